"""The rows of a data set: from a file, a folder or the hub, by split, with the columns that are wanted.

Nothing here communicates: every rank opens the same rows.
"""

import glob
import gzip
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
from pyarrow.parquet import read_table

from scale_prune.config import AS_LINES, DataConfig
from scale_prune.data import holdout, text_files

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
STRINGS = ("string", "large_string")
NUMBERS = (*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64", "bool")
READABLE = (*STRINGS, *NUMBERS, "list of string", "list of large_string")
"""What can stand in an example."""

REASON = 500
"""Characters of what a reader says that are told on; the hub lists what it has in the second line."""

logger = logging.getLogger(__name__)


@cache
def say(message: str) -> None:
    """Warn once of what is known each time that the rows are opened."""
    logger.warning(message)


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Rows of text.

    Attributes:
        name: where they come from, for messages.
        rows: a `datasets.Dataset`.
        columns: the columns of `rows` that are wanted.
        lines: the rows are lines that keep their newline, not documents; None where that is not known yet.
        label: the column of the label, if there is one.
        numbers: where only some rows are left, their numbers among all, counted from 1.
        part: what these rows are, in words.
    """

    name: str
    rows: datasets.Dataset
    columns: tuple[str, ...]
    lines: bool | None = None
    label: str | None = None
    numbers: np.ndarray | None = None
    part: str = ""

    def number(self, row: int) -> int:
        """Return what people call a row: its number among all, counted from 1."""
        return row + 1 if self.numbers is None else int(self.numbers[row])

    def select(self, kept: np.ndarray, part: str) -> "Text":
        """Return some of the rows."""
        numbers = np.arange(1, len(self.rows) + 1) if self.numbers is None else self.numbers
        return replace(self, rows=self.rows.select(kept), numbers=numbers[kept], part=part)


def load_text(spec: DataConfig, split: Split, columns: tuple[str, ...] = (), label: str | None = None) -> Text:
    """Open the rows of one split.

    `spec.train_file` and `spec.validation_file` take the place of the splits of `spec.dataset`. Where nothing gives a
    validation split, 5 % of the training rows are held out for it, and taken from the training split: always the same
    ones, see `scale_prune.data.holdout`.

    Args:
        spec: which text.
        split: the part that is wanted.
        columns: the columns of an example, which hold texts, numbers or lists of texts; none for running text, which is
            in the one column `spec.text_column`.
        label: one more column, which holds texts or numbers.

    Raises:
        ValueError: nothing gives this split; a data set that is missing, unreadable or empty, that lacks a column or
            has one that holds something else; one row, where some are to be held out.
    """
    splits = _open_dataset(spec, columns, label) if spec.dataset else {}
    for name, file in (("train", spec.train_file), ("validation", spec.validation_file)):
        if file:
            splits[name] = _open_file(Path(file), columns or spec.text_column, label)
    rows, kinds = ("documents", READABLE) if columns else (spec.rows, STRINGS)
    if "train" in splits and "validation" not in splits:
        splits = _hold_out(_as_told(_checked(splits["train"], label, kinds), rows))
    if split not in splits:
        found = f"{spec.dataset} has only {', '.join(splits)}" if splits else "no data set is given"
        raise ValueError(f"no {split} text: {found}; give --dataset or --{split}_file")
    text = _as_told(_checked(splits[split], label, kinds), rows)
    if len(text.rows) == 0:
        raise ValueError(f"data set {text.name} is empty")
    return text


def _open_dataset(spec: DataConfig, columns: tuple[str, ...], label: str | None) -> dict[str, Text]:
    """Open what `spec.dataset` names, by split: a local file or folder, else a data set of the hub."""
    name, path = str(spec.dataset), Path(str(spec.dataset))
    if path.is_dir():
        with _one_message(name):
            found = datasets.load_from_disk(path)
    elif path.exists() or name.startswith(("/", ".", "~")) or _suffix(path) in READERS:
        return {"train": _open_file(path, columns or spec.text_column, label)}
    else:
        with _one_message(name):
            found = datasets.load_dataset(name, spec.dataset_config)
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    wanted = columns or (spec.text_column,)
    if ignored := [key for key in splits if key not in SPLITS]:
        say(f"of the splits of {name}, {', '.join(ignored)} are not used; only {' and '.join(SPLITS)} are")
    return {
        key: Text(name=f"{name} ({key})", rows=rows, columns=wanted, part=f"{name} ({key})")
        for key, rows in splits.items()
    }


def _open_file(path: Path, columns: tuple[str, ...] | str, label: str | None) -> Text:
    if not path.is_file():
        raise ValueError(f"data set {path} is missing: there is no such file")
    if _suffix(path) not in READERS:
        known = ", ".join(READERS)
        raise ValueError(f"data set {path} is of no known format; a file ends in one of {known}, each also with .gz")
    reader = READERS[_suffix(path)]
    # The reader of lines names its only column itself.
    wanted = columns if isinstance(columns, tuple) else ("text" if reader == "text" else columns,)
    with _one_message(str(path)):
        rows = _read(path, reader, wanted, None if label in wanted else label)
    return Text(name=str(path), rows=rows, columns=wanted, lines=reader == "text" or None, part=str(path))


def _read(path: Path, reader: str, columns: tuple[str, ...], label: str | None) -> datasets.Dataset:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        if not file.read(1):
            raise ValueError("it is empty")
        file.seek(0)
        if reader == "parquet" and path.suffix == ".gz":
            # The one pair that load_dataset does not unpack.
            return datasets.Dataset(datasets.table.InMemoryTable(read_table(file)))
        # By content: load_dataset would take a file of the same path, size and date for the one that it has read.
        cache = text_files.cache_folder() / f"{text_files.code_version()[:16]} {_digest(path, path.stat().st_ctime_ns)}"
        if reader in ("csv", "text"):
            return text_files.read(file, cache / f"{reader}.arrow", is_csv=reader == "csv", label=label)
    load = partial(
        datasets.load_dataset, reader, data_files=glob.escape(str(path)), split="train", cache_dir=str(cache)
    )
    rows = load()
    return _dates_as_texts(rows, {*columns, label}, load) if reader == "json" else rows


@cache
def _digest(path: Path, changed: int) -> str:
    """Return a hash of a file, read once by a process while the file has not changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dates_as_texts(
    rows: datasets.Dataset, wanted: Collection[str | None], load: Callable[..., datasets.Dataset]
) -> datasets.Dataset:
    """Return the rows of a JSON file with texts that look like dates, and are taken for such, as they stand there."""
    dates = [name for name, feature in rows.features.items() if name in wanted and "timestamp" in _kind(feature)]
    if dates:
        written = load(features=datasets.Features(rows.features | dict.fromkeys(dates, datasets.Json())))
        for name in dates:
            rows = rows.remove_columns([name]).add_column(name, written[name][:])
    return rows


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def _one_message(name: str) -> Iterator[None]:
    """Turn what a reader raises into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # the readers hand on the errors of pandas, pyarrow, json, gzip and the network
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:REASON] or type(cause).__name__
        raise ValueError(f"data set {name} cannot be read: {reason}") from error


def _hold_out(text: Text) -> dict[str, Text]:
    """Cut the training rows in two."""
    count = len(text.rows)
    if text.label and count:
        rows, how = holdout.stratified(text.rows[text.label][:])
    else:
        rows, how = holdout.neighbors(count, lines=bool(text.lines))
    if not 0 < len(rows) < count:
        raise ValueError(f"data set {text.name} has {count} rows, too few to hold out any for validation")
    part = f"{len(rows):,} of {count:,} rows of {text.part}, {how}"
    say(f"no validation text is given: it is {part}, the same ones in every run")
    others = np.setdiff1d(np.arange(count), rows, assume_unique=True)
    return {"train": text.select(others, "the other rows"), "validation": text.select(rows, f"held out: {part}")}


def _checked(text: Text, label: str | None, kinds: tuple[str, ...]) -> Text:
    """Return `text` with its label if the columns hold what they should, without rows that say they have no label."""
    there = text.rows.features
    wanted = {**dict.fromkeys(text.columns, kinds), **({label: (*STRINGS, *NUMBERS)} if label else {})}
    for column, allowed in wanted.items():
        if column not in there:
            raise ValueError(f"data set {text.name} has no column {column!r}, its columns are {', '.join(there)}")
        if (kind := _kind(there[column])) not in allowed:
            what = "a label (string or number)" if column == label else "text (string)"
            raise ValueError(f"column {column!r} of data set {text.name} holds {kind}, not {what}")
    if label and isinstance(there[label], datasets.ClassLabel):
        labeled = np.flatnonzero([value != -1 for value in text.rows[label][:]])
        if without := len(text.rows) - len(labeled):
            say(f"{without:,} of {len(text.rows):,} rows of {text.name} have no label (-1) and are left out")
            text = text.select(labeled, text.part)
    return replace(text, label=label)


def _as_told(text: Text, rows: str) -> Text:
    """Return `text` with what its rows are: "documents" or "lines" if told so, a txt file's always lines."""
    if text.lines is not None:
        return text
    if rows == "auto" and _are_lines(text):
        say(f"the rows of {text.name} are taken for lines of one text; give --rows documents where they are not")
        rows = "lines"
    # A report says so: the perplexity of documents does not compare.
    return replace(text, lines=rows == "lines", part=text.part + f", {AS_LINES}" * (rows == "lines"))


def have_newlines(text: Text) -> bool:
    """Whether any row of running text ends with a newline."""
    tables = text.rows.with_format("arrow").iter(batch_size=10_000)
    return any(pc.any(pc.ends_with(table[text.columns[0]], "\n")).as_py() for table in tables)


def _are_lines(text: Text) -> bool:
    """Whether the rows are a text cut behind its newlines: some are empty, all others end with their only newline."""
    any_empty = False
    for table in text.rows.with_format("arrow").iter(batch_size=10_000):
        rows = table[text.columns[0]]
        # Of an empty row both are -1, the place of a newline that is not there and the last one.
        if not pc.all(pc.equal(pc.find_substring(rows, "\n"), pc.subtract(pc.binary_length(rows), 1))).as_py():
            return False
        any_empty = any_empty or pc.any(pc.equal(rows, "")).as_py()
    return any_empty


def _kind(feature: Any) -> str:
    """Return what a column holds, of a list what its elements are."""
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Value):
        return f"list of {feature.feature.dtype}"
    return str(getattr(feature, "dtype", type(feature).__name__))

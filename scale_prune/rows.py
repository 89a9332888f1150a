"""The rows of a data set: from a file, a folder or the hub, by split, with the columns that are wanted.

Nothing here communicates: every rank opens the same rows.
"""

import csv
import glob
import gzip
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from pyarrow.parquet import read_table

from scale_prune import __version__
from scale_prune.config import DataConfig

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = 0.05
STRINGS = ("string", "large_string")
NUMBERS = (*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64", "bool")
READABLE = (*STRINGS, *NUMBERS, "list of string", "list of large_string")
"""What can stand in an example."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Rows of text.

    Attributes:
        name: where they come from, for messages.
        rows: a `datasets.Dataset`.
        columns: the columns of `rows` that are wanted.
        lines: the rows are lines that keep their newline, not documents.
        label: the column of the label, if there is one.
    """

    name: str
    rows: datasets.Dataset
    columns: tuple[str, ...]
    lines: bool = False
    label: str | None = None


def load_text(spec: DataConfig, split: Split, columns: tuple[str, ...] = (), label: str | None = None) -> Text:
    """Open the rows of one split.

    `spec.train_file` and `spec.validation_file` take the place of the splits of `spec.dataset`. Where nothing gives a
    validation split, the last 5 % of the training rows are held out for it, and taken from the training split.

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
    if "train" in splits and "validation" not in splits:
        splits = _hold_out(splits["train"])
    if split not in splits:
        found = f"{spec.dataset} has only {', '.join(splits)}" if splits else "no data set is given"
        raise ValueError(f"no {split} text: {found}; give --dataset or --{split}_file")
    return _checked(replace(splits[split], label=label), STRINGS if not columns else READABLE)


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of all rows, one after another.

    Attributes:
        tokens: int32, one-dimensional.
        lengths: int32 (rows,), how many are of each row.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def tokenised(text: Text, encode: Callable[..., dict[str, list[list[int]]]], names: Sequence[str]) -> dict[str, Tokens]:
    """Turn every row into tokens, cached on disk by the content of the rows and of `encode`.

    Args:
        text: the rows.
        encode: turns a batch of rows, lists by column, into lists of tokens by name.
        names: what it returns.
    """
    # Beside the other caches, not beside the rows: a data set on disk may be in a folder that cannot be written.
    fingerprint = Hasher.hash((__version__, text.rows._fingerprint, encode))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "scale_prune" / f"{fingerprint}.arrow"
    cache.parent.mkdir(parents=True, exist_ok=True)
    encoded = text.rows.map(
        encode,
        batched=True,
        remove_columns=text.rows.column_names,
        features=datasets.Features({name: datasets.List(datasets.Value("int32")) for name in names}),
        cache_file_name=str(cache),
        new_fingerprint=fingerprint,
        desc=f"Tokenising {text.name}",
    )
    table = encoded.with_format("arrow")[:]
    return {
        name: Tokens(
            np.concatenate([chunk.flatten().to_numpy() for chunk in table[name].chunks]),
            np.concatenate([chunk.value_lengths().to_numpy() for chunk in table[name].chunks]),
        )
        for name in names
    }


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
    return {key: Text(name=f"{name} ({key})", rows=rows, columns=wanted) for key, rows in splits.items()}


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
        rows = _read(path, reader, wanted, label)
    return Text(name=str(path), rows=rows, columns=wanted, lines=reader == "text")


def _read(path: Path, reader: str, columns: Sequence[str], label: str | None) -> datasets.Dataset:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        if not file.read(1):
            raise ValueError("it is empty")
        file.seek(0)
        if reader == "parquet" and path.suffix == ".gz":
            # The one pair that load_dataset does not unpack.
            return datasets.Dataset(datasets.table.InMemoryTable(read_table(file)))
        options: dict[str, Any] = {"keep_linebreaks": True} if reader == "text" else {}
        wanted = [*columns, *([label] if label else [])]
        if reader == "csv" and {*wanted} <= {*next(csv.reader(TextIOWrapper(file, encoding="utf-8", newline="")))}:
            # Otherwise the text "2020" becomes a number and the text "NA" nothing.
            options = {"usecols": wanted, "converters": dict.fromkeys(columns, str), "keep_default_na": False}
    return datasets.load_dataset(reader, data_files=glob.escape(str(path)), split="train", **options)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def _one_message(name: str) -> Iterator[None]:
    """Turn what a reader raises into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # the readers hand on the errors of pandas, pyarrow, json, gzip and the network
        cause = error.__cause__ or error
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        raise ValueError(f"data set {name} cannot be read: {reason}") from error


def _hold_out(text: Text) -> dict[str, Text]:
    """Cut the training rows in two."""
    held_out = max(1, round(len(text.rows) * HELD_OUT))
    first = len(text.rows) - held_out
    if first < 1:
        raise ValueError(f"data set {text.name} has {len(text.rows)} rows, too few to hold out any for validation")
    logger.warning(
        "no validation text is given: the last %d of %d rows of %s are it", held_out, len(text.rows), text.name
    )
    return {
        "train": replace(text, rows=text.rows.select(range(first))),
        "validation": replace(text, rows=text.rows.select(range(first, first + held_out))),
    }


def _checked(text: Text, kinds: tuple[str, ...]) -> Text:
    """Return `text` if it has rows, and its columns hold what they should."""
    there = text.rows.features
    wanted = {**dict.fromkeys(text.columns, kinds), **({text.label: (*STRINGS, *NUMBERS)} if text.label else {})}
    for column, allowed in wanted.items():
        if column not in there:
            raise ValueError(f"data set {text.name} has no column {column!r}, its columns are {', '.join(there)}")
        if (kind := _kind(there[column])) not in allowed:
            what = "a label (string or number)" if column == text.label else "text (string)"
            raise ValueError(f"column {column!r} of data set {text.name} holds {kind}, not {what}")
    if len(text.rows) == 0:
        raise ValueError(f"data set {text.name} is empty")
    return text


def _kind(feature: Any) -> str:
    """Return what a column holds, of a list what its elements are."""
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Value):
        return f"list of {feature.feature.dtype}"
    return str(getattr(feature, "dtype", type(feature).__name__))

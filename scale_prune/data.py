"""Text in, blocks of tokens out: one stream of tokens, cut into consecutive blocks.

The stream is defined so that anyone can recompute it: rows are tokenised one by one, without special tokens, and
joined. The rows of a txt file are its lines, which keep their newline, with nothing between them. The rows of every
other format are documents, with the end-of-text token between them. Nothing here communicates: every rank prepares the
same stream, from one cache on disk.
"""

import csv
import glob
import gzip
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from pyarrow.parquet import read_table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scale_prune import __version__
from scale_prune.batches import TokenBlocks
from scale_prune.config import DataConfig

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Rows of text.

    Attributes:
        name: where they come from, for messages.
        rows: a `datasets.Dataset`.
        column: the column of `rows` that holds the text.
        lines: the rows are lines that keep their newline, not documents.
    """

    name: str
    rows: datasets.Dataset
    column: str
    lines: bool = False


def prepare(spec: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
    """Read, tokenise and cut one split.

    Every rank gets the same blocks without communication. The tokens are cached on disk by the content of text and
    tokenizer; let one rank of a machine go first, so that the others find them there.

    Args:
        spec: which text, and how it is cut.
        split: "train" drops the last block where it is shorter; "validation" keeps it if it has 2 tokens or more (one
            token alone predicts nothing) and ends after `spec.eval_tokens` tokens where that is not 0.
        tokenizer: turns text into tokens.

    Raises:
        ValueError: as `load_text` and `token_stream`, or too few tokens: fewer than one block for training, fewer than
            2 for validation.
    """
    text = load_text(spec, split)
    tokens = token_stream(text, tokenizer)
    if split == "train":
        needed, kept = spec.block_size, len(tokens) - len(tokens) % spec.block_size
    else:
        limit = min(len(tokens), spec.eval_tokens or len(tokens))
        needed, kept = 2, limit - (limit % spec.block_size == 1)
    if kept < needed:
        raise ValueError(_too_short(spec, split, text, len(tokens), needed))
    return TokenBlocks(tokens[:kept], spec.block_size)


def check_length(spec: DataConfig, split: Split, text: Text, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text that `prepare` would find too short; no more rows are tokenised than that takes, none are kept.

    Raises:
        ValueError: too few tokens, as in `prepare`.
    """
    needed, between = spec.block_size if split == "train" else 2, 0 if text.lines else 1
    found = -between
    for row in text.rows[text.column]:
        found += len(tokenizer(row or "", add_special_tokens=False, verbose=False)["input_ids"]) + between
        if found >= needed:
            return
    raise ValueError(_too_short(spec, split, text, found, needed))


def _too_short(spec: DataConfig, split: Split, text: Text, found: int, needed: int) -> str:
    return (
        f"{split} text {text.name} has {found:,} tokens, at least {needed:,} are needed "
        f"(block_size {spec.block_size}, eval_tokens {spec.eval_tokens})"
    )


def load_text(spec: DataConfig, split: Split) -> Text:
    """Open the rows of one split.

    `spec.train_file` and `spec.validation_file` take the place of the splits of `spec.dataset`. Where nothing gives a
    validation split, the last 5 % of the training rows are held out for it, and taken from the training split.

    Args:
        spec: which text.
        split: the part that is wanted.

    Raises:
        ValueError: nothing gives this split; a data set that is missing, unreadable or empty, that has no text column
            or one that holds other things than text; one row, where some are to be held out.
    """
    splits = _open_dataset(spec) if spec.dataset else {}
    for name, file in (("train", spec.train_file), ("validation", spec.validation_file)):
        if file:
            splits[name] = _open_file(Path(file).expanduser(), spec.text_column)
    if "train" in splits and "validation" not in splits:
        splits = _hold_out(splits["train"])
    if split not in splits:
        found = f"{spec.dataset} has only {', '.join(splits)}" if splits else "no data set is given"
        raise ValueError(f"no {split} text: {found}; give --dataset or --{split}_file")
    return _checked(splits[split])


def token_stream(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokenise the rows one by one and join them.

    Returns:
        the stream, int32, one-dimensional: no special tokens, but the end-of-text token between two documents.

    Raises:
        ValueError: the rows are documents and the tokenizer has no end-of-text token.
    """
    end = [] if text.lines else [tokenizer.eos_token_id]
    if None in end:
        raise ValueError(f"the tokenizer has no eos_token, which stands between the documents of {text.name}")
    encode = partial(_encode, tokenizer=tokenizer, column=text.column, end=end)
    # Beside the other caches, not beside the rows: a data set on disk may be in a folder that cannot be written.
    fingerprint = Hasher.hash((__version__, text.rows._fingerprint, encode))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "scale_prune" / f"{fingerprint}.arrow"
    cache.parent.mkdir(parents=True, exist_ok=True)
    encoded = text.rows.map(
        encode,
        batched=True,
        remove_columns=text.rows.column_names,
        features=datasets.Features({"tokens": datasets.List(datasets.Value("int32"))}),
        cache_file_name=str(cache),
        new_fingerprint=fingerprint,
        desc=f"Tokenising {text.name}",
    )
    chunks = encoded.with_format("arrow")[:]["tokens"].chunks
    stream = torch.from_numpy(np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]))
    return stream[: len(stream) - len(end)]


def _encode(
    batch: dict[str, list[str | None]], *, tokenizer: PreTrainedTokenizerBase, column: str, end: list[int]
) -> dict[str, list[list[int]]]:
    # A missing text is an empty one: a csv file cannot tell them apart.
    texts = [text or "" for text in batch[column]]
    tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"tokens": [ids + end for ids in tokens]}


def _open_dataset(spec: DataConfig) -> dict[str, Text]:
    """Open what `spec.dataset` names, by split: a local file or folder, else a data set of the hub."""
    name, path = str(spec.dataset), Path(str(spec.dataset)).expanduser()
    if path.is_dir():
        with _one_message(name):
            found = datasets.load_from_disk(path)
    elif path.exists() or name.startswith(("/", ".", "~")) or _suffix(path) in READERS:
        return {"train": _open_file(path, spec.text_column)}
    else:
        with _one_message(name):
            found = datasets.load_dataset(name, spec.dataset_config)
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return {key: Text(name=f"{name} ({key})", rows=rows, column=spec.text_column) for key, rows in splits.items()}


def _open_file(path: Path, column: str) -> Text:
    if not path.is_file():
        raise ValueError(f"data set {path} is missing: there is no such file")
    if _suffix(path) not in READERS:
        known = ", ".join(READERS)
        raise ValueError(f"data set {path} is of no known format; a file ends in one of {known}, each also with .gz")
    reader = READERS[_suffix(path)]
    with _one_message(str(path)):
        rows = _read(path, reader, column)
    # The reader of lines names its only column itself.
    return Text(name=str(path), rows=rows, column="text" if reader == "text" else column, lines=reader == "text")


def _read(path: Path, reader: str, column: str) -> datasets.Dataset:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        if not file.read(1):
            raise ValueError("it is empty")
        file.seek(0)
        if reader == "parquet" and path.suffix == ".gz":
            # The one pair that load_dataset does not unpack.
            return datasets.Dataset(datasets.table.InMemoryTable(read_table(file)))
        options: dict[str, Any] = {"keep_linebreaks": True} if reader == "text" else {}
        if reader == "csv" and column in next(csv.reader(TextIOWrapper(file, encoding="utf-8", newline=""))):
            # Otherwise the text "2020" becomes a number and the text "NA" nothing.
            options = {"usecols": [column], "converters": {column: str}, "keep_default_na": False}
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


def _checked(text: Text) -> Text:
    """Return `text` if it has rows with strings in them."""
    columns = text.rows.features
    if text.column not in columns:
        raise ValueError(f"data set {text.name} has no column {text.column!r}, its columns are {', '.join(columns)}")
    kind = getattr(columns[text.column], "dtype", type(columns[text.column]).__name__)
    if kind not in ("string", "large_string"):
        raise ValueError(f"column {text.column!r} of data set {text.name} holds {kind}, not text (string)")
    if len(text.rows) == 0:
        raise ValueError(f"data set {text.name} is empty")
    return text

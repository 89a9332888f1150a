"""The tokens of rows, cached on disk, where all ranks of a host share them.

Nothing here communicates: the first that wants them makes them, and the others find them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from scale_prune import __version__
from scale_prune.data import text_files
from scale_prune.data.rows import Text


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of all rows, one after another.

    Attributes:
        tokens: int32, one-dimensional.
        lengths: int32 (rows,), how many are of each row.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def tokenized(text: Text, encode: Callable[..., dict[str, list[list[int]]]], names: Sequence[str]) -> dict[str, Tokens]:
    """Turn every row into tokens, cached on disk by the content of the columns that are wanted and of `encode`.

    Args:
        text: the rows.
        encode: turns a batch of rows, lists by column, into lists of tokens by name.
        names: what it returns.
    """
    rows = text.rows.select_columns(list(text.columns))
    fingerprint = Hasher.hash((__version__, _content(rows), encode))
    encoded = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features({name: datasets.List(datasets.Value("int32")) for name in names}),
        cache_file_name=str(text_files.cache_folder() / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc=f"Tokenizing {text.name}",
    )
    table = encoded.with_format("arrow")[:]
    return {
        name: Tokens(
            _joined([chunk.flatten().to_numpy() for chunk in table[name].chunks], f"{fingerprint}-{name}.npy"),
            np.concatenate([chunk.value_lengths().to_numpy() for chunk in table[name].chunks]),
        )
        for name in names
    }


def _joined(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Return int32 arrays as one that is mapped from a file of the cache: all ranks of a host share its memory."""
    file = text_files.cache_folder() / name
    if not file.exists():
        told = {"descr": dtype_to_descr(np.dtype(np.int32)), "fortran_order": False, "shape": (sum(map(len, parts)),)}
        # Not mapped here: on a full disk that ends a process without a word.
        with text_files.whole_or_absent(file) as unfinished, unfinished.open("wb") as opened:
            write_array_header_1_0(opened, told)
            for part in parts:
                opened.write(part.data)  # tofile would not say that the disk is full
    return np.load(file, mmap_mode="c")  # nobody writes, but torch warns of arrays that cannot be written


def _content(rows: datasets.Dataset) -> str:
    """Return a hash of what stands in the rows; their own fingerprint is one of path, size and date."""
    found = hashlib.sha256(repr(rows.features).encode())
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        for batch in table.combine_chunks().to_batches():
            found.update(batch.serialize())
    return found.hexdigest()

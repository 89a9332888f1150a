"""The tokens of rows, cached on disk, where all ranks of a host share them.

Nothing here communicates: the first that wants them makes them, and the others find them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from torch import Tensor

from scale_prune.data import text_files
from scale_prune.data.rows import Text

BATCH_BYTES = 2**24
"""Of text that is tokenized at a time: a token takes about 139 bytes until there are arrays."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of all rows, one after another.

    Attributes:
        tokens: int32, one-dimensional.
        lengths: int32 (rows,), how many are of each row.
    """

    tokens: np.ndarray
    lengths: np.ndarray


class Pieces:
    """The tokens of some rows, of which one is cut out when it is asked for: a tensor a row would take more memory.

    Args:
        parts: the tokens of all rows.
        rows: numbers of those that are wanted, ascending.

    Attributes:
        lengths: int64 (rows,), how many tokens are of each.
    """

    def __init__(self, parts: Tokens, rows: np.ndarray) -> None:
        self._tokens, self._all = torch.from_numpy(parts.tokens), len(rows) == len(parts.lengths)
        self.lengths = parts.lengths[rows].astype(np.int64)
        self._starts = np.cumsum(parts.lengths, dtype=np.int64)[rows] - self.lengths

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __getitem__(self, place: int) -> Tensor:
        """Return the tokens of one row, int32."""
        return self._tokens[self._starts[place] :][: self.lengths[place]]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tokens of each row."""
        return map(self.__getitem__, range(len(self)))

    def joined(self) -> Tensor:
        """Return the tokens of all these rows, one after another; not to be changed."""
        return self._tokens if self._all else torch.cat([*self])

    def add_to(self, found: Any) -> None:
        """Add all tokens, and where they are cut, to a hash."""
        found.update(self.lengths.data)
        found.update(self.joined().numpy().data)


def tokenized(text: Text, encode: Callable[..., dict[str, list[list[int]]]], names: Sequence[str]) -> dict[str, Tokens]:
    """Turn every row into tokens, cached on disk by the content of the columns that are wanted and of `encode`.

    Args:
        text: the rows.
        encode: turns a batch of rows, lists by column, into lists of tokens by name.
        names: what it returns.
    """
    rows = text.rows.select_columns(list(text.columns))
    fingerprint = Hasher.hash((text_files.code_version(), _content(rows), encode))
    encoded = rows.map(
        encode,
        batched=True,
        batch_size=max(1, min(1000, BATCH_BYTES * len(rows) // max(1, rows.data.nbytes))),
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

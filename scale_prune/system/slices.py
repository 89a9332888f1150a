"""Tensors that many ranks store in slices, and any other number of ranks reads back in slices of its own.

A file is safetensors: 1-D slices by the name of the tensor they are cut from, with the offsets of their first elements
in the header, and the step they are of where it is given. Nothing is unpickled, and a reader takes from disk only the
elements it asks for.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scale_prune.core import FlatSlice

STARTS, STEP = "starts", "step"


def write_slices(path: Path, slices: dict[str, FlatSlice], step: int | None = None) -> None:
    """Write the slices of one rank.

    Raises:
        OSError: the file cannot be written, e.g. because the disk is full.
    """
    starts = {name: each.start for name, each in slices.items()}
    tensors = {name: each.values.contiguous() for name, each in slices.items()}
    of_step = {} if step is None else {STEP: str(step)}
    try:
        save_file(tensors, path, metadata={STARTS: json.dumps(starts)} | of_step)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def portions(slices: Iterable[tuple[str, FlatSlice]], max_bytes: int) -> Iterator[dict[str, FlatSlice]]:
    """Yield the slices in portions of at most `max_bytes`, at least one slice each; empty slices are left out."""
    portion: dict[str, FlatSlice] = {}
    size = 0
    for name, each in slices:
        if portion and size + each.values.nbytes > max_bytes:
            yield portion
            portion, size = {}, 0
        if len(each.values):
            portion[name] = each
            size += each.values.nbytes
    yield portion


class SliceReader:
    """Reads slices out of the files of all ranks.

    Args:
        paths: the files.

    Attributes:
        steps: those that the files are of, of files that say it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._open = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        self.steps: set[int] = set()
        for path in paths:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            said = file.metadata()
            if STEP in said:
                self.steps.add(int(said[STEP]))
            for name, start in json.loads(said[STARTS]).items():
                (count,) = file.get_slice(name).get_shape()
                self._pieces.setdefault(name, []).append((start, count, file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._pieces)

    def whole(self, name: str) -> Tensor:
        """Return all elements that are stored of a tensor."""
        return self.read(name, 0, max(start + count for start, count, _ in self._pieces[name]))

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return elements [start, start + count) of a tensor, (count,), on the CPU.

        Raises:
            ValueError: some of them are in no file.
        """
        found, covered = [], start
        for first, length, file in sorted(self._pieces.get(name, ()), key=lambda piece: piece[0]):
            low, high = max(covered, first), min(start + count, first + length)
            if low == covered and low < high:
                found.append(file.get_slice(name)[low - first : high - first])
                covered = high
        if covered != start + count:
            raise ValueError(f"elements {covered} to {start + count} of {name} are in none of the files")
        return torch.cat(found) if found else torch.empty(0)

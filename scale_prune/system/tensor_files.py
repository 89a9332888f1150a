"""Weights in files of bounded size."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scale_prune.system.folders import sync

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Portions:
    """What stands in the files of a folder that have no names yet.

    Attributes:
        names: the tensors' names in each file.
        num_bytes: of all tensors.
        dtype: of the first floating point tensor.
    """

    names: list[list[str]] = field(default_factory=list)
    num_bytes: int = 0
    dtype: torch.dtype | None = None


def write_portions(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int, writes: Callable[[int], bool]
) -> Portions:
    """Write weights as files of bounded size, some of them here and the others by whom else gets the same tensors.

    Args:
        folder: an existing folder.
        tensors: names and contiguous CPU tensors that share no memory; taken one at a time.
        max_bytes: largest size of a file and of what is held, in bytes; a larger tensor has a file to itself.
        writes: tells whether the file of a number is written here.

    Returns:
        What stands in all the files, also in those that others write.
    """
    portions, held, size = Portions(), dict[str, Tensor](), 0
    for name, tensor in tensors:
        if not portions.names or size + tensor.nbytes > max_bytes:
            _write_portion(folder, len(portions.names) - 1, held)
            portions.names.append([])
            size = 0
        portions.names[-1].append(name)
        size += tensor.nbytes
        portions.num_bytes += tensor.nbytes
        if portions.dtype is None and tensor.is_floating_point():
            portions.dtype = tensor.dtype
        if writes(len(portions.names) - 1):
            held[name] = tensor
    _write_portion(folder, len(portions.names) - 1, held)
    return portions


def _write_portion(folder: Path, number: int, held: dict[str, Tensor]) -> None:
    """Write what is held, flushed to the disk since another node may give it its name, and hold it no more."""
    if held:
        path = folder / f"portion-{number}"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        sync(path)
        held.clear()


def name_portions(folder: Path, portions: Portions) -> None:
    """Give files the names by which transformers reads them, with an index if they are several."""
    weight_map = {}
    for index, names in enumerate(portions.names):
        several = len(portions.names) > 1
        file = f"model-{index + 1:05d}-of-{len(portions.names):05d}.safetensors" if several else SINGLE
        (folder / f"portion-{index}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(portions.names) > 1:
        contents = {"metadata": {"total_size": portions.num_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(contents, indent=2), encoding="utf-8")


class TensorFiles:
    """The weights in a folder's safetensors files, read one at a time.

    Args:
        folder: the folder.

    Attributes:
        names: the tensors' names, in the files' order.

    Raises:
        ValueError: it has none, or one is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
            files = sorted(set(places.values())) if places else [SINGLE]
            self._files = {file: safe_open(folder / file, framework="pt") for file in files}
        except (OSError, ValueError, KeyError, SafetensorError) as problem:
            raise ValueError(f"{folder} has no complete weights in safetensors files: {problem}") from problem
        self._places = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118
        self.names = list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""
        return tuple(self._places[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

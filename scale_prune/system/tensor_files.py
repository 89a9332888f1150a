"""Weights in files of bounded size."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in portions; a portion is emptied before the next is filled."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > max_bytes:
            yield shard
            shard.clear()
        shard[name] = tensor
    yield shard


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> torch.dtype:
    """Write weights as safetensors files under the names that transformers reads, with an index if they are several.

    Args:
        folder: an existing folder.
        tensors: names and contiguous CPU tensors that share no memory; taken one at a time.
        max_bytes: largest size of a file, in bytes; a larger tensor has a file to itself.

    Returns:
        The dtype of the first floating point tensor.
    """
    shards: list[list[str]] = []
    dtype, total_size = None, 0
    for shard in _shards(tensors, max_bytes):
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        dtype = dtype or next((held.dtype for held in shard.values() if held.is_floating_point()), None)
        total_size += sum(held.nbytes for held in shard.values())
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        path = (folder / f"shard-{index}").rename(folder / file)
        # safetensors makes files that only their owner can read.
        path.chmod(folder.stat().st_mode & 0o666)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        contents = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(contents, indent=2), encoding="utf-8")
    assert dtype is not None
    return dtype


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

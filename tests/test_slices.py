"""What some ranks store in slices, any number of ranks reads in slices of its own."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scale_prune.core.shards import FlatSlice, shard_bounds
from scale_prune.system.slices import SliceReader, portions, write_slices

TENSORS = {
    "weights": torch.randn(101, generator=torch.Generator().manual_seed(0)),
    "mask": torch.arange(13) % 3 == 0,
    "half": torch.arange(17).to(torch.bfloat16),
    "one": torch.tensor([7]),
}


def store(folder: Path, world_size: int) -> list[Path]:
    for rank in range(world_size):
        own = {name: slice_of(tensor, rank, world_size) for name, tensor in TENSORS.items()}
        for number, portion in enumerate(portions(own.items(), 64)):
            write_slices(folder / f"{rank}-{number}", portion)
    return sorted(folder.iterdir())


def slice_of(tensor: Tensor, rank: int, world_size: int) -> FlatSlice:
    start, count = shard_bounds(len(tensor), rank, world_size)
    return FlatSlice(start, tensor[start : start + count])


@pytest.mark.parametrize("before", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, before: int) -> None:
    with SliceReader(store(tmp_path, before)) as reader:
        assert reader.names() == TENSORS.keys()
        for (name, tensor), after in product(TENSORS.items(), (1, 2, 3, 7, 20)):
            for rank in range(after):
                start, count = shard_bounds(len(tensor), rank, after)
                found = reader.read(name, start, count)
                assert torch.equal(found, tensor[start : start + count]), (name, rank)
                assert not count or found.dtype == tensor.dtype


def test_slices_that_are_stored_twice_count_once(tmp_path: Path) -> None:
    for file in ("a", "b"):
        write_slices(tmp_path / file, {"squares": FlatSlice(0, torch.arange(5))})
    with SliceReader([tmp_path / "a", tmp_path / "b"]) as reader:
        assert reader.read("squares", 1, 3).tolist() == [1, 2, 3]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_slices(tmp_path / "a", {"weights": FlatSlice(0, torch.arange(5))})
    write_slices(tmp_path / "b", {"weights": FlatSlice(7, torch.arange(5))})
    with SliceReader([tmp_path / "a", tmp_path / "b"]) as reader:
        with pytest.raises(ValueError, match="elements 5 to 9 of weights are in none of the files"):
            reader.read("weights", 3, 6)
        with pytest.raises(ValueError, match="elements 0 to 1 of nothing are in none"):
            reader.read("nothing", 0, 1)


def test_portions_are_small_and_leave_nothing_out() -> None:
    slices = {str(size): FlatSlice(0, torch.zeros(size, dtype=torch.uint8)) for size in (3, 0, 4, 9, 1, 5)}
    found = [{name: len(each.values) for name, each in portion.items()} for portion in portions(slices.items(), 8)]
    assert found == [{"3": 3, "4": 4}, {"9": 9}, {"1": 1, "5": 5}]

"""Laws of slices: shares add up for every cut, and expanding is the adjoint of summing."""

from itertools import pairwise, product
from math import prod

import pytest
import torch
from torch import Tensor

from scale_prune.core.shards import expand_to_shard, shard_bounds, unit_sum

SHAPES = [(13,), (7, 5), (5, 11), (2, 7, 3), (1, 3), (3, 1)]
AXES = [(shape, dim) for shape in SHAPES for dim in range(len(shape))]


def integers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return whole numbers in float32, whose sums are exact in any order."""
    return torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(seed)).float()


def shards(tensor: Tensor, world_size: int) -> list[tuple[Tensor, int]]:
    """Cut as ZeRO-3 does: equal slices whose padding is whatever was in memory, then clip to the real elements."""
    size = -(-tensor.numel() // world_size)
    padded = torch.full((size * world_size,), torch.nan)
    padded[: tensor.numel()] = tensor.flatten()
    bounds = [shard_bounds(tensor.numel(), rank, world_size) for rank in range(world_size)]
    return [(whole[:count], start) for whole, (start, count) in zip(padded.split(size), bounds, strict=True)]


def sum_over_others(tensor: Tensor, dim: int) -> Tensor:
    return tensor.double().movedim(dim, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor.double()


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize(("shape", "dim"), AXES)
def test_shares_add_up_to_the_sum_of_each_unit(shape: tuple[int, ...], dim: int, world_size: int) -> None:
    tensor = integers(shape)
    shares = [unit_sum(values, start, shape, dim) for values, start in shards(tensor, world_size)]
    assert all(share.shape == (shape[dim],) and share.dtype == tensor.dtype for share in shares)
    assert torch.equal(sum(shares, torch.zeros(())), sum_over_others(tensor, dim).float())


@pytest.mark.parametrize(("shape", "dim"), AXES)
def test_any_cut_adds_up(shape: tuple[int, ...], dim: int) -> None:
    flat, numel = integers(shape).flatten(), prod(shape)
    whole = sum_over_others(flat.view(shape), dim)
    for first, second in product(range(numel + 1), repeat=2):
        edges = sorted((0, first, second, numel))
        shares = [unit_sum(flat[start:end], start, shape, dim) for start, end in pairwise(edges)]
        assert torch.equal(sum(shares, torch.zeros(())), whole.float())


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize(("shape", "dim"), AXES)
def test_expanding_gives_each_element_its_unit(shape: tuple[int, ...], dim: int, world_size: int) -> None:
    per_unit = torch.arange(shape[dim])
    outer = [1] * len(shape)
    outer[dim] = -1
    whole = per_unit.view(outer).expand(shape).flatten()
    for rank in range(world_size):
        start, count = shard_bounds(prod(shape), rank, world_size)
        expanded = expand_to_shard(per_unit, start, count, shape, dim)
        assert torch.equal(expanded, whole[start : start + count])


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize(("shape", "dim"), AXES)
def test_expanding_is_the_adjoint_of_summing(shape: tuple[int, ...], dim: int, world_size: int) -> None:
    per_unit = integers((shape[dim],), seed=1)
    for values, start in shards(integers(shape), world_size):
        expanded = expand_to_shard(per_unit, start, len(values), shape, dim)
        assert unit_sum(values, start, shape, dim) @ per_unit == values @ expanded


@pytest.mark.parametrize(("shape", "dim"), AXES)
def test_an_empty_shard_has_no_share_and_expands_to_nothing(shape: tuple[int, ...], dim: int) -> None:
    for start in (0, 1, prod(shape)):
        assert torch.equal(unit_sum(torch.zeros(0), start, shape, dim), torch.zeros(shape[dim]))
        assert expand_to_shard(torch.ones(shape[dim]), start, 0, shape, dim).shape == (0,)


def test_masks_keep_their_dtype() -> None:
    assert expand_to_shard(torch.tensor([True, False]), 1, 4, (2, 3), 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("numel", "world_size", "bounds"),
    [
        (7, 1, [(0, 7)]),
        (7, 3, [(0, 3), (3, 3), (6, 1)]),
        (4, 3, [(0, 2), (2, 2), (4, 0)]),  # ceil(4 / 3) = 2 leaves nothing for the last rank
        (2, 5, [(0, 1), (1, 1), (2, 0), (2, 0), (2, 0)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_bounds_of_shards(numel: int, world_size: int, bounds: list[tuple[int, int]]) -> None:
    assert [shard_bounds(numel, rank, world_size) for rank in range(world_size)] == bounds


@pytest.mark.parametrize(("shape", "dim"), [((3, 100_001), 0), ((100_001, 3), 1), ((100_001, 3), 0)])
def test_sums_of_many_numbers_are_exact_enough(shape: tuple[int, ...], dim: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 10.0
    found = unit_sum(tensor.flatten(), 0, shape, dim)
    torch.testing.assert_close(found.double(), sum_over_others(tensor, dim), rtol=3e-7, atol=0)

"""Arithmetic on flat slices of tensors, as ZeRO-3 cuts them.

A shard is the elements [start, start + S) of a tensor's row-major order, cut anywhere, also through a unit. So a
rank never sees whole units: it adds up its share of each unit's number, and the shares add up over ranks.

Shape legend: S elements of the shard, N units along `dim`, inner = product of the axes after `dim`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class FlatSlice:
    """Elements [start, start + S) of a tensor's row-major order.

    Attributes:
        start: flat offset of the first element.
        values: (S,).
    """

    start: int
    values: Tensor


ReadSlice = Callable[[str, int, int], Tensor]
"""(name, start, count) -> the (count,) elements of a stored tensor, on the CPU."""


def unit_sum(values: Tensor, start: int, shape: tuple[int, ...], dim: int) -> Tensor:
    """Add up the shard's elements by unit.

    Args:
        values: (S,) one value per element of the shard; S may be 0.
        start: flat offset of the first element, in [0, numel].
        shape: full shape of the tensor.
        dim: the axis that counts units.

    Returns:
        (N,) of the dtype of the values: the shard's share of each unit's sum; the shares of all shards add up to the
        whole sum. torch adds pairwise: in float32 to about 1e-7 of the sum of absolute values.
    """
    num_units, inner = shape[dim], prod(shape[dim + 1 :])
    rows = values if inner == 1 else _rows(values, start % inner, inner).sum(1)
    return _rows(rows, start // inner % num_units, num_units).sum(0)


def _rows(values: Tensor, first: int, length: int) -> Tensor:
    """Cut into rows of `length`, of which the first lacks its `first` leading elements; missing elements are 0."""
    missing = -(first + len(values)) % length
    padded = pad(values, (first, missing)) if first or missing else values  # a copy, which whole rows are spared
    return rearrange(padded, "(row inner) -> row inner", inner=length)


def expand_to_shard(per_unit: Tensor, start: int, count: int, shape: tuple[int, ...], dim: int) -> Tensor:
    """Give every element of a shard its unit's value: the adjoint of `unit_sum`.

    Args:
        per_unit: (N,) one value per unit, any dtype.
        start: flat offset of the shard's first element, in [0, numel].
        count: elements in the shard, S.
        shape: full shape of the tensor.
        dim: the axis that counts units.

    Returns:
        (S,) of the dtype of `per_unit`.
    """
    num_units, inner = shape[dim], prod(shape[dim + 1 :])
    first_row, skipped = divmod(start, inner)
    num_rows = -(-(skipped + count) // inner)
    rows = per_unit.roll(-(first_row % num_units)).repeat(-(-num_rows // num_units))[:num_rows]
    return repeat(rows, "row -> (row inner)", inner=inner)[skipped : skipped + count]


def shard_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return (start, count) of the slice that `rank` holds of a tensor of `numel` elements, without the padding.

    ZeRO-3 gives each rank ceil(numel / world_size) elements; the last slices may be shorter or empty.
    """
    size = -(-numel // world_size)
    start = min(rank * size, numel)
    return start, min(size, numel - start)

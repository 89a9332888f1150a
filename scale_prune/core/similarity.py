"""How alike units are: mean absolute cosine between activations, for a block of rows at a time.

Shape legend: T sampled tokens, N units of a group, R the rows (units) that this rank owns of it.

Source: arXiv 2302.03773, uniqueness: uncentered cosine of the activations after the non-linearity.
Deviation: the mean runs over live units other than i itself; padding tokens are left out by the caller.
"""

import torch
from torch import Tensor

from scale_prune.core.shards import FlatSlice, ReadSlice

ROWS_AT_ONCE = 1024  # bounds the (R, N) temporaries: 64 MiB in float32 at N = 16,384


class Similarity:
    """Running similarity of the units [first, last) of one group to all live units of the group.

    Args:
        num_units: N.
        first: first unit that is owned here.
        last: one past the last.
        kind: "batch" smooths the row sums and keeps R numbers; "running" smooths the sums of products and keeps R * N.
        weight: share of the newest sample, in (0, 1].
    """

    def __init__(self, num_units: int, first: int, last: int, *, kind: str, weight: float) -> None:
        self.first, self.last = first, last
        self.kind, self.weight = kind, weight
        self.num_units = num_units
        self.values: Tensor | None = None
        self._products = torch.empty(0)
        self._squares = torch.empty(0)

    def update(self, activations: Tensor, live: Tensor) -> Tensor:
        """Take in a sample.

        Args:
            activations: (T, N); rows of zeros count as nothing.
            live: (N,) bool, units that remain.

        Returns:
            (R,) mean over live units j != i of |cos(h_i, h_j)|, in [0, 1]; a removed unit keeps its last value.
        """
        h = activations.float()
        newest = self._running(h, live) if self.kind == "running" else self._batch(h, live)
        if self.values is None:
            self.values = newest
        self.values = torch.where(live[self.first : self.last], newest, self.values)
        return self.values

    def remembered(self) -> dict[str, FlatSlice]:
        """Return what the next update builds on, beside `values`: with "running" the sums of products, else nothing."""
        if self.kind == "batch" or self.values is None:
            return {}
        products = FlatSlice(self.first * self.num_units, self._products.flatten())
        return {"products": products, "squares": FlatSlice(0, self._squares)}

    def go_on_from(self, values: Tensor, read: ReadSlice) -> None:
        """Take over what another object remembered.

        Args:
            values: (R,) the last result for these rows.
            read: reads "products", N * N elements of which a row's are consecutive, and "squares".
        """
        self.values = values
        if self.kind == "running":
            count = (self.last - self.first) * self.num_units
            products = read("products", self.first * self.num_units, count).to(values.device)
            self._products = products.view(self.last - self.first, self.num_units)
            self._squares = read("squares", 0, self.num_units).to(values.device)

    def _batch(self, h: Tensor, live: Tensor) -> Tensor:
        if self.values is not None:
            return torch.lerp(self.values, similarity_of_live(h, live, self.first, self.last), self.weight)
        squares = h.square().sum(0)
        return torch.cat([mean_absolute_cosine(h[:, b].T @ h, squares, live, b.start) for b in self._blocks()])

    def _running(self, h: Tensor, live: Tensor) -> Tensor:
        weight = self.weight
        if self.values is None:
            weight = 1.0
            self._squares = h.new_zeros(self.num_units)
            self._products = h.new_zeros(self.last - self.first, self.num_units)
        self._squares.lerp_(h.square().sum(0), weight)
        rows = []
        for block in self._blocks():
            products = self._products[block.start - self.first : block.stop - self.first]
            products.lerp_(h[:, block].T @ h, weight)
            rows.append(mean_absolute_cosine(products, self._squares, live, block.start))
        return torch.cat(rows)

    def _blocks(self) -> list[slice]:
        edges = range(self.first, self.last, ROWS_AT_ONCE)
        return [slice(edge, min(edge + ROWS_AT_ONCE, self.last)) for edge in edges]


def similarity_of_live(h: Tensor, live: Tensor, first: int, last: int) -> Tensor:
    """Average |cosine| of the units [first, last) to the other live units; of removed ones it is left open.

    Removed units are left out of the products, and of two live units in [first, last) the product is taken once.

    Args:
        h: (T, N) activations.
        live: (N,) bool, units that remain.
        first: first unit that is owned here.
        last: one past the last.

    Returns:
        (R,) in [0, 1].
    """
    units = h[:, live]
    norms = units.norm(dim=0)
    units = units * torch.where(norms > 0, 1.0 / norms, 0.0)
    start, stop = int(live[:first].sum()), int(live[:last].sum())
    sums = units.new_zeros(units.shape[1])
    for edge in range(start, stop, ROWS_AT_ONCE):
        block = slice(edge, min(edge + ROWS_AT_ONCE, stop))
        rows = units[:, block].T
        cosines = (rows @ units[:, edge:stop]).abs()
        cosines.diagonal().zero_()
        sums[block] += cosines.sum(1)
        sums[block.stop : stop] += cosines[:, len(rows) :].sum(0)
        for elsewhere in (units[:, :start], units[:, stop:]):
            sums[block] += (rows @ elsewhere).abs().sum(1)
    found = h.new_zeros(last - first)
    found[live[first:last]] = sums[start:stop] / max(units.shape[1] - 1, 1)
    return found


def mean_absolute_cosine(products: Tensor, squares: Tensor, live: Tensor, first: int) -> Tensor:
    """Average |cosine| of some units to the other live units.

    Args:
        products: (R, N) inner products of units first, first + 1, ... with all units.
        squares: (N,) squared norms; a unit whose norm is 0 has cosine 0 to all.
        live: (N,) bool, the units that count.
        first: number of the unit in row 0.

    Returns:
        (R,) in [0, 1]; 0 where no other unit is live.
    """
    norms = squares.sqrt()
    inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
    own = slice(first, first + len(products))
    cosines = (products * inverse * inverse[own, None]).abs()
    cosines.diagonal(offset=first).zero_()
    others = live.sum() - live[own].long()
    return cosines @ live.to(cosines.dtype) / others.clamp(min=1)

"""What can be removed, and from which tensors: unit groups.

Pure data. A unit lives in several tensors at once: an MLP neuron is a row of the input projection, an element of its
bias, a column of the output projection; a low-rank component is a row of one factor and a column of the other. A
`UnitGroup` lists them, so that everything after it can treat the units of any architecture alike.

A unit may own several neighboring indices of an axis: an attention head has those of its size, and where queries share
keys and values the unit is a head of these with all its queries. Where one axis holds queries, keys and values one
after another, it counts the units three times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from torch import Tensor

Role = Literal["in", "bias", "out"]
Kind = Literal["neuron", "component", "head"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One stored tensor that loses an index when a unit is removed.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        shape: the full shape, also where only a shard is held.
        dim: the axis that counts units.
        role: "in" for a weight that makes the units' activations, "bias" for its bias, "out" for the weight that reads
            them.
        block: neighboring indices of the axis that a unit owns.
        pieces: how often the axis counts the units through, one after another.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    role: Role
    block: int = 1
    pieces: int = 1

    @property
    def num_units(self) -> int:
        """Units that the axis counts, N."""
        return self.shape[self.dim] // (self.pieces * self.block)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape in which an axis of its own, `unit_dim`, counts units; elements are in the same order."""
        by_unit = (self.pieces, self.num_units, self.block)
        return (*self.shape[: self.dim], *by_unit, *self.shape[self.dim + 1 :])

    @property
    def unit_dim(self) -> int:
        """The axis of `unit_shape` that counts units."""
        return self.dim + 1


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units that are stored alike and are ranked together under scope "per_group".

    The neurons of one MLP, the heads of one attention, or the components of one factorized matrix.

    Attributes:
        name: the dotted name of the module that holds them, unique in the model.
        layer: index of the transformer layer, from 0.
        num_units: units in the group, N.
        members: the tensors that lose the same unit together.
        output: the dotted name of the module whose input is the units' activations h; of components, the module that
            holds both factors.
        kind: what the units are.
        cost: what one unit counts in the budget: a neuron 1, a component its parameters, D_in + D_out; where heads can
            leave, a head and a neuron their parameters.
        matrix_cost: what the group counts in the dense model where that is not its units': the D_in * D_out parameters
            of a matrix of components, the neurons that there were before the first round of several.
    """

    name: str
    layer: int
    num_units: int
    members: tuple[Member, ...]
    output: str
    kind: Kind = "neuron"
    cost: int = 1
    matrix_cost: int | None = None

    @property
    def dense_cost(self) -> int:
        """What the group counts in the dense model."""
        return self.num_units * self.cost if self.matrix_cost is None else self.matrix_cost

    @property
    def block(self) -> int:
        """Features of h, what the output reads, that are one unit's."""
        return next((member.block for member in self.members if member.role == "out"), 1)

    @property
    def num_features(self) -> int:
        """Features of h."""
        return self.num_units * self.block

    def by_feature(self, units: Tensor) -> Tensor:
        """Give every feature of h its unit's value of an (N,) tensor."""
        return units.repeat_interleave(self.block) if self.block > 1 else units


def remaining_fraction(groups: Sequence[UnitGroup], widths: Sequence[int]) -> float:
    """Return what `widths` units of each group count, as a fraction of the dense model."""
    kept = sum(group.cost * width for group, width in zip(groups, widths, strict=True))
    return kept / sum(group.dense_cost for group in groups)


@dataclass(frozen=True, kw_only=True)
class UnitSpan:
    """Units [first, last) of one group, standing at `place` in a vector that holds units of several groups."""

    group: UnitGroup
    index: int
    first: int
    last: int
    place: slice


class UnitLayout:
    """All units of all groups in one line, cut evenly over the ranks.

    Unit u of group g has the number `starts[g] + u` in [0, M). Rank r owns the numbers from r * per_rank on, so that
    one reduce-scatter and one all-gather of a flat vector serve every group at once; the line is padded to
    `per_rank * world_size`.

    Args:
        groups: the model's groups.
        world_size: number of ranks, at least 1.
    """

    def __init__(self, groups: Sequence[UnitGroup], world_size: int) -> None:
        self.groups = tuple(groups)
        self.world_size = world_size
        ends = list(accumulate(group.num_units for group in groups))
        self.starts = [0, *ends[:-1]]
        self.num_units = ends[-1]
        self.per_rank = -(-self.num_units // world_size)
        self.padded = self.per_rank * world_size

    def slice_of(self, group: int) -> slice:
        """Return where group number `group` stands in the line of all units."""
        return slice(self.starts[group], self.starts[group] + self.groups[group].num_units)

    def owned(self, rank: int) -> slice:
        """Return the units that `rank` owns, without the padding."""
        first = min(rank * self.per_rank, self.num_units)
        return slice(first, min(first + self.per_rank, self.num_units))

    def owners(self, group: int) -> range:
        """Return the ranks that own units of group number `group`."""
        own = self.slice_of(group)
        return range(own.start // self.per_rank, (own.stop - 1) // self.per_rank + 1)

    def owned_spans(self, rank: int) -> list[UnitSpan]:
        """Return the units that `rank` owns, group by group; `place` counts from the first of them."""
        owned, spans = self.owned(rank), []
        for index, (group, start) in enumerate(zip(self.groups, self.starts, strict=True)):
            first = max(owned.start, start)
            last = min(owned.stop, start + group.num_units)
            if first < last:
                place = slice(first - owned.start, last - owned.start)
                spans.append(UnitSpan(group=group, index=index, first=first - start, last=last - start, place=place))
        return spans

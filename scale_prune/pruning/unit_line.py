"""One number a unit over the ranks: from every rank's shares to the unit's owner, and from the owners to all.

All units of all groups stand in one line of M, of which each rank owns a piece of U (`core.UnitLayout`). What is known
of a unit lives with its owner; what every rank must agree on is gathered.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scale_prune.core import Member, UnitGroup, UnitLayout
from scale_prune.pruning.backend import ShardBackend


class UnitLine:
    """The line of all units as one rank sees it.

    Args:
        backend: where the parameters live.
        groups: the model's groups of units.

    Attributes:
        layout: who owns which units.
        own: where the units that this rank owns stand in the line.
        spans: the same, group by group.
        num_owned: how many they are, U.
        costs: (M,) float32, what each unit counts, as a fraction of the dense model.
    """

    def __init__(self, backend: ShardBackend, groups: Sequence[UnitGroup]) -> None:
        self.backend, self.groups = backend, tuple(groups)
        self.layout = UnitLayout(self.groups, backend.world_size)
        self.own = self.layout.owned(backend.rank)
        self.spans = self.layout.owned_spans(backend.rank)
        self.num_owned = self.own.stop - self.own.start
        dense_cost = sum(group.dense_cost for group in self.groups)
        self.costs = self.per_unit(lambda group: group.cost / dense_cost)

    def per_unit(self, value: Callable[[UnitGroup], float]) -> Tensor:
        """Return the (M,) line in which every unit has its group's value."""
        values = [torch.full((group.num_units,), value(group)) for group in self.groups]
        return torch.cat(values).to(self.backend.device)

    def owned(self, line: Tensor) -> Tensor:
        """Return the (U,) owned units' part of an (M,) line, as a view."""
        return line[self.own]

    def by_group(self, line: Tensor) -> list[Tensor]:
        """Split an (M,) line into one (N,) tensor a group, views of it."""
        return list(line.split([group.num_units for group in self.groups]))

    def add_up(self, line: Tensor) -> Tensor:
        """Add up the ranks' (M,) float32 lines; return the (U,) totals of the owned units. A collective, 4 M bytes."""
        padded = pad(line, (0, self.layout.padded - self.layout.num_units))
        return self.backend.reduce_scatter(padded)[: self.num_owned]

    def totals(self, share: Callable[[Member], Tensor | None]) -> Tensor:
        """Add up what the members have for every unit. A collective, 4 M bytes.

        Args:
            share: gives the (N,) additive part of this rank's slice of a member; None where it has none.

        Returns:
            (U,) float32 totals of the owned units.
        """
        line = torch.zeros(self.layout.num_units, dtype=torch.float64, device=self.backend.device)
        for index, group in enumerate(self.groups):
            for member in group.members:
                part = share(member)
                if part is not None:
                    line[self.layout.slice_of(index)] += part
        return self.add_up(line.float())

    def gather(self, owned: Tensor) -> Tensor:
        """Join the owners' (U,) numbers to the (M,) line, on all ranks. A collective, 4 M bytes in float32."""
        padding = owned.new_zeros(self.layout.per_rank - len(owned))
        return self.backend.all_gather(torch.cat([owned, padding]))[: self.layout.num_units]

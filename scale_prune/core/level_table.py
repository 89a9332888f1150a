"""How much is lost where one group alone keeps fewer units, and the levels of all groups that lose least together.

Losses of groups are taken to add up. What is chosen is then a knapsack with one choice a group, solved exactly.

Source: Puzzle (arXiv 2411.19146), which scores blocks one by one and chooses by a mixed-integer program.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from scale_prune.core.groups import UnitGroup

TRIAL_TOKENS = 4096  # at least, if the calibration text has as many: what every trial reads
GENERATIONS, OFFSPRING = 20, 4  # of a search
TICKS = 20_000  # that the dense model's time is cut into, for the knapsack
LEVELS = 8  # of a group; of heads as many as there are, if they are fewer


def levels_of(num_units: int) -> list[int]:
    """Return the numbers of units that are tried, ascending; the last is all of them."""
    return sorted({-(-num_units * level // LEVELS) for level in range(1, LEVELS + 1)})


def num_trials(sizes: Sequence[int], *, search: bool) -> int:
    """Return how many trials it takes to measure groups of so many units, and to search from there on."""
    return sum(len(levels_of(size)) - 1 for size in sizes) + search * (1 + GENERATIONS * OFFSPRING)


@dataclass(frozen=True, kw_only=True)
class LevelTable:
    """What the levels of every group lose.

    Attributes:
        names: of the groups.
        costs: what a unit of each group counts in the budget.
        kept: units at each level of each group, ascending; the last is all of them.
        losses: what the model loses with this group alone at this level, and all others whole.
    """

    names: tuple[str, ...]
    costs: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Refuse losses that cannot be compared.

        Raises:
            ValueError: one is not finite.
        """
        for name, kept, losses in zip(self.names, self.kept, self.losses, strict=True):
            if unknown := [level for level, loss in zip(kept, losses, strict=False) if not math.isfinite(loss)]:
                raise ValueError(
                    f"with {unknown[0]} of the {kept[-1]} units of {name} predictions are not finite; give --repair "
                    "least_squares, --precision fp32 or bf16, or another --budget"
                )

    @classmethod
    def of(cls, groups: Sequence[UnitGroup], losses: Sequence[Sequence[float]]) -> Self:
        """Return the table of groups, of which each has the losses of its `levels_of`."""
        return cls(
            names=tuple(group.name for group in groups),
            costs=tuple(group.cost for group in groups),
            kept=tuple(tuple(levels_of(group.num_units)) for group in groups),
            losses=tuple(tuple(each) for each in losses),
        )

    def told(self) -> dict[str, Any]:
        """Return the table for a file, by the groups' names."""
        rows = zip(self.names, self.costs, self.kept, self.losses, strict=True)
        return {name: {"cost": cost, "kept": [*kept], "loss": [*loss]} for name, cost, kept, loss in rows}

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> Self:
        """Return the table that `told` has told.

        Raises:
            ValueError: it is no such table.
        """
        try:
            costs, kept, losses = (tuple(each[key] for each in told.values()) for key in ("cost", "kept", "loss"))
            table = cls(names=tuple(told), costs=costs, kept=tuple(map(tuple, kept)), losses=tuple(map(tuple, losses)))
        except (AttributeError, KeyError, TypeError) as problem:
            raise ValueError(f"it is no table of levels: {problem!r}") from problem
        if any(len(own) != len(each) or not own for own, each in zip(table.kept, table.losses, strict=True)):
            raise ValueError("it is no table of levels: a group has not as many losses as levels")
        whole = [*table.costs, *(level for own in table.kept for level in own)]
        if any(type(number) is not int or number < 1 for number in whole):
            raise ValueError("it is no table of levels: costs and levels are whole numbers from 1 on")
        return table

    @property
    def dense_cost(self) -> int:
        """What all groups count when they are whole."""
        return sum(cost * kept[-1] for cost, kept in zip(self.costs, self.kept, strict=True))

    def widths(self, remaining: float, present: Sequence[int] | None = None) -> list[int]:
        """Return the units of each group that lose least within a budget.

        Args:
            remaining: fraction of the dense cost that is kept at most, in (0, 1].
            present: units that each group has, where some have left already.
        """
        tops = [kept[-1] for kept in self.kept] if present is None else present
        curves = [_up_to(top, own, lost) for top, own, lost in zip(tops, self.kept, self.losses, strict=True)]
        costs = [[cost * level for level in own] for cost, (own, _) in zip(self.costs, curves, strict=True)]
        allowed = int(remaining * self.dense_cost + 1e-6)
        places = best_levels(costs, [lost for _, lost in curves], allowed)
        widths = [own[place] for (own, _), place in zip(curves, places, strict=True)]
        left = max(allowed - sum(cost * width for cost, width in zip(self.costs, widths, strict=True)), 0)
        steps = []  # to the next level: what it gains for its cost, of which group, and how many units it is
        for index, ((own, lost), place) in enumerate(zip(curves, places, strict=True)):
            if place + 1 < len(own):
                units = own[place + 1] - own[place]
                steps.append(((lost[place] - lost[place + 1]) / (self.costs[index] * units), index, units))
        for _, index, units in sorted(steps, key=lambda step: -step[0]):  # a part of it, where no more is left
            more = min(left // self.costs[index], units)
            widths[index] += more
            left -= more * self.costs[index]
        return widths

    def widths_in_time(self, seconds: Sequence[Sequence[float]], others: float, fraction: float) -> list[int]:
        """Return the levels of each group that lose least within a time.

        Args:
            seconds: of each group's levels.
            others: of what has no levels.
            fraction: of the dense model's time that is allowed, in (0, 1).

        Raises:
            ValueError: not even the lowest levels are fast enough.
        """
        dense = others + sum(own[-1] for own in seconds)
        least = (others + sum(min(own) for own in seconds)) / dense
        if least > fraction:
            raise ValueError(
                f"--latency_target {fraction} cannot be reached: at the lowest level of every group the matrices "
                f"still take {least:.3f} of the dense model's time here; give more, or more --targets"
            )
        ticks = [[math.ceil(each / dense * TICKS) for each in own] for own in seconds]
        allowed = math.floor((fraction - others / dense) * TICKS)
        places = best_levels(ticks, self.losses, max(allowed, sum(map(min, ticks))))
        return [own[place] for own, place in zip(self.kept, places, strict=True)]


def switched(widths: Sequence[int], table: LevelTable, generator: torch.Generator) -> list[int]:
    """Return widths of the same cost in which a few groups have given units to others of their kind.

    Args:
        widths: units of each group.
        table: of the groups; kinds are told apart by what a unit costs.
        generator: decides which give, and which take.

    Source: the level switches of DarwinLM (arXiv 2502.07780), one to three, fewer more often.
    """
    new, most = [*widths], [kept[-1] for kept in table.kept]
    for _ in range(int(torch.randint(1, 4, (2,), generator=generator).min())):
        giver = int(torch.randint(len(new), (), generator=generator))
        step, cost = max(1, most[giver] // LEVELS), table.costs[giver]
        alike = [index for index, other in enumerate(table.costs) if index != giver and other == cost]
        takers = [index for index in alike if new[index] + step <= most[index]]
        if takers and new[giver] > step:
            new[giver] -= step
            new[takers[int(torch.randint(len(takers), (), generator=generator))]] += step
    return new


def on_the_way(widths: Sequence[int], dense: Sequence[int], target: float, remaining: float) -> list[float]:
    """Return the fraction of each group that remains on the straight way from the dense model to the target's widths.

    Args:
        widths: units of each group at the target.
        dense: units of each group in the dense model.
        target: fraction that remains in all at the target, below 1.
        remaining: fraction that remains in all now, at least the target.
    """
    part = (1 - remaining) / (1 - target)
    return [1 - part * (1 - width / whole) for width, whole in zip(widths, dense, strict=True)]


def _up_to(top: int, kept: Sequence[int], losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return the levels up to a number of units, which is the last; its loss lies between those of its neighbors."""
    below = [level for level in kept if level < top]
    if not below:
        return [top], [losses[0]]
    first = len(below) - 1
    part = (top - kept[first]) / (kept[first + 1] - kept[first])
    return [*below, top], [*losses[: len(below)], losses[first] + part * (losses[first + 1] - losses[first])]


def best_levels(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], allowed: int) -> list[int]:
    """Return a level for each group, so that costs are allowed and the sum of losses is least.

    Where not even the cheapest levels are allowed, these are returned. What is worse than something cheaper is dropped
    on the way, so that there are about as many states as different sums of costs.

    Args:
        costs: of each group's levels, ascending.
        losses: of each group's levels.
        allowed: the largest sum of costs.
    """
    spare = allowed - sum(min(each) for each in costs)  # so that every group can have its cheapest level
    spent, lost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, int]] = []
    for cost, loss in zip(costs, losses, strict=True):
        more = torch.tensor(cost) - min(cost)
        all_spent, all_lost = (spent[:, None] + more).flatten(), lost[:, None] + torch.tensor(loss, dtype=torch.float64)
        all_lost = all_lost.flatten()
        order = all_lost.argsort(stable=True)
        order = order[all_spent[order].argsort(stable=True)]
        least = all_lost[order].cummin(0).values
        better = torch.ones_like(least, dtype=torch.bool)
        better[1:] = least[1:] < least[:-1]
        order = order[better & ((all_spent[order] <= spare) | (all_spent[order] == 0))]
        spent, lost = all_spent[order], all_lost[order]
        trail.append((order, len(cost)))
    place, chosen = len(spent) - 1, []
    for order, count in reversed(trail):
        place, level = divmod(int(order[place]), count)
        chosen.append(level)
    return chosen[::-1]

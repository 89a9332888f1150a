"""What a criterion is: the rule that gives each unit a score.

A criterion knows nothing of ranks. It turns a slice of a tensor into the slice's additive share of every unit's number,
and updates state for some units, whichever they are. A new criterion is a new file in this folder; it says only what
distinguishes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scale_prune.config import PruningConfig
from scale_prune.core.groups import Member, Role, UnitSpan
from scale_prune.core.schedule import Schedule
from scale_prune.core.selection import select
from scale_prune.core.shards import unit_sum

Need = Literal["weight", "grad", "activation"]
State = dict[str, Tensor]


@dataclass(frozen=True)
class ShardView:
    """A rank's slice of one member, in float32.

    Attributes:
        member: the tensor it is a slice of.
        start: flat offset of the first element.
        weight: (S,) master values, unmasked.
        grad: (S,) gradient of the loss, averaged over the global batch and unscaled; None where it isn't needed.
    """

    member: Member
    start: int
    weight: Tensor
    grad: Tensor | None

    def unit_sum(self, values: Tensor) -> Tensor:
        """Return this slice's (N,) share of the sum by unit of (S,) `values`."""
        return unit_sum(values, self.start, self.member.shape, self.member.dim)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where the run is, and what is known of the units being updated; U of them, of one or more groups.

    Attributes:
        step: optimizer step that was just made, from 1.
        schedule: the run's schedule.
        live: (U,) bool, units that remain at present.
        similarity: (U,) mean similarity to the live units of the group, 0 before the first sample.
        weight: (U,) 1 / (number of groups * units of its group): the unit's part in a mean over groups and units.
    """

    step: int
    schedule: Schedule
    live: Tensor
    similarity: Tensor
    weight: Tensor


class Criterion:
    """A rule that gives each unit a score; the base of all criteria.

    Attributes:
        needs: what the shares are made of. "grad": they are taken after every backward pass and `update` runs every
            step. "weight" alone: only when masks are chosen. "activation": `Moment.similarity` is kept up to date.
        roles: the members that have a share.
        defaults: values of the settings that have none of their own, where the user gives none; every criterion has a
            "scope".

    Args:
        config: settings of pruning, without None where `defaults` has a value.
        seed: the run's seed, at least 0.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    roles: ClassVar[frozenset[Role]] = frozenset({"in", "out"})
    defaults: ClassVar[dict[str, Any]] = {"scope": "per_group"}

    def __init__(self, config: PruningConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's (N,) additive part of every unit's number."""
        raise AssertionError(f"{type(self).__name__} needs {set(self.needs)} but has no share")

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Return the state of the spans' units, (U,) tensors by name."""
        return {"total": torch.zeros(sum(span.last - span.first for span in spans), device=device)}

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Return the state after this step. Pure.

        Args:
            state: (U,) tensors by name.
            total: (U,) float32, the units' shares added up.
            moment: where the run is.
        """
        return state | {"total": total}

    def score(self, state: State) -> Tensor:
        """Return (U,) float32 scores; higher = keep."""
        return state["total"]

    def select(self, scores: Sequence[Tensor], schedule: Schedule, step: int) -> list[Tensor]:
        """Choose the units that remain after `step`: one (N,) bool mask for each group's (N,) scores."""
        at_target = step >= schedule.last_descent_step
        return select(
            scores,
            remaining=schedule.remaining(step),
            scope=str(self.config.scope),
            min_kept=self.config.min_kept,
            width_multiple=self.config.width_multiple if at_target else 1,
        )

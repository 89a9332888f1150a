"""What gates a coming step has: drawn alike on every rank, from the criterion's parameters and the step's number.

Dense steps have none. Then they are drawn anew before every step; once the target is reached they are what the units
will be exported with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.core import Schedule, UnitGroup
from scale_prune.criteria import GatedCriterion
from scale_prune.models import Gates


class Gating:
    """The gates of a run.

    Args:
        criterion: makes gates of its parameters.
        schedule: the run's schedule.
        groups: the groups that are gated.
        gates: where they are put.
        costs: (M,) what each unit counts, as a fraction of the dense model.
        seed: seed of the noise.

    Attributes:
        noise: (M,) of the coming step, uniform in (0, 1); 0 where there are no gates.
        expected: the remaining fraction that the coming step's gates amount to on average.
        parameter: (M,) what the gates are made of, on all ranks.
    """

    def __init__(
        self,
        criterion: GatedCriterion,
        schedule: Schedule,
        groups: Sequence[UnitGroup],
        gates: Gates,
        costs: Tensor,
        seed: int,
    ) -> None:
        self.criterion, self.schedule, self.groups, self.gates = criterion, schedule, tuple(groups), gates
        self.costs, self.seed = costs, seed
        self.noise = torch.zeros_like(costs)
        self.parameter = torch.zeros_like(costs)
        self.expected = schedule.initial

    def draw(self, parameter: Tensor, step: int) -> None:
        """Put on the gates of the step after `step`, from the (M,) parameters of all units."""
        self.parameter = parameter
        if step < self.schedule.warmup_steps:
            return
        self.expected = self.criterion.expected_remaining(parameter, self.costs)
        if step >= self.schedule.last_descent_step:
            final = self.criterion.final_gates(parameter)
            self.gates.put_on(final, final)
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        self.noise = torch.rand(len(parameter), generator=generator).to(parameter.device)
        by_group = parameter.split([group.num_units for group in self.groups])
        test_time = torch.cat([self.criterion.test_time_gates(part) for part in by_group])
        self.gates.put_on(self.criterion.training_gates(parameter, self.noise), test_time)

    def gradient(self) -> Tensor | None:
        """Return this rank's (M,) gradient of the step that was just made, None if it had no gates."""
        return self.gates.gradient()

    def final(self) -> dict[str, Tensor]:
        """Return the (N,) gates that units are exported with, by group."""
        parts = self.criterion.final_gates(self.parameter).split([group.num_units for group in self.groups])
        return {group.name: part for group, part in zip(self.groups, parts, strict=True)}

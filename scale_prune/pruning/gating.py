"""What gates a coming step has: drawn alike on every rank, from the criterion's parameters and the step's number.

Dense steps have none. Then they are drawn anew before every step; once the target is reached they are what the units
will be exported with.
"""

import torch
from torch import Tensor

from scale_prune.core import Schedule
from scale_prune.criteria import GatedCriterion, State
from scale_prune.models import Gates
from scale_prune.pruning.unit_line import UnitLine


class Gating:
    """The gates of a run.

    Args:
        line: the units that are gated.
        criterion: makes gates of its parameters.
        schedule: the run's schedule.
        seed: seed of the noise.

    Attributes:
        noise: (M,) of the coming step, uniform in (0, 1); 0 where there are no gates.
        expected: the remaining fraction that the coming step's gates amount to on average, None where masks decide it.
        parameter: (M,) what the gates are made of, on all ranks.
        kinds: (M,) int64, 1 for heads.
        summary: what the criterion makes of all parameters of the coming step.
    """

    def __init__(self, line: UnitLine, criterion: GatedCriterion, schedule: Schedule, seed: int) -> None:
        self.line, self.criterion, self.schedule, self.seed = line, criterion, schedule, seed
        self.gates = Gates(line.backend.module, line.groups)
        self.noise = torch.zeros_like(line.costs)
        self.parameter = torch.zeros_like(line.costs)
        self.expected: float | None = schedule.initial
        self.kinds = line.per_unit(lambda group: float(group.kind == "head")).long()
        self.summary = torch.zeros(0)

    def draw(self, state: State, step: int) -> None:
        """Put on the gates of the step after `step`, by the criterion's state of the owned units. A collective."""
        self.parameter = parameter = self.line.gather(self.criterion.parameter(state))
        if step < self.schedule.warmup_steps:
            return
        self.expected = self.criterion.expected_remaining(parameter, self.line.costs)
        self.summary = self.criterion.summary(parameter, self.line.costs, self.kinds, self.schedule, step + 1)
        if step >= self.schedule.last_descent_step:
            final = self.criterion.final_gates(parameter)
            self.gates.put_on(final, lambda: final)
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        self.noise = torch.rand(len(parameter), generator=generator).to(parameter.device)

        def test_time() -> Tensor:
            return torch.cat([self.criterion.test_time_gates(part) for part in self.line.by_group(parameter)])

        self.gates.put_on(self.criterion.training_gates(parameter, self.noise), test_time)

    def totals(self) -> Tensor:
        """Return the (U,) gradients of the owned units' gates, averaged over the global batch. A collective.

        In fp16 one may overflow, though the loss is scaled so that no weight's does: then the gate has none.
        """
        gradient, backend = self.gates.gradient(), self.line.backend
        if gradient is None:  # dense steps have no gates
            gradient = torch.zeros_like(self.line.costs)
        totals = self.line.add_up(gradient / (backend.world_size * backend.loss_scale))
        return totals if backend.loss_scale == 1.0 else totals.nan_to_num(0.0, 0.0, 0.0)

    def take_off(self) -> dict[str, Tensor]:
        """Leave the model without gates; return the (N,) numbers that units are exported with, by group."""
        self.gates.remove()
        return self.final()

    def final(self) -> dict[str, Tensor]:
        """Return the (N,) gates that units are exported with, by group."""
        parts = self.line.by_group(self.criterion.final_gates(self.parameter))
        return {group.name: part for group, part in zip(self.line.groups, parts, strict=True)}

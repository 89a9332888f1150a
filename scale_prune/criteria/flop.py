"""FLOP: hard-concrete gates on the rank-1 components of factorized weights, under one budget of parameters.

    minimize over weights and log_alpha, maximize over l1, l2:   L_task + l1 (S - T) + l2 (S - T)^2

S is the sparsity that the gates amount to on average, T the one that is wanted: it rises linearly to its target. The
gradient of both terms is taken in closed form, so the loss itself stays untouched. What a component costs are its
D_in + D_out parameters; S counts the parameters of the dense weights.

Source: arXiv 1910.04732. Adam with betas (.9, .999) for log_alpha and for the ascent of l1 and l2, which start at 0.
Deviations: gates are divided by their mean at the start, so that training starts from about the function of the given
weights; after an SVD log_alpha starts SPREAD_BY_SIZE higher for the largest singular value and as much lower for the
smallest (mean gates of 1.07 and 0.73), evenly between: what they say is known before a gate has learnt anything; one
draw serves all micro batches of a step, so that a result does not depend on how a batch is cut up; when the schedule
reaches its target, the components with the highest log_alpha that fit the budget stay for good, with their mean gates,
and the rest of the steps trains just them (the original stays random to the end, which is --cooldown_fraction 0 here).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_prune.config import PruningConfig
from scale_prune.core import Kind, Schedule, UnitGroup, UnitSpan, generator_of, hard_concrete
from scale_prune.core.adam import adam_step, ascended
from scale_prune.criteria.base import OF_COMPONENTS, GatedCriterion, Moment, State

SPREAD = 0.01
SPREAD_BY_SIZE = 2.0
MULTIPLIERS = ("l1", "l2")


class Flop(GatedCriterion):
    """Keep the components whose gates want to stay open under the budget.

    Attributes:
        multipliers_travel: how far l1 and l2 can move while the target is approached, at the usual learning rate.
    """

    kind: ClassVar[Kind] = "component"
    grows = 0.0
    travel = 20.0
    multipliers_travel: ClassVar[float] = 40.0
    defaults: ClassVar[dict[str, Any]] = {"scope": "global"}
    settings = (
        OF_COMPONENTS
        | {"min_kept", "width_multiple"}
        | {"gate_learning_rate", "lambda_learning_rate", "target_warmup_fraction", "initial_drop_rate", "gate_range"}
    )

    @property
    def _unit(self) -> float:
        """The mean of a gate at the start, which stands for 1."""
        start = hard_concrete.log_alpha_of(self.config.initial_drop_rate)
        return float(hard_concrete.mean(torch.tensor(start, dtype=torch.float64), free=_is_free(self.config)))

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Draw log_alpha by group: log(1 - p) - log p, SPREAD of noise, SPREAD_BY_SIZE; everything else starts at 0."""
        drawn = torch.cat([self._log_alpha(span.group)[span.first : span.last] for span in spans] or [torch.zeros(0)])
        drawn = drawn.to(device)
        vectors = {"log_alpha": drawn, "mean": torch.zeros_like(drawn), "square": torch.zeros_like(drawn)}
        scalars = ["count", *(f"{name}{part}" for name in MULTIPLIERS for part in ("", "_mean", "_square"))]
        return vectors | {name: torch.zeros((), device=device) for name in scalars}

    def _log_alpha(self, group: UnitGroup) -> Tensor:
        noise = torch.randn(group.num_units, generator=generator_of(self.seed, group.name))
        in_order_of_size = group.kind == "component" and self.config.factors != "random"
        by_size = SPREAD_BY_SIZE if in_order_of_size else 0.0
        start = hard_concrete.log_alpha_of(self.config.initial_drop_rate)
        return start + SPREAD * noise + torch.linspace(by_size, -by_size, group.num_units)

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Descend on log_alpha and ascend on the multipliers, until the target is reached."""
        if moment.step >= moment.schedule.last_descent_step:
            return state
        excess = wanted(moment, self.config.target_warmup_fraction) - moment.expected  # S - T
        count = state["count"] + 1
        open_share = hard_concrete.open_probability(state["log_alpha"])
        pull = state["l1"] + 2 * state["l2"] * excess
        of_budget = -pull * moment.cost * open_share * (1 - open_share)
        slope = hard_concrete.sample_gradient(state["log_alpha"], moment.noise, free=_is_free(self.config)) / self._unit
        step, mean, square = adam_step(total * slope + of_budget, state["mean"], state["square"], count)
        rate = self.gate_rate(moment.schedule)
        new = {"log_alpha": state["log_alpha"] - rate * step, "mean": mean, "square": square, "count": count}
        for name, gradient in zip(MULTIPLIERS, (excess, excess**2), strict=True):
            new |= ascended(state, name, gradient, self.multipliers_rate(moment.schedule), count)
        return state | new

    def multipliers_rate(self, schedule: Schedule) -> float:
        """Return the learning rate of l1 and l2."""
        return self.config.lambda_learning_rate or self.multipliers_travel / schedule.descent_steps

    def parameter(self, state: State) -> Tensor:
        """Return log_alpha."""
        return state["log_alpha"]

    def training_gates(self, parameter: Tensor, noise: Tensor) -> Tensor:
        """Draw hard-concrete gates."""
        return hard_concrete.sample(parameter, noise, free=_is_free(self.config)) / self._unit

    def final_gates(self, parameter: Tensor) -> Tensor:
        """Return the mean gates."""
        return hard_concrete.mean(parameter, free=_is_free(self.config)) / self._unit

    def test_time_gates(self, parameter: Tensor) -> Tensor:
        """Return the mean gates, 0 for as many of the lowest as are closed on average."""
        closed = round(len(parameter) - float(hard_concrete.open_probability(parameter).sum()))
        gates = self.final_gates(parameter)
        gates[parameter.argsort(stable=True)[:closed]] = 0.0
        return gates

    def expected_remaining(self, parameter: Tensor, cost: Tensor) -> float:
        """Return the mean of the remaining fraction: the costs of open gates."""
        return float((hard_concrete.open_probability(parameter.double()) * cost).sum())

    def select(
        self, scores: Sequence[Tensor], groups: Sequence[UnitGroup], schedule: Schedule, step: int
    ) -> list[Tensor]:
        """Keep everything until the target is due; the gates do the work before."""
        if step < schedule.last_descent_step:
            return [torch.ones_like(group, dtype=torch.bool) for group in scores]
        return super().select(scores, groups, schedule, step)


def _is_free(pruning: PruningConfig) -> bool:
    return pruning.gate_range == "free"


def wanted(moment: Moment, rise_fraction: float) -> float:
    """Return the remaining fraction that the gates should amount to now; it falls in that fraction of all steps."""
    schedule, rise = moment.schedule, rise_fraction * moment.schedule.total_steps
    share = min((moment.step - schedule.warmup_steps) / rise, 1.0) if rise else 1.0
    return schedule.initial + (schedule.target - schedule.initial) * max(share, 0.0)

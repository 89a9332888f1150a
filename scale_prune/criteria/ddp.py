"""DDP, deterministic differentiable pruning: gates without noise on neurons and heads, the weights frozen.

    minimize over z, maximize over l1, l2, l3:
        CE + KL_WEIGHT * KL(dense || gated) + l1 (T - S) + l2 (T - S)^2 + l3 mean of s (1 - s)

A gate is ReLU(z) and may exceed 1; S is the mean retention s of z (`core.retention`), of neurons and of heads apart,
each of which has multipliers of its own and comes to the target T by itself. The gradient of the last three terms is
taken in closed form; of ReLU and clamp it is passed straight through. At the end the highest z stay, and their gates
are multiplied into the weights that read the units. Where a layer's gates have all closed, the unit that its floor
keeps has a gate of 0, as in the model that was trained.

The dense model is the same shards with all gates at 1. There is no master of the weights, no optimizer and no
reduction of their gradients; what moves in a step, beside the parameters, are the gates' gradients, 4 M bytes.

Source: arXiv 2603.08065, its constants by its code; Adam for everything.
Deviations: z starts at 1 without noise; rates are as in its 1,000 steps, and at most MOST_HASTE times as high in fewer.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale_prune.core import Schedule, UnitGroup, UnitSpan
from scale_prune.core.adam import adam_step, ascended
from scale_prune.core.retention import LAST_CENTER, center, retention, retention_gradient
from scale_prune.criteria.base import GatedCriterion, Moment, State

KL_WEIGHT = 2.0
USUAL_STEPS, MOST_HASTE = 1000, 4.0
GATE_RATE = 0.02
MULTIPLIER_RATES = {"l1": 0.02, "l2": 0.4, "l3": 0.02}
KINDS = ("neuron", "head")


class Ddp(GatedCriterion):
    """Keep the neurons and heads whose gates stay open under the budget."""

    freezes = True
    apart = True
    defaults: ClassVar[dict[str, Any]] = {"scope": "global"}
    settings = frozenset({"targets", "min_kept", "width_multiple", "gate_learning_rate", "lambda_learning_rate"})

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Start z at 1, everything else at 0."""
        zeros = super().initial_state(spans, device)["total"]
        names = [
            f"{kind}_{name}{part}" for kind in KINDS for name in MULTIPLIER_RATES for part in ("", "_mean", "_square")
        ]
        scalars = {name: torch.zeros((), device=device) for name in ("count", *names)}
        return {"z": zeros + 1, "mean": zeros.clone(), "square": zeros.clone()} | scalars

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Descend on z and ascend on the multipliers."""
        assert moment.kinds is not None
        assert moment.summary is not None
        mu, count = center(_progress(moment.schedule, moment.step)), state["count"] + 1
        kept = retention(state["z"], mu)
        pull, new = torch.zeros_like(kept), {"count": count}
        for number, kind in enumerate(KINDS):
            mean_kept, undecided, whole = moment.summary[number]
            missing = moment.schedule.target - mean_kept  # T - S
            l1, l2, l3 = (state[f"{kind}_{name}"] for name in MULTIPLIER_RATES)
            of_budget = l3 * (1 - 2 * kept) - l1 - 2 * l2 * missing
            pull = torch.where(moment.kinds == number, of_budget * moment.cost / whole.clamp(min=1e-30), pull)
            for (name, usual), slope in zip(MULTIPLIER_RATES.items(), (missing, missing**2, undecided), strict=True):
                rate = self.config.lambda_learning_rate or usual * _haste(moment.schedule)
                new |= ascended(state, f"{kind}_{name}", slope, rate, count)
        gradient = total + pull * retention_gradient(state["z"], mu)
        step, mean, square = adam_step(gradient, state["mean"], state["square"], count)
        return state | new | {"z": state["z"] - self.gate_rate(moment.schedule) * step, "mean": mean, "square": square}

    def gate_rate(self, schedule: Schedule) -> float:
        """Return the learning rate of z."""
        return self.config.gate_learning_rate or GATE_RATE * _haste(schedule)

    def summary(self, parameter: Tensor, cost: Tensor, kinds: Tensor, schedule: Schedule, step: int) -> Tensor:
        """Return mean retention, mean of s (1 - s), and share of the costs, (2, 3): of neurons, of heads."""
        kept, rows = retention(parameter, center(_progress(schedule, step))), []
        for number in range(len(KINDS)):
            share = cost * (kinds == number)
            whole = share.sum()
            means = [(each * share).sum() / whole.clamp(min=1e-30) for each in (kept, kept * (1 - kept))]
            rows.append(torch.stack([*means, whole]))
        return torch.stack(rows)

    def parameter(self, state: State) -> Tensor:
        """Return z."""
        return state["z"]

    def final_gates(self, parameter: Tensor) -> Tensor:
        """Return ReLU(z)."""
        return parameter.relu()

    def expected_remaining(self, parameter: Tensor, cost: Tensor) -> float:
        """Return the mean retention as it will be counted at the end."""
        return float((retention(parameter.double(), LAST_CENTER) * cost).sum())

    def select(
        self, scores: Sequence[Tensor], groups: Sequence[UnitGroup], schedule: Schedule, step: int
    ) -> list[Tensor]:
        """Keep everything until the end; then neurons and heads come to the target apart."""
        masks = [torch.ones_like(each, dtype=torch.bool) for each in scores]
        for kind in KINDS if step >= schedule.last_descent_step else ():
            own = [index for index, group in enumerate(groups) if group.kind == kind]
            chosen = super().select([scores[i] for i in own], [groups[i] for i in own], schedule, step) if own else []
            for index, mask in zip(own, chosen, strict=True):
                masks[index] = mask
        return masks


def _progress(schedule: Schedule, step: int) -> float:
    return min(step / schedule.last_descent_step, 1.0)


def _haste(schedule: Schedule) -> float:
    """Return by how much rates are higher where there are fewer steps than usual."""
    return min(max(USUAL_STEPS / schedule.descent_steps, 1.0), MOST_HASTE)

"""FLOP-AGP: real-valued gates on the components of factorized weights, removed by magnitude on the cubic schedule.

Source: arXiv 1910.04732, the baseline "FLOP-AGP"; the schedule is that of arXiv 1710.01878.
Deviation: a component's magnitude is |gate| times the mean square norm of its two factors, at the start its norm as a
matrix, since it is these that differ and all gates start at 1. After an SVD that is its singular value; of whitened
factors it is not what the component adds to the outputs, by which they are ordered.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from scale_prune.core import Kind, UnitSpan
from scale_prune.core.adam import adam_step
from scale_prune.criteria.base import OF_COMPONENTS, Criterion, GatedCriterion, Moment, ShardView, State


class FlopAgp(GatedCriterion):
    """Keep the components with the largest gates."""

    kind: ClassVar[Kind] = "component"
    needs = frozenset({"gate", "weight"})
    travel = 0.5
    settings = Criterion.settings | OF_COMPONENTS | {"gate_learning_rate", "gate_l1"}

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Start gates at 1, their moments at 0."""
        zeros = super().initial_state(spans, device)["total"]
        count = torch.zeros((), device=device)
        return {"gate": zeros + 1, "size": zeros, "mean": zeros.clone(), "square": zeros.clone(), "count": count}

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's part of the mean of both factors' squared norms, (N,)."""
        return view.unit_sum(view.weight.square() / 2)

    def weigh(self, state: State, total: Tensor) -> State:
        """Keep the factors' sizes."""
        return state | {"size": total}

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Make one optimizer step on the live gates."""
        gradient = torch.where(moment.live, total + self.config.gate_l1 * moment.weight * state["gate"].sign(), 0.0)
        count = state["count"] + 1
        step, mean, square = adam_step(gradient, state["mean"], state["square"], count)
        rate = self.gate_rate(moment.schedule) * moment.schedule.learning_rate(moment.step)
        return state | {"gate": state["gate"] - rate * step, "mean": mean, "square": square, "count": count}

    def score(self, state: State) -> Tensor:
        """Return the components' magnitudes."""
        return state["gate"].abs() * state["size"]

    def parameter(self, state: State) -> Tensor:
        """Return the gates themselves."""
        return state["gate"]

    def final_gates(self, parameter: Tensor) -> Tensor:
        """Return the gates."""
        return parameter

"""Sensitivity: how much the loss changes, to first order, when a neuron is removed.

Source: arXiv 2302.03773, the sensitivity of section 5 (first-order Taylor), as a criterion.
Deviation: the running mean is over the steps in which the neuron was live, since a masked one has no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.core import UnitSpan
from scale_prune.criteria.base import Criterion, Moment, ShardView, State


class Sensitivity(Criterion):
    """Keep the units with the largest mean over steps of |sum of w * dL/dw|, input bias included."""

    needs = frozenset({"grad"})
    roles = frozenset({"in", "bias", "out"})

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's part of the units' w * dL/dw, (N,)."""
        assert view.grad is not None
        return view.unit_sum(view.weight * view.grad)

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Start means and counts at 0."""
        zeros = super().initial_state(spans, device)["total"]
        return {"mean": zeros, "count": zeros.clone()}

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Take the step's |total| into the mean of the live units."""
        count = state["count"] + moment.live
        mean = state["mean"] + torch.where(moment.live, (total.abs() - state["mean"]) / count.clamp(min=1), 0.0)
        return {"mean": mean, "count": count}

    def score(self, state: State) -> Tensor:
        """Return the means."""
        return state["mean"]

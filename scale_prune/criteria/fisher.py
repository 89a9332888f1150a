"""Fisher: the mean over sequences of the squared change of their loss, to first order, when a neuron is removed.

Source: the diagonal Fisher information of a gate on each neuron, as in LLM Surgeon (arXiv 2312.17244) and its kin.
Against sensitivity, which takes |sum of w * dL/dw| of a whole batch: there the sequences of a large batch cancel out,
and scores fade as the batch grows.
Deviation: the running mean is over the steps in which the neuron was live, since a masked one has no activation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.core import UnitSpan
from scale_prune.criteria.base import Criterion, Moment, State


class Fisher(Criterion):
    """Keep the units with the largest mean over sequences of (sum of h * dL/dh)^2."""

    needs = frozenset({"influence"})

    def of_sequences(self, influence: Tensor) -> Tensor:
        """Return the squares' sum over sequences, (N,)."""
        return influence.square().sum(0)

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Start means and counts at 0."""
        zeros = super().initial_state(spans, device)["total"]
        return {"mean": zeros, "count": zeros.clone()}

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Take the step's total into the mean of the live units."""
        count = state["count"] + moment.live
        mean = state["mean"] + torch.where(moment.live, (total - state["mean"]) / count.clamp(min=1), 0.0)
        return {"mean": mean, "count": count}

    def score(self, state: State) -> Tensor:
        """Return the means."""
        return state["mean"]

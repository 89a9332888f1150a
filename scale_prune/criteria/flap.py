"""FLAP: how much a neuron's part of the output fluctuates around its mean, which a bias could take over.

Source: arXiv 2312.11983, the metric WIFV: the variance of the activation times the squared norm of the output weights.
Deviations: the scope is what `--scope` says, "standardized" being the paper's. A head's features are taken as so many
tokens of one feature, with one variance and the norm of all its output weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.core import UnitSpan
from scale_prune.criteria.base import Criterion, ShardView, State


class Flap(Criterion):
    """Keep the units with the largest variance of the activation times squared norm of the output weights."""

    needs = frozenset({"weight", "activity"})
    roles = frozenset({"out"})
    settings = Criterion.settings | {"similarity_every", "similarity_tokens"}

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's part of the squared norms of the units' output weights, (N,)."""
        return view.unit_sum(view.weight.square())

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Start the sums over tokens at 0."""
        zeros = super().initial_state(spans, device)["total"]
        return {"total": zeros, "tokens": zeros.clone(), "sum": zeros.clone(), "squares": zeros.clone()}

    def activity(self, activations: Tensor) -> Tensor:
        """Return number, sum and sum of squares of the tokens' activations, (3, N)."""
        count = torch.full_like(activations[:0].sum(0), len(activations))
        return torch.stack([count, activations.sum(0), activations.square().sum(0)])

    def observe(self, state: State, activity: Tensor) -> State:
        """Add a sample to the sums."""
        tokens, total, squares = activity
        return state | {
            "tokens": state["tokens"] + tokens,
            "sum": state["sum"] + total,
            "squares": state["squares"] + squares,
        }

    def score(self, state: State) -> Tensor:
        """Return variance times squared norm; 0 before the first sample."""
        tokens = state["tokens"].clamp(min=1)
        variance = state["squares"] / tokens - (state["sum"] / tokens).square()
        return variance.clamp(min=0) * state["total"]

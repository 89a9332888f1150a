"""Wanda: the mean of |W2| of a neuron times the norm of its activation.

Source: arXiv 2306.11695, whose score of a weight is |W| times the norm of its input; here the mean over a neuron's
output weights, since neurons go as a whole. The squares of all samples add up, so that a neuron that has left keeps the
norm it had while others' grow, and seldom returns. A head's features are taken as so many tokens of one feature.
"""

from math import prod

from torch import Tensor

from scale_prune.criteria.base import Criterion, ShardView, State


class Wanda(Criterion):
    """Keep the units with the largest mean |output weight| * |activation|."""

    needs = frozenset({"weight", "activity"})
    roles = frozenset({"out"})
    grows = 0.5  # of a mean, times the root of a sum
    settings = Criterion.settings | {"similarity_every", "similarity_tokens"}

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's part of the units' means of |W2|, (N,)."""
        weights_of_a_unit = prod(view.member.shape) // view.member.num_units
        return view.unit_sum(view.weight.abs()) / weights_of_a_unit

    def activity(self, activations: Tensor) -> Tensor:
        """Return the squared norms of the tokens' activations, (N,)."""
        return activations.square().sum(0)

    def score(self, state: State) -> Tensor:
        """Return mean times norm."""
        return state["total"] * state["activity"].sqrt()

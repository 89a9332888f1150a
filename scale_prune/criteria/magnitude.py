"""Magnitude: the L2 norm of a neuron's weights.

Source: arXiv 2302.03773, the baseline "L2 magnitude".
Deviation: a neuron's input and output weights are one norm, so that they are removed together; the authors' code ranks
rows of W1 and columns of W2 apart.
"""

from torch import Tensor

from scale_prune.criteria.base import Criterion, ShardView, State


class Magnitude(Criterion):
    """Keep the units with the largest sqrt(sum of squares of their weights)."""

    needs = frozenset({"weight"})
    grows = 0.5

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's part of the units' squared norms, (N,)."""
        return view.unit_sum(view.weight.square())

    def score(self, state: State) -> Tensor:
        """Return the norms."""
        return state["total"].sqrt()

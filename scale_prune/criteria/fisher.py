"""Fisher: the mean over sequences of the squared change of their loss, to first order, when a neuron is removed.

Source: the diagonal Fisher information of a gate on each neuron, as in LLM Surgeon (arXiv 2312.17244) and its kin.
Against sensitivity, which takes |sum of w * dL/dw| of a whole batch: there the sequences of a large batch cancel out,
and scores fade as the batch grows.
Deviation: the running mean is over the steps in which the neuron was live, since a masked one has no activation.
"""

from torch import Tensor

from scale_prune.criteria.sensitivity import Sensitivity


class Fisher(Sensitivity):
    """Keep the units with the largest mean over sequences of (sum of h * dL/dh)^2."""

    needs = frozenset({"influence"})

    def of_sequences(self, influence: Tensor) -> Tensor:
        """Return the squares' sum over sequences, (N,)."""
        return influence.square().sum(0)

"""OBS: the error of the layer's output that a neuron's removal leaves when the others make good what they can.

Source: optimal brain surgeon for whole neurons, SlimGPT (arXiv 2412.18110) and ZipLM (arXiv 2302.04089): the squared
norm of the neuron's output weights over the diagonal of the inverse Gram matrix, in rounds.
Deviation: all neurons are taken out, an equal number in each round, so that any scope and any target can rank them.
"""

from torch import Tensor

from scale_prune.core import elimination_scores
from scale_prune.criteria.base import Criterion

ELIMINATION_ROUNDS = 32


class Obs(Criterion):
    """Keep the units that leave last; their scores presume the repair."""

    needs = frozenset({"gram"})

    def rank_units(self, gram: Tensor, weight: Tensor, block: int) -> Tensor:
        """Return the error that each unit adds when it goes, (N,)."""
        damping = self.config.damping_of(len(gram))
        return elimination_scores(gram, weight, damping=damping, rounds=ELIMINATION_ROUNDS, block=block)

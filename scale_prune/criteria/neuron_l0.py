"""NP-L0: FLOP's gates on the MLP neurons, the weights kept whole.

Source: arXiv 1910.04732, the baseline "neuron pruning with L0".
"""

from scale_prune.criteria.base import OF_COMPONENTS
from scale_prune.criteria.flop import Flop


class NeuronL0(Flop):
    """Keep the neurons whose gates want to stay open under the budget."""

    kind = "neuron"
    settings = Flop.settings - OF_COMPONENTS | {"targets"}
    multipliers_travel = 20.0

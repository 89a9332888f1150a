"""K-FAC: what a neuron's removal costs the loss, to second order, when the others make good what they can.

Source: LLM Surgeon (arXiv 2312.17244) for the two factors, the Gram matrices of a layer's input and of its output's
gradients, each token by itself; neurons leave as under `obs`, whose costs the second factor turns from errors of a
layer's output into errors of the loss, by which layers can be compared.
Deviation: the second factor is damped by as much as its own mean; less was worse (benchmarks/repair.md).
"""

from typing import Any, ClassVar

from scale_prune.criteria.obs import Obs


class Kfac(Obs):
    """Keep the units that leave last; their scores presume the repair."""

    needs = frozenset({"gram", "output_grad"})
    defaults: ClassVar[dict[str, Any]] = {"scope": "global"}

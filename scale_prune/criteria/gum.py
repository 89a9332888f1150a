"""GUM, globally unique movement: movement scores ranked over the whole model, similar neurons penalised.

Source: arXiv 2302.03773. GUM is three things together: top-v, over all groups at once, and a score penalty that grows
with a neuron's similarity to the live neurons of its layer.
Deviation: lambda_f and lambda_gum of the paper are not public; the defaults are a choice of scale, at which the penalty
separates units about as much as the movement gradient does (benchmarks/criteria.md).
"""

from typing import Any, ClassVar

from scale_prune.criteria.movement import Movement


class Gum(Movement):
    """Keep the units with the highest movement scores of the model, less alike ones first."""

    needs = frozenset({"grad", "activation"})
    defaults: ClassVar[dict[str, Any]] = {"scope": "global", "regularization": 1.0, "uniqueness": 10.0}
    settings = Movement.settings | {
        "uniqueness",
        "similarity",
        "similarity_every",
        "similarity_tokens",
        "similarity_weight",
    }

"""Units of a sharded model: factorized where the criterion removes components, before an engine is made around it."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from scale_prune.config import EMBEDDING, PruningConfig
from scale_prune.core import UnitGroup
from scale_prune.criteria import CRITERIA
from scale_prune.models import family_of, linear_names
from scale_prune.pruning import (
    clusters_of,
    components_of,
    embedding_tied_as_asked,
    neurons_and_heads,
    removes_components,
)
from scale_prune.zero3.factorize import factorize, factorize_embedding, factors_of


def prepare_units(
    model: PreTrainedModel,
    pruning: PruningConfig,
    *,
    seed: int,
    values: str,
    token_counts: Tensor | None = None,
    roots: Mapping[str, Tensor] | None = None,
) -> tuple[UnitGroup, ...]:
    """Factorize what the criterion needs factorized, and list the units. A collective.

    Args:
        model: a model that ZeRO-3 has partitioned, before an engine is made around it; changed in place.
        pruning: settings of pruning.
        seed: of random factors.
        values: "svd", "whitened", "random", or "zeros" where a checkpoint's values take the factors' place.
        token_counts: (V,) how often each token occurs in training, for the target embedding; without them tokens are
            taken to come in order of their frequency.
        roots: of whitened factors, see `factors_of`; number i of the linear maps' with rank i mod W.
    """
    if not removes_components(pruning):
        return neurons_and_heads(model, pruning)
    criterion, factors = CRITERIA[pruning.criterion](pruning, seed), factors_of(values, seed, roots or {})
    if names := linear_names(model, pruning.linear_targets):
        transposed = family_of(model.config).transposed
        factorize(model, names, criterion.components, factors, transposed=transposed)
    if EMBEDDING in pruning.target_names:
        tokens = clusters_of(model, pruning, token_counts)
        factorize_embedding(model, embedding_tied_as_asked(model, pruning), tokens, criterion.components, factors)
    return components_of(model)

"""What a criterion removes from a model: its neurons, or components of weights that are factorized first."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scale_prune.config import EMBEDDING, PruningConfig
from scale_prune.core import UnitGroup, frequency_clusters, zipf_clusters
from scale_prune.criteria import CRITERIA, Criterion
from scale_prune.models import (
    FACTOR_WORDS,
    cluster_groups,
    component_groups,
    full_shape,
    linear_names,
    put_clusters,
    put_factors,
    unit_groups,
)
from scale_prune.models.embedding import Cluster, SketchedEmbedding


def removes_components(pruning: PruningConfig) -> bool:
    """Tell whether a run factorizes weights."""
    criterion = CRITERIA.get(pruning.criterion)
    return criterion is not None and criterion.kind == "component" and pruning.remaining < 1


def clusters_of(model: PreTrainedModel, pruning: PruningConfig, token_counts: Tensor | None) -> list[Tensor]:
    """Return the tokens of each cluster of the target embedding."""
    size = full_shape(model.get_input_embeddings().weight)[0]
    if token_counts is None:
        return zipf_clusters(size, pruning.embedding_clusters)
    return frequency_clusters(token_counts, pruning.embedding_clusters)


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the name of a model's embedding, and of its output if that is tied to it."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = output is not None and output.weight is table.weight
    return [names[id(table)], names[id(output)]] if tied else [names[id(table)]]


def embedding_tied_as_asked(model: PreTrainedModel, pruning: PruningConfig) -> list[str]:
    """Return `embedding_names`.

    Raises:
        ValueError: the output is not tied, be it by the config or by a checkpoint with an output of its own, though the
            settings insist on it; or it is, and has a bias.
    """
    names = embedding_names(model)
    if pruning.tie_embeddings and len(names) == 1:
        raise ValueError(
            f"--tie_embeddings: the output of this model is not tied to its embedding {names[0]}; leave it out, and "
            "the embedding alone is factorized"
        )
    if len(names) > 1 and getattr(model.get_submodule(names[1]), "bias", None) is not None:
        raise ValueError(
            f"--targets {pruning.targets}: the output {names[1]}, which is tied to the embedding, has a bias, which "
            "clusters of tokens have no place for; leave the embedding out"
        )
    return names


def components_of(model: nn.Module) -> tuple[UnitGroup, ...]:
    """List the components of a model's factorized weights; none where there are none."""
    return (*cluster_groups(model), *component_groups(model))


def removes_heads(pruning: PruningConfig) -> bool:
    """Tell whether a run removes heads."""
    neurons = CRITERIA[pruning.criterion].kind == "neuron"
    return neurons and pruning.remaining < 1 and "attention" in pruning.target_names


def neurons_and_heads(model: PreTrainedModel, pruning: PruningConfig) -> tuple[UnitGroup, ...]:
    """List the neurons and heads of a model that are targets; where nothing is to leave, the neurons.

    Raises:
        ValueError: a target is neither; or as `unit_groups`.
    """
    criterion = CRITERIA.get(pruning.criterion)
    if criterion is None or criterion.kind == "component":
        return unit_groups(model)
    if EMBEDDING in pruning.target_names:
        raise ValueError(
            f"--targets {pruning.targets}: --criterion {pruning.criterion} removes neurons (mlp) and heads "
            "(attention); an embedding is factorized, by --criterion flop or factorize"
        )
    return unit_groups(model, pruning.target_names)


def units_of(model: PreTrainedModel, pruning: PruningConfig) -> tuple[UnitGroup, ...]:
    """List the units of a model that has been prepared.

    Raises:
        ValueError: the criterion removes components, and the model's weights are not factorized; or as `unit_groups`.
    """
    if not removes_components(pruning):
        return neurons_and_heads(model, pruning)
    if not (groups := components_of(model)):
        raise ValueError(
            f"criterion {pruning.criterion!r} removes components, but no weight of the model is factorized; call "
            "scale_prune.prepare(model, config) before deepspeed.initialize"
        )
    return groups


def sketch_units(model: PreTrainedModel, pruning: PruningConfig) -> tuple[UnitGroup, ...]:
    """List the units of a model without weights, on the meta device or of fake tensors; it is changed in place.

    Raises:
        ValueError: the model has no such targets, is factorized already, or `initial_rank` is more than any full rank.
    """
    saved = model.config.to_dict()
    if any(saved.get(key) for key in FACTOR_WORDS):
        raise ValueError(
            "the model has factorized weights already, which cannot be pruned again; give the model that it was made "
            "from"
        )
    if not removes_components(pruning):
        return neurons_and_heads(model, pruning)
    criterion = CRITERIA[pruning.criterion](pruning, 0)
    for name in linear_names(model, pruning.linear_targets):
        _put_empty_factors(model, name, criterion)
    if EMBEDDING in pruning.target_names:
        _put_empty_clusters(model, pruning, criterion)
    groups = components_of(model)
    asked, most = pruning.initial_rank or 0, max((group.num_units for group in groups), default=0)
    if asked > most and "initial_rank" in criterion.settings:
        raise ValueError(
            f"--initial_rank {asked} is more than the full rank of any weight, {most} at most; give at most that"
        )
    return groups


def _put_empty_factors(model: nn.Module, name: str, criterion: Criterion) -> None:
    weight: Any = model.get_submodule(name).weight
    transposed = hasattr(model.get_submodule(name), "nf")
    rows, columns = reversed(full_shape(weight)) if transposed else full_shape(weight)
    put_factors(model, name, *_empty_factors((rows, columns), criterion, weight))


def _put_empty_clusters(model: PreTrainedModel, pruning: PruningConfig, criterion: Criterion) -> None:
    names, table = embedding_tied_as_asked(model, pruning), model.get_input_embeddings()
    weight: Any = table.weight
    tokens = clusters_of(model, pruning, None)
    clusters = [Cluster(*_empty_factors((len(each), weight.shape[1]), criterion, weight)) for each in tokens]
    put_clusters(model, names, clusters, [each.to(weight.device) for each in tokens], SketchedEmbedding)


def _empty_factors(shape: tuple[int, int], criterion: Criterion, like: Tensor) -> list[nn.Parameter]:
    """Return down and up without values."""
    (rows, columns), count = shape, criterion.components(shape)
    return [
        nn.Parameter(torch.empty(size, device=like.device, dtype=like.dtype))
        for size in ((count, columns), (rows, count))
    ]

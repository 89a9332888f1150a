"""What a criterion removes from a model: its neurons, or components of weights that are factorised first."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scale_prune.config import PruningConfig
from scale_prune.core.groups import UnitGroup
from scale_prune.core.low_rank import full_rank
from scale_prune.criteria import CRITERIA, Criterion
from scale_prune.factorized import component_groups, full_shape, put_factors
from scale_prune.families import family_of, linear_names, unit_groups
from scale_prune.zero3.factorize import factorize, factors_of


def removes_components(pruning: PruningConfig) -> bool:
    """Tell whether a run factorises weights."""
    criterion = CRITERIA.get(pruning.criterion)
    return criterion is not None and criterion.kind == "component" and pruning.remaining < 1


def prepare_units(model: PreTrainedModel, pruning: PruningConfig, *, seed: int, values: str) -> tuple[UnitGroup, ...]:
    """Factorise what the criterion needs factorised, and list the units. A collective.

    Args:
        model: a model that ZeRO-3 has partitioned, before an engine is made around it; changed in place.
        pruning: settings of pruning.
        seed: of random factors.
        values: "svd", "random", or "zeros" where a checkpoint's values take the factors' place.
    """
    if not removes_components(pruning):
        return unit_groups(model)
    names = linear_names(model, pruning.target_names)
    criterion = CRITERIA[pruning.criterion](pruning, seed)
    transposed = family_of(model.config).transposed
    factorize(model, names, criterion.components, factors_of(values, seed), transposed=transposed)
    return component_groups(model)


def units_of(model: PreTrainedModel, pruning: PruningConfig) -> tuple[UnitGroup, ...]:
    """List the units of a model that has been prepared.

    Raises:
        ValueError: the criterion removes components, and the model's weights are not factorised; or as `unit_groups`.
    """
    if not removes_components(pruning):
        return unit_groups(model)
    if not (groups := component_groups(model)):
        raise ValueError(
            f"criterion {pruning.criterion!r} removes components, but no weight of the model is factorised; call "
            "scale_prune.prepare(model, config) before deepspeed.initialize"
        )
    return groups


def sketch_units(model: PreTrainedModel, pruning: PruningConfig) -> tuple[UnitGroup, ...]:
    """List the units of a model without weights, on the meta device or of fake tensors; it is changed in place.

    Raises:
        ValueError: the model has no such targets, is factorised already, or `initial_rank` is more than a full rank.
    """
    if getattr(model.config, "factorized", None):
        raise ValueError(
            f"{len(model.config.factorized)} weights of the model are factorised already, "
            f"{next(iter(model.config.factorized))} for one; give the model that it was made from"
        )
    if not removes_components(pruning):
        return unit_groups(model)
    criterion = CRITERIA[pruning.criterion](pruning, 0)
    for name in linear_names(model, pruning.target_names):
        _put_empty_factors(model, name, criterion)
    return component_groups(model)


def _put_empty_factors(model: nn.Module, name: str, criterion: Criterion) -> None:
    weight: Any = model.get_submodule(name).weight
    transposed = hasattr(model.get_submodule(name), "nf")
    rows, columns = reversed(full_shape(weight)) if transposed else full_shape(weight)
    count = criterion.components((rows, columns))
    if count > full_rank((rows, columns)):
        raise ValueError(
            f"--initial_rank {count} is more than the full rank {full_rank((rows, columns))} of {name} "
            f"({rows} x {columns}); give at most that"
        )
    like = {"device": weight.device, "dtype": weight.dtype}
    down, up = torch.empty(count, columns, **like), torch.empty(rows, count, **like)
    put_factors(model, name, nn.Parameter(down), nn.Parameter(up))

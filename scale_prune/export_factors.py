"""Factorised weights in a form that the exported model has: two linear maps where that is smaller, else one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from scale_prune.core.groups import UnitGroup
from scale_prune.core.low_rank import saves


def ranks_of(layout: str, groups: Sequence[UnitGroup]) -> dict[str, int]:
    """Return the ranks of the weights that stay factorised, by module.

    Args:
        layout: "per_layer" keeps factors where they are smaller than the matrix; the others have no place for them.
        groups: the compacted groups of components.
    """
    if layout != "per_layer":
        return {}
    return {group.name: group.num_units for group in groups if saves(group.num_units, _shape(group))}


def stored_factors(
    tensors: Iterable[tuple[str, Tensor]], groups: Sequence[UnitGroup], *, keep: Mapping[str, int], transposed: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield private CPU copies under the names that the exported model has.

    Args:
        tensors: names and tensors of the compacted model, each tensor copied before the next is asked for.
        groups: the compacted groups of components.
        keep: the modules that stay factorised.
        transposed: weights that are multiplied out are stored (in, out).
    """
    names = {group.name for group in groups}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        module, _, part = name.rpartition(".")
        if module not in names:
            yield name, copied
        elif module in keep:
            yield (f"{module}.up.bias" if part == "bias" else f"{name}.weight"), copied
        elif part == "bias":
            yield name, copied
        elif module not in waiting:
            waiting[module] = copied
        else:
            yield f"{module}.weight", _product(waiting.pop(module), copied, transposed)
    assert not waiting, f"factors of {sorted(waiting)} are missing"


def _product(down: Tensor, up: Tensor, transposed: bool) -> Tensor:
    weight = (up.float() @ down.float()).to(up.dtype)
    return weight.T.contiguous() if transposed else weight


def _shape(group: UnitGroup) -> tuple[int, int]:
    down, up = group.members
    return up.shape[0], down.shape[1]

"""Smaller tensors: units taken out of, or zeros put into, everything that stores them.

Under ZeRO-3 the caller selects from each gathered tensor with `select_units` and hands partitioned parameters to
`set_members`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from scale_prune.core.groups import Member, UnitGroup

# What attention modules call numbers that are in proportion to their heads.
HEAD_COUNTS = (
    *("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "kv_heads"),
    *("kv_dim", "split_size", "all_head_size"),
)
# What nn.Linear and the Conv1D of transformers call the size of the side that a member's role counts units on.
SIZE_ATTRIBUTES = {"in": ("out_features", "nf"), "out": ("in_features", "nx"), "bias": ()}


def select_units(tensor: Tensor, keep: Tensor, member: Member) -> Tensor:
    """Return a copy that holds only the kept units; for weights and their optimizer moments alike.

    Args:
        tensor: any tensor of the member's full shape.
        keep: int64 (K,), ascending indices of the kept units in [0, N).
        member: says which indices are a unit's.

    Returns:
        The tensor with K instead of N units, on the same device.
    """
    kept = tensor.reshape(member.unit_shape).index_select(member.unit_dim, keep.to(tensor.device))
    return kept.reshape(_resize(member, keep.numel()).shape)


def pad_units(tensor: Tensor, num_units: int, member: Member) -> Tensor:
    """Return a copy with zero units behind the existing ones.

    A unit with zero input weights, bias and output weights adds nothing, whatever the activation function.

    Args:
        tensor: a member's full tensor.
        num_units: units after padding, at least as many as there are.
        member: says which indices are a unit's.
    """
    missing = list(member.unit_shape)
    missing[member.unit_dim] = num_units - member.num_units
    padded = torch.cat([tensor.reshape(member.unit_shape), tensor.new_zeros(missing)], member.unit_dim)
    return padded.reshape(_resize(member, num_units).shape)


def resize_group(group: UnitGroup, num_units: int) -> UnitGroup:
    """Return the description of the same group with another number of units.

    Args:
        group: the group.
        num_units: units it has afterwards, at least 1.
    """
    return replace(group, num_units=num_units, members=tuple(_resize(member, num_units) for member in group.members))


def _resize(member: Member, num_units: int) -> Member:
    before, after = member.shape[: member.dim], member.shape[member.dim + 1 :]
    return replace(member, shape=(*before, member.pieces * num_units * member.block, *after))


def set_members(
    model: nn.Module, group: UnitGroup, parameters: Mapping[str, nn.Parameter], num_units: int
) -> UnitGroup:
    """Put smaller parameters in the place of a group's members and tell their modules the new size.

    The parameters' own shapes are not looked at, so they may be partitioned.

    Args:
        model: the model that the group describes; changed in place.
        group: the group as it is before.
        parameters: for each member's name the parameter that takes its place.
        num_units: units of the group afterwards, at least 1.

    Returns:
        The group as it is afterwards.
    """
    resized = resize_group(group, num_units)
    for member in resized.members:
        module_name, _, name = member.name.rpartition(".")
        module = model.get_submodule(module_name)
        setattr(module, name, parameters[member.name])
        for attribute in SIZE_ATTRIBUTES[member.role]:
            if hasattr(module, attribute):
                setattr(module, attribute, member.shape[member.dim])
    if group.kind == "head":
        attention = model.get_submodule(group.name)
        for attribute in HEAD_COUNTS:
            if isinstance(count := getattr(attention, attribute, None), int):
                setattr(attention, attribute, count * num_units // group.num_units)
    return resized

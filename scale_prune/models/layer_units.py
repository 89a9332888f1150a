"""The units that the layers of a model hold, by what its family says: neurons of the MLPs, heads of attention."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from scale_prune.core import Member, Role, UnitGroup
from scale_prune.models.factorized import full_shape
from scale_prune.models.families import Family, family_of


def linear_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """List a model's linear modules of some kinds, layer by layer.

    Args:
        model: the model.
        targets: any of "mlp" and "attention".

    Raises:
        ValueError: the family has none of a kind, or its description does not fit the model.
    """
    family = family_of(model.config)
    within = {
        "attention": family.attention,
        "mlp": tuple(
            ".".join(filter(None, (family.mlp, name))) for name in (*dict.fromkeys(family.inputs), family.output)
        ),
    }
    for target in targets:
        if not within[target]:
            found = ", ".join(name for name, projections in within.items() if projections)
            raise ValueError(
                f"--targets {target}: the family of {model.config.model_type} has no {target}, only {found}"
            )
    try:
        num_layers = len(list(model.get_submodule(family.layers).children()))
        names = [
            f"{family.layers}.{layer}.{name}"
            for layer in range(num_layers)
            for target in targets
            for name in within[target]
        ]
        for name in names:
            model.get_submodule(name)
    except AttributeError as missing:
        raise ValueError(f"{family} does not describe a {type(model).__name__}: {missing}") from missing
    return names


def linear_inputs(model: PreTrainedModel, targets: Sequence[str]) -> list[UnitGroup]:
    """List what the linear modules of `linear_names` read, one group of D_in features a module, without members."""
    axis = 0 if family_of(model.config).transposed else 1
    names = linear_names(model, targets)
    widths = [full_shape(model.get_submodule(name).weight)[axis] for name in names]
    return [
        UnitGroup(name=name, layer=0, num_units=width, members=(), output=name)
        for name, width in zip(names, widths, strict=True)
    ]


def unit_groups(model: PreTrainedModel, targets: Sequence[str] = ("mlp",)) -> tuple[UnitGroup, ...]:
    """List what can be removed of a model's layers: the neurons of the MLPs, then the heads of attention.

    Nothing is communicated: of a partitioned parameter only the recorded full shape is read.

    Args:
        model: the model, in one piece or partitioned by ZeRO-3; layers may differ in width.
        targets: "mlp", "attention", or both. Where heads can leave, a unit counts its parameters in the budget; alone,
            a neuron counts 1.

    Returns:
        The groups, by layer. A projection without bias has no bias member; the output projection's bias belongs to no
        unit and is never a member.

    Raises:
        ValueError: the model's type belongs to no registered family; the family's description does not fit the model,
            because a module has another name or the members differ in their number of units; or heads cannot leave.
    """
    family = family_of(model.config)
    try:
        layers = range(len(list(model.get_submodule(family.layers).children())))
        neurons = [_neurons(model, family, index) for index in layers if "mlp" in targets]
        heads = [head_group(model, family, index) for index in layers if "attention" in targets]
    except AttributeError as missing:
        raise ValueError(f"{family} does not describe a {type(model).__name__}: {missing}") from missing
    groups = (*neurons, *heads)
    return tuple(replace(group, cost=_parameters_of_a_unit(group)) for group in groups) if heads else groups


def stored_groups(model: PreTrainedModel) -> tuple[UnitGroup, ...]:
    """List what a folder has to tell of a model's layers: neurons, and heads where they are fewer than the config says.

    Raises:
        ValueError: as `unit_groups`.
    """
    neurons = unit_groups(model)
    if not family_of(model.config).heads:
        return neurons
    try:
        heads = unit_groups(model, ("attention",))
    except ValueError:  # all are there
        return neurons
    config = model.config.get_text_config()  # which tells the dense model's, also where layers have fewer
    full = config.num_attention_heads * head_size(config)
    return neurons if all(group.num_features == full for group in heads) else (*neurons, *heads)


def _parameters_of_a_unit(group: UnitGroup) -> int:
    return sum(prod(member.shape) for member in group.members) // group.num_units


def _neurons(model: nn.Module, family: Family, layer: int) -> UnitGroup:
    name = ".".join(filter(None, (family.layers, str(layer), family.mlp)))
    found = _members(model, family, [f"{name}.{each}" for each in (*dict.fromkeys(family.inputs), family.output)])
    pieces = len(family.inputs) // len(set(family.inputs))
    members = tuple(each if each.role == "out" else replace(each, pieces=pieces) for each in found)
    return _group(model, family, UnitGroup(name=name, layer=layer, num_units=0, members=members, output=""))


def _group(model: nn.Module, family: Family, group: UnitGroup) -> UnitGroup:
    """Return a group with the number of units that its members agree on.

    Raises:
        ValueError: they do not.
    """
    counts = {member.name: member.num_units for member in group.members}
    if len(set(counts.values())) > 1:
        what = {"neuron": "neurons", "head": "heads"}[group.kind]
        raise ValueError(
            f"{family} does not describe a {type(model).__name__}: {what} of {group.name} counted as {counts}"
        )
    output = group.members[-1].name.removesuffix(".weight")
    return replace(group, num_units=next(iter(counts.values())), output=output)


def _members(model: nn.Module, family: Family, names: Sequence[str]) -> Iterator[Member]:
    """Yield what linear modules, of which the last reads the units, store of them; a unit owns one index of each."""
    in_dim, out_dim = (1, 0) if family.transposed else (0, 1)
    *inputs, output = names
    for name in inputs:
        yield _member(model, f"{name}.weight", in_dim, "in")
        if getattr(model.get_submodule(name), "bias", None) is not None:
            yield _member(model, f"{name}.bias", 0, "bias")
    yield _member(model, f"{output}.weight", out_dim, "out")


def head_size(config: PretrainedConfig) -> int:
    """Return the numbers of a head."""
    config = config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def head_group(model: PreTrainedModel, family: Family, layer: int) -> UnitGroup:
    """Describe the heads of a layer; where queries share keys and values, a unit is a head of these and its queries.

    Raises:
        ValueError: heads cannot leave.
    """
    names = [f"{family.layers}.{layer}.{name}" for name in family.attention]
    size, name = head_size(model.config), names[0].rpartition(".")[0] if names else ""
    if problem := _why_no_head_leaves(model, family, name, names):
        raise ValueError(
            f"--targets attention: {problem}, so no head of a {model.config.model_type} can leave; give --targets mlp"
        )
    members = list(_members(model, family, names))
    query, output = members[0], members[-1]
    width = output.shape[output.dim]
    shared = members[1 + (members[1].role == "bias")] if family.heads == "apart" else query
    keys = shared.shape[shared.dim] if family.heads == "apart" else (query.shape[query.dim] - width) // 2
    num_units, pieces = keys // size, 3 if family.heads == "by_kind" else 1
    blocks = [member.shape[member.dim] // (num_units * (pieces if member.role != "out" else 1)) for member in members]
    return _group(
        model,
        family,
        UnitGroup(
            name=name,
            layer=layer,
            num_units=num_units,
            members=tuple(
                replace(member, block=block, pieces=pieces if member.role != "out" else 1)
                for member, block in zip(members, blocks, strict=True)
            ),
            output="",
            kind="head",
        ),
    )


def _why_no_head_leaves(model: PreTrainedModel, family: Family, attention: str, names: Sequence[str]) -> str:
    """Return why heads cannot leave, "" where they can."""
    if not family.heads:
        return "how its projections belong to heads is not known"
    if getattr(model.config, "alibi", False):
        return "its positions are told by slopes that follow from the number of heads"
    if getattr(model.config, "multi_query", False) and not getattr(model.config, "new_decoder_architecture", False):
        return "all its queries share one key and one value"
    own = tuple(f"{name}." for name in names)
    for name, parameter in model.get_submodule(attention).named_parameters(prefix=attention):
        if not name.startswith(own) and full_shape(parameter) != (head_size(model.config),):
            return f"{name} spans all heads"
        if not name.startswith(own) and name.count(".") > attention.count(".") + 2:
            return f"{name} belongs to one head alone"
    return ""


def _member(model: nn.Module, name: str, dim: int, role: Role) -> Member:
    return Member(name=name, shape=full_shape(model.get_parameter(name)), dim=dim, role=role)

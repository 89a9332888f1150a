"""The three layouts of a pruned model: its config, its modeling file and its tensors in each of them."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from scale_prune.core import Kind, UnitGroup, pad_units
from scale_prune.export.factors import Plan
from scale_prune.models import auto_model, classifies, family_of, model_type_of, stock_class, unit_groups

LAYOUTS = ("uniform", "pad", "per_layer")
PROBE = 61
"""A width that no model has by itself."""
MODELING_FILE = Path(__file__).parents[1] / "models" / "modeling_per_layer.py"
FACTORIZED_FILE = MODELING_FILE.with_name("modeling_factorized.py")


def resolve_layout(layout: str | None, scope: str, kind: Kind = "neuron") -> str:
    """Return the layout to write: the one that was asked for, or the usual one.

    Args:
        layout: "uniform", "pad", "per_layer", or None for the usual one.
        scope: "per_group" where all layers lose alike, else what lets them differ.
        kind: what is removed; factors of components have a place in "per_layer" alone, and are multiplied out in
            "uniform".

    Raises:
        ValueError: the layout is unknown; it is uniform although global ranking leaves layers of different widths; or
            it is pad although no neurons are removed.
    """
    if layout is None:
        return "per_layer" if kind == "component" or scope != "per_group" else "uniform"
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; valid are {', '.join(LAYOUTS)}")
    if (layout, kind) == ("pad", "component"):
        raise ValueError(
            "--layout pad is for layers of different widths, but removing components leaves widths as they are, "
            "choose --layout per_layer (factors) or uniform (multiplied out)"
        )
    if layout == "uniform" and scope != "per_group" and kind == "neuron":
        raise ValueError(
            f"--layout uniform cannot hold the widths of --scope {scope}, which differ by layer, "
            "choose --layout pad or per_layer, or --scope per_group"
        )
    return layout


def check_layout(layout: str, config: PretrainedConfig) -> None:
    """Make sure, before training, that a model of this kind can be written in a layout.

    Args:
        layout: "uniform", "pad" or "per_layer".
        config: the model's config.

    Raises:
        ValueError: the layout is per_layer and transformers itself has no model class for this config, so
            that there is no class for the modeling file to build on; or the model belongs to no registered family.
    """
    family_of(config)
    if layout == "per_layer" and stock_class(config) is None:
        raise ValueError(
            f"layout 'per_layer' needs a model class of transformers, which has none for {type(config).__name__}; "
            f"ask for layout 'pad' or 'uniform'"
        )


def check_width_key(model: PreTrainedModel) -> None:
    """Make sure, before training, that the config decides about the width, by which a pruned model is built again.

    Args:
        model: the model to prune, with or without weights; only its config and class are read.

    Raises:
        ValueError: MLPs are not built as wide as the family's `width_key` says, as where the width is fixed.
    """
    family, config = family_of(model.config), copy.deepcopy(model.config)
    _forget_per_layer(config)
    setattr(config, family.width_key, PROBE)
    try:
        with torch.device("meta"):
            widths = {group.num_units for group in unit_groups((stock_class(config) or type(model))(config))}
        problem = "" if widths == {PROBE} else f"MLPs have {sorted(widths)} neurons"
    except Exception as error:  # whatever an architecture raises at a width that it cannot have
        problem = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
    if problem:
        raise ValueError(
            f"a pruned {config.model_type} could not be written: built from a config with {PROBE} as "
            f'"{family.width_key}", {problem}; width_key must name the key that sets how wide the MLPs are, and '
            f"where none does, neurons cannot be pruned"
        )


def config_for(layout: str, config: PretrainedConfig, groups: Sequence[UnitGroup]) -> PretrainedConfig:
    """Return a copy of the config that tells the widths in the way of the layout."""
    check_layout(layout, config)
    widths = {group.layer: group.num_units for group in groups}
    if layout == "uniform" and len(set(widths.values())) > 1:
        raise ValueError(
            f"layout 'uniform' needs layers of one width, but they have {list(widths.values())}; "
            f"ask for layout 'pad' or 'per_layer'"
        )
    config = copy.deepcopy(config)
    _forget_per_layer(config)
    setattr(config, family_of(config).width_key, max(widths.values()))
    stock = stock_class(config)
    if stock is not None:
        config.architectures = [stock.__name__]
    if layout == "per_layer":
        _set_per_layer(config, widths)
    return config


def _forget_per_layer(config: PretrainedConfig) -> None:
    """Undo `_set_per_layer`, for a model that was pruned before and is pruned again."""
    config.per_layer_config = None
    vars(config).pop("serialize_explicit_per_layer_config", None)
    if MODELING_FILE.stem in str(getattr(config, "auto_map", None)):
        del config.auto_map


def _set_per_layer(config: PretrainedConfig, widths: dict[int, int]) -> None:
    key = family_of(config).width_key
    config.per_layer_config = {layer: {key: width} for layer, width in widths.items()}
    # Without it, layers as wide as the widest are left out of config.json.
    config.serialize_explicit_per_layer_config = True
    _set_code(config, MODELING_FILE, f"PerLayer{stock_class(config).__name__}")


def factorized_config(layout: str, config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Return a copy of the config that tells what stays factorized."""
    check_layout(layout, config)
    config = copy.deepcopy(config)
    stock = stock_class(config)
    if stock is not None:
        config.architectures = [stock.__name__]
    if factors := plan.settings():
        config.update(factors)
        _set_code(config, FACTORIZED_FILE, f"Factorized{stock.__name__}")
        config.auto_map["AutoConfig"] = f"{FACTORIZED_FILE.stem}.Factorized{_stock_config(config).__name__}"
    if plan.cluster_ranks:
        config.tie_word_embeddings = False  # the output uses the clusters, there is nothing to tie
    return config


def _set_code(config: PretrainedConfig, file: Path, name: str) -> None:
    config.architectures = [name]
    config.auto_map = {auto_model(config).__name__: f"{file.stem}.{name}"}


def _stock_config(config: PretrainedConfig) -> type[PretrainedConfig]:
    """Return the class of transformers for a config, also of one that we have left with factors."""
    kind: type[PretrainedConfig] = CONFIG_MAPPING[model_type_of(config)]
    return kind


def code_of(config: PretrainedConfig) -> Path | None:
    """Return the modeling file that a written config names, if it is one of ours."""
    auto_map = str(getattr(config, "auto_map", None))
    return next((file for file in (MODELING_FILE, FACTORIZED_FILE) if f"'{file.stem}." in auto_map), None)


def modeling_source(file: Path, config: PretrainedConfig) -> str:
    """Return a modeling file of ours, which is GPT-Neo's, with the names of another family."""
    family = family_of(config)
    names = {
        "AutoModelForCausalLM": auto_model(config).__name__,
        "A causal language model": "A classifier" if classifies(config) else "A causal language model",
        "GPTNeoForCausalLM": stock_class(config).__name__,
        "GPTNeoConfig": _stock_config(config).__name__,
        "factorized_gpt_neo": f"factorized_{model_type_of(config)}",
        "transformer.h": family.layers,
        "intermediate_size": family.width_key,
    }
    source = file.read_text(encoding="utf-8")
    for ours, theirs in names.items():
        source = source.replace(ours, theirs)
    return source


def in_layout(
    layout: str, tensors: Iterable[tuple[str, Tensor]], groups: Sequence[UnitGroup]
) -> Iterator[tuple[str, Tensor]]:
    """Yield private CPU copies, padded where the layout asks for it."""
    members = {member.name: member for group in groups for member in group.members}
    widest = max(group.num_units for group in groups)
    for name, tensor in tensors:
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        member = members.pop(name, None)
        if member is not None:
            assert copied.shape == member.shape, f"{name} is {copied.shape}, its group says {member.shape}"
            copied = pad_units(copied, widest, member.dim) if layout == "pad" else copied
        yield name, copied
    assert not members, f"tensors of {sorted(members)} are missing"

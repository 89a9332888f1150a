"""The layouts of a pruned model: its config, its modeling file and its tensors in each of them."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scale_prune.core import Kind, UnitGroup, pad_units, resize_group
from scale_prune.export.factors import Plan
from scale_prune.export.heads import fitting_heads, head_words, set_heads, tells_heads
from scale_prune.export.modeling_files import FACTORIZED_FILE, NEMOTRON_FILE, other_heads, set_code, stock_config_class
from scale_prune.export.plain_configs import MODELING_FILE, without_layout
from scale_prune.models import family_of, head_size, model_type_of, stock_class, unit_groups
from scale_prune.models.modeling_nemotron_nas import DeciLMConfig, DeciLMForCausalLM

LAYOUTS = ("uniform", "pad", "per_layer", "nemotron_nas")
AUTO, GGUF = "auto", "gguf"
LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Model types that are a Llama in all but name, and a bias that config.json can tell."""
PROBE = 61
"""A width that no model has by itself."""


def resolve_layout(layout: str | None, scope: str, kind: Kind = "neuron") -> str:
    """Return the layout to write: the one that was asked for, or the usual one.

    Args:
        layout: "uniform", "pad", "per_layer", "nemotron_nas", "gguf", or None or "auto" for the usual one.
        scope: "per_group" where all layers lose alike, else what lets them differ.
        kind: what is removed; factors of components have a place in "per_layer" alone, and are multiplied out in
            "uniform".

    Raises:
        ValueError: the layout is unknown; it is uniform although global ranking leaves layers of different widths; or
            it is pad or nemotron_nas although no neurons are removed.
    """
    if layout in (None, AUTO):
        return "per_layer" if kind == "component" or scope != "per_group" else "uniform"
    if layout == GGUF:
        return layout
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; valid are {', '.join((AUTO, *LAYOUTS, GGUF))}")
    if layout in ("pad", "nemotron_nas") and kind == "component":
        raise ValueError(
            f"--layout {layout} is for layers of different widths, but removing components leaves widths as they are, "
            "choose --layout per_layer (factors) or uniform (multiplied out)"
        )
    if layout == "uniform" and scope != "per_group" and kind == "neuron":
        raise ValueError(
            f"--layout uniform cannot hold the widths of --scope {scope}, which differ by layer, "
            "choose --layout pad or per_layer, or --scope per_group"
        )
    return layout


def needs_code(layout: str) -> bool:
    """Tell whether a layout comes with a modeling file."""
    return layout in ("per_layer", "nemotron_nas")


def check_layout(layout: str, config: PretrainedConfig, *, heads: bool = False) -> None:
    """Make sure, before training, that a model of this kind can be written in a layout.

    Args:
        layout: "uniform", "pad", "per_layer" or "nemotron_nas".
        config: the model's config.
        heads: heads have left.

    Raises:
        ValueError: the layout is per_layer and transformers itself has no model class for this config, so
            that there is no class for the modeling file to build on; the layout is nemotron_nas and the model is no
            Llama, or heads have left; the layout is uniform, and this config cannot tell fewer heads; or the
            model belongs to no registered family.
    """
    family_of(config)
    if layout == "nemotron_nas" and (reason := no_llama(config)):
        raise ValueError(
            f"layout 'nemotron_nas' is for models that are a Llama, {', '.join(LLAMA_LIKE)}, but {reason}; "
            f"ask for layout 'pad' or 'uniform', which every engine that knows the dense model loads"
        )
    if heads and layout == "nemotron_nas":
        raise ValueError(
            "layout 'nemotron_nas' has no place for different numbers of heads; ask for layout 'pad' or 'per_layer'"
        )
    if heads and layout == "uniform" and not tells_heads(config):
        raise ValueError(
            f"layout 'uniform' cannot hold fewer heads of a {config.model_type}, whose config does not tell their "
            "size; ask for layout 'pad' or 'per_layer'"
        )
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
    family, config = family_of(model.config), without_layout(model.config)
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
    heads = [group for group in groups if group.kind == "head"]
    check_layout(layout, config, heads=bool(heads))
    widths = {group.layer: group.num_units for group in groups if group.kind == "neuron"}
    for what, counts in (("width", [*widths.values()]), ("number of heads", [group.num_units for group in heads])):
        if layout == "uniform" and len(set(counts)) > 1:
            raise ValueError(
                f"layout 'uniform' needs layers of one {what}, but they have {counts}; "
                f"ask for layout 'pad' or 'per_layer'"
            )
    if layout == "uniform" and heads and (fitting := fitting_heads(config, heads)) != heads[0].num_units:
        raise ValueError(
            f"layout 'uniform' cannot hold {heads[0].num_units} units of heads a layer, which the config of a "
            f"{config.model_type} refuses, only {fitting}; ask for layout 'pad' or 'per_layer'"
        )
    config = without_layout(config)
    setattr(config, family_of(config).width_key, max(widths.values()))
    if model_type_of(config) == "phi":
        config.n_inner = max(widths.values())  # what vLLM reads in its place
    stock = stock_class(config)
    if stock is not None:
        config.architectures = [stock.__name__]
    if heads and layout in ("uniform", "pad") and tells_heads(config):
        set_heads(config, resize_group(heads[0], fitting_heads(config, heads)))
    if layout == "per_layer":
        _set_per_layer(config, widths, heads)
    return _nemotron(config, [*widths.values()]) if layout == "nemotron_nas" else config


def no_llama(config: PretrainedConfig) -> str:
    """Return why a model is more than a Llama by another name, "" where it is not."""
    if model_type_of(config) not in LLAMA_LIKE:
        return f"this is a {model_type_of(config)}"
    return short_window(config)


def short_window(config: PretrainedConfig) -> str:
    """Return how far back a model's attention reaches where that is not to the beginning, else ""."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        return f"its attention reaches back only {window} of {config.max_position_embeddings} tokens"
    return ""


def _nemotron(config: PretrainedConfig, widths: Sequence[int]) -> PretrainedConfig:
    """Return the config of a Llama in the form of Nemotron-NAS.

    Engines read either the width or, of multiples of 256, a multiple of the hidden size; the latter more of them.
    """
    words = config.to_dict()
    windows = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # as long as the context
    for name in ("model_type", "architectures", "per_layer_config", *windows):
        words.pop(name, None)
    if model_type_of(config) == "qwen2":
        words["qkv_bias"] = True
    heads_in_group = config.num_attention_heads // config.num_key_value_heads
    multiples = all(width % 256 == 0 for width in widths)
    told = [
        {"ffn_mult": 1.5 * width / config.hidden_size} if multiples else {"intermediate_size": width}
        for width in widths
    ]
    plain = {"no_op": False, "replace_with_linear": False}
    blocks = [{"attention": {"n_heads_in_group": heads_in_group} | plain, "ffn": each | plain} for each in told]
    changed = DeciLMConfig(block_configs=blocks, **words)
    set_code(changed, NEMOTRON_FILE, DeciLMForCausalLM.__name__)
    changed.auto_map["AutoConfig"] = f"{NEMOTRON_FILE.stem}.{DeciLMConfig.__name__}"
    return changed


def _set_per_layer(config: PretrainedConfig, widths: dict[int, int], heads: Sequence[UnitGroup]) -> None:
    key = family_of(config).width_key
    own = {group.layer: head_words(config, group) for group in heads}
    if heads:  # the numbers of the dense model, by which configs check themselves
        config.allow_global_per_layer_attribute_access = True
        if getattr(config, "head_dim", None) is None:  # caches would take it from a layer's own number of heads
            config.head_dim = head_size(config)
    config.per_layer_config = {layer: {key: width, **own.get(layer, {})} for layer, width in widths.items()}
    # Without it, layers as wide as the widest are left out of config.json.
    config.serialize_explicit_per_layer_config = True
    set_code(config, MODELING_FILE, f"PerLayer{stock_class(config).__name__}")
    for loader, name in other_heads(config):
        config.auto_map[loader] = f"{MODELING_FILE.stem}.PerLayer{name}"


def factorized_config(layout: str, config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Return a copy of the config that tells what stays factorized."""
    check_layout(layout, config)
    config = without_layout(config)
    stock = stock_class(config)
    if stock is not None:
        config.architectures = [stock.__name__]
    if factors := plan.settings():
        config.update(factors)
        set_code(config, FACTORIZED_FILE, f"Factorized{stock.__name__}")
        config.auto_map["AutoConfig"] = f"{FACTORIZED_FILE.stem}.Factorized{stock_config_class(config).__name__}"
    if plan.cluster_ranks:
        config.tie_word_embeddings = False  # the output uses the clusters, there is nothing to tie
    return config


def in_layout(
    layout: str, tensors: Iterable[tuple[str, Tensor]], groups: Sequence[UnitGroup], config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield private CPU copies, padded where the layout asks for it.

    Args:
        layout: "uniform", "pad", "per_layer" or "nemotron_nas".
        tensors: names and tensors of the compacted model.
        groups: its groups.
        config: of the dense model.
    """
    members = {member.name: (member, group) for group in groups for member in group.members}
    padded = _padded_to(groups, config) if layout == "pad" else {}
    for name, tensor in tensors:
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        member, group = members.pop(name, (None, None))
        if member is not None and group is not None:
            assert copied.shape == member.shape, f"{name} is {copied.shape}, its group says {member.shape}"
            copied = pad_units(copied, padded[group.kind], member) if padded else copied
        yield name, copied
    assert not members, f"tensors of {sorted(members)} are missing"


def _padded_to(groups: Sequence[UnitGroup], config: PretrainedConfig) -> dict[Kind, int]:
    """Return how many units all layers have in layout "pad": as the widest, of heads as many as the config can tell."""
    widest: dict[Kind, int] = {}
    for group in groups:
        widest[group.kind] = max(group.num_units, widest.get(group.kind, 0))
    if heads := [group for group in groups if group.kind == "head"]:
        widest["head"] = fitting_heads(config, heads)
    return widest

"""A config in the keys of GGUF."""

from typing import Any

import torch
from gguf import RopeScalingType
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scale_prune.export.stored import Stored
from scale_prune.models import head_size

SCALES = {
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Keys of configs, and what they are called in GGUF."""


def add_words(writer: Any, stored: Stored, widths: list[int]) -> None:
    """Tell the sizes of a model.

    Args:
        writer: a GGUFWriter.
        stored: the model.
        widths: neurons of each layer in the file; a list in the file where they differ.

    """
    config = stored.config
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths))
    writer.add_feed_forward_length(widths if len(set(widths)) > 1 else widths[0])
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        names = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
        writer.add_layer_norm_eps(next(getattr(config, name) for name in names if hasattr(config, name)))
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
    for name, called in SCALES.items():
        if hasattr(config, name):
            getattr(writer, f"add_{called}")(getattr(config, name))
    if rope := rope_of(config):
        _add_rope(writer, config, rope)


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return what the config says of rotary embeddings, nothing where the model has none."""
    return getattr(config, "rope_parameters", None) or {}


def unknown_rope(config: PretrainedConfig, factors: bool) -> str:
    """Return what there is of rotary embeddings that is not written, "" where all is.

    Args:
        config: the model's.
        factors: "llama3" is known, whose factors are a tensor of the file.
    """
    kind = rope_of(config).get("rope_type", "default")
    known = ("default", "linear", "llama3") if factors else ("default", "linear")
    return "" if kind in known else f'rotary embeddings of type "{kind}"'


def _add_rope(writer: Any, config: PretrainedConfig, rope: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return (head size / 2,) by which "llama3" divides the frequencies, None for other rotary embeddings."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]

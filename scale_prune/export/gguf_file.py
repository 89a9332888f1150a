"""GGUF, the file of llama.cpp and all that stands on it: a model's words, tokens and tensors as its loaders want them.

Names of tensors, keys, quantization and special tokens are those of the package `gguf`. What it does not know are the
orders of rows that llama.cpp expects; a `Dialect` says them. Models of different widths: the architecture "deci" is a
Llama that reads a width for each layer; all others are padded to the widest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PretrainedConfig

from scale_prune.core import UnitGroup
from scale_prune.export.gguf_tensors import tensors_for, type_of
from scale_prune.export.gguf_tokens import add_tokens
from scale_prune.export.gguf_words import add_words, unknown_rope
from scale_prune.export.layouts import LLAMA_LIKE, short_window
from scale_prune.export.stored import Stored
from scale_prune.models import head_size, model_type_of


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What llama.cpp calls a kind of models, and how its tensors differ from those of transformers.

    Attributes:
        arch: the architecture's name.
        pairs: the rows of q and k stand in pairs, one of each half of a head, as that rotary embedding turns them.
        fused: q, k and v of all heads stand one after another in the fused projection, instead of by head; it has one
            k and v for all in "multi_query" models anyway.
        shift: added to the weights of norms, which transformers adds when it uses them.
        activations: the names of the activation function that it computes.
        own_heads: heads together may be wider or narrower than the model.
        factors: rotary embeddings may be of type "llama3", whose factors are a tensor of the file.
        own_output: the output has to be there, also where it is the embedding.
    """

    arch: str
    pairs: bool = False
    fused: bool = False
    shift: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")
    own_heads: bool = False
    factors: bool = False
    own_output: bool = False


GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")

DIALECTS = {
    "llama": Dialect(arch="llama", pairs=True, own_heads=True, factors=True),
    "mistral": Dialect(arch="llama", pairs=True, own_heads=True, factors=True),
    "arcee": Dialect(arch="arcee", pairs=True, own_heads=True, factors=True, activations=("relu2",)),
    "granite": Dialect(arch="granite", pairs=True, own_heads=True, factors=True),
    "smollm3": Dialect(arch="smollm3", pairs=True, own_heads=True),
    "qwen2": Dialect(arch="qwen2"),
    "qwen3": Dialect(arch="qwen3", own_heads=True),
    "olmo2": Dialect(arch="olmo2", own_output=True),
    "gemma": Dialect(arch="gemma", shift=1.0, own_heads=True, activations=GELU),
    "starcoder2": Dialect(arch="starcoder2", activations=GELU),
    "stablelm": Dialect(arch="stablelm", own_output=True),
    "phi": Dialect(arch="phi2", activations=GELU, own_output=True),
    "gpt2": Dialect(arch="gpt2", activations=GELU),
    "gpt_bigcode": Dialect(arch="starcoder", fused=True, activations=GELU),
    "gpt_neox": Dialect(arch="gptneox", fused=True, activations=GELU, own_output=True),
}
"""By model type, the architectures that were tried in llama.cpp."""

PER_LAYER = Dialect(arch="deci", pairs=True, own_heads=True, factors=True)


def dialect_of(config: PretrainedConfig) -> Dialect:
    """Return how models of a config are told to llama.cpp where all layers are of one width.

    Raises:
        ValueError: llama.cpp has no implementation of them, or one that computes something else.
    """
    model_type = model_type_of(config)
    if model_type not in DIALECTS:
        raise ValueError(
            f"gguf is not written for models of type {model_type}, only for {', '.join(sorted(DIALECTS))}; llama.cpp "
            f"has none of gptj, gpt_neo and opt; a plain folder (pad, uniform) is what its own converter reads, if it "
            f"knows them"
        )
    dialect = DIALECTS[model_type]
    heads = config.num_attention_heads * head_size(config)
    problems = [short_window(config), unknown_rope(config, dialect.factors), unknown_biases(config)]
    if activation_of(config) not in dialect.activations:
        problems += [f"its activation function is {activation_of(config)}, not {dialect.activations[0]}"]
    if dialect.arch == "gemma" and not config.tie_word_embeddings:
        problems += ["its output is not its embedding"]
    if heads != config.hidden_size and not dialect.own_heads:
        problems += [f"its heads are {heads} wide together, not {config.hidden_size} like the model"]
    rotary = getattr(config, "no_rope_layers", None) or []  # 1 where a layer has rotary embeddings
    if rotary != [int(bool((layer + 1) % 4)) for layer in range(len(rotary))]:
        problems += [f"its layers with rotary embeddings are {rotary}, not all but every 4th"]
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        problems += ["its attention is not scaled by the root of a head's width alone"]
    if getattr(config, "qk_layernorm", False):
        problems += ["its queries and keys have norms"]
    if problem := next(filter(None, problems), ""):
        raise ValueError(f"gguf cannot tell what this {model_type} has: {problem}; every other layout can")
    return dialect


def unknown_biases(config: PretrainedConfig) -> str:
    """Return which biases llama.cpp does not read, or misses, "" where it reads what there is."""
    model_type, biases = model_type_of(config), getattr(config, "attention_bias", None)
    if model_type in ("qwen3", "arcee", "olmo2", "gemma") and (biases or getattr(config, "mlp_bias", False)):
        return "its projections have biases"
    if model_type == "starcoder2" and not config.use_bias:
        return "its projections have no biases"
    return "its attention has no biases" if model_type == "gpt_neox" and biases is False else ""


def activation_of(config: PretrainedConfig) -> str:
    """Return the name of the MLPs' activation function."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(str(value) for name in names if (value := getattr(config, name, None)) is not None)


def write_gguf(stored: Stored, path: Path, dtype: str | None) -> list[str]:
    """Write a model as one file; one tensor at a time is in memory.

    Args:
        stored: the model.
        path: the file.
        dtype: of matrices, one of `TYPES`, None for the folder's; vectors are fp32. Rows that blocks of 32 do not
            divide are fp16 in "q8_0".

    Returns:
        What it has become, in sentences.

    Raises:
        ValueError: llama.cpp has no implementation of the model, or its tokenizer cannot be told.
    """
    dialect, widths = dialect_of(stored.config), [group.num_units for group in stored.groups]
    if len(set(widths)) > 1 and model_type_of(stored.config) in LLAMA_LIKE:
        dialect = PER_LAYER
    else:
        widths = [max(widths)] * len(widths)
    dtype = dtype or type_of(stored)
    tensors = tensors_for(stored, dialect, widths, dtype)
    writer = GGUFWriter(path, dialect.arch)
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    add_words(writer, stored, widths)
    has_tokens = add_tokens(writer, stored.folder, stored.config.vocab_size)
    for each in tensors:
        each.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        writer.write_tensor_data(each.data())
    writer.close()
    notes = [f"architecture {dialect.arch}, {dtype}", *(padding(stored.groups) if dialect is not PER_LAYER else [])]
    if dtype == "q8_0" and (odd := sum(each.type == GGMLQuantizationType.F16 for each in tensors)):
        notes += [f"{odd} matrices are f16, for q8_0 needs rows of a multiple of 32: prune with --width_multiple 32"]
    return notes if has_tokens else [*notes, "without a tokenizer: the folder has no tokenizer.json"]


def padding(groups: Sequence[UnitGroup]) -> list[str]:
    """Say what it costs that all layers are as wide as the widest; nothing where they are."""
    groups = [group for group in groups if group.kind == "neuron"]
    widest = max(group.num_units for group in groups)
    each = [sum(prod(member.shape) // group.num_units for member in group.members) for group in groups]
    parameters = sum(n * group.num_units for n, group in zip(each, groups, strict=True))
    more = sum(n * (widest - group.num_units) for n, group in zip(each, groups, strict=True))
    return [f"padded to {widest} neurons a layer: {more:,} zeros beside {parameters:,} parameters"] if more else []

"""Where a model family keeps its MLP neurons and its heads: a few lines of data each.

To prune another architecture, describe it and register the description:

    register_family(Family(model_types=("persimmon",), layers="model.layers", mlp="mlp",
                           inputs=("dense_h_to_4h",), output="dense_4h_to_h", width_key="intermediate_size"))
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names by which models of one kind store their MLPs.

    Attributes:
        model_types: the `model_type` of the configs that the description fits.
        layers: dotted name of the list of layers; each is built as `Layer(config, index)` or `Layer(config)`.
        mlp: name of the MLP within a layer, "" where the projections belong to the layer itself.
        inputs: names of the projections that make the neurons' activations; two in a gated MLP, the same one twice
            where it makes first all of one half, then all of the other.
        output: name of the projection that reads them.
        width_key: the config's key for the number of neurons of an MLP.
        transposed: True where weights are stored (in, out), as by GPT-2's Conv1D, instead of (out, in).
        checkpoint_names: pairs of a name in the state dict and the one in files, where transformers tells them apart.
        attention: names of the linear projections of attention within a layer, the output's last.
        heads: how the rows of the other ones belong to heads: "apart", queries, keys and values have projections of
            their own; "by_head", one projection has those of each head together; "by_kind", it has first all queries,
            then all keys, then all values; "" where heads are not known to be removable.
        classifies: True for encoders, which classify texts; False for causal language models.
        spare_positions: rows of the table of positions that are never used, counted from `pad_token_id` on.
    """

    model_types: tuple[str, ...]
    layers: str
    mlp: str
    inputs: tuple[str, ...]
    output: str
    width_key: str
    transposed: bool = False
    checkpoint_names: tuple[tuple[str, str], ...] = ()
    attention: tuple[str, ...] = ()
    heads: Literal["", "apart", "by_head", "by_kind"] = ""
    classifies: bool = False
    spare_positions: bool = False


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known under each of its model types; a later description takes the place of an earlier one.

    Args:
        family: the description.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(family, Family):
        raise ValueError(f"{family!r} is no scale_prune.Family")
    FAMILIES.update(dict.fromkeys(family.model_types, family))


register = register_family  # its name before the front door had it


def _in(module: str, names: str) -> tuple[str, ...]:
    """Return the dotted names of what lies in a module; `names` stand with blanks between them."""
    return tuple(f"{module}.{name}" for name in names.split())


GPT_NEO = Family(
    model_types=("gpt_neo",),
    layers="transformer.h",
    mlp="mlp",
    inputs=("c_fc",),
    output="c_proj",
    width_key="intermediate_size",
    attention=_in("attn.attention", "q_proj k_proj v_proj out_proj"),
    heads="apart",
)
GPT_BIGCODE = replace(
    GPT_NEO,
    model_types=("gpt_bigcode",),
    width_key="n_inner",
    attention=_in("attn", "c_attn c_proj"),
    heads="by_head",
)
GPT_J = replace(
    GPT_NEO,
    model_types=("gptj",),
    inputs=("fc_in",),
    output="fc_out",
    width_key="n_inner",
    attention=_in("attn", "q_proj k_proj v_proj out_proj"),
)
FALCON = replace(
    GPT_NEO,
    model_types=("falcon",),
    inputs=("dense_h_to_4h",),
    output="dense_4h_to_h",
    width_key="ffn_hidden_size",
    attention=_in("self_attention", "query_key_value dense"),
    heads="by_head",
)
GPT_NEOX = replace(
    FALCON,
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    width_key="intermediate_size",
    checkpoint_names=(("lm_head.weight", "embed_out.weight"),),
    attention=_in("attention", "query_key_value dense"),
)
LLAMA = Family(
    model_types=(
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3"),
        *("gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "granite", "stablelm", "cohere", "cohere2"),
        *("exaone4", "seed_oss", "ernie4_5", "hunyuan_v1_dense"),
    ),
    layers="model.layers",
    mlp="mlp",
    inputs=("gate_proj", "up_proj"),
    output="down_proj",
    width_key="intermediate_size",
    attention=_in("self_attn", "q_proj k_proj v_proj o_proj"),
    heads="apart",
)
GLM = replace(LLAMA, model_types=("glm", "glm4"), inputs=("gate_up_proj", "gate_up_proj"))
PHI = replace(
    LLAMA, model_types=("phi",), inputs=("fc1",), output="fc2", attention=_in("self_attn", "q_proj k_proj v_proj dense")
)
OPT = replace(
    PHI,
    model_types=("opt",),
    layers="model.decoder.layers",
    mlp="",
    width_key="ffn_dim",
    attention=_in("self_attn", "q_proj k_proj v_proj out_proj"),
)
BERT = Family(
    model_types=("bert",),
    layers="bert.encoder.layer",
    mlp="",
    inputs=("intermediate.dense",),
    output="output.dense",
    width_key="intermediate_size",
    attention=_in("attention", "self.query self.key self.value output.dense"),
    heads="apart",
    classifies=True,
)
for family in (
    *(GPT_NEO, GPT_J, GPT_BIGCODE),
    replace(GPT_BIGCODE, model_types=("gpt2",), transposed=True, heads="by_kind"),
    replace(GPT_J, model_types=("codegen",), attention=_in("attn", "qkv_proj out_proj"), heads=""),
    *(FALCON, GPT_NEOX, LLAMA, GLM, PHI, OPT, BERT),
    # Its attention reads the number of heads in the config, which all layers share.
    replace(GLM, model_types=("phi3",), attention=_in("self_attn", "qkv_proj o_proj"), heads=""),
    replace(LLAMA, model_types=("arcee", "apertus", "nemotron"), inputs=("up_proj",)),
    replace(LLAMA, model_types=("starcoder2",), inputs=("c_fc",), output="c_proj"),
    replace(BERT, model_types=("electra",), layers="electra.encoder.layer"),
    replace(BERT, model_types=("roberta",), layers="roberta.encoder.layer", spare_positions=True),
):
    register_family(family)


def family_of(config: PretrainedConfig) -> Family:
    """Return the family that a model's config belongs to.

    Args:
        config: the model's config.

    Raises:
        ValueError: the config's `model_type` belongs to no registered family.
    """
    if model_type_of(config) not in FAMILIES:
        raise ValueError(
            f"no family is known for model type {config.model_type!r}; known are {', '.join(sorted(FAMILIES))}; "
            f"describe another in a few lines, scale_prune.register_family(scale_prune.Family(...)), in a --plugin"
        )
    return FAMILIES[model_type_of(config)]


def model_type_of(config: PretrainedConfig) -> str:
    """Return the model type of a config, of one that a layout has given its own that of the model it was."""
    return "llama" if config.model_type == "nemotron-nas" else str(config.model_type).removeprefix("factorized_")


def classifies(config: PretrainedConfig) -> bool:
    """Tell whether a config is that of an encoder, which classifies; of an unknown family, what its folder holds."""
    if (model_type := model_type_of(config)) in FAMILIES:
        return FAMILIES[model_type].classifies
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def auto_model(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads models of a config."""
    return AutoModelForSequenceClassification if classifies(config) else AutoModelForCausalLM


def stock_class(config: PretrainedConfig) -> Any:
    """Return the model class of transformers for a config, None if it has none."""
    heads = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if classifies(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return next((heads[kind] for kind in type(config).__mro__ if kind in heads), None)


def positions_of(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can read at once, None where its config does not say."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    family = FAMILIES.get(model_type_of(config))
    if positions is None or family is None or not family.spare_positions:
        return positions
    return int(positions - (config.pad_token_id + 1))

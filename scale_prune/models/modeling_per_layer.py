"""A causal language model whose layers have MLPs of different widths, and different numbers of heads.

Written beside a pruned model's weights, for `from_pretrained(folder, trust_remote_code=True)`. It is the model of
`transformers` in everything else. Widths and heads stand in config.json, under `per_layer_config`.
"""

import inspect
from typing import Any

import transformers
from torch import nn

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14):  # older ones name some weights otherwise
    raise ImportError(f"this model needs transformers 5.14 or newer, here is {transformers.__version__}")


ATTENTION = ["attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.out_proj"]
HEAD_COUNTS = (
    *("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "kv_heads"),
    *("kv_dim", "split_size", "all_head_size"),
)


def keep_heads(layer: Any, kept: int, heads: int) -> None:
    # Everything that is in proportion to the heads shrinks; what transformers would make of their number may not.
    for name in ATTENTION:
        parent, _, child = name.rpartition(".")
        attention, is_output = layer.get_submodule(parent), name == ATTENTION[-1]
        setattr(attention, child, narrower(getattr(attention, child), is_output, kept, heads))
    attention = layer.get_submodule(ATTENTION[0].rpartition(".")[0])
    for attribute in HEAD_COUNTS:
        if isinstance(count := getattr(attention, attribute, None), int):
            setattr(attention, attribute, count * kept // heads)


def narrower(module: Any, is_output: bool, kept: int, heads: int) -> Any:
    # A new module: in the making it may be sharded, and its weights have no shape.
    is_linear = isinstance(module, nn.Linear)
    sizes = [module.out_features, module.in_features] if is_linear else [module.nf, module.nx]
    sizes[is_output] = sizes[is_output] * kept // heads
    return type(module)(*sizes[::-1], bias=module.bias is not None) if is_linear else type(module)(*sizes)


class PerLayer:
    def __init__(self, config: Any) -> None:
        widths = config.to_dict().get("per_layer_config", {})
        # While per-layer values are set, the config refuses to tell the one width that the constructors read.
        config.per_layer_config = None
        super().__init__(config)  # type: ignore[call-arg]

        model: Any = self
        prefix, _, below = "transformer.h".partition(".")
        layers = model.get_submodule("transformer.h" if hasattr(model, prefix) else below)
        widest = config.intermediate_size
        for index, layer_config in widths.items():
            config.intermediate_size = layer_config["intermediate_size"]
            layer = type(layers[int(index)])
            takes_index = len(inspect.signature(layer).parameters) > 1
            layers[int(index)] = layer(config, int(index)) if takes_index else layer(config)
            if "num_attention_heads" in layer_config:
                keep_heads(layers[int(index)], layer_config["num_attention_heads"], config.num_attention_heads)

        config.intermediate_size = widest
        config.per_layer_config = widths
        model.post_init()


# `_auto_class` makes save_pretrained copy this file along.
class PerLayerGPTNeoForCausalLM(PerLayer, transformers.GPTNeoForCausalLM):
    _auto_class = "AutoModelForCausalLM"

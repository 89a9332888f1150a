"""A Llama whose MLPs have different widths, told in the form of Nemotron-NAS, which engines for serving read.

Written beside a pruned model's weights, for `from_pretrained(folder, trust_remote_code=True)`. The widths stand in
config.json, under `block_configs`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14):  # older ones take other arguments
    raise ImportError(f"this model needs transformers 5.14 or newer, here is {transformers.__version__}")


class Block(dict[str, Any]):
    # Engines ask for attributes, and config.json takes dictionaries.
    def __init__(self, words: Mapping[str, Any]) -> None:
        super().__init__({key: Block(each) if isinstance(each, dict) else each for key, each in words.items()})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"
    _auto_class = "AutoConfig"  # makes save_pretrained copy this file along

    def __init__(self, block_configs: Sequence[Mapping[str, Any]] = (), **words: Any) -> None:
        super().__init__(**words)
        self.block_configs = [Block(each) for each in block_configs]

    def width_of(self, layer: int) -> int:
        ffn = self.block_configs[layer].ffn
        if "ffn_mult" not in ffn:
            return int(ffn.intermediate_size)
        return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // 256) * 256


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        own = copy.copy(config)
        for index, layer in enumerate(self.model.layers):
            own.intermediate_size = config.width_of(index)
            layer.mlp = type(layer.mlp)(own)
            for name in ("q_proj", "k_proj", "v_proj") if getattr(config, "qkv_bias", False) else ():
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, nn.Linear(linear.in_features, linear.out_features))
        self.post_init()

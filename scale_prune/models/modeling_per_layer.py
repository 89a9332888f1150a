"""A causal language model whose MLPs have different widths, one for each layer.

Written beside a pruned model's weights, for `from_pretrained(folder, trust_remote_code=True)`. It is the model of
`transformers` in everything else. The widths stand in config.json, under `per_layer_config`.
"""

from typing import Any

from transformers import GPTNeoConfig, GPTNeoForCausalLM, __version__

if tuple(map(int, __version__.split(".")[:2])) < (5, 14):  # older ones name some weights otherwise
    raise ImportError(f"this model needs transformers 5.14 or newer, here is {__version__}")


class PerLayerGPTNeoForCausalLM(GPTNeoForCausalLM):
    _auto_class = "AutoModelForCausalLM"  # makes save_pretrained copy this file along

    def __init__(self, config: GPTNeoConfig) -> None:
        widths = config.to_dict().get("per_layer_config", {})
        # While per-layer values are set, the config refuses to tell the one width that the constructors read.
        config.per_layer_config = None
        super().__init__(config)

        layers: Any = self.get_submodule("transformer.h")
        widest = config.intermediate_size
        for index, layer_config in widths.items():
            config.intermediate_size = layer_config["intermediate_size"]
            layers[int(index)] = type(layers[int(index)])(config, int(index))

        config.intermediate_size = widest
        config.per_layer_config = widths
        self.post_init()

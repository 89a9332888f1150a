"""A causal language model whose MLPs have different widths, one for each layer.

Written beside a pruned model's weights, for `from_pretrained(folder, trust_remote_code=True)`. It is the model of
`transformers` in everything else. The widths stand in config.json, under `per_layer_config`.
"""

from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14):  # older ones name some weights otherwise
    raise ImportError(f"this model needs transformers 5.14 or newer, here is {transformers.__version__}")


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
            layers[int(index)] = type(layers[int(index)])(config, int(index))

        config.intermediate_size = widest
        config.per_layer_config = widths
        model.post_init()


# `_auto_class` makes save_pretrained copy this file along.
class PerLayerGPTNeoForCausalLM(PerLayer, transformers.GPTNeoForCausalLM):
    _auto_class = "AutoModelForCausalLM"

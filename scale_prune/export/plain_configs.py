"""A config as transformers has it, whatever layout a folder is in."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from scale_prune.models import FACTOR_WORDS
from scale_prune.models.modeling_nemotron_nas import DeciLMConfig

PER_LAYER_WORDS = ("serialize_explicit_per_layer_config", "allow_global_per_layer_attribute_access")
MODELING_FILE = Path(__file__).parents[1] / "models" / "modeling_per_layer.py"


def without_layout(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config without what tells a layout, for a model that was pruned before."""
    if config.model_type == DeciLMConfig.model_type:
        return stock_config(config.to_dict())
    config = copy.deepcopy(config)
    config.per_layer_config = None
    for word in PER_LAYER_WORDS:
        vars(config).pop(word, None)
    named = getattr(config, "auto_map", None) or {}
    if MODELING_FILE.stem in str(named) or type(config).__module__.startswith("transformers.models."):
        vars(config).pop("auto_map", None)
        # Of a hub's code the config's own part would have run first: who has a stock config ran none of it.
        hub = {} if "AutoConfig" in named else {name: code for name, code in named.items() if "--" in str(code)}
        if hub:
            config.auto_map = hub
    return config


def stock_config(words: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config of transformers for what config.json says, in whatever layout; no code of the folder runs.

    Raises:
        ValueError: transformers knows no such model type.
    """
    layout_words = ("auto_map", "architectures", "per_layer_config", *PER_LAYER_WORDS)
    plain = {key: value for key, value in words.items() if key not in (*layout_words, *FACTOR_WORDS, "block_configs")}
    model_type = str(plain.pop("model_type", "")).removeprefix("factorized_")
    if model_type == DeciLMConfig.model_type:
        model_type = "qwen2" if plain.pop("qkv_bias", False) else "llama"
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model type {model_type!r} is not known to transformers")
    if len(words.get("factorized_embedding", {"names": []})["names"]) > 1:
        plain["tie_word_embeddings"] = True
    kind: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return kind.from_dict(plain)

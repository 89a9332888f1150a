"""A model that a flag names: its config, its tokenizer and its shape, read without its weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from scale_prune.models import FACTOR_WORDS, auto_model


def built(model_config: PretrainedConfig, name: str | None, trusted: bool, *, flag: str = "model") -> PreTrainedModel:
    """Return a model without weights.

    Raises:
        ValueError: it is built by code of its own, which the user does not trust, or cannot be built.
    """
    values = model_config.to_dict()
    own = {"per_layer_config": "layers of different widths", **dict.fromkeys(FACTOR_WORDS, "factorized weights")}
    for key, what in own.items():
        if values.get(key) and not trusted:
            raise ValueError(
                f"--{flag} {name} has {what}, which the modeling file in that folder builds; "
                "give --trust_remote_code to run that file"
            )
    try:
        with torch.device("meta"):
            model = auto_model(model_config).from_config(model_config, trust_remote_code=trusted)
    except Exception as error:  # whatever an architecture raises at values it cannot be built with
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise ValueError(f"--{flag} {name}: no model can be built from its config: {reason}") from error
    return model


def check_weights(folder: Path, *, flag: str = "model") -> None:
    """See that the files with a local model's weights are whole; what a hub has is found out when it is loaded.

    Raises:
        ValueError: one of them is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"--{flag} {folder}: its weights cannot be read: {path.name} is damaged, {error}"
            ) from error


def read_config(name: str | None, trusted: bool, *, flag: str = "model") -> PretrainedConfig:
    """Read a model's config.

    Raises:
        ValueError: it cannot be read, or its weights are quantized.
    """
    config: PretrainedConfig = read("model", name, AutoConfig, trusted, flag=flag)
    values = config.to_dict()
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]  # of a composite config one may be
    if quantized := next(filter(None, (part.get("quantization_config") for part in parts)), None):
        raise ValueError(
            f"--{flag} {name} has weights quantized by {quantized.get('quant_method', 'some method')}, which can be "
            "neither trained nor sharded by ZeRO-3; give the 16-bit model that they were made from"
        )
    return config


def read(what: str, name: str | None, kind: Any, trusted: bool, *, flag: str = "model") -> Any:
    """Read a part of a model, by a class of transformers.

    Raises:
        ValueError: it cannot be read.
    """
    assert name is not None
    try:
        return kind.from_pretrained(name, trust_remote_code=trusted)
    except Exception as error:  # a broken file raises whatever its content comes to
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--{flag} {name}: its {what} cannot be read, neither as a folder nor as a hub name: {reason}"
        ) from error

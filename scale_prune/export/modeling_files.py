"""The modeling files that stand beside a model's weights: which one, and with whose names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING, PretrainedConfig

from scale_prune.export.plain_configs import MODELING_FILE
from scale_prune.models import auto_model, classifies, family_of, model_type_of, stock_class
from scale_prune.models.families import GPT_NEO

OTHER_HEAD = """

class PerLayer{name}(PerLayer, transformers.{name}):
    _auto_class = "{loader}"
"""
FACTORIZED_FILE = MODELING_FILE.with_name("modeling_factorized.py")
NEMOTRON_FILE = MODELING_FILE.with_name("modeling_nemotron_nas.py")
OTHER_HEADS: dict[str, Any] = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}


def set_code(config: PretrainedConfig, file: Path, name: str) -> None:
    """Name a class of one of our files in a config."""
    config.architectures = [name]
    config.auto_map = {auto_model(config).__name__: f"{file.stem}.{name}"}


def stock_config_class(config: PretrainedConfig) -> type[PretrainedConfig]:
    """Return the class of transformers for a config, also of one that we have left with factors."""
    kind: type[PretrainedConfig] = CONFIG_MAPPING[model_type_of(config)]
    return kind


def code_of(config: PretrainedConfig) -> Path | None:
    """Return the modeling file that a written config names, if it is one of ours."""
    auto_map = str(getattr(config, "auto_map", None))
    return next(
        (file for file in (MODELING_FILE, FACTORIZED_FILE, NEMOTRON_FILE) if f"'{file.stem}." in auto_map), None
    )


def modeling_source(file: Path, config: PretrainedConfig) -> str:
    """Return a modeling file of ours, which is GPT-Neo's, with the names of another family."""
    family = family_of(config)
    names = {
        "AutoModelForCausalLM": auto_model(config).__name__,
        "A causal language model": "A classifier" if classifies(config) else "A causal language model",
        "GPTNeoForCausalLM": stock_class(config).__name__,
        "GPTNeoConfig": stock_config_class(config).__name__,
        "factorized_gpt_neo": f"factorized_{model_type_of(config)}",
        _listed(GPT_NEO.attention): _listed(family.attention),
        "transformer.h": family.layers,
        "intermediate_size": family.width_key,
    }
    source = file.read_text(encoding="utf-8")
    if file == NEMOTRON_FILE:
        return source
    for ours, theirs in names.items():
        source = source.replace(ours, theirs)
    others = other_heads(config) if file == MODELING_FILE else []
    return source + "".join(OTHER_HEAD.format(loader=loader, name=name) for loader, name in others)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def other_heads(config: PretrainedConfig) -> list[tuple[str, str]]:
    """Return other classes that load the same layers: what loads them, and their names in transformers."""
    own = auto_model(config).__name__
    kinds = [kind for kind in type(config).__mro__ if kind in MODEL_MAPPING][:1]
    heads = [(loader, known[kind]) for kind in kinds for loader, known in OTHER_HEADS.items() if kind in known]
    return [(loader, head.__name__) for loader, head in heads if loader != own]


def own_code(config: PretrainedConfig) -> list[Path]:
    """Return the modules of the local folder that a config comes from, where it names code that is not ours."""
    named, source = str(getattr(config, "auto_map", None) or ""), config.name_or_path
    theirs = named and "--" not in named and code_of(config) is None
    return sorted(Path(source).glob("*.py")) if theirs and source and Path(source).is_dir() else []

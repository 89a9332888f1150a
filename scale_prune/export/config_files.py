"""config.json and tokenizer_config.json in words that transformers 4.57 reads as well as transformers 5.

Of what transformers 5 writes, 4.57 passes over `rope_parameters` without a word and takes its own defaults, and it
knows neither the tokenizer class TokenizersBackend nor a list of extra special tokens. Both read the older words.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from scale_prune.models import FACTOR_WORDS

OWN_ROPE_KEYS = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""By model type, what its older configs call what others call so."""

BOS_BY_DEFAULT = ("LlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes whose tokenizers in 4.57 put a token first, whatever tokenizer.json says."""


def write_config(folder: Path, config: PretrainedConfig) -> None:
    """Write config.json, with the older words for rotary embeddings where transformers 5 is not misled by them."""
    config.save_pretrained(folder)
    content = written = _read(folder / "config.json")
    if older := _older_rope(content.get("rope_parameters") or {}, content["model_type"]):
        understood, again = (_understood(type(config), words) for words in (content, content | older))
        if all(again.get(key) == value for key, value in understood.items() if key not in older):
            content = content | older
    if any(word in content for word in FACTOR_WORDS):  # its class is not here, but in the folder
        content = content | {"model_type": f"factorized_{content['model_type']}"}
    if content != written:
        _write(folder / "config.json", content)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer's files."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if not path.is_file():  # Mistral's own format
        return
    content = _read(path)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    if content.get("tokenizer_class", "").startswith(BOS_BY_DEFAULT) and not tokenizer("")["input_ids"]:
        content["add_bos_token"] = False
    _write(path, content)


def _understood(config_class: type[PretrainedConfig], words: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers 5 makes of a config's words."""
    told: dict[str, Any] = config_class.from_dict(copy.deepcopy(words)).to_dict()
    told["rope_parameters"].pop("type", None)  # beside `rope_type`, which is the same
    return told


def _older_rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return the keys that tell `rope_parameters` to transformers 4.57, none where these cannot.

    Of two kinds of layers Gemma 3's have a word for each base, those of others one for both.
    """
    local, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or rope
    names = OWN_ROPE_KEYS.get(model_type, {})
    apart = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    older = {names.get(key, key): value for key, value in apart.items()}
    if local and model_type == "gemma3_text":
        older["rope_local_base_freq"] = local["rope_theta"]
    elif local and local != rope:
        return {}
    if rope.get("rope_type", "default") != "default":
        told = {key: value for key, value in rope.items() if key not in apart}
        if model_type == "phi3":  # which takes these three alone
            told = {"type": rope["rope_type"]} | {key: rope.get(key) for key in ("short_factor", "long_factor")}
        older["rope_scaling"] = told
    return older


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

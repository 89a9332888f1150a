"""What a tokenizer puts before a text of its own accord: its BOS token, and a blank.

Models that were trained with a BOS token predict badly without it, so every sequence that a model sees begins with it:
each block, each prompt. The blank, of Llama 2's tokenizer and its like, belongs before a text, not where one goes on.
"""

import copy
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

NO_BLANK: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}
"""What the parts of a tokenizer that put a blank before a text are to say so that they put none."""


def bos_of(choice: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that every sequence begins with, None where it is to begin with the text.

    Args:
        choice: "always", "never", or "auto" for what the tokenizer does by itself.
        tokenizer: the model's.

    Raises:
        ValueError: always, but the tokenizer has no BOS token.
    """
    bos: int | None = tokenizer.bos_token_id
    if choice == "always" and bos is None:
        raise ValueError("--bos always needs a bos_token, which the model's tokenizer has not; give auto or never")
    return bos if choice == "always" or (choice == "auto" and adds_bos(tokenizer)) else None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer begins a text with its BOS token where nothing asks otherwise."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x", verbose=False)["input_ids"][:1] == [bos]


def with_bos(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy, that begins a text with its BOS token or does not, as is wanted."""
    if adds_bos(tokenizer) == wanted:
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other.add_bos_token = wanted
    return other


def continuing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer of text that goes on where other text ended: the same, or a copy that puts no blank before it.

    A tokenizer that is no fast one is returned as it is.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = {name: getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer")}
    before = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}
    after = {name: _without_blank(part) for name, part in before.items()}
    if after == before:
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other._tokenizer = type(backend).from_str(json.dumps(json.loads(backend.to_str()) | after))
    return other


def _without_blank(part: dict[str, Any]) -> dict[str, Any] | None:
    """Return the description of a part of a tokenizer, or of a sequence of such, without the blank."""
    if part["type"] == "Prepend":
        return None
    own = {key: value for key, value in NO_BLANK.get(part["type"], {}).items() if key in part}
    inner = {
        key: [kept for each in part[key] if (kept := _without_blank(each)) is not None]
        for key in ("normalizers", "pretokenizers")
        if key in part
    }
    return part | own | inner

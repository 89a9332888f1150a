"""A tokenizer in the keys of GGUF."""

import json
from pathlib import Path
from typing import Any

from gguf import SpecialVocab, TokenType

LLAMA_3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA_3, "ByteLevel"): "llama-bpe",
    (LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"), "ByteLevel"): "qwen2",
}
"""How a tokenizer splits a text before it merges bytes, and what llama.cpp calls that."""


def add_tokens(writer: Any, folder: Path, size: int) -> bool:
    """Tell the tokens, how texts become tokens, special ones and the chat template; return whether there are any.

    Args:
        writer: a GGUFWriter.
        folder: the model's folder.
        size: rows of the embedding, at least as many as there are tokens.

    Raises:
        ValueError: a kind of tokenizer that llama.cpp does not have, or whose name there is not known.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        writer.add_tokenizer_model("no_vocab")
        return False
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    check_tokens(tokenizer, size)
    by_bytes = _is_byte_level(tokenizer)
    texts, types = _tokens(tokenizer, size)
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(_split(tokenizer) if by_bytes else "default")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if not by_bytes:
        writer.add_token_scores(_scores(tokenizer, texts))
        writer.add_add_space_prefix(_begins_with_blank(tokenizer))
    special = SpecialVocab(folder, load_merges=by_bytes, n_vocab=size)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)
    return True


def check_tokens(tokenizer: dict[str, Any], size: int) -> None:
    """Make sure that llama.cpp can read texts as a tokenizer does.

    Args:
        tokenizer: the contents of tokenizer.json.
        size: rows of the embedding.

    Raises:
        ValueError: a kind that llama.cpp does not have, or that splits texts in a way whose name there is not known; a
            token has no row.
    """
    if (kind := tokenizer["model"].get("type")) != "BPE":
        raise ValueError(f"gguf cannot tell a tokenizer of type {kind}, only BPE")
    unknown = {part["type"] for part in _parts(tokenizer.get("normalizer"), "normalizers")}
    if _is_byte_level(tokenizer):
        _split(tokenizer)
        unknown -= {"NFC"}
    else:
        parts = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
        splits = {part["type"] for part in parts if part.get("pattern") != {"String": " "}}
        unknown = (unknown - {"Prepend", "Replace"}) | (splits - {"Metaspace"})
    if unknown:
        raise ValueError(f"gguf cannot tell what the tokenizer does to texts first: {', '.join(sorted(unknown))}")
    if (largest := max(_numbers(tokenizer))) >= size:
        raise ValueError(f"gguf needs a row of the embedding for every token: {largest + 1} tokens, {size} rows")


def _numbers(tokenizer: dict[str, Any]) -> list[int]:
    added = (token["id"] for token in tokenizer.get("added_tokens", ()))
    return [*tokenizer["model"]["vocab"].values(), *added]


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return texts and types of `size` tokens; numbers that no token has are unused ones."""
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, number in tokenizer["model"]["vocab"].items():
        is_byte = not _is_byte_level(tokenizer) and len(text) == 6 and text.startswith("<0x")
        texts[number], types[number] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        texts[added["id"]], types[added["id"]] = added["content"], int(kind)
    unknown = tokenizer["model"].get("unk_token")
    if unknown in tokenizer["model"]["vocab"] and not _is_byte_level(tokenizer):
        types[tokenizer["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return texts, types


def _scores(tokenizer: dict[str, Any], texts: list[str]) -> list[float]:
    """Return for each token minus the rank of the merge that makes it: llama.cpp merges the highest first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    return [-float(ranks.get(text, len(ranks))) for text in texts]


def _parts(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if stage is None:
        return []
    return list(stage[key]) if stage["type"] == "Sequence" else [stage]


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def _split(tokenizer: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a text is split.

    Raises:
        ValueError: it is none of those that are known here.
    """
    parts = _parts(tokenizer["pre_tokenizer"], "pretokenizers")
    split = tuple(part["pattern"].get("Regex", "") if part["type"] == "Split" else part["type"] for part in parts)
    by_words = parts[-1].get("use_regex", True)
    usual = {"Digits": parts[0].get("individual_digits", False) and by_words, "ByteLevel": by_words}
    if split not in SPLITS or parts[-1].get("add_prefix_space") or not usual.get(split[0], True):
        raise ValueError(f"gguf has no known name for the way in which the tokenizer splits texts: {parts}")
    return SPLITS[split]


def _begins_with_blank(tokenizer: dict[str, Any]) -> bool:
    prepends = any(part["type"] == "Prepend" for part in _parts(tokenizer.get("normalizer"), "normalizers"))
    schemes = {part.get("prepend_scheme") for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")}
    return prepends or bool(schemes & {"first", "always"})

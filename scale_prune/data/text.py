"""Text in, blocks of tokens out: one stream of tokens, cut into consecutive blocks.

The stream is defined so that anyone can recompute it: rows are tokenized one by one, without special tokens, and
joined. The rows of a txt file are its lines, which keep their newline, with nothing between them, not even the blank
that some tokenizers put before a text. The rows of every other format are documents, with the end-of-text token between
them, but for data sets of lines, such as WikiText's. Nothing here communicates: every rank prepares the same stream,
from one cache on disk.

Where the model was trained with a BOS token, every block begins with it, also one that begins amid a document, and only
blocks do: a block is what the model sees as one sequence. It counts for the block's size but is no text: `eval_tokens`
does not count it, it is never predicted, and the block's first token of text is predicted from it.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scale_prune.config import DataConfig
from scale_prune.data.batches import TokenBlocks
from scale_prune.data.beginnings import bos_of, continuing
from scale_prune.data.rows import Split, Text, have_newlines, load_text
from scale_prune.data.tokens import tokenized


def prepare(spec: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
    """Read, tokenize and cut one split.

    Every rank gets the same blocks without communication. The tokens are cached on disk by the content of text and
    tokenizer; let one rank of a machine go first, so that the others find them there.

    Args:
        spec: which text, and how it is cut.
        split: "train" drops the last block where it is shorter; "validation" keeps it if it has 2 tokens or more, BOS
            included (one token alone predicts nothing), and ends after `spec.eval_tokens` tokens where that is not 0.
        tokenizer: turns text into tokens.

    Raises:
        ValueError: as `bos_of`, `load_text` and `token_stream`, or too few tokens: fewer than one block for training,
            fewer than 2 for validation, BOS included.
    """
    bos = bos_of(spec.bos, tokenizer)
    text = load_text(spec, split)
    tokens = token_stream(text, tokenizer)
    whole = TokenBlocks(tokens, spec.block_size, bos)
    if split == "train":
        kept = len(tokens) - len(tokens) % whole.stride
    else:
        limit = min(len(tokens), spec.eval_tokens or len(tokens))
        kept = limit - (bos is None and limit % spec.block_size == 1)
    if kept < _needed(spec, split, bos):
        raise ValueError(_too_short(spec, split, text, len(tokens), bos))
    return replace(whole, tokens=tokens[:kept])


def check_length(spec: DataConfig, split: Split, text: Text, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text that `prepare` would find too short; no more rows are tokenized than that takes, none are kept.

    Raises:
        ValueError: too few tokens, or no token to end documents with, as in `prepare`.
    """
    bos, between = bos_of(spec.bos, tokenizer), len(_end_of(text, tokenizer))
    encode = continuing(tokenizer) if text.lines else tokenizer
    found = -between
    for row in text.rows[text.columns[0]]:
        found += len(encode(row or "", add_special_tokens=False, verbose=False)["input_ids"]) + between
        if found >= _needed(spec, split, bos):
            return
    raise ValueError(_too_short(spec, split, text, found, bos))


def _needed(spec: DataConfig, split: Split, bos: int | None) -> int:
    """Return how many tokens of text a split must have."""
    return (spec.block_size if split == "train" else 2) - (bos is not None)


def _too_short(spec: DataConfig, split: Split, text: Text, found: int, bos: int | None) -> str:
    return (
        f"{split} text {text.name} has {found:,} tokens, at least {_needed(spec, split, bos):,} are needed "
        f"(block_size {spec.block_size}{'' if bos is None else ' with BOS'}, eval_tokens {spec.eval_tokens})"
    )


def _end_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what ends a row: the end-of-text token after a document, after a line the newline if lines are without.

    Raises:
        ValueError: the rows are documents and the tokenizer has no end-of-text token.
    """
    if text.lines:
        return [] if have_newlines(text) else continuing(tokenizer)("\n", add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    if None in end:
        raise ValueError(f"the tokenizer has no eos_token, which stands between the documents of {text.name}")
    return end


def token_stream(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokenize the rows one by one and join them.

    Returns:
        the stream, int32, one-dimensional: no special tokens, but the end-of-text token between two documents, and a
        newline between two lines that have none.

    Raises:
        ValueError: the rows are documents and the tokenizer has no end-of-text token.
    """
    end = _end_of(text, tokenizer)
    tokenizer = continuing(tokenizer) if text.lines else tokenizer
    encode = partial(_encode, tokenizer=tokenizer, column=text.columns[0], end=end)
    stream = torch.from_numpy(tokenized(text, encode, ("tokens",))["tokens"].tokens)
    return stream[: len(stream) - len(end)]


def _encode(
    batch: dict[str, list[str | None]], *, tokenizer: PreTrainedTokenizerBase, column: str, end: list[int]
) -> dict[str, list[list[int]]]:
    # A missing text is an empty one: a csv file cannot tell them apart.
    texts = [text or "" for text in batch[column]]
    tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"tokens": [ids + end for ids in tokens]}

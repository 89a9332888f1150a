"""Prompts with their completions: one example a row, tokenized, assigned to the ranks, padded on the right.

An example is the BOS token where the model was trained with one, the prompt's tokens, the completion's, and the
end-of-text token; prompt and completion are tokenized apart, without special tokens, the completion also without the
blank that some tokenizers put before a text, because it goes on where the prompt ended. Only the completion and its end
are learned: all other labels are IGNORED, and padding is outside of the attention mask.

Shape letters: B examples in a forward pass, T tokens of the longest of them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from scale_prune.config import Config
from scale_prune.core import IGNORED
from scale_prune.data import (
    Pieces,
    Split,
    Template,
    Text,
    Tokens,
    assigned,
    bos_of,
    columns_of,
    continuing,
    load_text,
    templates_of,
    tokenized,
)
from scale_prune.tasks.task import MicroBatch, Step


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenized examples of one split.

    Attributes:
        prompts: the prompts' tokens with the BOS token, if there is one.
        completions: the completions' tokens with the end-of-text token.
        text: the rows that they come from, one an example.
        dropped: rows that were left out because they are longer than a block.
    """

    prompts: Pieces
    completions: Pieces
    text: Text
    dropped: int

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, int64."""
        return torch.from_numpy(self.prompts.lengths + self.completions.lengths)

    @property
    def counted(self) -> Tensor:
        """Tokens of each example that are learned, int64."""
        return torch.from_numpy(self.completions.lengths)

    def all_tokens(self) -> Tensor:
        """Return prompts and completions, one after another, int32."""
        return torch.cat([self.prompts.joined(), self.completions.joined()])

    def fingerprint(self) -> str:
        """Return a hash of all tokens and of where they are cut."""
        found = hashlib.sha256()
        self.prompts.add_to(found)
        self.completions.add_to(found)
        return found.hexdigest()


def prepare(config: Config, split: Split, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read and tokenize the examples of one split; every rank gets the same without communication.

    Args:
        config: the settings, with both templates.
        split: the part that is wanted.
        tokenizer: turns text into tokens.

    Raises:
        ValueError: as `bos_of` and `load_text`; a prompt or a completion is empty; an example is longer than a block,
            and such are not to be dropped, or all are; the tokenizer has no end-of-text token.
    """
    text = load_text(config.data, split, columns_of(config.task))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer has no eos_token, which ends the completions of {text.name}")
    prompt, completion = templates_of(config.task)
    encode = partial(
        _encode,
        tokenizer=tokenizer,
        following=continuing(tokenizer),
        bos=bos_of(config.data.bos, tokenizer),
        prompt=prompt,
        completion=completion,
    )
    parts = tokenized(text, encode, ("prompt", "completion"))
    refuse_empty(config, text, parts)
    kept = short_enough(config, text, parts)
    return Examples(
        prompts=Pieces(parts["prompt"], kept),
        completions=Pieces(parts["completion"], kept),
        text=text.select(kept, text.part),
        dropped=len(text.rows) - len(kept),
    )


def _encode(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    following: PreTrainedTokenizerBase,
    bos: int | None,
    prompt: Template,
    completion: Template,
) -> dict[str, list[list[int]]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def encoded(encode: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
        return encode(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def begun(ids: list[int]) -> list[int]:
        # A template may begin with the BOS token itself; an empty prompt stays empty, and is refused as such.
        return ids if bos is None or ids[:1] in ([], [bos]) else [bos, *ids]

    completions = [completion.fill(row) for row in rows]
    ended = [[*ids, tokenizer.eos_token_id] for ids in encoded(following, completions)]
    return {
        "prompt": [begun(ids) for ids in encoded(tokenizer, [prompt.fill(row) for row in rows])],
        # A completion of blanks alone is an empty one, and is refused as such.
        "completion": [ids if text.strip() else [] for ids, text in zip(ended, completions, strict=True)],
    }


def refuse_empty(config: Config, text: Text, parts: Mapping[str, Tokens]) -> None:
    """Refuse rows of which a part, by the name of its template, has no tokens."""
    for what, tokens in parts.items():
        if len(empty := np.flatnonzero(tokens.lengths == 0)):
            template = getattr(config.task, f"{what}_template")
            raise ValueError(
                f"row {text.number(empty[0])} of {text.name} has an empty {what}, by --{what}_template {template!r}; "
                f"{len(empty)} of {len(text.rows)} rows have, leave them out of the data set"
            )


def short_enough(config: Config, text: Text, parts: Mapping[str, Tokens]) -> np.ndarray:
    """Return the numbers of the rows whose parts together fit into a block.

    Raises:
        ValueError: a row is too long, and such are not to be dropped, or none fits.
    """
    block, lengths = config.data.block_size, np.sum([tokens.lengths for tokens in parts.values()], axis=0)
    kept, long = np.flatnonzero(lengths <= block), np.flatnonzero(lengths > block)
    if len(long) and (config.task.long_examples == "refuse" or not len(kept)):
        first = int(long[0])
        sizes = " and ".join(f"a {what} of {tokens.lengths[first]} tokens" for what, tokens in parts.items())
        raise ValueError(
            f"row {text.number(first)} of {text.name} has {sizes}, special ones included, more than --block_size "
            f"{block}; {len(long)} of {len(lengths)} rows are too long, the longest has {lengths.max()}: give a larger "
            "--block_size" + (", or --long_examples drop" if len(kept) else "")
        )
    return kept


def collate(examples: Examples, rows: Sequence[int]) -> dict[str, Tensor]:
    """Put examples into a batch.

    Args:
        examples: where they are.
        rows: their numbers, B of them; one outside of the examples stands for filling, of which nothing counts.

    Returns:
        input_ids, attention_mask and labels, int64 (B, T); labels are the input, not shifted, IGNORED outside of the
        completions.
    """
    ids, labels = [], []
    for row in rows:
        there = row < len(examples)
        prompt, completion = examples.prompts[row if there else 0].long(), examples.completions[row if there else 0]
        ids.append(torch.cat([prompt, completion.long()]))
        learned = completion.long() if there else torch.full((len(completion),), IGNORED)
        labels.append(torch.cat([torch.full_like(prompt, IGNORED), learned]))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def training_steps(
    examples: Examples, shape: tuple[int, int, int], *, rank: int, seed: int, first_step: int = 0
) -> Iterator[Step]:
    """Yield one rank's part of the optimizer steps, without end.

    A step's examples are the same for every number of ranks. A forward pass's mean loss over its completion tokens gets
    a weight, by which the mean over all passes of all ranks is that over all completion tokens of the step: examples
    are counted by what there is to learn in them, however they are assigned.

    Args:
        examples: the training examples, at least one.
        shape: forward passes of a rank in a step, ranks, examples in a forward pass (B).
        rank: this rank.
        seed: seed of the order.
        first_step: the step to begin with.
    """
    counted, lengths = examples.counted, examples.lengths
    for chosen in assigned(len(examples), shape, seed=seed, first_step=first_step):
        mean = float(counted[chosen].sum()) / (shape[0] * shape[1])
        passes = [
            MicroBatch(inputs=collate(examples, rows.tolist()), weight=float(counted[rows].sum()) / mean)
            for rows in chosen[:, rank]
        ]
        yield Step(micro_batches=passes, tokens=int(lengths[chosen].sum()))


def validation_batches(
    examples: Examples, count: int, *, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input_ids and labels of one rank's part of the first `count` examples; as many batches on every rank."""
    per_pass = micro_batch_size * world_size
    for start in range(rank * micro_batch_size, rank * micro_batch_size + count, per_pass):
        rows = [row if row < count else len(examples) for row in range(start, start + micro_batch_size)]
        batch = collate(examples, rows)
        yield batch["input_ids"], batch["labels"]

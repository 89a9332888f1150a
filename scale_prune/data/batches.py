"""Blocks of tokens, assigned to the ranks: which block is in which forward pass of which rank.

Shape letters: B blocks in a forward pass, T tokens in a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counting
from itertools import islice
from math import prod

import numpy as np
import torch
from torch import Tensor

from scale_prune.core import IGNORED


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """A stream of tokens, cut into consecutive blocks.

    Attributes:
        tokens: the stream, int32, one-dimensional.
        block_size: tokens in a block; only the last block may be shorter.
        bos: the token that every block begins with, before those of the stream; None for no such token.
    """

    tokens: Tensor
    block_size: int
    bos: int | None = None

    @property
    def stride(self) -> int:
        """Tokens of the stream in a block."""
        return self.block_size - (self.bos is not None)

    @property
    def all_tokens(self) -> Tensor:
        """All tokens of all blocks, int32, the stream first."""
        if self.bos is None:
            return self.tokens
        return torch.cat([self.tokens, torch.full((len(self),), self.bos, dtype=self.tokens.dtype)])

    def __len__(self) -> int:
        """Return the number of blocks, the shorter last one included."""
        return -(-len(self.tokens) // self.stride)

    def block(self, index: int) -> Tensor:
        """Return the tokens of one block, int64 (block_size,), or fewer in the last block."""
        text = self.tokens[index * self.stride : (index + 1) * self.stride].long()
        return text if self.bos is None else torch.cat([torch.tensor([self.bos]), text])


def training_batches(
    blocks: TokenBlocks,
    *,
    batch_size: int,
    micro_batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[list[Tensor]]:
    """Yield, for each optimizer step, the micro batches of one rank; without end.

    Every epoch goes through all blocks in a new order, made from `seed` and the epoch's number alone; a step takes the
    next `batch_size` of them, across the end of an epoch too. So a step's blocks are the same for every world size; and
    where `micro_batch_size * world_size` is the same, so are those that all ranks together see in one forward pass.

    Args:
        blocks: full blocks, at least one.
        batch_size: blocks in an optimizer step, over all ranks: micro_batch_size * accumulation * world_size.
        micro_batch_size: blocks in a forward pass of one rank, B.
        accumulation: forward passes in an optimizer step.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        seed: seed of the order, at least 0.
        first_step: the step to begin with, at least 0; for going on with a run.

    Yields:
        `accumulation` tensors, int64 (B, T).
    """
    assert batch_size == micro_batch_size * accumulation * world_size
    for chosen in assigned(len(blocks), (accumulation, world_size, micro_batch_size), seed=seed, first_step=first_step):
        yield [torch.stack([blocks.block(index) for index in indices]) for indices in chosen[:, rank].tolist()]


def assigned(count: int, shape: tuple[int, int, int], *, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Yield which rows every optimizer step has, and in which forward pass of which rank; without end.

    Args:
        count: rows there are, at least one.
        shape: forward passes of a rank in a step, ranks, rows in a forward pass.
        seed: seed of the order, at least 0.
        first_step: the step to begin with, at least 0.

    Yields:
        row numbers, int64 of `shape`.
    """
    order = _row_order(count, seed, first_step * prod(shape))
    while True:
        yield torch.tensor(list(islice(order, prod(shape)))).view(shape)


def validation_batches(
    blocks: TokenBlocks, *, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the part of one rank, once through all blocks.

    All ranks yield the same number of batches of the same shape, because a forward pass under ZeRO-3 is a collective:
    short or missing rows are filled with token 0. The filling needs no attention mask: it comes after the real tokens,
    and a causal model does not look ahead.

    Args:
        blocks: the validation text.
        micro_batch_size: rows of a batch, B.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.

    Yields:
        input_ids and labels, both int64 (B, T). The labels are the input, not shifted, and -100 at the filling.
    """
    per_pass = micro_batch_size * world_size
    for start in range(rank * micro_batch_size, rank * micro_batch_size + len(blocks), per_pass):
        input_ids = torch.zeros(micro_batch_size, blocks.block_size, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED)
        for row, index in enumerate(range(start, min(start + micro_batch_size, len(blocks)))):
            block = blocks.block(index)
            input_ids[row, : len(block)] = labels[row, : len(block)] = block
        yield input_ids, labels


def _row_order(num_rows: int, seed: int, first: int) -> Iterator[int]:
    """Yield row numbers without end, from place `first` of the line of all epochs."""
    epoch, place = divmod(first, num_rows)
    for number in counting(epoch):
        yield from map(int, np.random.default_rng((seed, number)).permutation(num_rows)[place:])
        place = 0

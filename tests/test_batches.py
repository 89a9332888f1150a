"""Which block goes where does not depend on the number of ranks."""

import hashlib
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_prune.config.settings import Config
from scale_prune.data import Inputs
from scale_prune.data.batches import TokenBlocks, assigned, training_batches, validation_batches
from scale_prune.tasks.language_modeling import fingerprint

BLOCK = 3
BATCH = 12


def numbered(num_blocks: int, last: int = BLOCK) -> TokenBlocks:
    """Return blocks of distinct tokens above 0, the last one with only `last` tokens."""
    return TokenBlocks(torch.arange(1, num_blocks * BLOCK + 1 - (BLOCK - last), dtype=torch.int32), BLOCK)


def steps(blocks: TokenBlocks, num_steps: int, *, world_size: int = 1, accumulation: int = 1, **more: int) -> Tensor:
    """Return the global batches (steps, BATCH, BLOCK), put together from all ranks pass by pass."""
    micro = BATCH // world_size // accumulation
    ranks = [
        training_batches(
            blocks,
            batch_size=BATCH,
            micro_batch_size=micro,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            **({"seed": 0} | more),
        )
        for rank in range(world_size)
    ]
    batches = []
    for step in islice(zip(*ranks, strict=True), num_steps):
        assert all(len(micro_batches) == accumulation for micro_batches in step)
        assert all(part.shape == (micro, BLOCK) for micro_batches in step for part in micro_batches)
        batches.append(torch.cat([part for passes in zip(*step, strict=True) for part in passes]))
    return torch.stack(batches)


def test_bos_is_among_all_tokens_and_in_the_fingerprint() -> None:
    """Without it the fingerprint is that of the stream alone, as in checkpoints of old."""
    plain = numbered(4, last=1)
    begun = TokenBlocks(plain.tokens, BLOCK, 99)
    blocks = [begun.block(index).tolist() for index in range(len(begun))]
    assert blocks == [[99, 1, 2], [99, 3, 4], [99, 5, 6], [99, 7, 8], [99, 9, 10]]
    assert sorted(begun.all_tokens.tolist()) == sorted(chain.from_iterable(blocks))
    assert plain.all_tokens is plain.tokens
    assert fingerprint(plain) == hashlib.sha256(plain.tokens.numpy().tobytes()).hexdigest() != fingerprint(begun)


@pytest.mark.parametrize("num_blocks", [1, 5, 17, 24])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 1), (2, 3), (3, 1), (3, 2)])
def test_all_ranks_together_see_the_same_blocks(num_blocks: int, world_size: int, accumulation: int) -> None:
    blocks = numbered(num_blocks)
    found = steps(blocks, 5, world_size=world_size, accumulation=accumulation)
    assert torch.equal(found, steps(blocks, 5))


@pytest.mark.parametrize("num_blocks", [1, 5, 17, 24])
def test_every_epoch_has_every_block_once(num_blocks: int) -> None:
    blocks = numbered(num_blocks)
    rows = steps(blocks, num_blocks).flatten(0, 1)
    epochs = rows.view(BATCH, num_blocks, BLOCK)
    assert torch.equal(epochs.sort(dim=1).values, blocks.tokens.long().view(1, num_blocks, BLOCK).expand_as(epochs))


def test_the_order_depends_on_seed_and_epoch() -> None:
    blocks = numbered(12)
    first, second = steps(blocks, 2)
    assert not torch.equal(first, second)
    assert not torch.equal(first, steps(blocks, 1, seed=1)[0])
    assert not torch.equal(second, steps(blocks, 1, seed=1)[0])


@pytest.mark.parametrize("first_step", [0, 1, 7])
def test_a_run_goes_on_where_it_stopped(first_step: int) -> None:
    blocks = numbered(17)
    assert torch.equal(steps(blocks, 3, first_step=first_step), steps(blocks, first_step + 3)[first_step:])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("last", [2, BLOCK])
def test_validation_counts_every_token_once(world_size: int, num_blocks: int, last: int) -> None:
    blocks = numbered(num_blocks, last)
    ranks = [
        list(validation_batches(blocks, micro_batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-num_blocks // (2 * world_size))}
    flat = [batch for batches in ranks for batch in batches]
    assert all(part.shape == (2, BLOCK) and part.dtype == torch.int64 for batch in flat for part in batch)
    input_ids, labels = (torch.cat(parts) for parts in zip(*flat, strict=True))
    assert sorted(labels[labels != -100].tolist()) == blocks.tokens.tolist()
    assert torch.equal(input_ids, labels.where(labels != -100, 0))
    starts = labels[:, 0][labels[:, 0] != -100]
    assert sorted(starts.tolist()) == blocks.tokens[::BLOCK].tolist()


@pytest.mark.parametrize(("rows", "starts"), [(40, 8), (41, 8), (44, 9), (12, 4), (5, 4), (2, 1)])
def test_what_a_round_is_calibrated_on_is_new_in_this_epoch_or_that_of_the_first_steps(rows: int, starts: int) -> None:
    config = Config.from_flat({"block_size": 8, "calibration_tokens": 3 * 4 * 8})
    of_no_model: dict[str, Any] = {"model_config": None, "tokenizer": None}
    inputs = Inputs(config=config, ds_config={"train_batch_size": 4}, train_rows=rows, **of_no_model)
    seen: set[int] = set()
    read = [each.flatten().tolist() for each in islice(assigned(rows, (1, 1, 4), seed=3), 60)]
    for step in range(40):
        start = inputs.calibration_start(step)
        text = [*chain.from_iterable(read[start : start + inputs.calibration_steps])]
        assert start in (step, 0)
        assert len(set(text)) == min(len(text), rows)
        if start == step:
            assert not seen.intersection(text)
        for row in read[step]:  # the step is made
            seen = seen | {row} if len(seen) + 1 < rows else set()
    assert len({inputs.calibration_start(step) for step in range(10)}) == starts

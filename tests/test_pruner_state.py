"""A pruner that takes over from another one goes on as if it had been the same, on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_backend import MASKING, Exchange, InMemoryBackend, run_ranks, steady_model, token_blocks, train
from models import VOCABULARY, prepared_units
from torch import Tensor

from scale_prune.config.settings import PruningConfig
from scale_prune.pruning.pruner import Pruner
from scale_prune.pruning.state import facts_of, pruner_slices, restore
from scale_prune.pruning.units import units_of
from scale_prune.system.slices import SliceReader, write_slices

STEPS, CUT = 11, 5
BLOCKS = token_blocks(VOCABULARY)
CASES = [*((name, {}) for name in MASKING), ("gum", {"similarity": "running"}), ("movement", {"scope": "global"})]


def pruner_on(backend: InMemoryBackend, criterion: str, settings: dict[str, Any]) -> Pruner:
    usual = {"remaining": 0.4, "warmup_fraction": 0.2, "cooldown_fraction": 0.2, "similarity_every": 2}
    config = PruningConfig(criterion=criterion, **usual | settings)
    return Pruner(backend, units_of(backend.module, config), config, total_steps=STEPS, seed=0)


def backend_of(exchange: Exchange, rank: int, criterion: str) -> InMemoryBackend:
    model = steady_model("gpt_neo")
    prepared_units(model, PruningConfig(criterion=criterion, remaining=0.4))
    return InMemoryBackend(model, exchange=exchange, rank=rank)


def stored(pruner: Pruner, folder: Path) -> str:
    write_slices(folder / str(pruner.backend.rank), dict(pruner_slices(pruner)))
    return json.dumps(facts_of(pruner))


def taken_over(pruner: Pruner, facts: str, folder: Path) -> Pruner:
    with SliceReader(sorted(folder.iterdir())) as reader:
        restore(pruner, json.loads(facts), reader.read)
    pruner.prepare_step()
    return pruner


def result(pruner: Pruner) -> dict[str, Tensor]:
    return {"masks": torch.cat(pruner.masks), "scores": torch.cat(pruner.scores)} | pruner.scoring.state


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for own, others in zip(found, expected, strict=True):
        assert own.keys() == others.keys()
        assert [name for name in own if not torch.equal(own[name], others[name])] == []


@pytest.mark.parametrize(("criterion", "settings"), CASES)
def test_a_run_that_was_cut_goes_on_bit_for_bit(criterion: str, settings: dict[str, Any], tmp_path: Path) -> None:
    def whole(exchange: Exchange, rank: int) -> dict[str, Tensor]:
        backend = backend_of(exchange, rank, criterion)
        pruner = pruner_on(backend, criterion, settings)
        train(backend, pruner, BLOCKS, STEPS)
        return result(pruner)

    def cut(exchange: Exchange, rank: int) -> dict[str, Tensor]:
        backend = backend_of(exchange, rank, criterion)
        pruner = pruner_on(backend, criterion, settings)
        train(backend, pruner, BLOCKS, CUT)
        facts = stored(pruner, tmp_path)
        exchange.barrier.wait()
        pruner.take_gates_off()
        pruner = taken_over(pruner_on(backend, criterion, settings), facts, tmp_path)
        train(backend, pruner, BLOCKS, STEPS - CUT)
        return result(pruner)

    assert_same(run_ranks(cut, 2), run_ranks(whole, 2))


@pytest.mark.parametrize(("criterion", "settings"), CASES)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (3, 2), (1, 50)])
def test_another_number_of_ranks_takes_everything_over(
    criterion: str, settings: dict[str, Any], before: int, after: int, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()

    def some(exchange: Exchange, rank: int) -> str:
        backend = backend_of(exchange, rank, criterion)
        pruner = pruner_on(backend, criterion, settings)
        train(backend, pruner, BLOCKS, CUT)
        return stored(pruner, first)

    facts, *_ = run_ranks(some, before)

    def others(exchange: Exchange, rank: int) -> str:
        pruner = taken_over(pruner_on(backend_of(exchange, rank, criterion), criterion, settings), facts, first)
        assert pruner.step == CUT
        assert pruner.remaining < 1 or criterion in ("soft_movement", "flop", "neuron_l0", "factorize")
        return stored(pruner, second)

    assert run_ranks(others, after)[0] == facts  # rank 0's count, and it always owns units
    with SliceReader(sorted(first.iterdir())) as old, SliceReader(sorted(second.iterdir())) as new:
        assert old.names() == new.names()
        for name in old.names():
            assert torch.equal(old.whole(name), new.whole(name)), name


def test_masks_go_onto_a_fresh_working_copy(tmp_path: Path) -> None:
    backend = backend_of(Exchange(1), 0, "movement")
    pruner = pruner_on(backend, "movement", {})
    train(backend, pruner, BLOCKS, CUT)
    facts = stored(pruner, tmp_path)
    fresh = backend_of(Exchange(1), 0, "movement")
    again = taken_over(pruner_on(fresh, "movement", {}), facts, tmp_path)
    member = again.groups[0].members[0]
    assert bool((fresh.parameters[member.name] != 0).all())
    again.put_masks_on()
    removed = ~again.masks[0]
    assert bool((fresh.parameters[member.name].movedim(member.dim, 0)[removed] == 0).all())
    assert bool((fresh.parameters[member.name].movedim(member.dim, 0)[~removed] != 0).all())

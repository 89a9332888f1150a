"""Sampled activations: every real token once, whatever is recomputed, padded or evaluated meanwhile."""

from functools import partial
from typing import Any

import pytest
import torch
from memory_backend import Exchange, InMemoryBackend, run_ranks, steady_model, token_blocks, train
from models import LAYERS, VOCABULARY, WIDTH, tiny_model, tokens
from torch import Tensor, nn

from scale_prune.config.settings import PruningConfig
from scale_prune.models.families import FAMILIES
from scale_prune.models.layer_units import unit_groups
from scale_prune.pruning.activations import ActivationSampler
from scale_prune.pruning.pruner import Pruner

BATCH, LENGTH = 2, 7
REENTRANT = {None: {}, True: {"use_reentrant": True}, False: {"use_reentrant": False}}


def all_activations(model: Any, **inputs: Any) -> list[Tensor]:
    """Return the (tokens, N) inputs of the output projections of a plain forward pass."""
    caught: list[Tensor] = []
    handles = [
        model.get_submodule(group.output).register_forward_pre_hook(
            lambda module, args: caught.append(args[0].detach().flatten(0, -2))
        )
        for group in unit_groups(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return caught


def in_order(rows: Tensor) -> Tensor:
    """Sort rows by their sum, so that samples compare as sets."""
    return rows[rows.sum(1).argsort()]


def num_hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def sampler_of(model: Any, size: int | None, **place: Any) -> ActivationSampler:
    return ActivationSampler(InMemoryBackend(model, **place), unit_groups(model), size)


def sample(model: Any, size: int, **inputs: Any) -> list[Tensor]:
    """Sample one training pass, forward and backward."""
    sampler = sampler_of(model, size)
    sampler.arm(5, 0)
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return list(sampler.take())


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not FAMILIES[name].classifies])
def test_all_tokens_are_caught_once_in_every_family(model_type: str) -> None:
    model, ids = steady_model(model_type), tokens(BATCH, LENGTH)
    expected = all_activations(model, input_ids=ids)
    for found, h in zip(sample(model, BATCH * LENGTH, input_ids=ids), expected, strict=True):
        assert found.shape == (BATCH * LENGTH, WIDTH)
        torch.testing.assert_close(in_order(found), in_order(h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("model_type", ["gpt_neo", "llama", "opt"])
def test_a_recomputed_pass_counts_once(model_type: str, reentrant: bool | None) -> None:
    model, ids = steady_model(model_type).train(), tokens(BATCH, LENGTH)
    passes: list[nn.Module] = []
    model.get_submodule(unit_groups(model)[0].output).register_forward_pre_hook(lambda m, args: passes.append(m))
    plain = sample(model, 5, input_ids=ids)
    assert len(passes) == 1
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = sample(model, 5, input_ids=ids)
    assert len(passes) == (2 if reentrant is None else 3), "checkpointing was not at work"
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert all(rows.shape == (5, WIDTH) and rows.any(1).all() for rows in again)


def test_padding_is_left_out() -> None:
    model, ids = steady_model("gpt_neo"), tokens(BATCH, LENGTH)
    attention_mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    attention_mask[0, 4:] = 0
    attention_mask[1, 6:] = 0
    real = attention_mask.flatten().bool()
    expected = all_activations(model, input_ids=ids, attention_mask=attention_mask)
    found = sample(model, BATCH * LENGTH, input_ids=ids, attention_mask=attention_mask)
    for rows, h in zip(found, expected, strict=True):
        torch.testing.assert_close(in_order(rows), in_order(h[real]), rtol=1e-4, atol=1e-5)


def test_a_mask_of_another_shape_is_no_padding() -> None:
    model, ids = steady_model("gpt_neo"), tokens(BATCH, LENGTH)
    everywhere = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    found = sample(model, 14, input_ids=ids, attention_mask=everywhere)
    assert all(len(rows) == 14 and rows.any(1).all() for rows in found)


def test_the_same_tokens_are_taken_in_every_layer_and_the_seed_decides_which() -> None:
    model, ids = steady_model("gpt_neo"), tokens(BATCH, LENGTH)
    expected = all_activations(model, input_ids=ids)
    picks = []
    for rows, h in zip(sample(model, 5, input_ids=ids), expected, strict=True):
        picks.append([int((h - row).abs().sum(1).argmin()) for row in rows])
    assert picks == [picks[0]] * LAYERS
    assert len(set(picks[0])) == 5
    sampler = sampler_of(model, 5)
    chosen = set()
    for seed, step in ((0, 0), (0, 1), (1, 0), (20240101, 0), (2**32 - 1, 10**9)):
        sampler.arm(seed, step)
        model(input_ids=ids)
        chosen.add(tuple(next(sampler.take())[:, 0].tolist()))
    assert len(chosen) == 5


def test_passes_without_gradient_do_not_count() -> None:
    model, ids = steady_model("gpt_neo"), tokens(BATCH, LENGTH)
    other = tokens(BATCH, LENGTH, seed=1)
    plain = sample(model, 5, input_ids=ids)
    sampler = sampler_of(model, 5)
    sampler.arm(5, 0)
    with torch.no_grad():
        model(input_ids=other)
    model(input_ids=ids).logits.sum().backward()
    with torch.inference_mode():
        model(input_ids=other)
    assert all(torch.equal(one, two) for one, two in zip(plain, sampler.take(), strict=True))


# (ranks, accumulation steps) that divide six rows; None takes every token, 5 fewer than there are rows.
CUTS = [(1, 1), (1, 2), (1, 6), (2, 1), (2, 3), (3, 2), (6, 1)]


@pytest.mark.parametrize("size", [None, 5, 6, 17, 40, 1000])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_sample_does_not_depend_on_how_the_global_batch_is_cut(padding: str, size: int | None) -> None:
    ids, lengths = tokens(6, LENGTH), (7, 3, 1, 7, 5, 2)
    mask = torch.stack([(torch.arange(LENGTH) < length).long() for length in lengths])
    mask = mask.flip(1) if padding == "left" else mask
    state = steady_model("llama").state_dict()

    def sampled(exchange: Exchange, rank: int, passes: int) -> list[Tensor]:
        model: Any = steady_model("llama")
        model.load_state_dict(state)
        sampler = sampler_of(model, size, exchange=exchange, rank=rank, accumulation_steps=passes)
        sampler.arm(3, 8)
        shape = (passes, exchange.world_size, -1, LENGTH)
        for part, real in zip(ids.view(shape)[:, rank], mask.view(shape)[:, rank], strict=True):
            model(input_ids=part, attention_mask=real)
        return list(sampler.take())

    found = {}
    for world_size, passes in CUTS:
        ranks = run_ranks(partial(sampled, passes=passes), world_size)
        assert all(torch.equal(one, other) for rank in ranks for one, other in zip(rank, ranks[0], strict=True))
        rows = [group[group.any(1)] for group in ranks[0]]
        found[world_size, passes] = [in_order(group) for group in rows]
    for groups in found.values():
        for group, expected in zip(groups, found[1, 1], strict=True):
            torch.testing.assert_close(group, expected, rtol=1e-4, atol=1e-5)
    # Of 25 tokens that are no padding: each row gives its part, or all that it has.
    fewest, most = {None: (25, 25), 5: (5, 5), 6: (6, 6), 17: (14, 15), 40: (23, 25), 1000: (25, 25)}[size]
    assert fewest <= len(found[1, 1][0]) <= most


def test_layers_that_are_dropped_by_chance_are_left_out() -> None:
    """OPT skips whole layers while it trains; a group may be without a sample on some ranks, or on all."""
    model: Any = tiny_model("opt", layerdrop=0.5, dropout=0.0).train()
    for seed in range(6):
        torch.manual_seed(seed)
        sampler = sampler_of(model, 5)
        sampler.arm(0, seed)
        model(input_ids=tokens(BATCH, LENGTH))
        found = [len(rows) for rows in sampler.take()]
        assert set(found) <= {0, 5}
        if 0 in found and 5 in found:
            return
    raise AssertionError("no layer was dropped")


@pytest.mark.parametrize("every", [1, 3])
def test_hooks_exist_only_in_the_steps_that_sample(every: int) -> None:
    model = steady_model("gpt_neo")
    backend, before = InMemoryBackend(model), num_hooks(model)
    settings = PruningConfig(criterion="gum", similarity_every=every)
    pruner = Pruner(backend, unit_groups(model), settings, total_steps=7, seed=0)
    hooks = [num_hooks(model) - before]
    train(backend, pruner, token_blocks(VOCABULARY), 7, after=lambda: hooks.append(num_hooks(model) - before))
    assert hooks == [LAYERS + 1 if step % every == 0 and step < 7 else 0 for step in range(8)]


@pytest.mark.parametrize("criterion", ["movement", "random", "magnitude", "sensitivity", "soft_movement"])
def test_criteria_without_similarity_hang_no_hooks(criterion: str) -> None:
    model = tiny_model("gpt_neo")
    before = num_hooks(model)
    Pruner(InMemoryBackend(model), unit_groups(model), PruningConfig(criterion=criterion), total_steps=7, seed=0)
    assert num_hooks(model) == before

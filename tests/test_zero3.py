"""Pruning on the real ZeRO-3 engine, on ranks that divide no width."""

import json
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import wanda  # noqa: F401  # the ranks import this file and no conftest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_fp32_param
from distributed import run_ranks
from engines import (
    ALL_GATHERED,
    BLOCKS,
    LAYERS,
    SHARDED,
    STEPS,
    call_each,
    ds_config,
    gathered,
    logits,
    masters,
    pruning,
    saved_model,
    start,
)
from memory_backend import MASKING, InMemoryBackend, members_by_unit, train, zeros
from models import WIDTH, prepared_units, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from scale_prune import attach, save
from scale_prune.config.settings import PruningConfig
from scale_prune.core.groups import UnitGroup
from scale_prune.core.selection import budget
from scale_prune.pruning.pruner import Pruner
from scale_prune.zero3 import Zero3Backend, load_model, training_engine

pytestmark = pytest.mark.distributed

BIASES_GATHERED = 30
BY_GATES_FIRST = ("soft_movement", "neuron_l0")  # the budget holds only at the target
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
ALONE = pytest.param(1, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


# --- masks -----------------------------------------------------------------------------------------------------------


def momentum(engine: Any, name: str) -> Tensor:
    found: Tensor = safe_get_full_optimizer_state(engine.module.get_parameter(name), "exp_avg")
    return found


def masks_hold(path: Path, settings: PruningConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Train, read everything back after every step, evaluate now and then."""
    engine, pruner = start(path, config, settings)
    members = [member.name for group in pruner.groups for member in group.members]
    masks: list[Tensor] = []
    momenta: list[Tensor] = []
    statuses: set[str] = set()

    def silent(index: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert not args[0][..., ~pruner.masks[index]].any()

    def check() -> None:
        statuses.update(engine.module.get_parameter(name).ds_status.name for name in members)
        masks.append(torch.cat(pruner.masks).cpu())
        assert torch.equal(torch.cat(zeros(gathered(engine, members).get, pruner.groups)), ~masks[-1])
        momenta.append(torch.cat(members_by_unit(partial(momentum, engine), pruner.groups)))
        for mask, old in zip(masks[-2:-1], momenta[-2:-1], strict=True):
            torch.testing.assert_close(momenta[-1][~mask], 0.9 * old[~mask])  # as on a gradient of 0
        if pruner.step % 2 == 0:
            logits(engine)

    for index, group in enumerate(pruner.groups):
        engine.module.get_submodule(group.output).register_forward_pre_hook(partial(silent, index))
    train(engine, pruner, BLOCKS, STEPS, after=check)
    assert not torch.cat(zeros(masters(engine, members).get, pruner.groups)).any()
    engine.destroy()
    targets = [pruner.schedule.remaining(step) for step in range(1, STEPS + 1)]
    return {"masks": torch.stack(masks), "targets": targets, "statuses": statuses, "scope": pruner.config.scope}


@pytest.mark.parametrize("world_size", [ALONE, 2, 3])
def test_masks_are_the_same_on_all_ranks_and_hold_in_what_the_forward_pass_uses(world_size: int, folder: Path) -> None:
    cases = [
        ("gpt_neo", pruning("gum"), ds_config(accumulation=6 // world_size, persistence=ALL_GATHERED)),
        ("gpt_neo", pruning("movement", scope="global"), ds_config(gradient_clipping=1.0)),
        ("gpt2", pruning("sensitivity", update_every=2), ds_config(persistence=BIASES_GATHERED)),
        ("gpt2", pruning("magnitude"), ds_config(**BF16)),
        ("llama", pruning("soft_movement"), ds_config(persistence=ALL_GATHERED, **BF16)),
        ("gpt_neo", pruning("neuron_l0"), ds_config(persistence=ALL_GATHERED, **BF16)),
    ]
    started = [(saved_model(folder, model_type), *rest) for model_type, *rest in cases]
    for (_, settings, config), *ranks in zip(
        cases, *run_ranks(call_each, world_size, masks_hold, started), strict=True
    ):
        masks, scope = ranks[0]["masks"], ranks[0]["scope"]
        assert all(torch.equal(rank["masks"], masks) for rank in ranks)
        for step, (mask, target) in enumerate(zip(masks, ranks[0]["targets"], strict=True), 1):
            if settings.criterion not in BY_GATES_FIRST and step % settings.update_every == 0:
                kept = budget(target, LAYERS * WIDTH) if scope == "global" else LAYERS * budget(target, WIDTH)
                assert mask.sum() == kept
        assert masks[-1].sum() == (13 if scope == "global" else 12)
        threshold = config["zero_optimization"]["stage3_param_persistence_threshold"]
        statuses = {SHARDED: {"NOT_AVAILABLE"}, ALL_GATHERED: {"AVAILABLE"}}
        assert ranks[0]["statuses"] == statuses.get(threshold, {"AVAILABLE", "NOT_AVAILABLE"})


class Forgetful(Zero3Backend):
    """Loses the mask of one tensor, in its shards or in the copy that stays gathered."""

    forgotten = "transformer.h.1.mlp.c_proj.weight"

    def mask_working_copy(self, group: UnitGroup, mask: Tensor, *, anew: bool = False) -> None:
        """Mask, and put one tensor's values back."""
        parameter: Any = self.parameters[self.forgotten]
        stays_gathered = parameter.ds_status == ZeroParamStatus.AVAILABLE
        copy = parameter.data if stays_gathered else parameter.ds_tensor.data
        before = copy.clone()
        super().mask_working_copy(group, mask, anew=anew)
        copy.copy_(before)


def message_of_a_mask_that_is_lost(path: Path, config: dict[str, Any]) -> str:
    engine, pruner = start(path, config, pruning("random"))
    pruner.line.backend = Forgetful(engine)
    with pytest.raises(RuntimeError) as error:
        train(engine, pruner, BLOCKS, STEPS)
    return str(error.value)


def test_a_mask_that_does_not_reach_the_forward_pass_stops_the_run_on_all_ranks(folder: Path) -> None:
    path = saved_model(folder, "gpt_neo")
    cases = [(path, ds_config(persistence=persistence)) for persistence in (SHARDED, ALL_GATHERED)]
    for messages in run_ranks(call_each, 3, message_of_a_mask_that_is_lost, cases):
        for message in messages:
            assert message.startswith("step 2: the masks of group transformer.h.1.mlp did not take hold")


# --- the same neurons ------------------------------------------------------------------------------------------------


def chosen(path: Path, settings: PruningConfig, config: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    engine, pruner = start(path, config, settings)
    train(engine, pruner, BLOCKS, STEPS)
    engine.destroy()
    return pruner.masks, pruner.scores


@cache
def chosen_in_memory(path: Path, settings: PruningConfig) -> tuple[list[Tensor], list[Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(path)
    groups = prepared_units(model, settings)
    backend = InMemoryBackend(model)
    pruner = Pruner(backend, groups, settings, total_steps=STEPS, seed=0)
    train(backend, pruner, BLOCKS, STEPS)
    return pruner.masks, pruner.scores


def assert_same_units(masks: Tensor, others: Tensor, scores: Tensor) -> None:
    """Units may be exchanged only where rounding decides: their scores differ by less than 1e-6 of their size."""
    exchanged = scores[masks != others]
    if len(exchanged):
        assert (exchanged.max() - exchanged.min()) < 1e-6 * exchanged.abs().max()
    assert masks.sum() == others.sum()


@pytest.mark.parametrize("world_size", [ALONE, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_keeps_the_same_neurons_by_every_criterion(world_size: int, folder: Path) -> None:
    path = saved_model(folder, "gpt_neo")
    # A step has 42 tokens: all of them are sampled, some, or fewer than there are rows.
    gum = [pruning("gum", similarity_tokens=10), pruning("gum", similarity="running", similarity_tokens=5)]
    settings = [*(pruning(criterion) for criterion in MASKING), pruning("gum", similarity="running"), *gum]
    expected = [chosen_in_memory(path, each) for each in settings]
    cut = [(each, 2 if world_size == 1 else 1) for each in settings]  # by itself a rank is the expected one
    cut += [(each, 6 // world_size) for each in gum]
    cases = [(path, each, ds_config(accumulation=accumulation)) for each, accumulation in cut]
    for rank in run_ranks(call_each, world_size, chosen, cases):
        for (masks, scores), (each, _) in zip(rank, cut, strict=True):
            others, other_scores = expected[settings.index(each)]
            for group in zip(masks, others, scores, strict=True):
                assert_same_units(*group)
            torch.testing.assert_close(torch.cat(scores), torch.cat(other_scores), rtol=1e-3, atol=1e-5)


# --- fp16, on a CPU that DeepSpeed thinks cannot --------------------------------------------------------------------


def half(scale_power: int) -> dict[str, Any]:
    dynamic = {"enabled": True, "loss_scale": 0, "initial_scale_power": scale_power, "hysteresis": 1}
    return ds_config(learning_rate=1e-3, fp16=dynamic)


def allow_fp16() -> None:
    get_accelerator().is_fp16_supported = lambda: True


def first_totals(path: Path, config: dict[str, Any], criterion: str) -> tuple[float, Tensor]:
    allow_fp16()
    engine, pruner = start(path, config, pruning(criterion, warmup_fraction=0.0))
    engine.train()
    ids = BLOCKS.block(0)[None].to(engine.device)
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    pruner.after_backward()
    return float(engine.optimizer.loss_scale), pruner.scoring.total


@pytest.mark.parametrize("world_size", [ALONE, 2])
def test_gradients_are_read_unscaled(world_size: int, folder: Path) -> None:
    path = saved_model(folder, "gpt_neo")
    criteria = ("movement", "sensitivity", "neuron_l0", "flop_agp")
    cases = [(path, config, criterion) for criterion in criteria for config in (ds_config(), half(10), half(2))]
    for rank in run_ranks(call_each, world_size, first_totals, cases):
        for (_, exact), *scaled in zip(*[iter(rank)] * 3, strict=True):
            assert [scale for scale, _ in scaled] == [1024.0, 4.0]
            assert exact.any()
            for _, rough in scaled:
                torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.01 * float(exact.abs().max()))


def overflow(path: Path, scale_power: int) -> dict[str, Any]:
    allow_fp16()
    engine, pruner = start(path, half(scale_power), pruning("gum", similarity_every=1))
    history = [(False, pruner.scoring.state, pruner.observations.similarity.clone())]
    members = [member.name for group in pruner.groups for member in group.members]

    def check() -> None:
        history.append((engine.was_step_applied(), pruner.scoring.state, pruner.observations.similarity.clone()))
        assert torch.equal(
            torch.cat(zeros(gathered(engine, members).get, pruner.groups)), ~torch.cat(pruner.masks).cpu()
        )

    train(engine, pruner, BLOCKS, STEPS, after=check)
    return {"history": history, "widths": pruner.widths}


@pytest.mark.parametrize("world_size", [ALONE, 2])
def test_a_step_that_overflows_changes_no_score(world_size: int, folder: Path) -> None:
    for rank in run_ranks(overflow, world_size, saved_model(folder, "gpt_neo"), 20):
        for (_, before, alike_before), (applied, after, alike) in pairwise(rank["history"]):
            same = all(torch.equal(value, after[name]) for name, value in before.items())
            assert applied != same
            assert applied != torch.equal(alike_before, alike)
        assert {applied for applied, *_ in rank["history"][1:]} == {True, False}
        assert sum(rank["widths"]) == 13


# --- an output of its own in the checkpoint of a model that its config ties ------------------------------------------

HEADS = [
    ("gpt2", "one"),
    ("gpt_neo", "sharded"),
    ("opt", "bin"),
    ("gemma", "one"),
    ("qwen2", "sharded"),
    ("gpt_neox", "one"),
]


def with_a_head(folder: Path, model_type: str, form: str, *, own: bool) -> Path:
    """Save a model tied by its config, with a head in the file that is its own or the embedding."""
    model: Any = tiny_model(model_type, tie_word_embeddings=False)
    if not own:
        model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    path = folder / f"{model_type}-{form}-{own}"
    model.save_pretrained(path, max_shard_size="2KB" if form == "sharded" else "5GB")
    if form == "bin":
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return path


def loaded_and_saved(path: Path) -> Tensor:
    """Return the logits under ZeRO-3, and write the model beside its folder."""
    engine = training_engine(load_model(str(path), ds_config()), ds_config())
    save(engine, path.with_suffix(".saved"), layout="uniform")
    found = logits(engine)
    engine.destroy()
    return found


def test_a_head_of_its_own_stays_and_one_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    own = {(model_type, form): with_a_head(tmp_path, model_type, form, own=True) for model_type, form in HEADS}
    tied = with_a_head(tmp_path, "gpt2", "one", own=False)
    cases = [(path,) for path in (*own.values(), tied)]
    for found in run_ranks(call_each, 2, loaded_and_saved, cases):
        for (path,), under_zero3 in zip(cases, found, strict=True):
            for folder in (path, path.with_suffix(".saved")):
                plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                expected = plain(BLOCKS.block(1)[None], use_cache=False).logits
                torch.testing.assert_close(under_zero3, expected, rtol=0, atol=1e-5)
                assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == (path == tied)
            told = json.loads((path.with_suffix(".saved") / "config.json").read_text())
            assert told.get("tie_word_embeddings", True) == (path == tied)


# --- where the weights live ------------------------------------------------------------------------------------------


def offloaded() -> dict[str, Any]:
    config = ds_config()
    config["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return config | {"zero_force_ds_cpu_optimizer": False}


@pytest.mark.parametrize("more", [offloaded(), ds_config(torch_autocast={"enabled": True, "dtype": "bfloat16"})])
def test_masks_hold_where_masters_or_computation_are_elsewhere(more: dict[str, Any], folder: Path) -> None:
    (rank, other) = run_ranks(masks_hold, 2, saved_model(folder, "gpt_neo"), pruning("gum"), more)
    assert torch.equal(rank["masks"], other["masks"])
    assert rank["masks"][-1].sum() == 13


@pytest.mark.slow  # compiles the optimizer
def test_masks_hold_with_the_optimizer_for_cpus(folder: Path) -> None:
    config = offloaded() | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    (rank,) = run_ranks(masks_hold, 1, saved_model(folder, "gpt_neo"), pruning("gum"), config, timeout=300)
    assert rank["masks"][-1].sum() == 13


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(path: Path, config: dict[str, Any], frozen: str = "", shared: str = "") -> str:
    """Return the message with which an engine is refused.

    Args:
        path: the model.
        config: the ds_config.
        frozen: name of a parameter that is not trained.
        shared: name of a parameter whose master and working copy become one memory.
    """
    model = load_model(str(path), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    engine = training_engine(model, config)
    if shared:
        spoilt: Any = model.get_parameter(shared)
        spoilt.ds_tensor.data = safe_get_local_fp32_param(spoilt)
    try:
        attach(engine, PruningConfig(criterion="movement"), total_steps=STEPS)
    except ValueError as error:
        return str(error)
    return ""


def test_what_cannot_be_pruned_is_refused(folder: Path) -> None:
    path, mlp = saved_model(folder, "gpt_neo"), "transformer.h.1.mlp"
    expected = [
        *(
            ((path, ds_config() | {"zero_optimization": {"stage": stage}}), f"the engine runs ZeRO stage {stage}; ")
            for stage in (0, 1, 2)
        ),
        ((path, ds_config(), f"{mlp}.c_proj.weight"), f"parameter {mlp}.c_proj.weight is frozen; "),
        ((path, ds_config(), "", f"{mlp}.c_fc.bias"), f"parameter {mlp}.c_fc.bias has no float32 master of its own "),
        ((path, ds_config(), "transformer.wte.weight"), ""),
    ]
    (messages,) = run_ranks(call_each, 1, refusal, [case for case, _ in expected])
    for message, (_, beginning) in zip(messages, expected, strict=True):
        assert message.startswith(beginning)
        assert bool(message) == bool(beginning)

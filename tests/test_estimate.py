"""What a run is reckoned to need: laws over all families, and models that are really there."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from models import LAYERS, WIDTH, compacted, tiny_config, tiny_model

from scale_prune.config.settings import PruningConfig
from scale_prune.criteria import CRITERIA, with_defaults
from scale_prune.models.families import FAMILIES
from scale_prune.models.layer_units import unit_groups
from scale_prune.preflight.disk import checkpoint_size, export_size
from scale_prune.preflight.job import Job
from scale_prune.preflight.memory import KEPT, memory, peak, total
from scale_prune.preflight.rehearsal import Rehearsal, rehearse, seconds_of_passes
from scale_prune.preflight.round_needs import round_bytes, round_operations, trials
from scale_prune.preflight.traffic import communication
from scale_prune.pruning import sketch_units

BLOCK = 13
DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 100, "stage3_prefetch_bucket_size": 100},
}
STATES = ("parameters", "master", "gradients", "optimizer")


ONE_OF_EACH_FAMILY = sorted({family.model_types[0] for family in FAMILIES.values()})


@cache
def shown(model_type: str) -> Rehearsal:
    return rehearse(tiny_config(model_type), dtype=torch.float32, batch=2, block=BLOCK)


def job_of(model_type: str = "gpt_neo", **changes: Any) -> Job:
    usual = Job(
        rehearsed=shown(model_type),
        recomputes=False,
        groups=unit_groups(tiny_model(model_type)),
        pruning=with_defaults(PruningConfig(criterion="gum", remaining=0.4)),
        trains=True,
        recovers=False,
        calibration_steps=4,
        has_teacher=False,
        ds_config=DS_CONFIG,
        world_size=2,
        on_gpu=True,
    )
    return replace(usual, **changes)


def pruning(criterion: str, **settings: Any) -> PruningConfig:
    return with_defaults(PruningConfig(criterion=criterion, **settings))


def zero(**keys: Any) -> dict[str, Any]:
    return DS_CONFIG | {"zero_optimization": DS_CONFIG["zero_optimization"] | keys}


def sizes(job: Job, phase: str) -> dict[tuple[str, str], int]:
    return {(part.name, part.place): part.size for part in memory(job)[phase]}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_those_of_the_real_model(model_type: str) -> None:
    job, model = job_of(model_type), tiny_model(model_type)
    assert sorted(job.rehearsed.numels) == sorted(parameter.numel() for parameter in model.parameters())
    assert job.rehearsed.buffers == sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt2", "llama", "opt"])
def test_parameters_left_are_those_of_the_compacted_model(model_type: str) -> None:
    model, groups, _ = compacted(model_type, "uniform")
    remaining = groups[0].num_units / WIDTH
    job = job_of(model_type, pruning=pruning("magnitude", remaining=remaining))
    assert job.num_pruned == sum(parameter.numel() for parameter in model.parameters())
    assert export_size(job, "uniform") == 4 * job.num_pruned
    assert export_size(job, "pad") == 4 * job.num_parameters


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_what_is_sharded_falls_with_the_number_of_ranks(world_size: int) -> None:
    job = job_of(world_size=world_size)
    whole, found = sizes(job_of(world_size=1), "optimizer step"), sizes(job, "optimizer step")
    for name in STATES:
        rounding = 8 * world_size * len(job.rehearsed.numels)
        assert whole[name, "GPU"] <= found[name, "GPU"] * world_size <= whole[name, "GPU"] + rounding


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_total_is_the_sum_of_its_parts(criterion: str, on_gpu: bool) -> None:
    job = job_of(pruning=pruning(criterion), on_gpu=on_gpu)
    phases = memory(job)
    making_a_step = ["forward, backward", "reduce-scatter", "scores, masks", "optimizer step"]
    rounds = ["round", "round, reading"] if "gram" in CRITERIA[criterion].needs else []
    assert list(phases) == ["loading", *making_a_step, *rounds, "compaction", *([] if on_gpu else [KEPT])]
    for parts in phases.values():
        assert sum(total(parts, place) for place in ("GPU", "host")) == sum(part.size for part in parts)
        assert all(total(parts, place) <= peak(phases, place) for place in ("GPU", "host"))
    assert on_gpu or peak(phases, "GPU") == 0


def test_states_have_the_bytes_that_zero_keeps() -> None:
    job = job_of()
    found = sizes(job, "optimizer step")
    assert [found[name, "GPU"] / job.shards for name in STATES] == [4, 4, 4, 8]
    half = sizes(job_of(ds_config=DS_CONFIG | {"bf16": {"enabled": True}}), "optimizer step")
    assert [half[name, "GPU"] / job.shards for name in STATES] == [2, 4, 2, 8]


def test_gradients_that_no_step_follows_are_those_of_neurons_weights_alone() -> None:
    for criterion, of_weights, activations in (("fisher", 0, True), ("sensitivity", 1, True), ("obs", 0, False)):
        settings = pruning(criterion, rounds=1, repair="none")
        job = job_of(pruning=settings, trains=False, ds_config=DS_CONFIG | {"train_batch_size": 4})
        found, members = sizes(job, "forward"), [member for group in job.groups for member in group.members]
        own = sum(job.shard_of(prod(member.shape)) for member in members)
        assert found.get(("gradients", "GPU"), 0) == 4 * own * of_weights
        assert found["activations", "GPU"] == (job.rehearsed.activations if activations else job.rehearsed.reading)
        assert not {("master", "GPU"), ("optimizer", "GPU")} & found.keys()
        received = {name: size for name, size in round_bytes(job, 1000).items() if size}
        assert ("gradients, parameters" in received) == activations
        assert received.get("gradients, of weights", 0) == of_weights * job.calibration_steps * 4 * own
        assert bool(round_operations(job, 1000)["gradients, passes"]) == activations


def test_a_repair_of_masks_reads_the_text_twice_more_to_be_tried() -> None:
    readings = []
    for rounds in (1, 0):
        settings = pruning("magnitude", rounds=rounds, repair="least_squares")
        job = job_of(pruning=settings, ds_config=DS_CONFIG | {"train_batch_size": 4})
        readings.append(round_bytes(job, 1000)["calibration, parameters"])
    assert readings[1] == pytest.approx(3 * readings[0], abs=3)


def test_what_is_trained_after_pruning_without_training_is_counted() -> None:
    quiet = job_of(pruning=pruning("obs", rounds=1), trains=False)
    job, trained = replace(quiet, recovers=True), job_of(pruning=pruning("obs", rounds=1))
    assert "recovery" not in memory(quiet)
    assert not any(communication(quiet).values())
    found = sizes(job, "recovery")
    for name, of_an_element in zip(STATES, (4, 4, 4, 8), strict=True):
        assert found[f"smaller {name}", "GPU"] == of_an_element * job.shard_of(job.num_pruned)
    assert found["activations", "GPU"] == job.rehearsed.activations
    received = {name: size for name, size in communication(job).items() if size}
    assert received == {name: communication(trained)[name] for name in ("ZeRO-3, parameters", "ZeRO-3, gradients")}


def test_components_that_are_multiplied_out_are_as_large_as_the_dense_model() -> None:
    model = tiny_model("llama")
    dense = sum(parameter.numel() for parameter in model.parameters())
    groups = sketch_units(model, pruning("flop", targets="mlp,attention", remaining=0.3))
    numels = tuple(parameter.numel() for parameter in model.parameters())
    settings = pruning("flop", targets="mlp,attention", remaining=0.3)
    job = job_of(groups=groups, rehearsed=replace(shown("llama"), numels=numels), pruning=settings)
    assert export_size(job, "uniform") == 4 * dense
    assert export_size(job, "per_layer") == 4 * job.num_pruned < 4 * dense
    assert export_size(job, "gguf") == 4 * (dense + job.num_pruned)


def test_offload_moves_states_to_the_host() -> None:
    to_host = {"device": "cpu"}
    job = job_of(ds_config=zero(offload_optimizer=to_host, offload_param=to_host))
    found = sizes(job, "forward, backward")
    assert [found[name, "host"] / job.shards for name in STATES] == [4, 4, 8, 8]  # with gradients for the optimizer
    assert ("activations", "GPU") in found
    assert not [name for name in STATES if (name, "GPU") in found]
    half = sizes(job_of(ds_config=zero(offload_optimizer=to_host)), "forward, backward")
    assert ("optimizer", "host") in half
    assert ("parameters", "GPU") in half


@pytest.mark.parametrize("model_type", ONE_OF_EACH_FAMILY)
def test_activations_grow_with_the_batch(model_type: str) -> None:
    two = shown(model_type).activations
    eight = rehearse(tiny_config(model_type), dtype=torch.float32, batch=8, block=BLOCK).activations
    assert eight == pytest.approx(4 * two, rel=0.1)


def test_recomputing_activations_saves_memory() -> None:
    config = tiny_config("gpt_neo", num_hidden_layers=6, attention_types=[[["global", "local"], 3]])
    plain, recomputed = (
        rehearse(config, dtype=torch.float32, batch=8, block=BLOCK, gradient_checkpointing=choice).activations
        for choice in (False, True)
    )
    assert recomputed < 0.5 * plain


def test_a_pass_back_takes_its_time() -> None:
    forward, both = seconds_of_passes(
        torch.device("cpu"), model_config=tiny_config("gpt_neo"), dtype=torch.float32, batch=2048, block=BLOCK
    )
    assert 0 < forward < both


def test_only_criteria_that_need_activations_pay_for_them() -> None:
    def similarity(job: Job) -> int:
        return sum(part.size for part in memory(job)["scores, masks"] if part.name == "similarity")

    assert similarity(job_of(pruning=pruning("movement"))) == 0
    batch, running = (similarity(job_of(pruning=pruning("gum", similarity=kind))) for kind in ("batch", "running"))
    owned = -(-LAYERS * WIDTH // 2)
    assert owned * WIDTH * 4 <= running - batch <= (owned + LAYERS) * WIDTH * 4


def test_compaction_replaces_and_does_not_add() -> None:
    phases = memory(job_of(pruning=pruning("movement")))
    names = [part.name for part in phases["compaction"]]
    assert "smaller master" in names
    assert not {"master", "gradients", "optimizer"} & set(names)
    assert total(phases["compaction"], "GPU") < total(phases["forward, backward"], "GPU")


def test_a_teacher_has_a_shard_too() -> None:
    (teacher,) = [part for part in memory(job_of(has_teacher=True))["optimizer step"] if part.name == "teacher"]
    assert (teacher.place, teacher.size) == ("GPU", 4 * job_of().shards)
    assert "teacher" not in [part.name for part in memory(job_of())["optimizer step"]]


def test_plain_fine_tuning_prunes_nothing() -> None:
    job = job_of(pruning=pruning("gum", remaining=1.0))
    assert "compaction" not in memory(job)
    assert job.num_pruned == job.num_parameters
    assert not [size for name, size in communication(job).items() if name.startswith("pruning") and size]


@pytest.mark.parametrize(("criterion", "shares", "update"), [("movement", 4, 12), ("magnitude", 0, 16), ("gum", 4, 12)])
def test_bytes_between_ranks(criterion: str, shares: int, update: int) -> None:
    units = 52  # 3 x 17, padded to the 4 ranks
    job = job_of(world_size=4, pruning=pruning(criterion))
    found = communication(job)
    assert found["pruning, shares"] == shares * units * 3 // 4
    assert found["pruning, at an update of the masks"] == update * units * 3 // 4
    assert found["ZeRO-3, gradients"] == 4 * job.num_parameters * 3 // 4
    assert found["ZeRO-3, parameters"] <= 2 * found["ZeRO-3, gradients"]
    assert set(communication(replace(job, world_size=1)).values()) == {0}


@pytest.mark.parametrize(("optimizer", "moments"), [("AdamW", 2), ("SGD", 1), ("Lion", 1), ("SomethingNew", 2)])
def test_a_checkpoint_holds_masters_moments_and_what_the_pruner_knows(optimizer: str, moments: int) -> None:
    job = job_of(ds_config=DS_CONFIG | {"optimizer": {"type": optimizer}})
    states = job.num_parameters * 4 * (1 + moments)
    known = 100 * LAYERS * WIDTH
    assert states < checkpoint_size(job) < states + known
    frozen = replace(job, trains=False)
    assert 0 < checkpoint_size(frozen) < known
    smaller = job.num_pruned * 4 * (1 + moments)
    assert smaller < states
    assert smaller < checkpoint_size(replace(frozen, recovers=True)) < smaller + known


@pytest.mark.parametrize("change", [{"world_size": 4}, {"on_gpu": False}])
def test_nothing_is_negative(change: dict[str, Any]) -> None:
    build: Callable[..., Job] = job_of
    assert all(part.size > 0 for parts in memory(build(**change)).values() for part in parts)


def test_a_search_from_a_given_table_makes_all_trials_but_those_of_the_table() -> None:
    made = {
        (budget, table): trials(job_of(pruning=pruning("obs", budget=budget, table=table)))
        for budget in ("uniform", "measured", "search")
        for table in (None, "table.json")
    }
    assert made["uniform", None] == made["measured", "table.json"] == 0
    assert made["search", None] == made["measured", None] + made["search", "table.json"] > made["measured", None] > 0

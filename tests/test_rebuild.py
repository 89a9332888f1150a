"""Compaction on the real ZeRO-3 engine: the smaller engine computes, remembers and trains as the masked one."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_optimizer_state
from distributed import run_ranks
from engines import (
    ALL_GATHERED,
    BLOCKS,
    LAYERS,
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
from memory_backend import train, zeros
from models import LOSE_HEADS, WIDTH, several_heads, tiny_config
from models import logits as logits_of
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, MultiStepLR, SequentialLR, StepLR
from transformers import AutoConfig, AutoModelForCausalLM, get_linear_schedule_with_warmup

from scale_prune import attach, compact, save
from scale_prune.core.compaction import select_units
from scale_prune.core.groups import UnitGroup
from scale_prune.core.selection import budget
from scale_prune.models.families import FAMILIES, auto_model, classifies
from scale_prune.models.layer_units import unit_groups
from scale_prune.zero3 import Zero3Backend, load_model, num_parameters, release, training_engine

pytestmark = pytest.mark.distributed

STEPS_AFTER = 3
FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1}  # overflows a few times first
SCHEDULER = {"type": "WarmupDecayLR", "params": {"total_num_steps": 13, "warmup_num_steps": 4, "warmup_max_lr": 1e-2}}

OFFLOADED = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def snapshot(engine: Any) -> dict[str, Any]:
    """Return everything that has to survive, whole, and what the model computes."""
    names = [name for name, _ in engine.module.named_parameters()]
    moments = {
        kind: {n: safe_get_full_optimizer_state(engine.module.get_parameter(n), kind).clone() for n in names}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return {
        "tensors": {"master": masters(engine, names), **moments},
        "logits": logits(engine),
        "working": gathered(engine, names),
        "steps": [int(state["step"]) for state in engine.optimizer.optimizer.state.values()],
        "rate": engine.get_lr(),
        "scale": float(engine.optimizer.loss_scale),
        "parameters": num_parameters(engine.module),
    }


def keep_training(engine: Any, first_step: int) -> None:
    """Train without pruning, on the blocks that come next."""
    pruner = attach(engine, pruning("random", remaining=1.0), total_steps=STEPS)
    pruner.step = first_step
    train(engine, pruner, BLOCKS, STEPS_AFTER)


def held_state(engine: Any) -> list[Tensor]:
    """Return masters and moments, of which there must not be a second set once the smaller engine is there."""
    optimizer = engine.optimizer
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    return [*optimizer.fp32_partitioned_groups_flat, *(m for m in moments if torch.is_tensor(m) and m.dim())]


def compaction(path: Path, config: dict[str, Any], output: Path) -> dict[str, Any]:
    """Compare two runs that differ in one thing: at the end of pruning, one of them is compacted."""
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed thinks that no CPU is
    settings = pruning("gum", update_every=100)
    masked, pruner = start(path, config, settings)
    train(masked, pruner, BLOCKS, STEPS)
    snapshots = {"masked": snapshot(masked)}
    train(masked, pruner, BLOCKS, STEPS_AFTER)  # no update is due any more
    snapshots["masked, later"] = snapshot(masked)
    masked.destroy()

    make_engine = partial(training_engine, ds_config=config)
    engine, pruner = start(path, config, settings)
    train(engine, pruner, BLOCKS, STEPS)
    assert torch.equal(logits(engine), snapshots["masked"]["logits"])
    states, moments = held_state(engine), engine.optimizer.optimizer.state
    engine = compact(pruner, make_engine)
    assert not moments, "what a checkpoint has brought cannot be resized, and is still there"
    assert [tensor.untyped_storage().nbytes() for tensor in states] == [0] * len(states)
    groups = unit_groups(engine.module)
    snapshots["compacted"] = snapshot(engine)
    engine.module.register_buffer("count", torch.ones(()))
    engine.module.register_buffer("scratch", torch.ones(()), persistent=False)
    exported = dict(Zero3Backend(engine).named_tensors())
    assert exported.pop("count") == 1
    assert "scratch" not in exported
    del engine.module.count, engine.module.scratch
    save(engine, output)
    keep_training(engine, STEPS)
    snapshots["compacted, later"] = snapshot(engine)

    again = attach(engine, pruning("magnitude", remaining=0.5, warmup_fraction=0.0), total_steps=2)
    train(engine, again, BLOCKS, 2)
    snapshots["masked again"] = snapshot(engine)
    hooks, (old,) = len(engine.module._forward_pre_hooks), engine.optimizer.fp16_partitioned_groups_flat
    engine = compact(again, make_engine)
    assert len(engine.module._forward_pre_hooks) == hooks
    assert old is None or not old.untyped_storage().nbytes(), "the old weights are still there"
    snapshots["compacted again"] = snapshot(engine)
    keep_training(engine, 0)
    return {
        "snapshots": snapshots,
        "groups": (pruner.groups, groups, unit_groups(engine.module)),
        "masks": (pruner.masks, again.masks),
        "exported": exported,
        "finite": bool(logits(engine).isfinite().all()),
    }


def only_kept(tensors: dict[str, Tensor], groups: tuple[UnitGroup, ...], masks: list[Tensor]) -> dict[str, Tensor]:
    """Take the removed units out of full tensors."""
    members = {m.name: (m, mask) for group, mask in zip(groups, masks, strict=True) for m in group.members}
    return {
        name: select_units(full, members[name][1].nonzero().flatten(), members[name][0]) if name in members else full
        for name, full in tensors.items()
    }


def assert_survived(before: dict[str, Any], after: dict[str, Any], groups: Any, masks: Any, tolerance: float) -> None:
    """Masters, moments, steps and rates are the same bits; what is computed is the same up to rounding."""
    for kind, tensors in before["tensors"].items():
        expected = only_kept(tensors, groups, masks)
        assert expected.keys() == after["tensors"][kind].keys()
        assert all(torch.equal(after["tensors"][kind][name], full) for name, full in expected.items())
    working = only_kept(before["working"], groups, masks)
    assert all(torch.equal(after["working"][name], full) for name, full in working.items())
    assert all(after[name] == before[name] for name in ("steps", "rate", "scale"))
    assert len(set(after["steps"])) == 1
    assert after["parameters"] == sum(full.numel() for full in working.values())
    torch.testing.assert_close(after["logits"], before["logits"], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("world_size", "model_type", "persistence", "more", "tolerance"),
    [
        (1, "gpt_neo", 0, {}, 1e-6),
        (2, "gpt2", 0, {"gradient_clipping": 0.5, **OFFLOADED}, 1e-6),
        (3, "gpt_neo", ALL_GATHERED, {"bf16": {"enabled": True}}, 0.05),
        pytest.param(3, "llama", 60, {}, 1e-6, marks=pytest.mark.slow),
        (2, "gpt_neo", 0, {"fp16": FP16}, 0.01),
    ],
)
def test_the_smaller_engine_goes_on_where_the_masked_one_was(
    world_size: int, model_type: str, persistence: int, more: dict[str, Any], tolerance: float, folder: Path
) -> None:
    path, output = saved_model(folder, model_type), folder / f"pruned-{model_type}-{world_size}"
    config = ds_config(persistence=persistence, scheduler=SCHEDULER, **more)
    for rank, result in enumerate(run_ranks(compaction, world_size, path, config, output)):
        snapshots, (groups, smaller, smallest), (masks, again) = result["snapshots"], result["groups"], result["masks"]
        assert_survived(snapshots["masked"], snapshots["compacted"], groups, masks, tolerance)
        assert_survived(snapshots["masked again"], snapshots["compacted again"], smaller, again, tolerance)
        assert [group.num_units for group in smaller] == [int(mask.sum()) for mask in masks]
        assert [group.num_units for group in smallest] == [group.num_units // 2 for group in smaller]
        assert all(0 < int(mask.sum()) < WIDTH for mask in masks)
        assert snapshots["compacted, later"]["steps"] == [
            step + STEPS_AFTER for step in snapshots["compacted"]["steps"]
        ]
        assert (
            snapshots["compacted, later"]["rate"] == snapshots["masked, later"]["rate"] != snapshots["masked"]["rate"]
        )
        assert result["finite"]
        later = only_kept(snapshots["masked, later"]["tensors"]["master"], groups, masks)
        for name, full in snapshots["compacted, later"]["tensors"]["master"].items():
            # Adam makes steps of some size from gradients that are 0 but for rounding, as those of a key's bias are.
            torch.testing.assert_close(full, later[name], rtol=0, atol=max(tolerance / 10, 1e-4))
        expected = snapshots["masked, later"]["logits"]
        torch.testing.assert_close(snapshots["compacted, later"]["logits"], expected, rtol=0, atol=10 * tolerance)
        if rank == 0:
            assert result["exported"].keys() == snapshots["compacted"]["working"].keys()
            for name, full in snapshots["compacted"]["working"].items():
                assert torch.equal(result["exported"][name], full)
    loaded: Any = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        found = loaded(BLOCKS.block(1)[None], use_cache=False).logits.float()
    torch.testing.assert_close(found, snapshots["compacted"]["logits"], rtol=0, atol=tolerance)


# --- schedulers and optimizers of a loop of one's own -----------------------------------------------------------------


class Halves(torch.optim.Optimizer):
    """An optimizer that keeps one number for two weights, as those in 8 bits keep one for a block."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].setdefault("absmax", torch.ones(param.numel() // 2))
                param.data.add_(param.grad, alpha=-group["lr"])


def linear(optimizer: Any) -> Any:
    return get_linear_schedule_with_warmup(optimizer, 4, 20)


def milestones(optimizer: Any) -> Any:
    return MultiStepLR(optimizer, [3, STEPS + 2], gamma=0.5)


def sequence(optimizer: Any) -> Any:
    parts = [ConstantLR(optimizer, 0.5, total_iters=2), StepLR(optimizer, 3)]
    return SequentialLR(optimizer, parts, milestones=[3])


def rates_of(path: Path, scheduler: Any) -> dict[str, list[float]]:
    """Return the rates of two runs under a scheduler of torch's, one of which is compacted."""

    def make_engine(module: Any) -> Any:
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config=ds_config(), lr_scheduler=scheduler
        )
        return engine

    rates: dict[str, list[float]] = {"masked": [], "compacted": []}
    for name, found in rates.items():
        engine = make_engine(load_model(str(path), ds_config()))
        pruner = attach(engine, pruning("magnitude"), total_steps=STEPS)
        train(engine, pruner, BLOCKS, STEPS)
        engine = compact(pruner, make_engine) if name == "compacted" else engine
        again = attach(engine, pruning("random", remaining=1.0), total_steps=STEPS)
        for _ in range(STEPS_AFTER):
            train(engine, again, BLOCKS, 1)
            found += engine.get_lr()
        release(engine)
    return rates


def without_its_scheduler(path: Path) -> None:
    """Compact with an engine that lacks the scheduler of the one before."""
    config = ds_config()
    config.pop("scheduler", None)
    model = load_model(str(path), config)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config, lr_scheduler=linear
    )
    pruner = attach(engine, pruning("magnitude"), total_steps=STEPS)
    train(engine, pruner, BLOCKS, STEPS)
    with pytest.raises(ValueError, match="1 groups of parameters and no scheduler, the one before had 1 and a: let"):
        compact(pruner, partial(training_engine, ds_config=config))


def refused_optimizer(path: Path) -> dict[str, Tensor]:
    """Return what the model computes before and after a compaction that is refused, and that it trains on."""
    config = ds_config(zero_allow_untested_optimizer=True)
    del config["optimizer"]
    model = load_model(str(path), config)
    optimizer = Halves(model.parameters(), {"lr": 1e-2})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    pruner = attach(engine, pruning("neuron_l0"), total_steps=STEPS + 1)
    train(engine, pruner, BLOCKS, STEPS)
    before = logits(engine)
    with pytest.raises(ValueError, match=r"Halves keeps absmax, \d+ float32 for \d+ weights, which cannot be cut"):
        compact(pruner, partial(training_engine, ds_config=config))
    found = {"before": before, "after": logits(engine)}
    train(engine, pruner, BLOCKS, 1)
    compact(pruner)
    return found


def released(path: Path, config: dict[str, Any]) -> list[int]:
    """Return the bytes that an engine which has trained holds once it is released."""
    engine, pruner = start(path, config, pruning("magnitude"))
    train(engine, pruner, BLOCKS, 2)
    optimizer = engine.optimizer
    held = [*held_state(engine), *optimizer.fp16_partitioned_groups_flat, optimizer.grad_partitions_flat_buffer]
    held += [param.ds_tensor for param in engine.module.parameters()]
    assert all(tensor.untyped_storage().nbytes() for tensor in held)
    release(engine)
    return [tensor.untyped_storage().nbytes() for tensor in held]


def after_evaluation(path: Path) -> dict[str, Tensor]:
    """Return what an engine computes before and after a compaction that follows upon an evaluation."""
    # As of a model of more than 5e8 parameters: a forward pass lets go of some, and gathers them for the way back.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 100}
    config = ds_config(zero_optimization=zero)
    engine, pruner = start(path, config, pruning("magnitude"))
    train(engine, pruner, BLOCKS, STEPS)

    def evaluated() -> Tensor:
        engine.eval()
        with torch.no_grad():
            found: Tensor = engine(input_ids=BLOCKS.block(1)[None], use_cache=False).logits
        engine.train()
        assert any(param.ds_status == ZeroParamStatus.INFLIGHT for param in engine.module.parameters())
        return found

    found = {"before": evaluated()}
    dict(Zero3Backend(engine).named_tensors())
    found["exported"] = evaluated()
    return found | {"after": logits(compact(pruner, partial(training_engine, ds_config=config)))}


def of_own_loops(path: Path) -> dict[str, Any]:
    bf16: dict[str, Any] = {"bf16": {"enabled": True}}
    without_its_scheduler(path)
    return {
        "rates": {scheduler.__name__: rates_of(path, scheduler) for scheduler in (linear, milestones, sequence)},
        "refused": refused_optimizer(path),
        "evaluated": after_evaluation(path),
        "released": [released(path, config) for config in (ds_config(), ds_config(**bf16))],
    }


def test_a_loop_of_ones_own_keeps_its_scheduler_or_its_engine(folder: Path) -> None:
    (found,) = run_ranks(of_own_loops, 1, saved_model(folder, "gpt_neo"))
    for name, rates in found["rates"].items():
        assert rates["compacted"] == rates["masked"], name
        assert len(set(rates["masked"])) > 1, name
    assert torch.equal(found["refused"]["after"], found["refused"]["before"])
    assert torch.equal(found["evaluated"]["exported"], found["evaluated"]["before"])
    torch.testing.assert_close(found["evaluated"]["after"], found["evaluated"]["before"], rtol=0, atol=1e-6)
    for held in found["released"]:
        assert held == [0] * len(held)


# --- every family ----------------------------------------------------------------------------------------------------

# What no other test has on ranks; GPT-NeoX, OPT, ELECTRA and relatives of Llama are only among all, which take 80 s.
SOME_FAMILIES = ("gemma3_text", "apertus", "phi", "phi3", "gpt_bigcode", "codegen", "falcon")
SOME_LOSE_HEADS = ("gpt2", "gpt_neox", "gptj")  # queries, keys and values in one tensor by kind, by head; apart
GROUPED = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def family_pruned(path: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Prune in three steps, compact and export."""
    config, rank = ds_config(), torch.distributed.get_rank()
    engine = training_engine(load_model(str(path), config), config)
    pruner = attach(engine, pruning("gum", scope="per_group", warmup_fraction=0.0, **settings), total_steps=3)
    for step in range(3):
        ids = torch.stack([BLOCKS.block(6 * step + 3 * rank + row) for row in range(3)])
        labels = ids[:, 0] % 5 if classifies(engine.module.config) else ids
        engine.backward(engine(input_ids=ids, labels=labels).loss)
        pruner.after_backward()
        engine.step()
        pruner.after_step()
    members = [member.name for group in pruner.groups for member in group.members]
    masks, silent = torch.cat(pruner.masks), torch.cat(zeros(gathered(engine, members).get, pruner.groups))
    found: dict[str, Any] = {"masks": masks, "silent": silent, "masked": logits(engine)}
    counted = pruner.masks[-LAYERS:]  # of heads, if there are any, for which neurons make up
    found["left"] = [int(mask.sum()) for mask in counted]
    found["budgets"] = [budget(0.4, mask.numel(), nearest=mask.numel() < WIDTH) for mask in counted]
    engine = compact(pruner, partial(training_engine, ds_config=config))
    save(engine, output)
    found["compacted"] = logits(engine)
    engine.destroy()
    return found


def assert_each_survives(folder: Path, model_types: Sequence[str], **settings: Any) -> None:
    """Check that models of the folder lose the same units on both ranks and compute the same ever after."""
    cases = [(folder / each, folder / f"pruned-{each}", settings) for each in model_types]
    ranks = run_ranks(call_each, 2, family_pruned, cases, timeout=300)
    for model_type, found, other in zip(model_types, *ranks, strict=True):
        assert torch.equal(found["masks"], other["masks"]), model_type
        assert torch.equal(found["silent"], ~found["masks"]), model_type
        assert found["left"] == found["budgets"], model_type
        torch.testing.assert_close(found["compacted"], found["masked"], rtol=0, atol=1e-4, msg=model_type)
        exported = AutoConfig.from_pretrained(folder / f"pruned-{model_type}", trust_remote_code=True)
        loaded = auto_model(exported).from_pretrained(folder / f"pruned-{model_type}", trust_remote_code=True)
        again = logits_of(loaded, BLOCKS.block(1)[None])
        torch.testing.assert_close(again, found["masked"], rtol=0, atol=1e-4, msg=model_type)


@pytest.mark.parametrize(
    "model_types", [SOME_FAMILIES, pytest.param(tuple(FAMILIES), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_families_are_pruned_compacted_and_exported(model_types: tuple[str, ...], tmp_path: Path) -> None:
    for model_type in model_types:
        grouped = GROUPED if hasattr(tiny_config(model_type), "num_key_value_heads") else {}
        saved_model(tmp_path, model_type, **grouped)
    assert_each_survives(tmp_path, model_types)


@pytest.mark.parametrize(
    "model_types", [SOME_LOSE_HEADS, pytest.param(tuple(LOSE_HEADS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_families_lose_heads(model_types: tuple[str, ...], tmp_path: Path) -> None:
    for model_type in model_types:
        saved_model(tmp_path, model_type, **several_heads(model_type))
    assert_each_survives(tmp_path, model_types, targets="mlp,attention")

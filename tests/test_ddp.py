"""Gates without noise on frozen weights: retention, the gates' gradient, and the command on real ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import GROUPED_HEADS, arguments, errors_of, make_work, outcomes, pruned, said_by
from distributed import run_ranks
from engines import ds_config, saved_model
from models import VOCABULARY
from safetensors.torch import load_file
from test_resume import assert_same_run, losses

from scale_prune.config import PruningConfig, get, parse
from scale_prune.core import Schedule
from scale_prune.core.retention import center, retention, retention_gradient
from scale_prune.criteria import CRITERIA
from scale_prune.criteria.base import Moment
from scale_prune.criteria.ddp import Ddp
from scale_prune.models import Gates, unit_groups
from scale_prune.preflight.inputs import read_inputs
from scale_prune.zero3 import FrozenEngine, load_model

HEADS = ("mlp", "attention")
SETTINGS = {
    "criterion": "ddp",
    "targets": "mlp,attention",
    "max_steps": 7,
    "remaining": 0.6,
    "train_batch_size": 6,
    "calibration_tokens": 384,
    "log_every": 1,
}


def test_retention_is_exact_at_both_ends_and_sharper_later() -> None:
    z = torch.linspace(-1, 3, 401, dtype=torch.float64)
    for progress in (0.0, 0.3, 1.0):
        mu = center(progress)
        assert float(retention(torch.zeros(()), mu)) == pytest.approx(0, abs=1e-6)
        assert float(retention(torch.tensor(2 * mu), mu)) == pytest.approx(1, abs=1e-6)
        assert bool((retention(z, mu).diff() >= 0).all())
        inside = z.clone().requires_grad_()
        retention(inside, mu).sum().backward()
        assert inside.grad is not None
        free = (retention(z, mu) > 0) & (retention(z, mu) < 1)
        torch.testing.assert_close(inside.grad[free], retention_gradient(z, mu)[free])
    assert center(0.0) > center(0.5) > center(1.0)


def test_an_update_descends_on_the_whole_objective() -> None:
    """The gradient of the terms with multipliers is that of autograd, where nothing is clamped."""
    generator, units = torch.Generator().manual_seed(0), 12
    criterion = Ddp(PruningConfig(criterion="ddp", remaining=0.5), 0)
    schedule = Schedule(total_steps=10, target=0.5, warmup_fraction=0.0, cooldown_fraction=0.0)
    z = (0.1 + 0.5 * torch.rand(units, generator=generator)).double()
    kinds, cost = (torch.arange(units) > 7).long(), torch.rand(units, generator=generator).double()
    state = {name: value.double() for name, value in criterion.initial_state([], torch.device("cpu")).items()}
    multipliers = dict.fromkeys(("neuron", "head"), (0.3, 0.7, 0.2))
    for kind, values in multipliers.items():
        state |= {f"{kind}_l{number}": torch.tensor(value) for number, value in enumerate(values, 1)}
    state |= {"z": z, "mean": torch.zeros_like(z), "square": torch.zeros_like(z)}
    total = torch.randn(units, generator=generator).double()
    summary = criterion.summary(z, cost, kinds, schedule, 3)
    moment = Moment(
        step=3,
        schedule=schedule,
        live=torch.ones(units, dtype=torch.bool),
        similarity=torch.zeros(units),
        weight=torch.ones(units),
        cost=cost,
        noise=torch.zeros(units),
        expected=0.5,
        kinds=kinds,
        summary=summary,
    )
    variable = z.clone().requires_grad_()
    kept, objective = retention(variable, center(0.3)), (total * variable).sum()
    for number, (l1, l2, l3) in enumerate(multipliers.values()):
        share = cost * (kinds == number) / cost[kinds == number].sum()
        missing = 0.5 - (kept * share).sum()
        objective = objective + l1 * missing + l2 * missing**2 + l3 * (kept * (1 - kept) * share).sum()
    objective.backward()
    after = criterion.update(state, total, moment)
    assert variable.grad is not None
    torch.testing.assert_close(after["mean"], 0.1 * variable.grad)
    missing = 0.5 - summary[1, 0]
    assert (after["head_l1"] > 0.3) == bool(missing > 0)
    assert after["head_l2"] > 0.7


def gradients(folder: str, passes: int) -> list[torch.Tensor]:
    """Return the gates' gradients of one step, and whether any weight has one, under a frozen engine."""
    model = load_model(folder, config := ds_config(accumulation=passes))
    engine = FrozenEngine(model, config)
    groups = unit_groups(model, HEADS)
    gates = Gates(model, groups)
    line = torch.linspace(0.2, 1.5, sum(group.num_units for group in groups))
    gates.put_on(line, lambda: line)
    rows = torch.randint(VOCABULARY, (6, 7), generator=torch.Generator().manual_seed(0))
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    engine.train()
    for part in rows.chunk(world_size)[rank].chunk(passes):
        engine.backward(engine(input_ids=part, labels=part, use_cache=False).loss)
        engine.step()
    assert (engine.global_steps, engine.micro_steps) == (1, passes)
    assert all(param.grad is None for param in model.parameters())
    own = gates.gradient()
    assert own is not None
    return [own / world_size]


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_gates_have_their_gradient_on_any_number_of_ranks_and_weights_have_none(
    tmp_path: Path, model_type: str
) -> None:
    folder = str(saved_model(tmp_path, model_type))
    (alone,) = run_ranks(gradients, 1, folder, 1)[0]
    assert bool((alone != 0).any())
    for world_size, passes in ((1, 2), (2, 1), (3, 2)):
        together = sum(each[0] for each in run_ranks(gradients, world_size, folder, passes))
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"), "llama", **GROUPED_HEADS, attention_dropout=0.3)


@pytest.mark.distributed
def test_any_number_of_ranks_and_passes_learns_the_same_gates(work: Path) -> None:
    reports = []
    for world_size, passes in ((1, 1), (3, 2)):
        name = f"{world_size}-{passes}"
        reports.append(pruned(work, name, world_size, **SETTINGS, gradient_accumulation_steps=passes))
    for report in reports:
        assert report["perplexity"]["masked"] == pytest.approx(report["perplexity"]["exported"], rel=1e-5)
        assert report["perplexity"]["exported"] == pytest.approx(reports[0]["perplexity"]["exported"], rel=1e-3)
        assert (report["heads"], report["widths"]) == (reports[0]["heads"], reports[0]["widths"])
    assert sum(reports[0]["heads"]) == int(0.6 * 9)
    assert sum(reports[0]["widths"]) == int(0.6 * 3 * 17)


def test_where_nothing_is_to_leave_weights_learn_at_the_rates_of_all_steps(work: Path) -> None:
    flags = arguments(work, work / "plain", **SETTINGS | {"remaining": 1.0})
    found = read_inputs(*parse(flags, criteria=(*CRITERIA,)), 1)
    assert get(found.ds_config, "scheduler.params.total_num_steps") == SETTINGS["max_steps"]


@pytest.mark.distributed
def test_weights_stay_as_they_are_but_for_the_gates(work: Path) -> None:
    said, _ = run_ranks(said_by, 2, arguments(work, work / "frozen", **SETTINGS | {"targets": "mlp", "repair": "none"}))
    assert "the gates came to 100.0%, not 60.0%, and what they left open was cut" in said
    kept = json.loads((work / "frozen" / "kept.json").read_text())
    dense, smaller = (
        load_file(folder / "model.safetensors") for folder in (work / "model", work / "frozen" / "pruned")
    )
    for name, tensor in smaller.items():
        group = name.rpartition(".mlp.")[0] + ".mlp"
        units = torch.tensor(kept.get(group, []), dtype=torch.long)
        if "down_proj" in name:
            ratios = tensor / dense[name][:, units]
            torch.testing.assert_close(ratios, ratios.median(0).values.expand_as(ratios), rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(tensor, dense[name][units] if ".mlp." in name else dense[name])


@pytest.mark.distributed
@pytest.mark.parametrize("repair", [pytest.param("none", marks=pytest.mark.slow), "least_squares"])
def test_weights_learn_afterwards_and_a_killed_run_goes_on_bit_for_bit(repair: str, work: Path) -> None:
    settings = SETTINGS | {"recovery_steps": 3, "save_every": 1, "keep_checkpoints": 11, "repair": repair}
    settings |= {"learning_rate": 3e-3}
    whole = pruned(work, f"whole {repair}", 2, **settings)
    assert whole["perplexity"]["recovered"] < whole["perplexity"]["compacted"]
    assert whole["perplexity"]["masked"] == pytest.approx(whole["perplexity"]["compacted"], rel=1e-5)
    recipe = yaml.safe_load((work / f"whole {repair}" / "recipe.yaml").read_text())
    assert recipe == {name: value for name, value in whole["settings"].items() if value is not None}
    for step in (2, 8) if repair == "none" else (7,):  # 7: what is to leave is chosen, and not repaired yet
        name = f"from {step} {repair}"
        checkpoint = work / f"whole {repair}" / "checkpoints" / f"step-{step:08d}"
        pruned(work, name, 2, **settings, resume=checkpoint)
        assert_same_run(work / name, work / f"whole {repair}")
        before = losses(work / f"whole {repair}")
        assert losses(work / name) == {made: loss for made, loss in before.items() if made > step}


@pytest.mark.distributed
def test_what_gates_on_frozen_weights_cannot_do_is_refused(work: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"precision": "fp16"}, "which fp16 may not hold; give --precision bf16 or fp32"),
        ({"max_steps": 0}, "trains gates that settle what leaves"),
        ({"rounds": 2}, "trains gates that settle what leaves"),
        ({"remaining": 0.3}, "every layer keeps 1, which is 3 of 9 heads; give at least --remaining 0.3334, or --targ"),
        ({"remaining": 0.3, "scope": "per_group"}, "which is 3 of 9 heads"),
        ({"min_kept": 11}, "brings neurons to --remaining 0.6 by themselves, but every layer keeps 11, which is 33 of"),
    ]
    flags = [arguments(work, work / "refused", **SETTINGS | settings) for settings, _ in cases]
    (found,) = run_ranks(outcomes, 1, flags)
    for (code, stderr), (_, expected) in zip(found, cases, strict=True):
        assert code == 2, expected
        assert expected in stderr
        assert len(errors_of(stderr)) == 1

"""Budgets that are measured: the knapsack against brute force, a run's table, and other words for `--remaining`."""

import json
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from command import GROUPED_HEADS, arguments, errors_of, make_work, outcomes, pruned
from distributed import run_ranks
from engines import ds_config, saved_model
from models import VOCABULARY, compact_model, random_keep, tiny_model
from safetensors.torch import load_file
from test_resume import assert_same_run

from scale_prune.config import PruningConfig
from scale_prune.core.level_table import LevelTable, best_levels, levels_of, on_the_way, switched
from scale_prune.models import unit_groups
from scale_prune.preflight.budgets import afforded, sizes_of
from scale_prune.run.budgeting import in_two_bytes
from scale_prune.zero3 import Zero3Backend, inference_engine, load_model, training_engine, tried

MEASURED = {
    "criterion": "obs",
    "budget": "measured",
    "targets": "mlp,attention",
    "max_steps": 0,
    "remaining": 0.6,
    "calibration_tokens": 384,
    "train_batch_size": 12,
}


def total(levels: tuple[int, ...] | list[int], values: list[list[Any]]) -> Any:
    return sum(own[level] for own, level in zip(values, levels, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_is_as_good_as_trying_everything(seed: int) -> None:
    random = Random(seed)
    costs = [sorted(random.sample(range(1, 40), random.randint(1, 4))) for _ in range(random.randint(1, 5))]
    losses = [[random.random() for _ in own] for own in costs]
    allowed = random.randint(1, 120)
    chosen = best_levels(costs, losses, allowed)
    possible = [levels for levels in product(*(range(len(own)) for own in costs)) if total(levels, costs) <= allowed]
    if possible:
        assert total(chosen, costs) <= allowed
        assert total(chosen, losses) == pytest.approx(min(total(levels, losses) for levels in possible))
    else:
        assert chosen == [0] * len(costs)


def a_table(seed: int = 0) -> LevelTable:
    random = Random(seed)
    kept = [levels_of(17), levels_of(3), levels_of(64)]
    losses = [[*sorted((random.random() for _ in own[:-1]), reverse=True), 0.0] for own in kept]
    return LevelTable(
        names=("a", "b", "c"), costs=(5, 40, 5), kept=tuple(map(tuple, kept)), losses=tuple(map(tuple, losses))
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_spent_and_units_that_have_left_stay_away(seed: int) -> None:
    table, present = a_table(seed), [17, 3, 64]
    assert table.widths(1.0) == present
    for remaining in (0.9, 0.7, 0.5, 0.3):
        widths = table.widths(remaining, present)
        spent = sum(cost * width for cost, width in zip(table.costs, widths, strict=True))
        assert remaining * table.dense_cost - 40 < spent <= remaining * table.dense_cost
        assert all(1 <= now <= before for now, before in zip(widths, present, strict=True))
        present = widths


def test_levels_are_eighths_and_of_few_units_all() -> None:
    assert levels_of(16) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert levels_of(3) == [1, 2, 3]


def test_a_table_is_read_back_as_it_was() -> None:
    assert LevelTable.from_told(json.loads(json.dumps(a_table().told()))) == a_table()
    broken: list[Any] = [[], {"a": {}}, {"a": {"cost": 1, "kept": [1], "loss": []}}]
    broken += [{"a": {"cost": 1, "kept": [1], "loss": ["0"]}}, {"a": {"cost": 1.0, "kept": [1], "loss": [0.0]}}]
    for told in broken:
        with pytest.raises(ValueError, match="no table of levels"):
            LevelTable.from_told(told)


def test_losses_that_are_not_finite_are_refused() -> None:
    told = a_table().told()
    name = min(told)
    for unknown in (float("nan"), float("inf")):
        told[name]["loss"][1] = unknown
        message = rf"with {told[name]['kept'][1]} of the \d+ units of {name} predictions are not finite; give --repair"
        with pytest.raises(ValueError, match=message):
            LevelTable.from_told(told)


def trial(folder: str, trains: bool, persistence: int) -> dict[str, Any]:
    """Try a model without every second unit of its first groups; return logits before, meanwhile and after."""
    config = ds_config(persistence=persistence)
    model = load_model(folder, config)
    engine = training_engine(model, config) if trains else inference_engine(model, config)
    engine.eval()
    backend, groups = Zero3Backend(engine), unit_groups(model)
    rows = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    masks = [torch.arange(group.num_units) % (2 if group.layer == 0 else 99) > 0 for group in groups]
    masks[-1][:] = True
    kept, gone = int(masks[0].sum()), int((~masks[0]).sum())
    takeover = torch.full((kept + 1, gone), 0.5)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return engine(input_ids=rows, use_cache=False).logits.float().clone()

    before = logits()
    with tried(backend, groups, masks, None):
        without = logits()
    with tried(backend, groups, masks, {0: takeover} if backend.rank == 0 else {}):
        repaired = logits()
    return {"before": before, "without": without, "repaired": repaired, "after": logits()}


@pytest.mark.distributed
@pytest.mark.parametrize(("trains", "persistence"), [(True, 0), (True, 10**6), (False, 0)])
def test_what_is_tried_leaves_no_trace(tmp_path: Path, trains: bool, persistence: int) -> None:
    for each in run_ranks(trial, 2, str(saved_model(tmp_path, "gpt_neo")), trains, persistence):
        assert torch.equal(each["before"], each["after"])
        assert not torch.allclose(each["before"], each["without"])
        assert not torch.allclose(each["repaired"], each["without"])


def test_what_the_dense_model_says_is_kept_with_its_digits_however_far_its_logits_are_from_0() -> None:
    logits = 3 * torch.randn(16, 50_000, generator=torch.Generator().manual_seed(0)) - 110

    def divergence(kept: torch.Tensor) -> float:
        known, found = kept.float().log_softmax(-1), logits.log_softmax(-1)
        return float((known.exp() * (known - found)).sum(-1).mean())

    assert divergence(logits.to(torch.bfloat16)) > 1e-3
    assert 0 <= divergence(in_two_bytes(logits)) < 1e-4
    assert torch.equal(in_two_bytes(logits.half()), logits.half())


@pytest.mark.parametrize("name", ["max_flops", "max_parameters"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_what_can_be_afforded_is_what_the_smaller_model_has(model_type: str, name: str) -> None:
    model = tiny_model(model_type, intermediate_size=400) if model_type != "gpt2" else tiny_model("gpt2", n_inner=400)
    groups, sizes = unit_groups(model), sizes_of(model)
    limit = int(0.7 * sizes[name])
    settings = PruningConfig(criterion="magnitude", **{name: limit})  # type: ignore[arg-type]
    kept = int(400 * afforded(settings, frozenset(), sizes, groups).remaining)
    compact_model(model, groups, random_keep(groups, [kept] * len(groups)))
    assert 0.99 * limit < sizes_of(model)[name] <= limit


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"), "llama", **GROUPED_HEADS)


@pytest.mark.distributed
def test_a_measured_table_is_alike_on_any_number_of_ranks_and_serves_other_sizes(work: Path) -> None:
    one, two = pruned(work, "one", 1, **MEASURED), pruned(work, "two", 2, **MEASURED)
    tables = [json.loads((work / name / "table.json").read_text()) for name in ("one", "two")]
    for name, own in tables[0].items():
        assert own["loss"] == pytest.approx(tables[1][name]["loss"], rel=1e-2, abs=1e-6)
        assert own["loss"][0] > 0
    assert (one["widths"], one["heads"]) == (two["widths"], two["heads"])
    assert one["remaining"]["measured"] == pytest.approx(0.6, abs=1e-2)
    again = pruned(work, "again", 2, **MEASURED, table=work / "one" / "table.json")
    assert (one["widths"], one["heads"]) == (again["widths"], again["heads"])
    assert "budget" not in again["seconds"]
    searched = pruned(work, "searched", 1, **MEASURED | {"budget": "search"}, table=work / "one" / "table.json")
    assert searched["rounds"][0]["searched"] == [*searched["widths"], *searched["heads"]]
    limit = 1 + one["parameters"]["pruned"]
    words = {name: value for name, value in MEASURED.items() if name != "remaining"}
    fewer = pruned(work, "fewer", 2, **words, table=work / "one" / "table.json", max_parameters=limit)
    assert limit - 200 < fewer["parameters"]["pruned"] <= limit
    smaller, dense = load_file(work / "fewer" / "pruned" / "model.safetensors"), one["parameters"]["dense"]
    assert sum(tensor.numel() for tensor in smaller.values()) <= limit < dense


@pytest.mark.distributed
@pytest.mark.parametrize("budget", ["measured", pytest.param("search", marks=pytest.mark.slow)])
def test_what_was_measured_decides_all_rounds(budget: str, work: Path) -> None:
    settings = MEASURED | {"max_steps": 6, "rounds": 2, "save_every": 3, "criterion": "magnitude", "repair": "none"}
    settings |= {"budget": budget}
    whole = pruned(work, budget, 2, **settings)
    assert whole["rounds"][0]["table"] == whole["rounds"][1]["table"]
    assert whole["remaining"]["measured"] == pytest.approx(0.6, abs=2e-2)
    if budget == "search":
        assert whole["rounds"][0]["searched"] == [*whole["widths"], *whole["heads"]]
    pruned(work, f"{budget} resumed", 2, **settings, resume=work / budget / "checkpoints" / "step-00000003")
    assert_same_run(work / f"{budget} resumed", work / budget)
    tables = [(work / name / "table.json").read_text() for name in (f"{budget} resumed", budget)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("seed", range(20))
def test_widths_in_time_lose_least_among_those_that_are_fast_enough(seed: int) -> None:
    table, random = a_table(seed), Random(seed)
    seconds = [sorted(random.random() for _ in own) for own in table.kept]
    dense = 0.5 + sum(own[-1] for own in seconds)
    every = list(product(*(range(len(own)) for own in table.kept)))
    for fraction in (0.95, 0.8, 0.65):
        fast = [levels for levels in every if 0.5 + total(levels, seconds) <= fraction * dense * (1 - 1e-3)]
        if not fast:
            continue
        widths = table.widths_in_time(seconds, 0.5, fraction)
        places = [own.index(width) for own, width in zip(table.kept, widths, strict=True)]
        assert 0.5 + total(places, seconds) <= fraction * dense
        least = min(total(levels, [[*own] for own in table.losses]) for levels in fast)
        assert total(places, [[*own] for own in table.losses]) <= least + 1e-9
    with pytest.raises(ValueError, match=r"--latency_target 0\.05 cannot be reached"):
        table.widths_in_time(seconds, 0.5, 0.05)


@pytest.mark.distributed
def test_a_target_of_time_is_kept_on_all_ranks(tmp_path: Path) -> None:
    work = make_work(tmp_path, "llama", intermediate_size=8192)  # whose products take longer than to begin them
    settings = {"criterion": "magnitude", "budget": "measured", "max_steps": 0, "repair": "none", "latency_target": 0.7}
    batch = {"train_batch_size": 64}  # of which a trial takes four
    first = pruned(work, "first", 2, **settings, **batch)["rounds"][0]
    assert first["widths"] == first["searched"]
    levels = [own["kept"] for own in first["table"].values()]
    assert all(width in own for width, own in zip(first["widths"], levels, strict=True))
    assert 0.2 < sum(first["widths"]) / sum(own[-1] for own in levels) < 0.8
    again = pruned(work, "again", 1, config=work / "first" / "recipe.yaml", **batch)["rounds"][0]
    assert len(again["searched"]) == len(levels)


@pytest.mark.parametrize("seed", range(20))
def test_groups_give_units_to_others_of_their_kind(seed: int) -> None:
    table, widths = a_table(), [9, 2, 31]
    new = switched(widths, table, torch.Generator().manual_seed(seed))
    assert 5 * (new[0] + new[2]) == 5 * (widths[0] + widths[2])
    assert new[1] == widths[1]
    assert all(1 <= now <= kept[-1] for now, kept in zip(new, table.kept, strict=True))
    assert on_the_way(widths, [17, 3, 64], 0.5, 1.0) == [1.0, 1.0, 1.0]
    assert on_the_way(widths, [17, 3, 64], 0.5, 0.5) == pytest.approx([9 / 17, 2 / 3, 31 / 64])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"table": "no.json"}, "--table no.json cannot be read"),
    ({"scope": "global"}, "--budget measured says what each layer loses"),
    ({"budget": "log", "table": "no.json"}, "--table no.json is for --budget measured or search, not log"),
    ({"remaining": 0.1}, "--budget measured leaves 0.268293 of the targets"),
    (
        {"remaining": 0.04, "budget": "log"},
        "--budget log leaves 0.05 of the targets at least, more than the 0.04 that are to remain",
    ),
    ({"budget": "uniform", "targets": "attention", "remaining": 0.3}, "with one head at least, are 0.333333 of the"),
    (
        {"budget": "uniform", "targets": "mlp", "remaining": 0.3, "width_multiple": 32},
        "--width_multiple and with one head at least, are 1 of the targets'",
    ),
    (
        {"budget": "uniform", "criterion": "flop", "max_steps": 9, "initial_rank": 1, "targets": "mlp"},
        "--initial_rank 1 begins with 0.",
    ),
    ({"max_parameters": 10}, "--max_parameters 10 cannot be reached: the model has"),
    ({"max_parameters": 10**9}, "--max_parameters 1,000,000,000 cannot be reached"),
    ({"max_flops": 10, "max_parameters": 20}, "--max_parameters and --max_flops say the same"),
    ({"latency_target": 0.5, "max_flops": 10}, "--max_flops and --latency_target say the same"),
    ({"latency_target": 0.5, "remaining": 0.6}, "--latency_target and --remaining say the same"),
    (
        {"latency_target": 0.5, "budget": "redundancy"},
        "--latency_target 0.5 is for --budget measured or search, not redundancy",
    ),
    ({"targets": "mlp,embedding"}, "an embedding is factorized, by --criterion flop or factorize"),
    ({"layout": "gguf"}, "--layout gguf has no place for different numbers of heads"),
    ({"layout": "nemotron_nas"}, "'nemotron_nas' has no place for different numbers of heads"),
    ({"layout": "uniform", "targets": "attention"}, "--layout uniform cannot hold the widths"),
]


@pytest.mark.distributed
def test_budgets_that_cannot_be_kept_are_refused(work: Path) -> None:
    words = {name: value for name, value in MEASURED.items() if name != "remaining"}
    cases = [arguments(work, work / "refused", **words | settings) for settings, _ in REFUSED]
    cases += [[*case, "--dry_run"] for case in cases]
    (found,) = run_ranks(outcomes, 1, cases)
    for (code, stderr), (_, expected) in zip(found, [*REFUSED, *REFUSED], strict=True):
        assert code == 2, expected
        assert expected in stderr
        assert len(errors_of(stderr)) == 1

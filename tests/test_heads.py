"""Attention heads as units: a masked head is a removed one, for every family; scores, repair and budgets by blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import GROUPED_HEADS, arguments, make_work, outcome, pruned, report_of
from distributed import run_ranks
from models import (
    EXTRAS,
    HEADS_REMAIN,
    LOSE_HEADS,
    WIDTH,
    compact_model,
    export,
    logits,
    mask_units,
    random_keep,
    several_heads,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_export import loaded_alone
from test_resume import assert_same_run
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from scale_prune.config import PruningConfig, parse
from scale_prune.core import compaction, elimination_scores, least_squares, select
from scale_prune.core.groups import UnitGroup
from scale_prune.core.repair import UnsolvableError, taken_over
from scale_prune.core.selection import budget
from scale_prune.criteria import CRITERIA
from scale_prune.criteria.slimllm import Slimllm
from scale_prune.export import convert, open_folder, plainest
from scale_prune.models import modeling_per_layer
from scale_prune.models.families import FAMILIES
from scale_prune.models.layer_units import stored_groups, unit_groups
from scale_prune.preflight.inputs import read_inputs

HEADS = ("mlp", "attention")
TELL = ("llama", "qwen3", "gemma2", "phi")
"""Some whose configs tell the number of heads without their size."""
EXPORTS = [(each, layout) for each in LOSE_HEADS for layout in ("pad", "per_layer")]
EXPORTS += [(each, "uniform") for each in TELL]


UNTRAINED = {
    "criterion": "kfac",
    "targets": "mlp,attention",
    "max_steps": 0,
    "remaining": 0.6,
    "calibration_tokens": 384,
    "train_batch_size": 6,
}


def without_heads(model_type: str, layout: str) -> tuple[PreTrainedModel, tuple[UnitGroup, ...], Tensor]:
    """Return a model that has lost neurons and heads, its groups, and the logits of its masked form."""
    model = tiny_model(model_type, **several_heads(model_type))
    groups = unit_groups(model, HEADS)
    most = {"uniform": (2, 2), "pad": (1, 2)}.get(layout, (1, 3))
    kept = [min(most[0] + group.layer, most[1]) for group in groups]
    keep = random_keep(groups, kept)
    mask_units(model, groups, keep)
    masked = logits(model, tokens())
    return model, compact_model(model, groups, keep), masked


@pytest.mark.parametrize("model_type", LOSE_HEADS)
def test_a_masked_head_is_a_removed_head(model_type: str) -> None:
    model, groups, masked = without_heads(model_type, "per_layer")
    assert torch.allclose(logits(model, tokens()), masked, atol=1e-4)
    assert groups == unit_groups(model, HEADS)
    assert [group.members for group in stored_groups(model)] == [group.members for group in groups]
    assert [group.num_units for group in groups if group.kind == "head"] == [1, 2, 3]


@pytest.mark.parametrize("model_type", sorted(HEADS_REMAIN))
def test_heads_that_cannot_leave_are_refused(model_type: str) -> None:
    settings = several_heads(model_type) if model_type != "codegen" else EXTRAS["codegen"]
    with pytest.raises(ValueError, match=r"--targets attention: .* no head of a .* can leave; give --targets mlp"):
        unit_groups(tiny_model(model_type, **settings), HEADS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict]:
    """Export models with fewer heads in every layout and load all of them in one fresh process."""
    return loaded_alone(tmp_path_factory.mktemp("heads"), EXPORTS, without_heads)


@pytest.mark.parametrize(("model_type", "layout"), EXPORTS)
def test_an_exported_model_loads_with_its_heads(loaded: Mapping[str, dict], model_type: str, layout: str) -> None:
    result = loaded[f"{model_type}-{layout}"]
    assert result["difference"] < 5e-4  # gemma2's logits go up to 5, and sums of fewer heads are rounded otherwise
    assert result["generated"] == tokens().shape[1] + 3 * (not FAMILIES[model_type].classifies)
    assert layout != "per_layer" or loaded[f"{model_type}-{layout}-again"] == result


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen2"])  # whose configs do not tell the size of a head
def test_a_cache_that_is_made_at_once_fits_fewer_heads(model_type: str, tmp_path: Path) -> None:
    model, groups, _ = without_heads(model_type, "per_layer")
    folder = export(tmp_path / "own", model, groups, "per_layer")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    static = loaded.generate(tokens(), cache_implementation="static", prefill_chunk_size=3, **how)
    assert torch.equal(static, loaded.generate(tokens(), **how))


@pytest.mark.parametrize("model_type", ["gptj", "llama"])
def test_a_folder_with_fewer_heads_is_converted(model_type: str, tmp_path: Path) -> None:
    model, groups, masked = without_heads(model_type, "per_layer")
    stored = open_folder(export(tmp_path / "own", model, groups, "per_layer"))
    convert(stored, "pad", tmp_path / "pad")
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "pad")
    assert torch.allclose(logits(padded, tokens()), masked, atol=1e-4)
    convert(stored, "auto", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    for form, reason in (("uniform", "one"), ("nemotron_nas", "Llama|heads"), ("gguf", "--to pad first")):
        with pytest.raises(ValueError, match=reason):
            convert(stored, form, tmp_path / form)


def test_numbers_of_heads_that_a_config_refuses_are_padded_or_told_by_layer(tmp_path: Path) -> None:
    """A Llama's heads have to divide its width: 6 of 10 do not divide 40, 8 do."""
    model = tiny_model("llama", hidden_size=40, num_attention_heads=10, head_dim=4, num_key_value_heads=5)
    groups = unit_groups(model, HEADS)
    keep = random_keep(groups, [3] * len(groups))
    mask_units(model, groups, keep)
    masked, left = logits(model, tokens()), compact_model(model, groups, keep)
    assert plainest(model.config, left) == "per_layer"
    with pytest.raises(ValueError, match=r"cannot hold 3 units of heads a layer, .* only 4; ask for layout 'pad'"):
        export(tmp_path / "uniform", model, left, "uniform")
    padded = AutoModelForCausalLM.from_pretrained(export(tmp_path / "pad", model, left, "pad"))
    assert padded.config.num_attention_heads == 8
    assert torch.allclose(logits(padded, tokens()), masked, atol=1e-4)


def test_they_are_refused_before_training_or_another_layout_is_taken(tmp_path: Path) -> None:
    work = make_work(tmp_path, "llama", hidden_size=40, num_attention_heads=10, head_dim=4, num_key_value_heads=5)
    settings = UNTRAINED | {"criterion": "obs", "scope": "per_group"}
    asked, named = (
        parse(arguments(work, work / "out", **settings, layout=layout), criteria=(*CRITERIA,))
        for layout in ("auto", "uniform")
    )
    assert read_inputs(*asked, 1).config.output.layout == "per_layer"
    with pytest.raises(ValueError, match=r"the 3 of 5 units of heads that --remaining 0\.6 leaves .* takes is 4"):
        read_inputs(*named, 1)


def test_the_written_code_knows_the_same_counts_of_heads() -> None:
    assert modeling_per_layer.HEAD_COUNTS == compaction.HEAD_COUNTS


@pytest.mark.parametrize("block", [1, 3])
def test_the_cost_of_a_unit_is_what_the_best_repair_leaves(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(200, 12, generator=generator).double(), torch.randn(5, 12, generator=generator).double()
    scores = elimination_scores(h.T @ h, weight, damping=0.0, rounds=12, block=block)
    first = int(scores.argmin())
    keep = torch.ones(12 // block, dtype=torch.bool)
    keep[first] = False
    features = keep.repeat_interleave(block)
    repaired = taken_over(weight, least_squares(h.T @ h, features, 0.0).double(), features, 1)
    repaired[:, ~features] = 0
    error = (h @ (repaired - weight).T).square().sum()
    assert float(scores[first]) == pytest.approx(float(error), rel=1e-5)


def test_a_budget_of_heads_and_neurons_is_exact() -> None:
    costs, sizes = [40, 40, 7, 7], [3, 3, 17, 17]
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.randn(size, generator=generator) for size in sizes]
        masks = select(scores, remaining=0.55, scope="global", costs=costs)
        spent = sum(cost * int(mask.sum()) for cost, mask in zip(costs, masks, strict=True))
        allowed = 0.55 * sum(cost * size for cost, size in zip(costs, sizes, strict=True))
        assert allowed - 7 < spent <= allowed


def test_neurons_make_up_for_the_heads_of_their_layer() -> None:
    costs, sizes, layers = [7, 7, 40, 40], [17, 17, 3, 3], [0, 1, 0, 1]
    for remaining in (0.9, 0.75, 0.6, 0.5):
        masks = select(
            [torch.rand(size) for size in sizes], remaining=remaining, scope="per_group", costs=costs, layers=layers
        )
        kept = [int(mask.sum()) for mask in masks]
        assert kept[2:] == [round(3 * remaining)] * 2
        for layer in (0, 1):
            spent = 7 * kept[layer] + 40 * kept[2 + layer]
            assert remaining * (7 * 17 + 40 * 3) - 7 < spent <= remaining * (7 * 17 + 40 * 3)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"), "llama", **GROUPED_HEADS)


@pytest.mark.distributed
def test_any_number_of_ranks_and_passes_prunes_heads_alike(work: Path) -> None:
    reports = []
    for world_size, passes in ((1, 1), (3, 2)):
        settings = UNTRAINED | {"gradient_accumulation_steps": passes}
        reports.append(pruned(work, f"{world_size}-{passes}", world_size, **settings))
    first = reports[0]
    assert sum(first["heads"]) < 9
    assert first["remaining"]["measured"] == pytest.approx(0.6, abs=1e-2)
    for report in reports[1:]:
        assert (report["heads"], report["widths"]) == (first["heads"], first["widths"])
        assert report["perplexity"]["exported"] == pytest.approx(first["perplexity"]["exported"], rel=1e-4)
    for report in reports:
        assert report["perplexity"]["compacted"] == pytest.approx(report["perplexity"]["exported"], rel=1e-5)


@pytest.mark.distributed
def test_heads_leave_in_rounds_that_go_on_bit_for_bit(work: Path) -> None:
    settings = UNTRAINED | {"criterion": "fisher", "max_steps": 6, "rounds": 2, "save_every": 3, "scope": "global"}
    whole = pruned(work, "whole", 2, **settings)
    again = pruned(work, "again", 2, **settings, resume=work / "whole" / "checkpoints" / "step-00000003")
    assert_same_run(work / "again", work / "whole")
    assert whole["heads"] == again["heads"] != [3, 3, 3]
    events = EventAccumulator(str(work / "whole" / "tensorboard")).Reload()
    tags = [f"kept/{name}_{layer:02d}" for name in ("layer", "heads") for layer in range(3)]
    shares = [{event.step: event.value for event in events.Scalars(tag)}[4] for tag in tags]
    dense = [WIDTH] * 3 + [3] * 3
    assert shares == pytest.approx(
        [width / size for width, size in zip(whole["rounds"][0]["widths"], dense, strict=True)]
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"criterion": "gum", "similarity_every": 2, "remaining": 0.5}, marks=pytest.mark.slow),
        {"criterion": "neuron_l0", "remaining": 0.5},
        pytest.param(
            {"criterion": "obs", "targets": "attention", "rounds": 1, "layout": "pad"}, marks=pytest.mark.slow
        ),
        {"criterion": "wanda", "rounds": 1, "budget": "log", "width_multiple": 4},
        pytest.param(
            {"criterion": "sensitivity", "scope": "standardized", "precision": "bf16"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_heads_with_everything(settings: dict[str, Any], work: Path) -> None:
    usual = {"targets": "mlp,attention", "calibration_tokens": 384, "remaining": 0.6, "max_steps": 6}
    report = pruned(work, str(abs(hash(str(settings)))), 2, **usual | settings)
    assert report["perplexity"]["masked"] == pytest.approx(report["perplexity"]["compacted"], rel=1e-2)
    assert sum(report["heads"]) < 9


@pytest.mark.distributed
@pytest.mark.parametrize("targets", ["attention", "mlp,attention"])
def test_a_loss_that_is_not_finite_leaves_the_model_of_before(targets: str, work: Path) -> None:
    output = work / f"nan {targets}"
    steep = {"criterion": "magnitude", "learning_rate": 1e30, "warmup_fraction": 0.9, "cooldown_fraction": 0.0}
    (code, stderr), _ = run_ranks(outcome, 2, arguments(work, output, **steep, targets=targets))
    assert code == 2
    assert f"at step 4; the model as it was before that step is in {output}/last_good" in stderr
    AutoModelForCausalLM.from_pretrained(output / "last_good")


def test_as_many_heads_stay_as_are_foretold() -> None:
    for heads in range(1, 21):
        for remaining in (0.3, 0.45, 0.5, 0.6, 0.77, 0.9):
            scores = [torch.arange(float(size)) for size in (40, heads)]
            masks = select(scores, remaining=remaining, scope="per_group", costs=[3, 50], layers=[0, 0])
            assert int(masks[1].sum()) == budget(remaining, heads, nearest=True)


def tokens_and_output(features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(300, features, generator=generator).double() + 0.3, torch.randn(5, features, generator=generator)


def gram_with_ones(h: torch.Tensor) -> torch.Tensor:
    with_ones = torch.cat([h, h.new_ones(len(h), 1)], 1)
    return with_ones.T @ with_ones


def test_slimllm_refuses_activations_that_overflow() -> None:
    h, weight = tokens_and_output(12)
    h[5, 3] = torch.inf
    for block in (1, 3):
        with pytest.raises(UnsolvableError, match="not finite"):
            Slimllm(PruningConfig(criterion="slimllm"), 0).rank_units(gram_with_ones(h), weight, block)


@pytest.mark.parametrize("seed", range(5))
def test_slimllm_has_scores_where_outputs_do_not_vary(seed: int) -> None:
    h, weight = tokens_and_output(12, seed)
    constant = gram_with_ones(h[:1].expand_as(h)).float()  # as sums over tokens are kept
    scores = Slimllm(PruningConfig(criterion="slimllm"), 0).rank_units(constant, weight, 3)
    assert scores.isfinite().all()


def test_slimllm_takes_out_the_head_without_which_outputs_correlate_best() -> None:
    h, weight = tokens_and_output(12)
    scores = Slimllm(PruningConfig(criterion="slimllm"), 0).rank_units(gram_with_ones(h), weight, 3)
    output = h @ weight.double().T
    kept = [0, 1, 2, 3]
    for head in scores.argsort().tolist()[:3]:
        errors = {}
        for each in kept:
            own = [feature for other in kept if other != each for feature in range(3 * other, 3 * other + 3)]
            part = h[:, own] @ weight.double()[:, own].T
            pairs = [torch.stack([part[:, d], output[:, d]]) for d in range(5)]
            errors[each] = 1 - float(torch.stack([torch.corrcoef(pair)[0, 1].abs() for pair in pairs]).mean())
        assert head == min(errors, key=lambda each: errors[each])
        assert float(scores[head]) >= errors[head] - 1e-6
        kept.remove(head)
    assert scores.argmax() == kept[0]


def test_slimllm_weighs_neurons_by_the_principal_directions_of_the_output() -> None:
    h, weight = tokens_and_output(12)
    scores = Slimllm(PruningConfig(criterion="slimllm"), 0).rank_units(gram_with_ones(h), weight, 1)
    output = h @ weight.double().T
    values, directions = torch.linalg.eigh(torch.cov(output.T) * (len(h) - 1))
    expected = [
        ((directions.T @ weight.double()[:, unit]) * (values / values.mean()).sigmoid()).norm() * h[:, unit].norm()
        for unit in range(12)
    ]
    torch.testing.assert_close(scores, torch.stack(expected).float())


@pytest.mark.distributed
def test_what_has_lost_heads_is_pruned_again_and_a_recipe_starts_the_same_run(work: Path) -> None:
    first = pruned(work, "first", 2, **UNTRAINED | {"remaining": 0.5})
    smaller = {
        "model": work / "first" / "pruned",
        "trust_remote_code": True,
        "targets": "mlp",
        "criterion": "magnitude",
    }
    usual = {name: value for name, value in UNTRAINED.items() if name != "remaining"}
    limit = first["parameters"]["pruned"] - 200
    again = pruned(work, "once more", 1, **usual | smaller, scope="per_group", max_parameters=limit)
    assert again["settings"]["layout"] == "per_layer"
    assert again["parameters"]["pruned"] <= limit
    assert again["perplexity"]["compacted"] == pytest.approx(again["perplexity"]["exported"], rel=1e-5)
    recipe = work / "once more" / "recipe.yaml"
    ((code, _),) = run_ranks(outcome, 1, ["--config", str(recipe), "--output_dir", str(work / "by recipe")])
    assert code == 0
    assert report_of(work / "by recipe")["widths"] == again["widths"]

"""What an analysis says of every neuron, against the definitions on the whole model, on one rank and on two."""

import json
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import BLOCK, errors_of, make_work
from deepspeed.accelerator import get_accelerator
from distributed import run_ranks
from models import LAYERS, WIDTH
from outcomes import outcome_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from scale_prune.commands import analyze
from scale_prune.commands.analyze import _of_same_groups
from scale_prune.config.settings import Config
from scale_prune.core.redundancy import Products, sample_units
from scale_prune.data.batches import TokenBlocks, training_batches
from scale_prune.data.text import prepare
from scale_prune.inspection.analysis import GroupAnalysis, Sampling
from scale_prune.inspection.analysis import analyze as analyze_model
from scale_prune.inspection.analysis_tables import as_json, summary
from scale_prune.preflight.inputs import read_inputs
from scale_prune.zero3 import Runtime

pytestmark = pytest.mark.distributed

STEPS, BATCH = 3, 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def config_of(work: Path) -> Config:
    texts = {f"{split}_file": str(work / f"{split}.txt") for split in ("train", "validation")}
    return Config.from_flat({"model": str(work / "model"), "block_size": BLOCK, "train_batch_size": BATCH, **texts})


def analysed(work: Path, sampling: Sampling | None = None, fp16: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    runtime = Runtime.start()
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed thinks that a CPU cannot
    inputs = read_inputs(config_of(work), frozenset(), runtime.world_size)
    inputs = replace(inputs, ds_config=inputs.ds_config | ({"bf16": {"enabled": False}, "fp16": fp16} if fp16 else {}))
    blocks = prepare(inputs.config.data, "train", inputs.tokenizer)
    return [
        vars(group) | {"uniqueness": group.uniqueness}
        for group in analyze_model(inputs, blocks, STEPS, runtime, sampling or Sampling())
    ]


def batches_of(work: Path) -> list[Tensor]:
    inputs = read_inputs(config_of(work), frozenset(), 1)
    blocks: TokenBlocks = prepare(inputs.config.data, "train", inputs.tokenizer)
    steps = training_batches(
        blocks, batch_size=BATCH, micro_batch_size=BATCH, accumulation=1, rank=0, world_size=1, seed=0
    )
    return [micro_batches[0] for micro_batches in islice(steps, STEPS)]


@cache
def expected(work: Path) -> list[dict[str, Tensor]]:
    """Compute sensitivity and cosines from whole gradients and activations."""
    model: Any = AutoModelForCausalLM.from_pretrained(work / "model").eval()
    caught: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    sensitivity = torch.zeros(LAYERS, WIDTH)
    for layer, block in enumerate(model.transformer.h):
        block.mlp.c_proj.register_forward_pre_hook(
            lambda module, inputs, layer=layer: caught[layer].append(inputs[0].detach().flatten(0, 1))
        )
    for input_ids in batches_of(work):
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        for layer, block in enumerate(model.transformer.h):
            first, last = block.mlp.c_fc, block.mlp.c_proj
            by_unit = (first.weight * first.weight.grad).sum(1) + first.bias * first.bias.grad
            by_unit = by_unit + (last.weight * last.weight.grad).sum(0)
            sensitivity[layer] += by_unit.detach().abs() / STEPS
    found = []
    for layer, parts in enumerate(caught):
        h = torch.cat(parts).double()
        cosines = (h / h.norm(dim=0)).T @ (h / h.norm(dim=0))
        found.append({"sensitivity": sensitivity[layer], "cosines": cosines, "correlations": torch.corrcoef(h.T)})
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_number_is_that_of_its_definition(world_size: int, work: Path) -> None:
    ranks = run_ranks(analysed, world_size, work)
    for found in ranks:
        assert [group["name"] for group in found] == [f"transformer.h.{layer}.mlp" for layer in range(LAYERS)]
        for group, whole in zip(found, expected(work), strict=True):
            others = ~torch.eye(WIDTH, dtype=torch.bool)
            cosines, correlations = whole["cosines"], whole["correlations"].abs() * others
            later = (cosines >= 0.8) & torch.ones(WIDTH, WIDTH).triu(1).bool()
            torch.testing.assert_close(group["sensitivity"], whole["sensitivity"], rtol=1e-4, atol=1e-7)
            absolute = (cosines.abs() * others).float()
            torch.testing.assert_close(group["similarity"], absolute.sum(1) / (WIDTH - 1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(group["nearest"], absolute.amax(1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(group["correlated"], correlations.amax(1).float(), rtol=1e-3, atol=1e-4)
            assert torch.equal(group["similar"], later.any(1))
            assert group["uniqueness"] == 1 - int(later.any(1).sum()) / WIDTH
            assert group["live"].all()
            assert group["sampled"].all()
            assert group["explained"].shape == (WIDTH,)
            assert 0 < float(group["explained"].mean()) < 1


def test_batches_whose_gradients_overflow_in_fp16_do_not_count(work: Path) -> None:
    """The loss scale starts far too high, and is halved until the gradients fit."""
    (found,) = run_ranks(analysed, 1, work, None, {"enabled": True, "initial_scale_power": 30, "hysteresis": 1})
    for group, whole in zip(found, expected(work), strict=True):
        # Not the same batches as without overflow, so of the same size only.
        assert 0.3 < float(group["sensitivity"].sum() / whole["sensitivity"].sum()) < 3
        assert group["sensitivity"].isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sample_of_neurons_is_compared_with_all_of_them(world_size: int, work: Path) -> None:
    size = 6
    ranks = run_ranks(analysed, world_size, work, Sampling(units=size))
    for found in ranks:
        for index, (group, whole) in enumerate(zip(found, expected(work), strict=True)):
            others = ~torch.eye(WIDTH, dtype=torch.bool)
            absolute, correlations = (whole["cosines"].abs() * others).float(), whole["correlations"].abs() * others
            later = (whole["cosines"] >= 0.8) & torch.ones(WIDTH, WIDTH).triu(1).bool()
            sampled = group["sampled"]
            assert sampled.nonzero().flatten().tolist() == sample_units(WIDTH, size, index).tolist()
            torch.testing.assert_close(group["sensitivity"], whole["sensitivity"], rtol=1e-4, atol=1e-7)
            mean = absolute[:, sampled].sum(1) / (size - sampled.float())
            torch.testing.assert_close(group["similarity"], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(group["nearest"], absolute.amax(1) * sampled, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                group["correlated"], correlations.amax(1).float() * sampled, rtol=1e-3, atol=1e-4
            )
            assert torch.equal(group["similar"], later.any(1) & sampled)
            assert group["uniqueness"] == 1 - int(later.any(1)[sampled].sum()) / size
            assert group["explained"].shape == (size,)


def test_a_sample_of_tokens_bounds_the_activations(work: Path) -> None:
    tokens = [*run_ranks(counted, 1, work, Sampling(tokens=10)), *run_ranks(counted, 2, work, Sampling(tokens=10))]
    assert tokens == [10, 10, 10]
    assert run_ranks(counted, 1, work, Sampling()) == [BATCH * BLOCK]


def counted(work: Path, sampling: Sampling) -> int:
    """Return how many tokens of a batch came together from all ranks."""
    seen = set()
    update = Products.update

    def noted(self: Products, activations: Tensor) -> None:
        seen.add(len(activations))
        update(self, activations)

    Products.update = noted  # type: ignore[method-assign]
    try:
        analysed(work, sampling)
    finally:
        Products.update = update  # type: ignore[method-assign]
    (number,) = seen
    return number


def without_units(work: Path, folder: Path) -> Path:
    """Return inputs whose model has neurons of zeros, as a padded layout has."""
    model: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    for block in model.transformer.h:
        for tensor in (block.mlp.c_fc.weight, block.mlp.c_fc.bias):
            tensor.data[[2, 11]] = 0.0
        block.mlp.c_proj.weight.data[:, [2, 11]] = 0.0
    (folder / "model").mkdir()
    for file in (*work.glob("*.txt"), *(work / "model").glob("token*"), *(work / "model").glob("*.json")):
        target = folder / file.relative_to(work)
        target.write_bytes(file.read_bytes())
    model.save_pretrained(folder / "model")
    return folder


def test_neurons_of_zeros_do_not_count(work: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(analysed, 1, without_units(work, tmp_path))
    for group in found:
        assert (~group["live"]).nonzero().flatten().tolist() == [2, 11]
        assert group["sensitivity"][[2, 11]].tolist() == [0.0, 0.0]
        assert not group["similar"][[2, 11]].any()
        assert not group["sampled"][[2, 11]].any()
        assert len(group["explained"]) == WIDTH - 2


def analyze_flags(work: Path, output: Path, *more: str) -> list[str]:
    text = ["--train_file", str(work / "train.txt"), "--block_size", str(BLOCK), "--train_batch_size", str(BATCH)]
    return [*text, "--batches", "2", "--output_dir", str(output), *more]


def run_of(work: Path, folder: Path) -> Path:
    """Return what a run leaves: a smaller model, and which neurons it kept of the dense one."""
    from models import compact_model

    from scale_prune.models.layer_units import unit_groups

    model: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    keep = {group.name: torch.arange(5) for group in unit_groups(model)}
    compact_model(model, unit_groups(model), keep)
    model.config.intermediate_size = 5
    model.save_pretrained(folder / "pruned")
    for file in (work / "model").glob("token*"):
        (folder / "pruned" / file.name).write_bytes(file.read_bytes())
    (folder / "kept.json").write_text(json.dumps({name: units.tolist() for name, units in keep.items()}))
    return folder / "pruned"


def test_the_command_writes_numbers_a_table_and_figures(work: Path, tmp_path: Path) -> None:
    output, small = tmp_path / "analysis", run_of(work, tmp_path / "some run")
    both = ["--baseline", str(work / "model"), "--model", str(small)]
    run_ranks(
        analyze.main,
        2,
        analyze_flags(work, output, *both, "--sample_units", "4", "--sample_tokens", "50", "--bos", "always"),
    )
    found = json.loads((output / "analysis.json").read_text())
    assert (found["baseline"], found["sample_units"], found["sample_tokens"]) == ("model", 4, 50)
    assert found["bos"] == {"model": True, "some run": True}
    assert "of 4 neurons a layer" in (output / "table.md").read_text()
    dense, pruned = found["models"]["model"], found["models"]["some run"]
    assert (dense["model"]["neurons"], pruned["model"]["neurons"]) == (LAYERS * WIDTH, LAYERS * 5)
    assert pruned["ratio"]["neurons"] == pytest.approx(5 / WIDTH)
    expected_ratio = pruned["model"]["sensitivity_sum"] / dense["model"]["sensitivity_sum"]
    assert pruned["ratio"]["sensitivity_sum"] == pytest.approx(expected_ratio)
    by_layer = sum(layer["sensitivity_sum"] for layer in dense["layers"])
    assert by_layer == pytest.approx(dense["model"]["sensitivity_sum"])
    assert f"({expected_ratio:.3f})" in (output / "table.md").read_text()
    names = {"redundancy", "nearest_neighbours", "kept_neurons"}
    names |= {"sensitivity_by_neuron_model", "sensitivity_by_neuron_some_run"}
    assert {path.name for path in output.glob("*.*g")} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in output.glob("*.png"))


def test_a_sample_counts_layers_by_their_neurons() -> None:
    """Two layers of 8 and 2 neurons, 2 of each looked at: one of the large layer repeats another, none of the small."""
    large, small = (
        sampled_group(8, similar=[True, False], near=[0.9, 0.5]),
        sampled_group(2, [False, False], [0.1, 0.2]),
    )
    found = summary([large, small])
    assert found["uniqueness"] == pytest.approx(1 - 4 / 10)
    assert found["nearest_median"] == pytest.approx(0.5)
    assert found["neurons"] == 10
    assert found["explained_mean"] == pytest.approx((8 * 0.5 + 2 * 0.25) / 10)
    neurons = as_json({"model": [large, small]}, None)["models"]["model"]["neurons"]
    assert neurons["8"]["nearest"][:3] == [pytest.approx(0.9), pytest.approx(0.5), None]
    assert neurons["8"]["similar"][:3] == [True, False, None]


def sampled_group(width: int, similar: list[bool], near: list[float]) -> GroupAnalysis:
    line = torch.zeros(width)
    line[:2] = torch.tensor(near)
    flags = torch.zeros(width, dtype=torch.bool)
    flags[:2] = torch.tensor(similar)
    return GroupAnalysis(
        name=str(width),
        layer=0,
        live=torch.ones(width, dtype=torch.bool),
        sampled=torch.arange(width) < 2,
        sensitivity=torch.ones(width),
        similarity=torch.zeros(width),
        nearest=line,
        correlated=line,
        similar=flags,
        explained=torch.tensor([0.5, 0.5] if width == 8 else [0.25]),
    )


def mistakes(cases: list[list[str]]) -> list[tuple[int, str]]:
    return [outcome_of(analyze.main, *case) for case in cases]


def test_what_cannot_be_analysed_is_named(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    AutoConfig.for_model("bert", hidden_size=8).save_pretrained(tmp_path / "bert")
    for file in (work / "model").glob("token*"):
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    model = ["--model", str(work / "model")]
    cases = {
        "its model cannot be read": analyze_flags(work, tmp_path / "a", "--model", str(tmp_path / "empty")),
        "bert": analyze_flags(work, tmp_path / "a", "--model", str(tmp_path / "bert")),
        "is there twice": analyze_flags(work, tmp_path / "a", *model, "--baseline", str(work / "model")),
        "holds something": analyze_flags(work, work, *model),
        "train.txt is not a folder": analyze_flags(work, work / "train.txt" / "new" / "a", *model),
        "0 is not valid": analyze_flags(work, tmp_path / "a", *model, "--batches", "0"),
        "1 is not valid": analyze_flags(work, tmp_path / "a", *model, "--sample_units", "1"),
    }
    for message, (code, stderr) in zip(cases, run_ranks(mistakes, 1, list(cases.values()))[0], strict=True):
        (error,) = errors_of(stderr)
        assert code == 2
        assert message in error, error
    assert not (tmp_path / "a").exists()


def test_a_mount_point_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    code, stderr = outcome_of(analyze.main, *analyze_flags(tmp_path, tmp_path, "--model", "nowhere"))
    assert code == 2
    assert f"--output_dir {tmp_path} is a mount point" in stderr


def test_what_is_kept_of_another_model_is_left_out() -> None:
    found: Any = {"base": [SimpleNamespace(name="h.0", sensitivity=torch.zeros(5))]}
    kept: dict[str, Any] = {"base": {"h.0": [0]}, "own": {"h.0": [0, 4]}, "other": {"h.1": [0]}, "wider": {"h.0": [5]}}
    kept["heads"] = {"h.0": [1], "h.0.attn": [0]}
    kept |= {"list": [3], "text": {"h.0": ["0"]}, "number": {"h.0": 3}, "below": {"h.0": [-1]}}
    assert _of_same_groups(kept, found, "base") == {"own": {"h.0": [0, 4]}, "heads": {"h.0": [1]}}
    assert _of_same_groups(kept, found, None) == {}

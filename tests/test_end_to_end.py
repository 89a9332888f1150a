"""The command itself, from the text to the report, and what it says where it cannot go on."""

import json
import math
import os
import re
import shutil
import signal
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from command import (
    BATCH,
    BLOCK,
    STEPS,
    arguments,
    errors_of,
    finish,
    launch,
    make_work,
    outcome,
    outcomes,
    pids_of,
    recomputed_perplexity,
    report_of,
    wait_until,
)
from distributed import run_ranks, start_ranks
from models import LAYERS, WIDTH
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import AutoModelForCausalLM

from scale_prune.config.settings import Config
from scale_prune.core.selection import select
from scale_prune.preflight import fill_in
from scale_prune.run import model_writer, student
from scale_prune.system.exits import LOST_CONTACT

pytestmark = pytest.mark.distributed

RECOVERY = 2
SEED = 2**32 - 1  # the largest: nothing that is made of it may overflow, on no rank


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    """Return the output folder of a whole run on two ranks."""
    more = {"criterion": "gum", "remaining": 0.4, "recovery_steps": RECOVERY, "seed": SEED}
    process = launch(arguments(work, work / "out", **more))
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count("(dense)") == 1, "only rank 0 speaks"
    warnings = {line for line in output.splitlines() if "warning" in line.lower()}
    assert all("hostfile" in line for line in warnings), "somebody warns of what nobody can change"
    words: Any = process.args
    port = words[words.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    return work / "out"


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    return report_of(finished)


def test_the_report_keeps_its_contract(report: dict[str, Any], finished: Path) -> None:
    facts = {name: report[name] for name in ("criterion", "scope", "layout", "seed", "world_size", "steps")}
    assert facts == {
        "criterion": "gum",
        "scope": "global",
        "layout": "per_layer",
        "seed": SEED,
        "world_size": 2,
        "steps": STEPS + RECOVERY,
    }
    kept = int(0.4 * LAYERS * WIDTH)
    assert report["remaining"] == {"target": 0.4, "measured": kept / (LAYERS * WIDTH), "gates": None}
    assert sum(report["widths"]) == kept
    assert report["parameters"]["dense"] - report["parameters"]["pruned"] == (LAYERS * WIDTH - kept) * (11 + 1 + 11)
    assert report["parameters"]["stored"] == report["parameters"]["pruned"]
    assert report["tokens"] == (STEPS + RECOVERY) * BATCH * BLOCK
    parts = {"forward_backward", "step", "scoring", "similarity", "masking", "evaluation"}
    assert parts < report["seconds"].keys()
    assert sum(report["seconds"][part] for part in parts) <= report["seconds"]["total"]
    assert len(report["peak_memory_bytes"]) == 2
    assert all(2**26 < peak < 2**34 for peak in report["peak_memory_bytes"])
    shares = 4 * math.ceil(LAYERS * WIDTH / 2)  # one number a unit, half of which a rank of two has not
    assert shares <= report["received_bytes"]["reduce_scatter"] <= 2 * shares
    counts = 8 * LAYERS  # of sampled tokens
    assert 0 < report["received_bytes"]["all_gather"] <= 2 * shares + counts
    assert report["settings"]["learning_rate"] == report["ds_config"]["optimizer"]["params"]["lr"]
    assert {"host", "commit"} <= report.keys()
    assert "--criterion gum" in report["command"]
    assert time.time() - 3600 < datetime.fromisoformat(report["date"]).timestamp() <= time.time()
    assert (
        torch.__version__.split("+")[0] == report["versions"]["torch"].split("+")[0]
    )  # a wheel for CUDA says more of itself
    markdown = (finished / "report.md").read_text()
    assert all(str(width) in markdown for width in report["widths"])
    assert f"{report['perplexity']['exported']:,.3f}" in markdown


def test_masked_compacted_and_exported_model_agree(report: dict[str, Any]) -> None:
    perplexity = report["perplexity"]
    assert perplexity["masked"] == pytest.approx(perplexity["compacted"], rel=1e-5)
    assert perplexity["recovered"] == pytest.approx(perplexity["exported"], rel=1e-5)
    assert perplexity["recovered"] < perplexity["masked"] < perplexity["dense"]


def test_anyone_can_recompute_the_perplexities(report: dict[str, Any], finished: Path, work: Path) -> None:
    pruned = AutoModelForCausalLM.from_pretrained(finished / "pruned", trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(work / "model")
    for model, name in ((pruned, "exported"), (dense, "dense")):
        found = recomputed_perplexity(model, finished / "pruned", work / "validation.txt")
        assert found == pytest.approx(report["perplexity"][name], rel=1e-5)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == report["parameters"]["pruned"]


def test_kept_neurons_are_those_of_the_highest_scores(report: dict[str, Any], finished: Path) -> None:
    kept, scores = json.loads((finished / "kept.json").read_text()), load_file(finished / "scores.safetensors")
    assert list(kept) == [f"transformer.h.{layer}.mlp" for layer in range(LAYERS)]
    assert kept.keys() == scores.keys()
    masks = select([scores[name] for name in kept], remaining=0.4, scope="global", min_kept=1)
    assert [mask.nonzero().flatten().tolist() for mask in masks] == list(kept.values())
    assert [len(indices) for indices in kept.values()] == report["widths"]


def test_the_recipe_names_the_settings(report: dict[str, Any], finished: Path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe == {name: value for name, value in report["settings"].items() if value is not None}


def test_tensorboard_shows_what_happened(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    logged = [2, 4, 6, 7, 8, 9]
    for tag in ("train/loss", "train/learning_rate", "pruning/remaining", "pruning/mask_churn", "pruning/similarity"):
        assert [step for step, _ in scalars[tag]] == logged, tag
        assert all(math.isfinite(value) for _, value in scalars[tag])
    assert scalars["pruning/remaining"][-1][1] == pytest.approx(20 / 51)
    assert {f"kept/layer_{layer:02d}" for layer in range(LAYERS)} < scalars.keys()
    assert {f"scores/layer_{layer:02d}" for layer in range(LAYERS)} == set(tags["histograms"])
    assert tags["images"] == ["kept/layers_over_time"]
    assert [step for step, _ in scalars["validation/perplexity"]] == [0, 7, 7, 9, 9]


# --- in forked ranks, which start fast -------------------------------------------------------------------------------


def content(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_left_alone(finished: Path, work: Path) -> None:
    before = content(finished)
    (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, arguments(work, finished))
    assert (code, other_code) == (2, 2)
    message = (
        f"error: --output_dir {finished} holds a run already; give another folder, --resume to go on with it, or "
        "--overwrite to replace it"
    )
    assert errors_of(stderr) == [message]
    assert errors_of(other_stderr) == []
    assert "Traceback" not in stderr + other_stderr
    assert content(finished) == before


def files(work: Path) -> dict[str, Path]:
    """Make inputs that cannot be used."""
    folder = work / "bad"
    folder.mkdir(exist_ok=True)
    contents = {
        "broken.json": "{",
        "stage2.json": json.dumps({"zero_optimization": {"stage": 2}}),
        "compression.json": json.dumps({"zero_optimization": {"stage": 3}, "compression_training": {}}),
        "batches.json": json.dumps(
            {"zero_optimization": {"stage": 3}, "train_batch_size": 5, "gradient_accumulation_steps": 2}
        ),
        "typo.yaml": "remainin: 0.5\n",
        "empty.txt": "",
        "short.txt": "the model\n",
        "columns.jsonl": json.dumps({"body": "a", "title": "b"}) + "\n",
        "notes.txt": "mine",
    }
    for name, written in contents.items():
        (folder / name).write_text(written)
    return {name: folder / name for name in contents}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ds_config": "nowhere.json"}, "--ds_config nowhere.json does not exist"),
    ({"ds_config": "broken.json"}, "is not valid JSON at line 1"),
    ({"ds_config": "stage2.json"}, '"zero_optimization.stage": 2, it must be 3'),
    ({"ds_config": "compression.json"}, '"compression_training"'),
    ({"ds_config": "batches.json", "train_batch_size": 5}, "train_batch_size 5 is not"),
    ({"train_batch_size": 3}, "train_batch_size 3 is not"),
    ({"model": "nowhere"}, "--model nowhere: its model cannot be read"),
    ({"criterion": "sparsity"}, "--criterion sparsity is unknown, choose one of"),
    ({"remainin": 0.5}, "unknown flag --remainin, did you mean --remaining?"),
    ({"config": "typo.yaml"}, "has the unknown key remainin, did you mean remaining?"),
    ({"remaining": 0}, "--remaining 0.0 is out of range"),
    ({"remaining": 1.5}, "--remaining 1.5 is out of range"),
    ({"criterion": "gum", "remaining": 0.3, "min_kept": 6}, "--min_kept 6 keeps 18 units in 3 layers"),
    ({"warmup_fraction": 0.6, "cooldown_fraction": 0.6}, "their sum must be at most 1"),
    ({"criterion": "gum", "layout": "uniform"}, "--layout uniform cannot hold the widths"),
    ({"criterion": "movement", "uniqueness": 3}, "--uniqueness 3.0 does nothing under --criterion movement"),
    ({"block_size": 32}, "--block_size 32 is more than the 31 positions"),
    ({"train_file": "nowhere.txt"}, "nowhere.txt is missing"),
    ({"train_file": "empty.txt"}, "empty.txt cannot be read: it is empty"),
    ({"train_file": "columns.jsonl"}, "has no column 'text', its columns are body, title"),
    ({"output_dir": "bad"}, "holds something that is not a run"),
    ({"learning_rate": "fast"}, "--learning_rate fast is not valid, it must be a number"),
    ({"ds_config": "zero3", "precision": "fp32"}, '"bf16.enabled": true'),
]


def test_bad_input_ends_in_one_message_and_writes_nothing(work: Path) -> None:
    paths = files(work) | {"bad": work / "bad"}
    output = work / "never"
    cases = [
        arguments(work, output, **{name: paths.get(str(value), value) for name, value in settings.items()})
        for settings, _ in BAD
    ]
    before = content(work)
    ranks = run_ranks(outcomes, 2, cases)
    for (_, expected), (code, stderr), (other_code, other_stderr) in zip(BAD, *ranks, strict=True):
        assert (code, other_code) == (2, 2), expected
        assert len(errors_of(stderr)) == 1, (expected, stderr)
        assert expected in errors_of(stderr)[0]
        assert errors_of(other_stderr) == []
        assert "Traceback" not in stderr + other_stderr
    assert content(work) == before
    assert not output.exists()


def test_a_text_shorter_than_a_block_is_found_on_all_ranks(work: Path) -> None:
    flags = arguments(work, work / "never", train_file=files(work)["short.txt"])
    (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, flags)
    assert (code, other_code) == (2, 2)
    (error,) = errors_of(stderr)
    assert "short.txt has " in error
    assert "at least 16 are needed" in error
    assert errors_of(other_stderr) == []
    assert not (work / "never").exists()


def test_other_settings_reach_a_model_that_loads_without_code_of_its_own(work: Path) -> None:
    shape = {"scope": "per_group", "layout": "uniform", "width_multiple": 4, "recovery_steps": 2}
    running = {"precision": "bf16", "micro_batch_size": 1, "gradient_checkpointing": True}
    flags = arguments(work, work / "uniform", criterion="movement", eval_every=3, **shape, **running)
    results = run_ranks(outcome, 2, flags)
    assert [code for code, _ in results] == [0, 0]
    report = report_of(work / "uniform")
    assert report["ds_config"]["gradient_accumulation_steps"] == 2
    assert report["widths"] == [8, 8, 8]
    assert report["perplexity"]["masked"] == pytest.approx(report["perplexity"]["compacted"], rel=0.01)
    model = AutoModelForCausalLM.from_pretrained(work / "uniform" / "pruned")
    assert model.config.intermediate_size == 8
    assert model.dtype == torch.bfloat16
    found = recomputed_perplexity(model, work / "uniform" / "pruned", work / "validation.txt")
    assert found == pytest.approx(report["perplexity"]["exported"], rel=0.01)


def test_overwriting_replaces_a_run_and_plain_fine_tuning_prunes_nothing(work: Path) -> None:
    output = work / "replaced"
    assert fill_in(Config.from_flat({"remaining": 1.0})).output.layout == "uniform"
    first = arguments(work, output, criterion="gum", layout="pad", max_steps=3, tensorboard=True)
    second = arguments(work, output, remaining=1.0, max_steps=2, overwrite=True, layout="pad")
    assert run_ranks(outcome, 1, first)[0][0] == 0
    padded, model = report_of(output), AutoModelForCausalLM.from_pretrained(output / "pruned")
    assert model.config.intermediate_size == max(padded["widths"]) < WIDTH
    assert padded["parameters"]["stored"] > padded["parameters"]["pruned"]
    theirs = [output.with_name(f"replaced.{end}") / "notes" for end in ("old", "partial", "replaced-0a1b2c3d")]
    for file in theirs:
        file.parent.mkdir()
        file.write_text("mine")
    (output / ".replaces").write_text("replaced.partial\n../somebody\n")  # not names of our making
    broken = arguments(work, output, max_steps=4, overwrite=True, learning_rate=1e30, save_every=1)
    set_aside = [run_ranks(replacing, 1, flags, output)[0] for flags in (broken, broken, second)]
    assert [code for code, _ in set_aside] == [2, 2, 0]
    assert set_aside[0][1] == ["", "pruned report.json"], "the complete run is there until another one is"
    assert set_aside[1][1] == ["", "checkpoints", "pruned report.json"], "and so is one that was killed"
    assert set_aside[2][1] == [""], "theirs alone"
    assert [file.read_text() for file in theirs] == ["mine"] * 3
    assert not (output / ".replaces").exists()
    dense = report_of(output)
    assert (dense["steps"], dense["widths"], dense["remaining"]["measured"]) == (2, [WIDTH] * LAYERS, 1.0)
    assert dense["perplexity"]["masked"] == dense["perplexity"]["compacted"]
    assert dense["parameters"]["dense"] == dense["parameters"]["pruned"] == dense["parameters"]["stored"]


def replacing(flags: list[str], output: Path) -> tuple[int, list[str]]:
    """Return a run's exit code, and what is in the folders that are set aside after it."""
    code, _ = outcome(flags)
    kinds, beside = ("checkpoints", "pruned", "report.json"), output.parent.glob(f"{output.name}.replaced-*")
    return code, sorted(" ".join(kind for kind in kinds if (path / kind).exists()) for path in beside)


def outcome_with_a_broken_export(flags: list[str]) -> tuple[int, str]:
    """Run where a weight is not what it was when it is in its file."""

    def write_model(*args: Any, **options: Any) -> None:
        write(*args, **options)
        file = args[2] / "model.safetensors"
        broken = load_file(file)
        broken["transformer.ln_f.weight"] *= 2
        save_file(broken, file, {"format": "pt"})

    write = model_writer.write_model
    with patch.object(model_writer, "write_model", write_model):
        return outcome(flags)


def test_a_folder_that_holds_another_model_than_was_trained_gets_no_report(work: Path) -> None:
    output = work / "broken export"
    with pytest.raises(AssertionError, match="the one it was written from"):
        run_ranks(outcome_with_a_broken_export, 1, arguments(work, output, criterion="magnitude", max_steps=0))
    assert (output / "pruned").exists()
    assert not (output / "report.json").exists()


# --- what can happen on the way ------------------------------------------------------------------------------------


def assert_stopped(ranks: list[tuple[int, str]], reason: str, output: Path, step: int) -> None:
    """The run, which saved before that step, has stopped in it, with one message and the model of before."""
    (code, stderr), (other_code, other_stderr) = ranks
    assert (code, other_code) == (2, 2)
    (error,) = errors_of(stderr)
    assert error.startswith(
        f"error: {reason} at step {step}; the model as it was before that step is in {output}/last_good"
    )
    assert errors_of(other_stderr) == []
    assert not (output / "report.json").exists()
    assert not (output / "pruned").exists()
    AutoModelForCausalLM.from_pretrained(output / "last_good", trust_remote_code=True)
    model = load_file(output / "last_good" / "model.safetensors")
    masters = defaultdict[str, list[torch.Tensor]](list)
    for part in sorted((output / "checkpoints" / f"step-{step - 1:08d}").glob("rank-*.safetensors")):
        for name, own in load_file(part).items():
            masters[name].append(own)
    for name, weight in model.items():
        master = torch.cat(masters[f"engine/master/{name}"])[: weight.numel()].view_as(weight)
        assert not weight[weight != master].any(), "masked units are 0, everything else is as it was"
        assert weight.any()


def test_a_loss_that_is_not_finite_stops_the_run(work: Path) -> None:
    steep = {"learning_rate": 1e30, "warmup_fraction": 0.9, "cooldown_fraction": 0.0}
    flags = arguments(work, work / "nan", **steep, save_every=1)
    ranks = run_ranks(outcome, 2, flags)
    assert_stopped(ranks, "the loss is nan", work / "nan", 4)


def test_weights_that_are_not_finite_are_not_factorized(work: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    model.get_parameter("transformer.h.1.mlp.c_fc.weight").data[0, :2] = math.inf
    shutil.copytree(work / "model", work / "infinite")
    model.save_pretrained(work / "infinite")
    flags = arguments(work, work / "never", model=work / "infinite", criterion="flop")
    (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, flags)
    assert (code, other_code) == (2, 2)
    (error,) = errors_of(stderr)
    assert re.search(r"2 of \d+ elements of transformer\.h\.1\.mlp\.c_fc\.weight are not finite", error)
    assert errors_of(other_stderr) == []
    assert "Traceback" not in stderr + other_stderr
    assert not (work / "never").exists()


@pytest.mark.parametrize(("criterion", "is_the_same"), [("factorize", False), ("flop", True)])
def test_dense_is_before_the_weights_are_factorized(
    criterion: str, is_the_same: bool, report: dict[str, Any], work: Path
) -> None:
    output = work / f"start-{criterion}"
    settings = {"criterion": criterion, "remaining": 0.3, "max_steps": 4, "warmup_fraction": 0.3}  # no gates at first
    ranks = run_ranks(outcome, 2, arguments(work, output, **settings))
    assert [code for code, _ in ranks] == [0, 0]
    found = report_of(output)["perplexity"]
    assert found["dense"] == pytest.approx(report["perplexity"]["dense"], rel=1e-5)
    assert (found["factorized"] == pytest.approx(found["dense"], rel=1e-4)) == is_the_same


def outcome_with_a_broken_gradient(flags: list[str], step: int) -> tuple[int, str]:
    """Run with a gradient that is NaN in one step, although the loss is finite."""
    load = student.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        passes = []

        def spoil(module: nn.Module, inputs: Any, outputs: Any) -> Any:
            passes.append(module)
            return tuple(gradient * math.nan for gradient in inputs) if len(passes) == step else None

        model.get_submodule("transformer.h.2.mlp").register_full_backward_hook(spoil)
        return model

    student.load_model = load_model
    return outcome(flags)


@pytest.mark.parametrize("criterion", ["gum", "random"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_in_the_weights(criterion: str, work: Path) -> None:
    output = work / f"nan-{criterion}"
    flags = arguments(work, output, criterion=criterion, save_every=1)
    ranks = run_ranks(outcome_with_a_broken_gradient, 2, flags, 3)
    assert_stopped(ranks, "a gradient is not finite", output, 3)


def test_when_a_rank_dies_the_others_end(work: Path, tmp_path: Path) -> None:
    output = work / "killed"
    ranks = start_ranks(outcome, 3, tmp_path, arguments(work, output, max_steps=10_000, train_batch_size=3))
    wait_until(lambda: (output / "recipe.yaml").exists())
    time.sleep(1)
    assert all(rank.is_alive() for rank in ranks)
    ranks[1].kill()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [LOST_CONTACT, -9, LOST_CONTACT]
    assert not (output / "report.json").exists()


@pytest.mark.slow
def test_when_a_rank_dies_the_launcher_ends_the_others(work: Path) -> None:
    output = work / "killed by the launcher"
    process = launch(arguments(work, output, max_steps=10_000))
    wait_until(lambda: (output / "recipe.yaml").exists())
    time.sleep(1)
    ranks = pids_of(str(output))
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    finish(process)
    assert process.returncode != 0
    assert pids_of(str(output)) == []

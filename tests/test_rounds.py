"""Units that leave in rounds, and pruning without training, through the command on real ranks."""

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from command import BLOCK, arguments, errors_of, make_work, outcome, outcomes, report_of, said_by
from distributed import run_ranks
from memory_backend import DROPOUTS
from safetensors.torch import load_file
from test_resume import assert_same_run, losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale_prune.data import Inputs
from scale_prune.pruning import Calibration
from scale_prune.run.losses import observe_gradients
from scale_prune.run.run import Run
from scale_prune.zero3 import Runtime

pytestmark = pytest.mark.distributed

UNTRAINED = {"max_steps": 0, "remaining": 0.5, "calibration_tokens": 384, "train_batch_size": 6}
ROUNDS = {
    "criterion": "sensitivity",
    "rounds": 3,
    "remaining": 0.4,
    "max_steps": 7,
    "recovery_steps": 3,
    "train_batch_size": 6,
    "calibration_tokens": 384,
    "save_every": 2,
    "keep_checkpoints": 9,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def run(world_size: int, flags: list[str]) -> None:
    codes = run_ranks(outcome, world_size, flags)
    assert [code for code, _ in codes] == [0] * world_size, codes


def with_dropout(work: Path) -> Path:
    if not (folder := work / "with dropout").exists():
        shutil.copytree(work / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(DROPOUTS["gpt_neo"], 0.3)))
    return folder


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "pruned" / "model.safetensors")
    return found


@pytest.mark.parametrize(
    "criterion",
    [*(pytest.param(each, marks=pytest.mark.slow) for each in ("obs", "flap", "sensitivity", "fisher")), "kfac"],
)
def test_any_number_of_ranks_and_passes_prunes_alike_without_training(criterion: str, work: Path) -> None:
    """Also a model with dropout, which every rank would draw otherwise."""
    outputs, model = [], with_dropout(work)
    for world_size, passes in ((1, 1), (2, 1), (2, 3), (3, 2)):
        outputs.append(work / f"{criterion}-{world_size}-{passes}")
        settings = UNTRAINED | {"model": model, "criterion": criterion, "gradient_accumulation_steps": passes}
        run(world_size, arguments(work, outputs[-1], **settings))
    for output in outputs[1:]:
        assert json.loads((output / "kept.json").read_text()) == json.loads((outputs[0] / "kept.json").read_text())
        for name, weight in weights(outputs[0]).items():
            torch.testing.assert_close(weights(output)[name], weight, rtol=1e-3, atol=5e-4)
    perplexity = report_of(outputs[0])["perplexity"]
    assert perplexity["masked"] == pytest.approx(perplexity["exported"], rel=1e-5)
    assert perplexity["compacted"] == pytest.approx(perplexity["exported"], rel=1e-5)


def counts_of_readings(flags: list[str]) -> list[int]:
    """Run, and return how many steps a criterion remembers after each reading of the calibration text."""
    counts = []

    def observe(run: Run) -> None:
        observe_gradients(run)
        counts.append(int(run.student.pruner.scoring.state["count"].max()))

    with patch("scale_prune.run.removal.observe_gradients", observe):
        assert outcome(flags)[0] == 0
    return counts


def test_a_round_without_training_is_chosen_by_its_own_model_alone(work: Path) -> None:
    flags = arguments(work, work / "readings", **UNTRAINED | {"criterion": "fisher", "rounds": 2})
    ((first, second),) = run_ranks(counts_of_readings, 1, flags)
    assert first == second > 0


def starts_of_readings(flags: list[str]) -> list[int]:
    """Run, and return the step that the text of each reading begins with."""
    starts: list[int] = []
    start = Inputs.calibration_start

    def note(inputs: Inputs, step: int) -> int:
        starts.append(start(inputs, step))
        return starts[-1]

    with patch.object(Inputs, "calibration_start", note):
        assert outcome(flags)[0] == 0
    return starts


def test_a_round_reads_what_no_step_has_read(work: Path) -> None:
    output = work / "what comes next"
    settings = ROUNDS | {"criterion": "kfac", "calibration_tokens": 96}
    (starts,) = run_ranks(starts_of_readings, 1, arguments(work, output, **settings))
    assert starts == [each["step"] for each in report_of(output)["rounds"]]
    assert len(set(starts)) == 3


class OnlyOne(Calibration):
    """Sees to it that the matrices of earlier readings are gone."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        earlier = [each for each in gc.get_objects() if isinstance(each, Calibration) and each is not self]
        assert not any(each.grams or each.output_grams for each in earlier), "matrices of two portions at a time"
        with super().watching():
            yield


def outcome_in_little_memory(flags: list[str]) -> tuple[int, str]:
    """Run where a rank has room for one Gram matrix at a time."""
    with (
        patch.object(Runtime, "free_memory", lambda runtime: 0),
        patch("scale_prune.run.removal.Calibration", OnlyOne),
    ):
        return outcome(flags)


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "kfac", "rounds": 2, "max_steps": 4, "budget": "redundancy", "scope": "per_group"},
        pytest.param(UNTRAINED | {"criterion": "flap"}, marks=pytest.mark.slow),
        pytest.param({"criterion": "gum", "repair": "mean", "max_steps": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_portion_of_the_matrices_at_a_time_comes_to_the_same(settings: dict[str, Any], work: Path) -> None:
    for output, how in ((work / "at once", outcome), (work / "in portions", outcome_in_little_memory)):
        flags = arguments(work, output, **UNTRAINED | settings | {"overwrite": True})
        assert [code for code, _ in run_ranks(how, 2, flags)] == [0, 0]
    whole, portions = weights(work / "at once"), weights(work / "in portions")
    assert whole.keys() == portions.keys()
    assert all(torch.equal(whole[name], portions[name]) for name in whole)
    assert report_of(work / "in portions")["perplexity"] == report_of(work / "at once")["perplexity"]


@pytest.mark.parametrize(
    ("settings", "rounding"),
    [({}, 1e-4), ({"precision": "bf16", "ds_config": "zero3_offload", "max_steps": 3, "learning_rate": 1e-8}, 1e-2)],
    ids=str,
)
def test_neurons_that_follow_from_others_go_for_nothing(
    settings: dict[str, Any], rounding: float, work: Path, tmp_path: Path
) -> None:
    """Half of the neurons are copies of the others, so that a repaired half is the dense model."""
    doubled: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    for layer in doubled.transformer.h:
        half = layer.mlp.c_fc.weight.shape[0] // 2
        for tensor in (layer.mlp.c_fc.weight, layer.mlp.c_fc.bias):
            tensor.data[half : 2 * half] = tensor.data[:half]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((work / "model" / name).read_bytes())
    doubled.save_pretrained(tmp_path)
    for criterion, repair in (("obs", "least_squares"), ("obs", "none")):
        how = {"criterion": criterion, "repair": repair, "remaining": 0.6, "repair_damping": 1e-6, "rounds": 1}
        run(2, arguments(work, tmp_path / repair, model=tmp_path, **UNTRAINED | how | settings))
    dense, exact = (report_of(tmp_path / "least_squares")["perplexity"][stage] for stage in ("dense", "exported"))
    assert exact == pytest.approx(dense, rel=rounding)
    assert report_of(tmp_path / "none")["perplexity"]["exported"] != pytest.approx(dense, rel=3 * rounding)


@pytest.mark.parametrize(
    ("criterion", "steps"),
    [pytest.param("sensitivity", (2, 4, 6, 8), marks=pytest.mark.slow), ("kfac", (2, 4, 6, 8))],
)
def test_rounds_go_on_bit_for_bit(criterion: str, steps: tuple[int, ...], work: Path) -> None:
    whole, rounds = work / f"whole {criterion}", ROUNDS | {"criterion": criterion}
    run(2, arguments(work, whole, **rounds))
    report = report_of(whole)
    assert report["remaining"]["measured"] == pytest.approx(0.4, abs=0.05)
    assert report["widths"] == [len(units) for units in json.loads((whole / "kept.json").read_text()).values()]
    for step in steps:
        output = work / f"{criterion} from {step}"
        checkpoint = whole / "checkpoints" / f"step-{step:08d}"
        run(2, arguments(work, output, **rounds | {"resume": checkpoint}))
        assert_same_run(output, whole)
        assert losses(output) == {made: loss for made, loss in losses(whole).items() if made > step}
    other = work / f"{criterion} on one rank"
    run(1, arguments(work, other, **rounds | {"resume": whole / "checkpoints" / "step-00000004"}))
    assert json.loads((other / "kept.json").read_text()) == json.loads((whole / "kept.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "criterion": "obs", "rounds": 2},
        {"ds_config": "zero3_offload", "criterion": "magnitude", "rounds": 2, "repair": "mean"},
        pytest.param({"criterion": "gum", "rounds": 2, "similarity_every": 2}, marks=pytest.mark.slow),
        {"criterion": "kfac", "rounds": 2, "precision": "bf16", "gradient_checkpointing": True},
        pytest.param({"criterion": "wanda", "rounds": 1, "repair": "none"}, marks=pytest.mark.slow),
        pytest.param({"criterion": "sensitivity", "repair": "least_squares"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounds_with_everything(settings: dict[str, Any], work: Path) -> None:
    output = work / str(abs(hash(str(settings))))
    run(2, arguments(work, output, **{"calibration_tokens": 384, "remaining": 0.5, "max_steps": 6} | settings))
    perplexity = report_of(output)["perplexity"]
    assert (perplexity["recovered"] is not None) == ("rounds" in settings)
    assert perplexity["masked"] == pytest.approx(perplexity["compacted"], rel=1e-2 if "precision" in settings else 1e-5)
    assert report_of(output)["remaining"]["measured"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("training", "taken"),
    [
        ({"max_steps": 6, "learning_rate": 1e-6}, True),
        ({"max_steps": 40, "learning_rate": 0.01, "warmup_fraction": 0.0, "cooldown_fraction": 0.8}, False),
    ],
    ids=["hardly trained", "trained long"],
)
def test_masks_are_repaired_where_weights_have_not_learned_to_do_without(
    training: dict[str, Any], taken: bool, work: Path, tmp_path: Path
) -> None:
    settings = {"criterion": "random", "rounds": 0, "remaining": 0.5, "calibration_tokens": 384} | training
    for repair in ("none", "least_squares"):
        run(2, arguments(work, tmp_path / repair, **settings | {"repair": repair}))
    repaired, without = (report_of(tmp_path / repair) for repair in ("least_squares", "none"))
    assert without["repair"] == {}
    losses = repaired["repair"]
    assert losses["taken"] is (losses["loss_with"] < losses["loss_without"]) is taken
    if taken:
        assert repaired["perplexity"]["exported"] < without["perplexity"]["exported"]
    else:
        assert repaired["perplexity"] == without["perplexity"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_text_that_is_shorter_than_the_calibration_is_read_once(world_size: int, work: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("".join((work / "train.txt").read_text().splitlines(keepends=True)[:40]))
    settings = UNTRAINED | {"criterion": "obs", "train_file": tmp_path / "short.txt", "calibration_tokens": 20_000}
    said = run_ranks(said_by, world_size, arguments(work, tmp_path / "out", **settings))
    tokens = len(AutoTokenizer.from_pretrained(work / "model")((tmp_path / "short.txt").read_text())["input_ids"])
    once = tokens // BLOCK // 6 * 6 * BLOCK
    assert [each["calibration_tokens"] for each in report_of(tmp_path / "out")["rounds"]] == [once]
    line = f"--calibration_tokens 20000 are more than the training text has in whole steps, {once} at most"
    assert "".join(said).splitlines().count(line) == 1


def test_rows_that_are_fewer_than_a_steps_count_once(work: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("".join((work / "train.txt").read_text().splitlines(keepends=True)[:40]))
    tokens = len(AutoTokenizer.from_pretrained(work / "model")((tmp_path / "short.txt").read_text())["input_ids"])
    asked = {"train_batch_size": 900, "calibration_tokens": 900 * BLOCK}
    settings = UNTRAINED | {"criterion": "obs", "train_file": tmp_path / "short.txt"} | asked
    run(2, arguments(work, tmp_path / "out", **settings))
    assert tokens // BLOCK < 900
    assert report_of(tmp_path / "out")["rounds"][0]["calibration_tokens"] == tokens // BLOCK * BLOCK


def test_what_no_criterion_is_named_for(work: Path, tmp_path: Path) -> None:
    run(2, arguments(work, tmp_path / "auto", criterion="auto", calibration_tokens=384, width_multiple=4))
    report = report_of(tmp_path / "auto")
    assert {name: report["settings"][name] for name in ("criterion", "rounds", "repair", "scope")} == {
        "criterion": "kfac",
        "rounds": 4,
        "repair": "least_squares",
        "scope": "global",
    }
    assert len(report["rounds"]) == 4
    assert all(each["calibration_tokens"] >= 384 for each in report["rounds"])
    assert not any(width % 4 for width in report["widths"])
    begun = tmp_path / "gum"
    run(2, arguments(work, begun, save_every=3))
    again = arguments(work, tmp_path / "again", criterion="auto", resume=begun / "checkpoints" / "step-00000003")
    run(2, again)  # goes on with the checkpoint's criterion
    assert_same_run(tmp_path / "again", begun)


def test_recovery_follows_pruning_without_training(work: Path) -> None:
    output = work / "recovered"
    settings = UNTRAINED | {"criterion": "sensitivity", "recovery_steps": 4, "learning_rate": 3e-3, "save_every": 2}
    run(2, arguments(work, output, **settings))
    perplexity = report_of(output)["perplexity"]
    assert perplexity["recovered"] < perplexity["compacted"]
    again = work / "recovered again"
    run(2, arguments(work, again, **settings | {"resume": output / "checkpoints" / "step-00000002"}))
    assert_same_run(again, output)


def test_recovery_alone_is_plain_training(work: Path) -> None:
    settings = UNTRAINED | {"remaining": 1.0, "recovery_steps": 4, "learning_rate": 3e-3}
    run(2, arguments(work, work / "plain", **settings))
    perplexity = report_of(work / "plain")["perplexity"]
    assert perplexity["exported"] < perplexity["dense"]


def test_redundancy_is_measured_once_and_decides_all_rounds(work: Path) -> None:
    settings = ROUNDS | {"criterion": "magnitude", "budget": "redundancy", "rounds": 2, "repair": "none"}
    whole, again = work / "redundancy", work / "redundancy again"
    run(2, arguments(work, whole, **settings))
    first, second = report_of(whole)["rounds"]
    assert first["redundancy"] == second["redundancy"]
    for widths in (first["widths"], second["widths"]):  # where more comes out that went in, more leaves
        in_order = sorted(zip(first["redundancy"], widths, strict=True))
        assert all(width >= after for (_, width), (_, after) in pairwise(in_order))
        assert len(set(widths)) > 1
    run(2, arguments(work, again, **settings | {"resume": whole / "checkpoints" / "step-00000004"}))
    assert_same_run(again, whole)


def test_whitened_factors_are_alike_on_any_number_of_ranks(work: Path) -> None:
    settings = UNTRAINED | {"criterion": "factorize", "targets": "mlp,attention", "factors": "whitened"}
    outputs = [work / f"whitened-{world_size}" for world_size in (1, 2)]
    for world_size, output in enumerate(outputs, 1):
        run(world_size, arguments(work, output, **settings, gradient_accumulation_steps=world_size % 2 + 1))
        perplexity = report_of(output)["perplexity"]
        assert perplexity["factorized"] == pytest.approx(perplexity["exported"], rel=1e-5)
        assert perplexity["exported"] == pytest.approx(report_of(outputs[0])["perplexity"]["exported"], rel=1e-4)
    AutoTokenizer.from_pretrained(outputs[0] / "pruned")
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # not a model with random weights
        AutoModelForCausalLM.from_pretrained(outputs[0] / "pruned")
    plain = work / "svd"
    run(2, arguments(work, plain, **settings | {"factors": "svd"}))
    assert report_of(plain)["perplexity"]["exported"] != pytest.approx(perplexity["exported"], rel=1e-3)


def test_whitened_factors_train_and_go_on(work: Path) -> None:
    settings = {"criterion": "flop", "factors": "whitened", "targets": "mlp,embedding", "max_steps": 6, "save_every": 3}
    settings |= {"calibration_tokens": 384}
    whole, again = work / "whitened", work / "whitened again"
    run(2, arguments(work, whole, **settings))
    run(2, arguments(work, again, **settings | {"resume": whole / "checkpoints" / "step-00000003"}))
    assert_same_run(again, whole)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "factorize", "repair": "least_squares"}, "--repair least_squares belongs to neurons"),
    ({"criterion": "flop", "max_steps": 0}, "trains gates that settle what leaves"),
    ({"criterion": "factorize", "rounds": 2}, "--rounds 2 belongs to neurons"),
    ({"criterion": "magnitude", "budget": "redundancy"}, "--budget redundancy is measured where neurons leave at once"),
    ({"criterion": "neuron_l0", "rounds": 2}, "trains gates that settle what leaves"),
    ({"criterion": "obs", "rounds": 0}, "--criterion obs ranks neurons that leave at once"),
    ({"criterion": "magnitude", "rounds": 5, "max_steps": 4}, "--rounds 5 are more than the 3 steps of the descent"),
    (
        {"criterion": "sensitivity", "max_steps": 0, "calibration_tokens": 10},
        "--calibration_tokens 10 are less than the 64 tokens of a step",
    ),
    (
        {"criterion": "slimllm", "scope": "global", "targets": "mlp,attention", "remaining": 0.9},
        "--scope global ranks heads and neurons together, whose scores under --criterion slimllm",
    ),
    ({"criterion": "magnitude", "repair_damping": -1}, "--repair_damping -1.0 is out of range"),
    ({"criterion": "magnitude", "repair": "some"}, "--repair some is unknown"),
]


def test_what_cannot_be_repaired_is_refused(work: Path) -> None:
    cases = [arguments(work, work / "refused", **settings) for settings, _ in REFUSED]
    cases += [[*case, "--dry_run"] for case in cases]
    (found,) = run_ranks(outcomes, 1, cases)
    for (code, stderr), (_, expected) in zip(found, [*REFUSED, *REFUSED], strict=True):
        assert code == 2
        assert expected in stderr
        assert len(errors_of(stderr)) == 1

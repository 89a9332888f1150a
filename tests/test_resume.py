"""A run that goes on from a checkpoint ends as the one that was never interrupted, or says why it cannot."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from command import arguments, errors_of, make_work, outcome, outcomes, report_of, said_by
from distributed import run_ranks
from memory_backend import steady_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale_prune.checkpoint.choice import filled_from
from scale_prune.checkpoint.folder import Checkpoint
from scale_prune.checkpoint.run_state import check_model_and_text
from scale_prune.commands import evaluate
from scale_prune.config.settings import Config
from scale_prune.data import Inputs
from scale_prune.preflight.reading import Reading
from scale_prune.run import loop
from scale_prune.run import output as run_output
from scale_prune.run.run import Run
from scale_prune.system import appears
from scale_prune.system.exits import STOPPED
from scale_prune.system.slices import write_slices
from scale_prune.tasks.task import MicroBatch

pytestmark = pytest.mark.distributed

MAX_STEPS, RECOVERY, EVERY = 7, 3, 4
SETTINGS = {
    "criterion": "gum",
    "remaining": 0.4,
    "similarity": "running",
    "similarity_every": 2,
    "max_steps": MAX_STEPS,
    "recovery_steps": RECOVERY,
    "train_batch_size": 6,
    "save_every": EVERY,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return inputs whose model has dropout, so that random generators matter."""
    work = make_work(tmp_path_factory.mktemp("work"))
    vocabulary = len(AutoTokenizer.from_pretrained(work / "model"))
    model = steady_model("gpt_neo", vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.config.resid_dropout = 0.2
    model.save_pretrained(work / "model")
    return work


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """Return the folder of a run on two ranks that nothing interrupted."""
    output = work / "whole"
    assert codes(run_ranks(outcome, 2, arguments(work, output, **SETTINGS))) == [0, 0]
    assert [path.name for path in checkpoints(output)] == ["step-00000004", "step-00000008"]
    return output


def codes(ranks: list[tuple[int, str]]) -> list[int]:
    return [code for code, _ in ranks]


def checkpoints(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").iterdir())


def scalars(output: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def losses(output: Path) -> dict[int, float]:
    return scalars(output, "train/loss")


def go_on(work: Path, output: Path, world_size: int, **settings: Any) -> list[tuple[int, str]]:
    flags = arguments(work, output, **SETTINGS | settings)
    return run_ranks(outcome, world_size, flags)


def assert_same_run(output: Path, whole: Path) -> None:
    assert (output / "kept.json").read_bytes() == (whole / "kept.json").read_bytes()
    for file in ("scores.safetensors", "pruned/model.safetensors"):
        found, expected = load_file(output / file), load_file(whole / file)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert found.keys() == expected.keys()
    assert report_of(output)["perplexity"] == report_of(whole)["perplexity"]


@pytest.mark.parametrize("step", [4, 8])
def test_the_same_ranks_go_on_bit_for_bit(step: int, whole: Path, work: Path) -> None:
    output = work / f"from {step}"
    checkpoint = with_more_names(whole / "checkpoints" / f"step-{step:08d}", work / f"edited {step}")
    assert codes(go_on(work, output, 2, resume=checkpoint)) == [0, 0]
    assert_same_run(output, whole)
    expected = losses(whole)
    assert losses(output) == {made: loss for made, loss in expected.items() if made > step}
    assert report_of(output)["resumed_at"] == [step]
    assert report_of(output)["received_bytes"] == report_of(whole)["received_bytes"] != {}
    assert report_of(output)["seconds"]["total"] > report_of(output)["seconds"]["step"]


def test_gates_go_on_bit_for_bit(work: Path) -> None:
    flop = SETTINGS | {"criterion": "flop", "targets": "mlp,attention", "save_every": 2, "keep_checkpoints": 9}
    whole = work / "flop"
    assert codes(run_ranks(outcome, 2, arguments(work, whole, **flop))) == [0, 0]
    for step in (4, 6, 8):  # while gates are drawn, when the components are gone, and in recovery
        output = work / f"flop from {step}"
        resumed = flop | {"resume": whole / "checkpoints" / f"step-{step:08d}"}
        assert codes(run_ranks(outcome, 2, arguments(work, output, **resumed))) == [0, 0]
        assert_same_run(output, whole)
        assert losses(output) == {made: loss for made, loss in losses(whole).items() if made > step}
    assert_anyone_can_measure(whole, work)
    refused = {4: (4, "has made 4 steps already, more than the 3"), 6: (9, "its model is compacted already (step 6)")}
    for step, (max_steps, expected) in refused.items():
        checkpoint = whole / "checkpoints" / f"step-{step:08d}"
        changed = flop | {"max_steps": max_steps, "recovery_steps": 0, "resume": checkpoint}
        ((code, stderr),) = run_ranks(outcome, 1, arguments(work, work / "refused", **changed))
        assert (code, len(errors_of(stderr))) == (2, 1)
        assert expected in stderr


def assert_anyone_can_measure(output: Path, work: Path) -> None:
    """See that the command for finished models comes to the perplexity that the run has reported of its factors."""
    result, settings = work / "evaluation.json", report_of(output)["settings"]
    words = ["--model", output / "pruned", "--trust_remote_code", "--output", result]
    for name in ("validation_file", "block_size", "eval_tokens"):
        words += [f"--{name}", settings[name]]
    run_ranks(evaluate.main, 1, [str(word) for word in words])
    (found,) = json.loads(result.read_text())["models"].values()
    assert found["perplexity"] == pytest.approx(report_of(output)["perplexity"]["exported"], rel=1e-5)


def test_a_text_that_an_earlier_version_held_out_otherwise_is_refused_with_the_way_out() -> None:
    state = {"pruner": {"groups": {}}, "texts": {"train": "a"}, "settings": {"validation_file": None}}
    for more, told in (
        ({}, True),
        ({"validation": "held out"}, False),
        ({"settings": {"validation_file": "v"}}, False),
    ):
        checkpoint: Any = SimpleNamespace(state={**state, **more}, kept_groups={})
        with pytest.raises(ValueError, match="the train text has other tokens than the run's") as caught:
            check_model_and_text(checkpoint, (), {"train": "b"})
        assert (
            "give these rows as --validation_file and those before them as --train_file" in str(caught.value)
        ) == told


def without_dropout(work: Path, world_size: int) -> Path:
    """Return a run's checkpoint after 4 steps, of a model whose losses do not depend on who draws which number."""
    flags = {"model": work / "steady", "max_steps": 4, "recovery_steps": 0}
    if not (work / "steady").exists():
        shutil.copytree(work / "model", work / "steady")
        config = json.loads((work / "steady" / "config.json").read_text())
        (work / "steady" / "config.json").write_text(json.dumps(config | {"resid_dropout": 0.0}))
    output = work / f"on {world_size}"
    assert codes(run_ranks(outcome, world_size, arguments(work, output, **SETTINGS | flags))) == [0] * world_size
    return checkpoints(output)[0]


@pytest.mark.parametrize(("before", "others"), [(2, (1, 3)), pytest.param(3, (2,), marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_go_on_with_the_same_masks(before: int, others: tuple[int, ...], work: Path) -> None:
    first = without_dropout(work, before)
    kept, expected = ended(work, first, before)
    for after in others:
        kept_by_others, found = ended(work, first, after)
        assert kept_by_others == kept, after
        assert found == pytest.approx(expected, rel=1e-5), after


def ended(work: Path, checkpoint: Path, world_size: int) -> tuple[Any, dict[int, float]]:
    """Go on for the rest of the steps, and return what is kept, and the losses."""
    output = work / f"{checkpoint.parents[1].name} to {world_size}"
    ranks = go_on(work, output, world_size, resume=checkpoint, model=work / "steady", recovery_steps=0)
    assert codes(ranks) == [0] * world_size, ranks[0][1]
    return json.loads((output / "kept.json").read_text()), losses(output)


def test_offloaded_state_in_bf16_goes_on_bit_for_bit(work: Path) -> None:
    settings = {"ds_config": "zero3_offload", "micro_batch_size": 1, "criterion": "movement", "recovery_steps": 0}
    whole, output = work / "offloaded", work / "offloaded, from 4"
    assert codes(go_on(work, whole, 2, **settings)) == [0, 0]
    assert codes(go_on(work, output, 2, **settings, resume=checkpoints(whole)[0])) == [0, 0]
    assert report_of(output)["ds_config"]["gradient_accumulation_steps"] == 3
    assert_same_run(output, whole)


# --- stopped ---------------------------------------------------------------------------------------------------------


def stopping(flags: list[str], step: int) -> tuple[int, str]:
    """Run the command, and send rank 0 alone the scheduler's warning in the middle of a step."""
    forward = loop.loss_of

    def warned(run: Run, micro_batch: MicroBatch) -> torch.Tensor:
        if run.progress.step + 1 == step and run.runtime.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(run, micro_batch)

    loop.loss_of = warned
    return outcome(flags)


def reading_once(flags: list[str]) -> tuple[int, str]:
    """Run the command, and see that it reads its inputs once."""
    inputs_of, reads = Reading.inputs, []

    def counted(self: Reading) -> Inputs:
        reads.append(self)
        return inputs_of(self)

    Reading.inputs = counted  # type: ignore[method-assign]
    result = outcome(flags)
    assert len(reads) == 1
    return result


def test_a_warned_run_saves_and_goes_on_with_resume_alone(whole: Path, work: Path) -> None:
    output = work / "stopped"
    flags = arguments(work, output, **SETTINGS)
    assert codes(run_ranks(stopping, 2, flags, 6)) == [STOPPED, STOPPED]
    assert [path.name for path in checkpoints(output)] == ["step-00000004", "step-00000006"]
    assert not (output / "report.json").exists()
    assert codes(run_ranks(reading_once, 2, [*flags, "--resume"])) == [0, 0]
    assert_same_run(output, whole)
    assert losses(output) == losses(whole)
    assert report_of(output)["resumed_at"] == [6]
    assert "resume" not in (output / "recipe.yaml").read_text()
    assert codes(run_ranks(outcome, 1, [*flags, "--resume"])) == [0], "there is nothing left to do"
    assert report_of(output)["resumed_at"] == [6]


@contextmanager
def warned_in(place: str) -> Iterator[None]:
    """Let the scheduler's warning come at the beginning of a function."""
    module, name = place.rsplit(".", 1)
    function = getattr(import_module(module), name)

    def warned(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    with patch(place, warned):
        yield


def warned_outcome(flags: list[str], place: str) -> tuple[int, str]:
    with warned_in(place):
        return outcome(flags)


def test_a_warning_between_steps_waits_for_the_next_one_or_the_end(work: Path) -> None:
    rounds = {"criterion": "obs", "rounds": 2, "max_steps": 5, "recovery_steps": 0, "save_every": 0}
    rounds |= {"calibration_tokens": 384, "remaining": 0.6}
    whole, stopped = work / "not warned", work / "warned"
    assert codes(go_on(work, whole, 1, **rounds)) == [0]
    flags = arguments(work, stopped, **SETTINGS | rounds)
    assert codes(run_ranks(warned_outcome, 1, flags, "scale_prune.run.removal.read_text")) == [STOPPED]
    assert len(checkpoints(stopped)) == 1
    assert codes(run_ranks(warned_outcome, 1, [*flags, "--resume"], "scale_prune.run.stages._export")) == [0]
    assert_same_run(stopped, whole)


def test_the_run_that_was_replaced_waits_for_the_end_of_one_that_is_gone_on_with(work: Path) -> None:
    output = work / "replaced"
    flags = arguments(work, output, **SETTINGS | {"max_steps": 4, "recovery_steps": 0})
    assert codes(run_ranks(outcome, 1, flags)) == [0]
    assert codes(run_ranks(stopping, 1, [*flags, "--overwrite"], 2)) == [STOPPED]
    (aside,) = work.glob("replaced.replaced-*")
    assert report_of(aside)["steps"] == 4
    assert codes(run_ranks(outcome, 1, [*flags, "--resume"])) == [0]
    assert not list(work.glob("replaced.replaced-*"))
    assert report_of(output)["resumed_at"] == [2]
    aside.mkdir()  # as a kill leaves it that comes while it is removed
    (output / ".replaces").write_text(f"{aside.name}\n")
    assert codes(run_ranks(outcome, 1, [*flags, "--resume"])) == [0]
    assert not aside.exists()


def test_what_may_change_is_said_and_holds_from_then_on(whole: Path, work: Path) -> None:
    output, before = work / "changed on the way", SETTINGS | {"learning_rate": 5e-4}
    shutil.copytree(work / "model", work / "moved")
    changes = {"learning_rate": 1e-4, "layout": "pad", "recovery_steps": 4, "model": work / "moved"}
    resumed = {"resume": whole / "checkpoints" / "step-00000004"}
    (said,) = run_ranks(said_by, 1, arguments(work, output, **before | resumed | changes))
    for name, value in changes.items():
        assert f"--{name} is now {value}, was " in said
    rates, usual = scalars(output, "train/learning_rate"), scalars(whole, "train/learning_rate")
    assert max(rates) == 11
    assert all(rates[step] < 0.3 * usual[step] for step in rates if 5 < step < 9)
    assert AutoModelForCausalLM.from_pretrained(output / "pruned").config.intermediate_size == max(
        report_of(output)["widths"]
    )


def failing_on_rank_1(flags: list[str], save: int) -> tuple[int, str]:
    """Run on disks of which that of rank 1 is full at a save."""
    saves: list[Path] = []

    def write(path: Path, *args: Any) -> None:
        saves.append(path)
        if os.environ["RANK"] == "1" and len(saves) == save:
            raise OSError(28, "No space left on device")
        write_slices(path, *args)

    with patch("scale_prune.checkpoint.writing.write_slices", write):
        return outcome(flags)


def test_a_save_that_fails_on_one_rank_ends_all_and_leaves_the_one_before(work: Path) -> None:
    output = work / "full"
    flags = arguments(work, output, **SETTINGS | {"save_every": 1, "keep_checkpoints": 1})
    ranks = run_ranks(failing_on_rank_1, 2, flags, 3)
    assert codes(ranks) == [2, 2]
    (error,) = errors_of(ranks[0][1])
    assert "No space left on device" in error
    left = checkpoints(output)
    assert [path.suffix for path in left] == [""]
    assert f"Earlier checkpoints are as they were: {left[0].name}" in error


# --- what cannot be used ---------------------------------------------------------------------------------------------


def copy_of(whole: Path, output: Path) -> Path:
    """Return a run that was killed after its last checkpoint."""
    shutil.copytree(whole / "checkpoints", output / "checkpoints")
    shutil.copy(whole / "recipe.yaml", output)
    return output


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(whole: Path, work: Path) -> None:
    """Also of a run that was killed while it wrote its result."""
    output = copy_of(whole, work / "damaged")
    (output / "pruned").mkdir()
    (output / "pruned" / "model-00001-of-00002.safetensors").write_text("of the attempt before")
    theirs = output / "checkpoints" / "notes.partial"
    theirs.mkdir()
    flip_a_bit(output / "checkpoints" / "step-00000008" / "rank-00001-0000.safetensors")
    said, _ = run_ranks(said_by, 2, arguments(work, output, **SETTINGS, resume=True))
    assert "step-00000008 is damaged: the contents of rank-00001-0000.safetensors are not what was written" in said
    assert "going on after step 4" in said
    assert_same_run(output, whole)
    assert [path.name for path in (output / "pruned").glob("*.safetensors")] == ["model.safetensors"]
    left = ["notes.partial", "step-00000004", "step-00000008", "step-00000008.abandoned"]
    assert [path.name for path in checkpoints(output)] == left


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "movement"}, "--criterion movement is not the run's gum"),
    ({"remaining": 0.5}, "--remaining 0.5 is not the run's 0.4"),
    ({"scope": "per_group"}, "--scope per_group is not the run's global"),
    ({"precision": "bf16"}, "--precision bf16 is not the run's fp32"),
    ({"seed": 3}, "--seed 3 is not the run's 0"),
    ({"block_size": 8}, "--block_size 8 is not the run's 16"),
    ({"bos": "always"}, "--bos always is not the run's never"),
    ({"train_batch_size": 4}, '"train_batch_size": 4, but the run has 6'),
    ({"warmup_fraction": 0.3}, "--warmup_fraction 0.3 is not the run's 0.1"),
    ({"max_steps": 9}, "--max_steps 9 is not the run's 7, and its model is compacted already"),
    ({"recovery_steps": 0}, "has made 8 steps already, more than the 7 that --max_steps 7 and --recovery_steps 0"),
]


@pytest.mark.parametrize(
    ("before", "asked", "expected"),
    [({}, "auto", "never"), ({}, "always", "always"), ({"bos": "always"}, "auto", "always"), (None, "auto", "auto")],
)
def test_bos_stays_as_it_was_where_it_is_left_open(before: dict[str, str] | None, asked: str, expected: str) -> None:
    """Checkpoints from before there was the setting have no BOS token, and rows of data sets are documents."""
    state = {"settings": {"criterion": "gum"} | (before or {}), "ds_config": {"train_batch_size": 6}}
    checkpoint = None if before is None else Checkpoint(Path("step"), state, {})
    data = filled_from(checkpoint, Config.from_flat({"bos": asked})).data
    assert (data.bos, data.rows) == (expected, "auto" if before is None else "documents")


def test_settings_that_must_not_change_are_refused(whole: Path, work: Path) -> None:
    output = copy_of(whole, work / "changed")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    cases = [arguments(work, output, **SETTINGS | {"resume": True} | settings) for settings, _ in REFUSED]
    cases.append(arguments(work, output, **SETTINGS, resume=whole / "checkpoints" / "step-00000004"))
    said = [*(expected for _, expected in REFUSED), "step-00000004 is not of it; give another folder"]
    for expected, (code, stderr) in zip(said, run_ranks(outcomes, 1, cases)[0], strict=True):
        assert code == 2, expected
        (error,) = errors_of(stderr)
        assert expected in error
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def edit(path: Path, **more: Any) -> None:
    """Add to the mappings of a JSON file."""
    content = json.loads(path.read_text())
    for name, values in more.items():
        content[name] |= values
    path.write_text(json.dumps(content))


def with_more_names(checkpoint: Path, folder: Path) -> Path:
    """Return a checkpoint whose state has names that it should not have, and that an engine has."""
    shutil.copytree(checkpoint, folder)
    state = folder / "state.json"
    engine = json.loads(state.read_text())["engine"]
    engine["loss_scaler"] |= {"dynamic": False, "update_scale": 1, "backward": 2}  # the first was written once
    engine["options"] = [options | {"params": 0, "weight_decay": 1e9} for options in engine["options"]]
    engine["scheduler"] |= {"step": 1, "get_lr": 2}
    edit(state, engine=engine)
    entry = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    edit(folder / "manifest.json", files={"state.json": entry})
    return folder


def damaged(whole: Path, work: Path) -> Iterator[tuple[Path, str]]:
    """Yield checkpoints that are not whole, and what is said of them."""
    cases = {
        "truncated": "rank-00000-0000.safetensors has 100 bytes, not",
        "missing": "rank-00000-0000.safetensors is missing",
        "no manifest": "manifest.json cannot be read",
        "broken manifest": "manifest.json is not valid JSON",
        "empty manifest": "manifest.json has the format None",
        "other manifest": "manifest.json does not say which files there are",
        "altered state": "the contents of state.json are not what was written",
        "other folder": "../../whole/kept.json is not a file of its own folder",
        "link": "rank-00001-0000.safetensors is not a file of its own folder",
    }
    for name, expected in cases.items():
        folder = shutil.copytree(whole / "checkpoints" / "step-00000004", work / "broken" / name)
        tensors, manifest = folder / "rank-00000-0000.safetensors", folder / "manifest.json"
        if name == "truncated":
            os.truncate(tensors, 100)
        elif name == "altered state":
            flip_a_bit(folder / "state.json")
        elif name == "other folder":
            edit(manifest, files={"../../whole/kept.json": {"bytes": 1, "sha256": ""}})
        elif name == "link":
            (folder / "rank-00001-0000.safetensors").unlink()
            (folder / "rank-00001-0000.safetensors").symlink_to(whole / "checkpoints/step-00000004" / tensors.name)
        elif name in ("missing", "no manifest"):
            (tensors if name == "missing" else manifest).unlink()
        else:
            manifest.write_text({"broken": "{", "empty": "{}", "other": '{"format": 1, "files": [3]}'}[name.split()[0]])
        yield folder, expected


def test_a_checkpoint_that_is_asked_for_must_be_whole(whole: Path, work: Path) -> None:
    cases = [*damaged(whole, work), (work / "nowhere", "manifest.json cannot be read")]
    flags = [arguments(work, work / "never", **SETTINGS, resume=folder) for folder, _ in cases]
    for (folder, expected), (code, stderr) in zip(cases, run_ranks(outcomes, 1, flags)[0], strict=True):
        assert code == 2
        (error,) = errors_of(stderr)
        assert f"--resume {folder} is not a whole checkpoint: {expected}" in error
    assert not (work / "never").exists()


def test_where_no_checkpoint_is_whole_nothing_is_overwritten(whole: Path, work: Path) -> None:
    output = copy_of(whole, work / "all damaged")
    for folder in checkpoints(output):
        flip_a_bit(folder / "rank-00000-0000.safetensors")
    ranks = go_on(work, output, 2, resume="newest")
    assert codes(ranks) == [2, 2]
    (error,) = errors_of(ranks[0][1])
    assert "no checkpoint in" in error
    assert "step-00000008 is damaged" in error
    assert len(checkpoints(output)) == 2


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(work: Path) -> None:
    output = work / "killed early"
    output.mkdir()
    (output / "recipe.yaml").write_text("max_steps: 2\n")
    (said,) = run_ranks(said_by, 1, arguments(work, output, max_steps=2, resume=True))
    assert "has no checkpoint yet, so the run starts from the beginning" in said
    assert report_of(output)["steps"] == 2


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoints(work: Path, small_disk: Path) -> None:
    output = small_disk / "out"
    ranks = go_on(work, output, 2, save_every=1, keep_checkpoints=50)
    assert codes(ranks) == [2, 2], ranks[0][1]
    (error,) = errors_of(ranks[0][1])
    assert "cannot be written" in error
    assert "No space left on device" in error
    left = checkpoints(output)
    assert left
    assert f"Earlier checkpoints are as they were: {left[-1].name}" in error
    assert not [path for path in left if path.suffix == ".partial"]


def test_a_disk_that_is_too_full_for_the_result_ends_all_ranks_with_one_message(work: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_500_000))
    flags = arguments(work, small_disk / "out", criterion="magnitude", max_steps=2)
    ranks = run_ranks(outcome, 2, [*flags, "--no-tensorboard"])
    assert codes(ranks) == [2, 2], ranks[0][1]
    (error,) = errors_of(ranks[0][1])
    assert "out/pruned cannot be written: " in error
    assert "No space left on device" in error
    assert "Traceback" not in ranks[0][1] + ranks[1][1]
    assert not (small_disk / "out" / "report.json").exists()


def on_own_disks(flags: list[str], output: str) -> tuple[int, str]:
    run_output.appears = lambda path, patience: appears(path, patience / 20)  # a cluster's disks need more time
    return outcome([*flags, "--output_dir", f"{output} of rank {os.environ['RANK']}"])


@pytest.mark.parametrize("save_every", [0, 4])
def test_ranks_that_do_not_share_a_disk_are_told_at_the_start(save_every: int, work: Path) -> None:
    flags = arguments(work, work / "unused", **SETTINGS | {"save_every": save_every})
    ranks = run_ranks(on_own_disks, 2, flags, str(work / f"disk {save_every}"))
    assert codes(ranks) == [2, 2]
    (error,) = errors_of(ranks[0][1])
    assert "rank 1 does not see --output_dir" in error
    assert not list(work.glob("disk*/tensorboard"))

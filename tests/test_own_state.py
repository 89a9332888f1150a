"""A loop of one's own that is cut goes on with DeepSpeed's checkpoint of the engine and ours of the pruner."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines import BLOCKS, STEPS, ds_config, gathered, pruning, saved_model, start
from memory_backend import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale_prune import attach, compact, load_state, save, save_state
from scale_prune.pruning.pruner import Pruner
from scale_prune.zero3.runtime import training_engine

pytestmark = pytest.mark.distributed

CUT = 4
FIRST_FILE, LAST_FILE = "pruner-00000.safetensors", "pruner-00001.safetensors"


def whole_and_cut(path: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a run ends with, and what one that was cut after some steps ends with."""
    engine, pruner = start(path, ds_config(), pruning("gum"))
    with pytest.raises(ValueError, match="nowhere cannot be written"):  # on both ranks
        save_state(pruner, folder / "nowhere")
    train(engine, pruner, BLOCKS, CUT - 1)
    save_state(pruner, folder)
    before = (folder / LAST_FILE).read_bytes()
    train(engine, pruner, BLOCKS, 1)
    engine.save_checkpoint(str(folder))
    save_state(pruner, folder)
    train(engine, pruner, BLOCKS, STEPS - CUT)
    whole = result(engine, pruner)
    engine.destroy()

    engine, pruner = start(path, ds_config(), pruning("gum"))
    engine.load_checkpoint(str(folder))
    see_what_was_cut_off_refused(pruner, folder, before)
    load_state(pruner, folder)
    assert pruner.step == CUT
    train(engine, pruner, BLOCKS, STEPS - CUT)
    return whole, result(engine, pruner)


def see_what_was_cut_off_refused(pruner: Pruner, folder: Path, before: bytes) -> None:
    """Load with a file of the save before, and leave the last one without its step, as earlier versions wrote it."""
    main, (file, now) = pruner.backend.rank == 0, (folder / LAST_FILE, (folder / LAST_FILE).read_bytes())
    torch.distributed.barrier()
    if main:
        file.write_bytes(before)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=rf"the steps \[{CUT - 1}\] beside pruner.json of step {CUT}: .* cut off"):
        load_state(pruner, folder)
    torch.distributed.barrier()
    if main:
        with safe_open(folder / FIRST_FILE, "pt") as first:
            starts = first.metadata()["starts"]
        save_file(load_file(folder / FIRST_FILE), folder / FIRST_FILE, {"starts": starts})
        file.write_bytes(now)
    torch.distributed.barrier()


def result(engine: Any, pruner: Pruner) -> dict[str, Tensor]:
    working = gathered(engine, [name for name, _ in engine.module.named_parameters()])
    return {"masks": torch.cat(pruner.masks), "scores": torch.cat(pruner.scores), **working}


def test_a_loop_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = saved_model(tmp_path, "gpt_neo")
    for whole, cut in run_ranks(whole_and_cut, 2, path, tmp_path):
        assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
        assert not whole["masks"].all()


def of_another_model(path: Path, other: Path, folder: Path) -> str:
    engine, pruner = start(path, ds_config(), pruning("magnitude"))
    save_state(pruner, folder)
    engine.destroy()
    _, pruner = start(other, ds_config(), pruning("magnitude"))
    with pytest.raises(ValueError, match="is of a model with the groups") as error:
        load_state(pruner, folder)
    facts = json.loads((folder / "pruner.json").read_text())
    for name, value, expected in SPOILT:
        (folder / "pruner.json").write_text(json.dumps(facts | {name: value}))
        with pytest.raises(ValueError, match=expected):
            load_state(pruner, folder)
    return str(error.value)


SPOILT = [
    ("step", "4", "pruner.json has '4' as \"pruner.step\", it must be int"),
    ("scalars", [], "pruner.json has '\\[\\]' as \"pruner.scalars\", it must be dict"),
    ("groups", None, "pruner.json has 'None' as \"pruner.groups\", it must be dict"),
]


def test_another_model_is_refused(tmp_path: Path) -> None:
    neo, llama = saved_model(tmp_path, "gpt_neo"), saved_model(tmp_path, "llama")
    (message,) = run_ranks(of_another_model, 1, neo, llama, tmp_path)
    assert "this one has {" in message


def forgetful(path: Path, folder: Path) -> dict[str, str]:
    """Return what is said of loops that leave calls out."""
    engine, pruner = start(path, ds_config(), pruning("magnitude"))
    train(engine, pruner, BLOCKS, 2)
    save_state(pruner, folder)
    said: dict[str, str] = {}

    def loop(*calls: str) -> None:
        """Make two steps with some of the calls, then compact, by a new pruner on the engine as it is."""
        pruner = attach(engine, pruning("magnitude"), total_steps=STEPS)
        for block in range(2):
            ids = BLOCKS.block(block)[None]
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            if "after_backward" in calls:
                pruner.after_backward()
            engine.step()
            if "after_step" in calls:
                pruner.after_step()
        compact(pruner, make_engine)

    for missing, calls in {"both": [], "after_backward": ["after_step"], "after_step": ["after_backward"]}.items():
        with pytest.raises(ValueError, match="without pruner") as error:
            loop(*calls)
        said[missing] = str(error.value)
    engine.step()  # the pass that was broken off
    pruner = attach(engine, pruning("magnitude"), total_steps=STEPS)
    with pytest.raises(ValueError, match="load the engine's checkpoint of that step first") as error:
        load_state(pruner, folder)
    said["load_checkpoint"] = str(error.value)
    train(engine, pruner, BLOCKS, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(engine, folder / "saved")
        smaller = compact(pruner, make_engine)
        save(smaller, folder / "compacted")
    ours = [str(each.message) for each in caught if each.filename == __file__]
    return said | dict(zip(("compact", "steps"), ours, strict=True))


def make_engine(module: Any) -> Any:
    return training_engine(module, ds_config())


def test_a_loop_that_forgets_a_call_is_told(tmp_path: Path) -> None:
    (said,) = run_ranks(forgetful, 1, saved_model(tmp_path, "gpt_neo"), tmp_path)
    assert "has made 2 of its steps without pruner.after_backward() and pruner.after_step()" in said["both"]
    assert "has made 1 of its steps without pruner.after_backward()" in said["after_backward"]
    assert "has made 1 of its steps without pruner.after_step()" in said["after_step"]
    assert "when the engine had made 2 steps, but it has made 7" in said["load_checkpoint"]
    assert said["compact"] == "saved without `compact`: the removed units are still there, as zeros"
    assert "compact after 2 of the 7 steps" in said["steps"]
    assert "the target is 40.0%" in said["steps"]


def saved_and_shrunk(path: Path, folder: Path, result: Path) -> None:
    """Save on some ranks, and keep what was saved as one rank knows it."""
    engine, pruner = start(path, ds_config(), pruning("gum"))
    train(engine, pruner, BLOCKS, CUT)
    engine.save_checkpoint(str(folder))
    save_state(pruner, folder)
    if pruner.backend.rank == 0:
        torch.save([pruner.masks, pruner.scores], result)


def loaded_elsewhere(path: Path, folder: Path) -> tuple[int, list[Tensor], list[Tensor]]:
    _, pruner = start(path, ds_config(), pruning("gum"))
    pruner.backend.steps_made = lambda: CUT  # type: ignore[method-assign]  # DeepSpeed's checkpoint is of two ranks
    load_state(pruner, folder)
    return pruner.step, list(pruner.masks), list(pruner.scores)


def of_another_criterion(path: Path, folder: Path) -> None:
    engine, pruner = start(path, ds_config(), pruning("magnitude"))
    save_state(pruner, folder)
    with pytest.raises(ValueError, match="cannot be read: it is of criterion magnitude, this is random"):
        load_state(attach(engine, pruning("random"), total_steps=STEPS), folder)
    if pruner.backend.rank == 1:  # as where a host does not see what another has written
        (folder / "pruner-00000.safetensors").rename(folder / "gone")
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="cannot be read: "):
        load_state(attach(engine, pruning("magnitude"), total_steps=STEPS), folder)


def test_what_cannot_be_read_is_said_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(of_another_criterion, 2, saved_model(tmp_path, "gpt_neo"), tmp_path)


def test_another_number_of_ranks_reads_what_was_saved_last(tmp_path: Path) -> None:
    path = saved_model(tmp_path, "gpt_neo")
    for ranks in (3, 2):  # the third rank's file of the first stays
        run_ranks(saved_and_shrunk, ranks, path, tmp_path, tmp_path / "saved.pt")
    masks, scores = torch.load(tmp_path / "saved.pt")
    ((step, found, ranked),) = run_ranks(loaded_elsewhere, 1, path, tmp_path)
    assert step == CUT
    assert all(map(torch.equal, found, masks))
    assert all(map(torch.equal, ranked, scores))
    assert not torch.cat(found).all()

"""A loop of one's own that is cut goes on with DeepSpeed's checkpoint of the engine and ours of the pruner."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines import BLOCKS, STEPS, ds_config, gathered, pruning, saved_model, start
from memory_backend import train
from torch import Tensor

from scale_prune import load_state, save_state
from scale_prune.pruner import Pruner

pytestmark = pytest.mark.distributed

CUT = 4


def whole_and_cut(path: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a run ends with, and what one that was cut after some steps ends with."""
    engine, pruner = start(path, ds_config(), pruning("gum"))
    train(engine, pruner, BLOCKS, CUT)
    engine.save_checkpoint(str(folder))
    save_state(pruner, folder)
    train(engine, pruner, BLOCKS, STEPS - CUT)
    whole = result(engine, pruner)
    engine.destroy()

    engine, pruner = start(path, ds_config(), pruning("gum"))
    engine.load_checkpoint(str(folder))
    load_state(pruner, folder)
    assert pruner.step == CUT
    train(engine, pruner, BLOCKS, STEPS - CUT)
    return whole, result(engine, pruner)


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
    return str(error.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    neo, llama = saved_model(tmp_path, "gpt_neo"), saved_model(tmp_path, "llama")
    (message,) = run_ranks(of_another_model, 1, neo, llama, tmp_path)
    assert "this one has {" in message

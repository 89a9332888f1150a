"""The example of a loop of one's own, as docs/own_loop.md shows it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import run_ranks
from engines import ds_config, pruning, saved_model, start
from memory_backend import steady_model
from models import LAYERS, WIDTH
from transformers import AutoModelForCausalLM

import scale_prune

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_prunes_half_of_the_neurons(tmp_path: Path) -> None:
    steady_model("gpt_neo").save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    program = [str(ROOT / "launch" / "own_loop.py"), str(tmp_path / "model"), str(tmp_path / "pruned")]
    done = subprocess.run(
        [sys.executable, "-m", *command, *program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    layers = json.loads((tmp_path / "pruned" / "config.json").read_text())["per_layer_config"]
    assert sum(layer["intermediate_size"] for layer in layers.values()) == LAYERS * WIDTH // 2
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert model.transformer.h[0].mlp.c_fc.out_features == layers["0"]["intermediate_size"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "log", "scope": "global"}, "says what each layer loses, --scope global lets scores say it"),
        ({"rounds": 2}, "belong to launch/prune.py"),
        ({"criterion": "kfac", "rounds": 0}, "a criterion that needs no Gram matrix"),
        ({"max_parameters": 9}, "max_parameters: only launch/prune.py knows"),
    ],
    ids=str,
)
def test_what_a_loop_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    engine = SimpleNamespace(zero_optimization_stage=lambda: 3)
    with pytest.raises(ValueError, match=message):
        scale_prune.attach(engine, scale_prune.PruningConfig(**{"criterion": "magnitude"} | settings), total_steps=9)


def test_a_ds_config_that_is_harmful_is_refused_in_a_loop_too(tmp_path: Path) -> None:
    run_ranks(refused, 1, saved_model(tmp_path, "gpt_neo"), ds_config(managed_gradient_accumulation=False))


def refused(path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='"managed_gradient_accumulation": false, which'):
        start(path, config, pruning("magnitude"))


def test_gates_are_not_left_out_of_what_is_saved(tmp_path: Path) -> None:
    run_ranks(saved_with_gates, 1, saved_model(tmp_path, "gpt_neo"), tmp_path / "saved")


def saved_with_gates(path: Path, folder: Path) -> None:
    engine, _ = start(path, ds_config(), pruning("neuron_l0"))
    with pytest.raises(ValueError, match="which alone puts gates into the weights"):
        scale_prune.save(engine, folder)
    assert not folder.exists()


@pytest.mark.parametrize("layout", ["auto", "gguf", "per-layer"])
def test_a_layout_that_is_none_is_refused(tmp_path: Path, layout: str) -> None:
    with pytest.raises(ValueError, match=f"unknown layout '{layout}'; valid are uniform, pad, per_layer"):
        scale_prune.save(SimpleNamespace(), tmp_path, layout=layout)


def test_the_page_shows_the_calls_of_the_example() -> None:
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    example = (ROOT / "launch" / "own_loop.py").read_text(encoding="utf-8")
    attached = "scale_prune.attach(engine, scale_prune.PruningConfig("
    for call in (attached, "pruner.after_backward()", "pruner.after_step()"):
        assert call in page
        assert call in example

"""Gradients of frozen weights and of activations that no step follows, on real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from distributed import run_ranks
from engines import BATCH, SHARDED, ds_config, saved_model
from models import VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from scale_prune.models import recompute_in_training, recomputing, unit_groups
from scale_prune.zero3 import FrozenEngine, Zero3Backend, load_model, num_parameters

pytestmark = pytest.mark.distributed

TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}


def rows() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, 7), generator=torch.Generator().manual_seed(0))


def slices_and_held(folder: str, passes: int, precision: str, persistence: int) -> tuple[dict[str, Any], float]:
    """Return this rank's slices of members' gradients after a second step, with their starts; and what it holds."""
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed thinks that no CPU can
    half: dict[str, Any] = {} if precision == "fp32" else {precision: {"enabled": True}}
    model: Any = load_model(folder, config := ds_config(accumulation=passes, persistence=persistence, **half))
    recompute_in_training(model)
    groups = unit_groups(model)
    members = [member for group in groups for member in group.members]
    backend = Zero3Backend(engine := FrozenEngine(model, config, [member.name for member in members]))
    own = rows().chunk(backend.world_size)[backend.rank]
    model.enable_input_require_grads()
    engine.eval()
    for step in range(2):
        assert engine.global_steps == step
        for part in own.chunk(passes):
            found = {}
            with recomputing(engine.module):
                loss = engine(input_ids=part, labels=part, use_cache=False).loss
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                views: list[Any] = [backend.master(member, grad=True) for member in members]
                found = {view.member.name: (view.start, view.grad.clone()) for view in views}
            engine.step()
    assert all(param.grad is None for param in model.parameters())
    held = sum(param.ds_tensor.nbytes for param in model.parameters()) / num_parameters(model)
    return found, held * backend.world_size


@pytest.mark.parametrize(
    ("model_type", "world_size", "passes", "precision", "persistence"),
    [
        ("gpt2", 1, 2, "fp32", SHARDED),
        ("gpt2", 3, 1, "fp32", 30),
        ("llama", 2, 3, "fp32", SHARDED),
        ("llama", 2, 1, "bf16", SHARDED),
        ("gpt_neo", 2, 1, "fp16", 30),
    ],
)
def test_gradients_are_those_of_the_whole_batch(
    model_type: str, world_size: int, passes: int, precision: str, persistence: int, tmp_path: Path
) -> None:
    folder = saved_model(tmp_path, model_type)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model(input_ids=rows(), labels=rows(), use_cache=False).loss.backward()
    expected = {name: param.grad.flatten() for name, param in model.named_parameters()}
    for found, held in run_ranks(slices_and_held, world_size, str(folder), passes, precision, persistence):
        assert found
        for name, (start, gradient) in found.items():
            whole = expected[name]
            rounding = TOLERANCE[precision] * float(whole.abs().max())
            torch.testing.assert_close(gradient, whole[start : start + len(gradient)], rtol=0, atol=rounding)
        assert held < (5 if precision == "fp32" else 2.5)  # bytes a parameter, padding included: a copy, no master

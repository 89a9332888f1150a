"""The calibration text, and a model that reads it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scale_prune.core import IGNORED
from scale_prune.data import Inputs
from scale_prune.models import linear_inputs, recomputing
from scale_prune.pruning import Calibration, roots_of
from scale_prune.tasks import MicroBatch, Task
from scale_prune.zero3 import Runtime, reading


def calibration_text(engine: Any, inputs: Inputs, task: Task, step: int) -> Iterator[MicroBatch]:
    """Yield this rank's part of the text that a round after a step is calibrated on: that of the steps to come."""
    steps = task.steps(engine.gradient_accumulation_steps(), inputs.calibration_start(step))
    for each in islice(steps, inputs.calibration_steps):
        yield from each.micro_batches


@torch.no_grad()
def read_text(engine: Any, calibration: Calibration, inputs: Inputs, task: Task, step: int) -> None:
    """Let a model read the calibration text, the same for every number of ranks, and be watched. A collective."""
    engine.eval()
    with calibration.watching():
        for micro_batch in calibration_text(engine, inputs, task, step):
            engine(**{**micro_batch.to(engine.device), **task.options, "labels": None})
    engine.empty_partition_cache()
    engine.train()


@torch.no_grad()
def text_loss(engine: Any, inputs: Inputs, task: Task, step: int, runtime: Runtime) -> float:
    """Return a model's loss on the calibration text, a mean over what is predicted. A collective."""
    total = torch.zeros(2, dtype=torch.float64)
    engine.eval()
    for micro_batch in calibration_text(engine, inputs, task, step):
        batch = micro_batch.to(engine.device)
        mean_loss, predicted = engine(**batch, **task.options).loss, int((batch["labels"] != IGNORED).sum())
        if predicted:  # the mean of none is NaN
            total += torch.tensor([float(mean_loss) * predicted, predicted])
    engine.empty_partition_cache()
    engine.train()
    summed, predicted = runtime.add_over_ranks(total).tolist()
    return summed / predicted


def read_back(engine: Any, calibration: Calibration, inputs: Inputs, task: Task, step: int) -> None:
    """Do the same, and watch the gradients of what its projections put out, in one pass and back. A collective.

    Gradients of parameters are not made, so that an engine without an optimizer is enough.
    """
    embedded: list[Tensor] = []
    embedding = engine.module.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    engine.eval()
    with calibration.watching(), calibration.watching_gradients(), recomputing(engine.module):
        for micro_batch in calibration_text(engine, inputs, task, step):
            batch = micro_batch.to(engine.device)
            # Of what the engine itself returns DeepSpeed lets no gradient through but by engine.backward.
            mean_loss, predicted = engine.module(**batch, **task.options).loss, batch["labels"] != IGNORED
            torch.autograd.grad(mean_loss * predicted.sum(), embedded.pop())
    handle.remove()
    engine.empty_partition_cache()
    engine.train()


def whitening_roots(model: PreTrainedModel, inputs: Inputs, task: Task) -> dict[str, Tensor]:
    """Return roots of the Gram matrices of what the targets read, by the name of the linear map. A collective.

    Args:
        model: one that ZeRO-3 has partitioned and no engine is around; it is so again afterwards.
        inputs: the run's inputs.
        task: has the text.

    Returns:
        (D_in, D_in) of the maps that this rank keeps, number i with rank i mod W.

    Raises:
        ValueError: a Gram matrix has no root.
    """
    pruning = inputs.config.pruning
    if not (groups := linear_inputs(model, pruning.linear_targets)):
        return {}
    with reading(model, inputs.ds_config) as backend:
        calibration = Calibration(backend, groups)
        read_text(backend.engine, calibration, inputs, task, 0)
        return roots_of(calibration, pruning.damping_of(0))  # with few tokens it was not measured

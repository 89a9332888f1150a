"""The loss of a step: of the labels, of a teacher's logits, and over all ranks; and gradients that no step follows."""

import math

import torch
from torch import Tensor

from scale_prune.criteria import KL_WEIGHT
from scale_prune.models import recomputing
from scale_prune.run.calibrating import calibration_text
from scale_prune.run.run import Run
from scale_prune.tasks import MicroBatch
from scale_prune.zero3 import gradients_finite


def loss_of(run: Run, micro_batch: MicroBatch) -> Tensor:
    """Return the loss of a micro batch, times its weight; with a teacher also that of its logits. A collective."""
    inputs = micro_batch.to(run.runtime.device)
    if run.student.is_frozen and run.student.pruner.gating is not None:
        return _gated_loss(run, inputs) * micro_batch.weight
    teacher_logits = _teacher_logits(run, inputs)
    with run.progress.seconds.measure("forward_backward"):
        output = run.student.engine(**inputs, **run.task.options)
        loss: Tensor = output.loss
        if teacher_logits is not None:
            alpha, temperature = run.config.distillation.distill_alpha, run.config.distillation.distill_temperature
            divergence = run.task.divergence(output.logits, teacher_logits, inputs["labels"], temperature)
            loss = (1 - alpha) * loss + alpha * divergence
        return loss * micro_batch.weight


def _gated_loss(run: Run, inputs: dict[str, Tensor]) -> Tensor:
    """Return the loss that gates learn from: of the labels, and of the distance to the model without gates."""
    engine, gating = run.student.engine, run.student.pruner.gating
    assert gating is not None
    with run.progress.seconds.measure("teacher"), torch.no_grad(), gating.gates.all_open():
        engine.eval()  # no dropout, in the gated pass neither
        dense = engine(**{**inputs, **run.task.options, "labels": None}).logits
    gating.gates.train()
    with run.progress.seconds.measure("forward_backward"), recomputing(engine.module):
        output = engine(**inputs, **run.task.options)
        loss: Tensor = output.loss + KL_WEIGHT * run.task.divergence(output.logits, dense, inputs["labels"], 1.0)
        return loss


def _teacher_logits(run: Run, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return the teacher's logits, None where there is no teacher."""
    if run.teacher is None:
        return None
    with run.progress.seconds.measure("teacher"):
        return run.teacher.logits({**inputs, **run.task.options, "labels": None})


def observe_gradients(run: Run) -> None:
    """Let the criterion see the gradients of the calibration text, of which no step follows. A collective.

    They take the place of those that earlier rounds have seen: of the same text, by the model as it was then.
    """
    engine, pruner = run.student.engine, run.student.pruner
    pruner.scoring.forget()
    engine.module.enable_input_require_grads()  # where no weight has a gradient, activations are to have one
    engine.eval()  # no dropout
    for micro_batch in calibration_text(engine, run.inputs, run.task, run.progress.step):
        with recomputing(engine.module):
            loss = loss_of(run, micro_batch)
        with run.progress.seconds.measure("forward_backward"):
            engine.backward(loss)
        pruner.after_backward()
        engine.step()
        pruner.after_step()
    engine.module.disable_input_require_grads()
    engine.gradients.clear()  # matrices of products may come in their place
    engine.empty_partition_cache()
    engine.train()


def mean_over_ranks(run: Run, own_loss: float) -> tuple[float, bool]:
    """Return the ranks' mean loss, and whether one was told to stop; call it before the loss reaches the weights.

    In fp16 the loss scaler skips steps whose loss or gradient is not finite.

    Raises:
        ValueError: the loss or a gradient is not finite; the model as it was before is written.
    """
    engine, fp16 = run.student.engine, run.student.engine.fp16_enabled()
    gradients_broken = not (fp16 or run.student.is_frozen or gradients_finite(engine.module))
    own = torch.tensor([own_loss, float(gradients_broken), float(run.stop.received)], dtype=torch.float64)
    total_loss, num_broken, num_stopping = run.runtime.add_over_ranks(own).tolist()
    loss = total_loss / run.runtime.world_size
    is_finite = math.isfinite(loss) and not num_broken
    if not is_finite and not fp16:
        raise ValueError(_not_finite(run, loss))
    return loss, num_stopping > 0


def _not_finite(run: Run, loss: float) -> str:
    """Write the model as it is, and return what to say. A collective."""
    student = run.student
    last_good = run.writer.write("last_good", student.backend, student.stored, student.layout)
    what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
    return (
        f"{what} at step {run.progress.step + 1}; the model as it was before that step is in "
        f"{last_good}; try a smaller --learning_rate than {run.config.training.learning_rate}"
    )

"""A round: units leave for good, and those that stay take over what they did."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from scale_prune.criteria import learns_from_gradients
from scale_prune.pruning import Calibration, takeovers_of
from scale_prune.run.losses import loss_of
from scale_prune.run.run import Run
from scale_prune.tasks import MicroBatch
from scale_prune.zero3 import repair_weights, write_working_copy


def remove(run: Run, step: int, *, finished: bool) -> None:
    """Choose the units that leave after a step, repair what stays, and rebuild the engine around it. A collective.

    Args:
        run: the run.
        step: of the schedule's removal steps.
        finished: no round comes after it.

    Raises:
        ValueError: scores cannot be ranked, or a Gram matrix cannot be solved.
        RuntimeError: masks did not take hold.
    """
    student, pruner = run.student, run.student.pruner
    with _noted(run):
        if pruner.pruning:
            _choose_and_repair(run, step)
            pruner.put_masks_on()
        if finished:
            run.measure("masked")
        student.compact(run.progress.seconds, finished=finished)
    if finished:
        run.measure("compacted")


def _choose_and_repair(run: Run, step: int) -> None:
    """Leave the weights repaired and the masks chosen, but not put on."""
    student, pruner, pruning = run.student, run.student.pruner, run.config.pruning
    repairs, chooses = pruning.repair != "none", bool(pruning.rounds)
    needs = pruner.scoring.criterion.needs
    if chooses and not run.config.training.max_steps and learns_from_gradients(pruner.scoring.criterion):
        _observe_gradients(run)
    calibration = None
    if repairs or (chooses and needs & {"gram", "activity"}):
        if not chooses:
            write_working_copy(student.backend)  # what the masks hide is to be seen, and taken over
        calibration = _calibrate(run, gram=repairs or "gram" in needs)
    if chooses:
        pruner.choose(step, calibration)
    if repairs and calibration is not None:
        with run.progress.seconds.measure("repair"):
            takeovers = takeovers_of(calibration, pruner.masks, str(pruning.repair), pruning.repair_damping)
            repair_weights(student.backend, student.groups, pruner.masks, takeovers)


@contextmanager
def _noted(run: Run) -> Iterator[None]:
    """Note in the progress what the body leaves and costs, where units leave in rounds."""

    def seconds() -> dict[str, float]:
        return {**run.progress.seconds, **run.student.pruner.seconds}

    before = seconds()
    yield
    if run.config.pruning.rounds and run.student.pruner.pruning:
        spent = {part: now - before.get(part, 0.0) for part, now in seconds().items()}
        widths = [group.num_units for group in run.student.groups]
        dense = sum(group.dense_cost for group in run.student.groups)
        round_: dict[str, Any] = {"step": run.progress.step, "remaining": sum(widths) / dense, "widths": widths}
        round_ |= {"seconds": {part: each for part, each in spent.items() if each and part != "evaluation"}}
        run.progress.rounds.append(round_)
        run.monitor.say(f"step {run.progress.step}: {round_['remaining']:.1%} of the neurons remain, for good")


@torch.no_grad()
def _calibrate(run: Run, *, gram: bool) -> Calibration:
    """Let the student read the calibration text, the same for every number of ranks. A collective."""
    student = run.student
    criterion = student.pruner.scoring.criterion
    activity = criterion.activity if "activity" in criterion.needs else None
    calibration = Calibration(student.backend, student.groups, gram=gram, activity=activity)
    student.engine.eval()
    with run.progress.seconds.measure("calibration"), calibration.watching():
        for micro_batch in _calibration_text(run):
            student.engine(**{**micro_batch.to(run.runtime.device), **run.task.options, "labels": None})
    student.engine.empty_partition_cache()
    student.engine.train()
    return calibration


def _observe_gradients(run: Run) -> None:
    """Let the criterion see the gradients of the calibration text, of which no step follows. A collective."""
    engine, pruner = run.student.engine, run.student.pruner
    engine.train()
    for micro_batch in _calibration_text(run):
        engine.backward(loss_of(run, micro_batch))
        pruner.after_backward()
        engine.step()
        pruner.after_step()


def _calibration_text(run: Run) -> Iterator[MicroBatch]:
    """Yield this rank's part of the text that every round is calibrated on: that of the first steps."""
    for step in islice(
        run.task.steps(run.student.engine.gradient_accumulation_steps(), 0), run.inputs.calibration_steps
    ):
        yield from step.micro_batches

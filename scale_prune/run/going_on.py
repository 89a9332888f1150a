"""Saving a run, and going on with it."""

from scale_prune.checkpoint import Checkpoint, read_kept, restore_engine, restore_pruner, restore_randomness, save_run
from scale_prune.run.budgeting import write_table
from scale_prune.run.run import Run
from scale_prune.system import STOPPED


def go_on_from(run: Run, checkpoint: Checkpoint) -> None:
    """Bring everything to where it was after the checkpoint's step. A collective."""
    measured, student = checkpoint.state["measured"], run.student
    tokens_per_step = run.inputs.batch_size * run.config.data.block_size
    run.progress.restore(checkpoint.step, measured, tokens_per_step=tokens_per_step)
    run.quality.restore(measured)
    table = run.progress.rounds[0].get("table") if run.progress.rounds else None
    if table is not None and run.config.pruning.table is None:
        write_table(run, table)  # the folder may be another one
    if checkpoint.kept_groups:
        student.go_on_with(*read_kept(checkpoint, student.dense.groups), run.progress.seconds)
    restore_pruner(checkpoint, student.pruner)
    student.pruner.seconds.update(measured["pruner_seconds"])
    if checkpoint.compacted:
        student.compact(run.progress.seconds, finished=True)
    restore_engine(checkpoint, student.backend)
    if not checkpoint.compacted:
        pruner = student.pruner  # under gates what leaves is cut later, after it has been seen once more
        pruner.calls.go_on() if pruner.scoring.criterion.freezes else pruner.put_masks_on()
    restore_randomness(checkpoint, run.runtime, run.config.training.seed)
    run.monitor.say(f"going on after step {checkpoint.step}, from {checkpoint.folder}")


def save_if_due(run: Run, stopping: bool) -> None:
    """Save where it is time to, and where the run is to end. A collective.

    Raises:
        SystemExit: the run is to end; with the code STOPPED.
        ValueError: the checkpoint cannot be written.
    """
    step, every = run.progress.step, run.config.checkpoint.save_every
    if stopping or (every and step % every == 0):
        _save(run)
    if stopping:
        run.monitor.say(f"stopped by SIGTERM after step {step}; the same command with --resume goes on")
        raise SystemExit(STOPPED)


def _save(run: Run) -> None:
    progress, student, pruner = run.progress, run.student, run.student.pruner
    measured = {**progress.state(), "pruner_seconds": dict(pruner.seconds), **run.quality.state()}
    with progress.seconds.measure("checkpoints"):
        facts = {"step": progress.step, "finished": student.finished, "texts": dict(run.task.fingerprints)}
        folder = save_run(
            run.inputs, run.runtime, student.backend, pruner, student.dense, facts | {"measured": measured}
        )
    run.monitor.say(f"step {progress.step}: saved {folder}")

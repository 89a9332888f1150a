"""What a run has come to: the contents of report.json."""

from typing import Any

from scale_prune.models import cluster_sizes
from scale_prune.run.origin import origin, with_other
from scale_prune.run.progress import Progress
from scale_prune.run.report import tenths
from scale_prune.run.run import Run
from scale_prune.system import versions
from scale_prune.zero3 import working_dtype


def results(run: Run, *, pruned_parameters: int, stored_parameters: int) -> dict[str, Any]:
    """Return the report of a run whose exported folder was loaded again. A collective.

    Args:
        run: the run.
        pruned_parameters: parameters of the student at the end.
        stored_parameters: parameters in the folder's files.
    """
    config, progress, pruner = run.config, run.progress, run.student.pruner
    settings = config.flat()
    dense_parameters = run.student.dense_parameters
    return {
        **{name: settings[name] for name in ("model", "criterion", "scope", "layout", "seed")},
        "dataset": settings["dataset"] or settings["train_file"],
        "validation": run.inputs.validation,
        "world_size": run.runtime.world_size,
        "steps": run.last_step,
        "remaining": {
            "target": config.pruning.remaining,
            "measured": pruner.remaining,
            "gates": pruner.gating.expected if pruner.gating is not None else None,
        },
        "unit": run.student.kind,
        "widths": _left(run, run.student.kind),
        "heads": _left(run, "head"),
        "parameters": {"dense": dense_parameters, "pruned": pruned_parameters, "stored": stored_parameters},
        "task": config.task.task,
        "bos": run.inputs.begins_with_bos,
        **_quality(run),
        **_progress(progress),
        "seconds": with_other(progress.total_seconds, {**progress.seconds, **pruner.seconds}),
        "embedding": cluster_sizes(pruner.groups, pruner.widths),
        "distillation": _distillation(run),
        "peak_memory_bytes": run.runtime.peak_memory(),
        "settings": settings,
        "ds_config": run.inputs.ds_config,
        "versions": versions(),
        **origin(config),
    }


def _left(run: Run, kind: str) -> list[int]:
    """Return how many units of a kind each group has left."""
    pruner = run.student.pruner
    return [width for group, width in zip(pruner.groups, pruner.widths, strict=True) if group.kind == kind]


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "tokens": progress.tokens,
        "step_seconds": tenths(progress.step_seconds),
        "resumed_at": progress.resumed_at,
        "received_bytes": progress.received_bytes,
        "rounds": progress.rounds,
        "repair": progress.repair,
        "history": progress.history,
    }


def _quality(run: Run) -> dict[str, Any]:
    return {
        "perplexity": {"recovered": None, **run.quality.perplexities},
        "metrics": run.quality.metrics,
        "dropped_examples": dict(run.task.dropped),
    }


def _distillation(run: Run) -> dict[str, Any] | None:
    """Return what the teacher cost: seconds of this rank, and bytes of every rank."""
    if run.teacher is None:
        return None
    bytes_each = working_dtype(run.inputs.ds_config).itemsize
    return {
        "teacher": run.config.distillation.teacher,
        "parameters": run.teacher.num_parameters,
        "bytes_per_rank": -(-run.teacher.num_parameters // run.runtime.world_size) * bytes_each,
        "seconds": run.progress.seconds["teacher"],
    }

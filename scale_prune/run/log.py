"""What TensorBoard shows of a step."""

from scale_prune.core import UnitGroup
from scale_prune.run.run import Run


def log(run: Run, *, loss: float, tokens_per_second: float) -> None:
    """Write the numbers of the step that was made, and what has become of every layer."""
    step, pruner = run.progress.step, run.student.pruner
    values = {
        "train/loss": loss,
        "train/learning_rate": run.student.engine.get_lr()[0],
        "train/tokens_per_second": tokens_per_second,
        "pruning/score_learning_rate": run.config.pruning.score_learning_rate * pruner.schedule.learning_rate(step),
        "pruning/remaining_target": pruner.schedule.remaining(step),
        "pruning/remaining": pruner.remaining,
        "pruning/mask_churn": pruner.masking.churn,
    }
    similarity = pruner.observations.mean_similarity(pruner.masking.live)
    if similarity is not None:
        values["pruning/similarity"] = similarity
    if pruner.gating is not None and pruner.gating.expected is not None:
        values["pruning/remaining_by_gates"] = pruner.gating.expected
    parts = {**run.progress.seconds, **pruner.seconds}
    values |= {f"seconds/{part}": seconds / step for part, seconds in parts.items()}
    run.monitor.scalars(step, values)
    names = [_name(index, group) for index, group in enumerate(pruner.groups)]
    run.monitor.layers(step, names, masks=run.student.dense.masks_with(pruner), scores=pruner.scores)


def _name(index: int, group: UnitGroup) -> str:
    return f"heads_{group.layer:02d}" if group.kind == "head" else f"layer_{index:02d}"

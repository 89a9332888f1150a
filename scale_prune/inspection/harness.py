"""Tasks of EleutherAI's lm-evaluation-harness for evaluate.py: flags, table, and the way to an optional package."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from scale_prune.inspection.finished_models import positive
from scale_prune.system import markdown_table

if TYPE_CHECKING:
    from scale_prune.inspection.lm_eval_tasks import Tasks

NO_METRICS = ("alias", "name", "sample_len", "sample_count")


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of the harness to a command on finished models."""
    add = parser.add_argument
    add("--lm_eval", nargs="+", metavar="TASK", help="score tasks of lm-evaluation-harness too, where it is installed")
    add(
        "--lm_eval_include",
        type=expanduser,
        metavar="DIR",
        help="folder of task files (*.yaml) beside the harness's own",
    )
    add("--lm_eval_limit", type=positive, metavar="INT", help="documents of each task that count; default: all")


def tasks_of(own: Namespace, world_size: int) -> "Tasks | None":
    """Return the tasks of --lm_eval, checked, or None without any.

    Args:
        own: the values of the flags of `add_flags`.
        world_size: number of ranks.

    Raises:
        ValueError: lm_eval is not installed; or a task is unknown, cannot be used, or is too small for the ranks.
    """
    if not own.lm_eval:
        if own.lm_eval_include or own.lm_eval_limit:
            raise ValueError("--lm_eval_include and --lm_eval_limit say how --lm_eval is done, which is missing")
        return None
    try:
        from scale_prune.inspection.lm_eval_tasks import Tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "--lm_eval needs EleutherAI's lm-evaluation-harness, which is not installed; pip install lm_eval"
        ) from None
    return Tasks(own.lm_eval, own.lm_eval_include, own.lm_eval_limit, world_size)


def as_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the scores of models, one row a metric, with their standard errors where lm_eval gives them.

    Args:
        scores: by model, what `Tasks.measure` returned.
    """
    by_model = {name: each["results"] | each.get("groups", {}) for name, each in scores.items()}
    rows = [
        [task, metric.removesuffix(",none"), *(_cell(each[task], metric) for each in by_model.values())]
        for task, metrics in next(iter(by_model.values())).items()
        for metric in metrics
        if metric not in NO_METRICS and "_stderr" not in metric
    ]
    return "\n".join(markdown_table(["task", "metric", *by_model], rows, texts=2)) + "\n"


def _cell(metrics: Mapping[str, Any], metric: str) -> str:
    name, _, rest = metric.partition(",")
    error = metrics.get(f"{name}_stderr,{rest}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")

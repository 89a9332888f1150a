"""A run in one picture: quality over steps beside what remained, and how wide each layer has become."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_prune.system import whole_or_absent

FIGURE = "report.png"


def draw(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the picture of a report into the run's folder."""
    from matplotlib.figure import Figure  # takes half a second, for which no start of a rank should wait

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _over_steps(left, report)
    _by_layer(right, report)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with whole_or_absent(folder / FIGURE) as partial:
        partial.write_bytes(drawn.getvalue())


def _over_steps(axes: Any, report: Mapping[str, Any]) -> None:
    name, points = _quality(report["history"])
    trained = len({each["step"] for each in points}) > 1
    steps = [each["step"] if trained else each["stage"] for each in points]
    axes.plot(steps, [each[name] for each in points], "o-", color="C0")
    axes.set(xlabel="step" if trained else "", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel(f"validation {name}", color="C0")
    beside = axes.twinx()
    by_stairs = trained and bool(report["rounds"])
    places, remaining = stairs(report) if by_stairs else (steps, [100 * each["remaining"] for each in points])
    style = "steps-post" if by_stairs else "default"
    beside.plot(places, remaining, "s--", color="C1", markersize=4, drawstyle=style)
    beside.set_ylabel("remaining, %", color="C1")
    beside.set_ylim(0, 105)


def _quality(history: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return what is drawn of the evaluations, perplexity or, where a task has none, loss, and those that have it."""
    losses = [{"loss": each.get("metrics", {}).get("loss"), **each} for each in history]
    name = "perplexity" if any(each["perplexity"] is not None for each in history) else "loss"
    return name, [each for each in losses if each[name] is not None]


def stairs(report: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Return the steps after which units left in rounds, or something was measured, and what then remained, in %."""
    known = sorted([*report["history"], *report["rounds"]], key=lambda each: (each["step"], -each["remaining"]))
    return [each["step"] for each in known], [100 * each["remaining"] for each in known]


def _by_layer(axes: Any, report: Mapping[str, Any]) -> None:
    axes.bar(range(len(report["widths"])), report["widths"], color="C0")
    axes.set(xlabel="weight" if report["unit"] == "component" else "layer", ylabel=f"{report['unit']}s that are left")
    if report["unit"] == "neuron" and not report["heads"]:
        dense = math.ceil(sum(report["widths"]) / report["remaining"]["measured"] / len(report["widths"]))
        axes.axhline(dense, color="gray", linestyle=":", label="dense, on average")
        axes.legend()
    if report["unit"] == "neuron" and report["heads"]:
        beside = axes.twinx()
        beside.plot(range(len(report["heads"])), report["heads"], "s", color="C1", markersize=5)
        beside.set_ylabel("heads that are left", color="C1")
        beside.set_ylim(0, max(report["heads"]) + 0.5)

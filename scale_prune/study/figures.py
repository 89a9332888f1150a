"""The figure of a comparison, as PNG and SVG, for readers who have not seen the code."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from scale_prune.study.rows import LOWER_IS_BETTER, Row, badness

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")  # not as many as colors, so that pairs differ longer
LOG_FROM = 4.0
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""
SAME = 0.005
"""Fraction of an axis within which two points count as one place."""

APART = 0.012
"""Distance, as a fraction of an axis, between points of the same place; less where places are near each other."""

ALONE = 0.2
"""Half the width of an axis with one place, as a fraction of it."""

TICKS_APART = 0.08
"""Fraction of an axis that two ticks need between them to be read."""

PANELS = {
    "measured": ("Quality against what is left", "% of the neurons, or of the targets' parameters", 100.0),
    "parameters": ("Quality against size", "parameters of the pruned model, millions", 1e-6),
}

Line = list[Row]


def draw(folder: Path, rows: Sequence[Row]) -> None:
    """Draw quality against what is left, one panel each for this and for parameters.

    Args:
        folder: an existing folder, which gets quality.png and quality.svg.
        rows: the rows of the table.
    """
    level, name = _reference(rows)
    drawn = [row for row in rows if row.method != name and math.isfinite(row.mean("quality"))]
    lines = {method: [row for row in drawn if row.method == method] for method in _by_quality(drawn)}
    figure = Figure(figsize=_size([name, *lines]), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, key in zip(axes, PANELS, strict=True):
        _panel(axis, key, lines)
        if level is not None:
            axis.axhline(
                level, color="0.35", linewidth=1.2, linestyle="--", label=_wrapped(f"{name} ({level:,.2f})"), zorder=1
            )
    metric = rows[0].runs[0].metric
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    axes[0].set_ylabel(f"validation {metric} ({better} is better)")
    _scale(axes[0], [row.mean("quality") for row in drawn] + ([level] if level is not None else []))
    figure.suptitle(_title(rows), fontsize=11)
    note = "Points of one place are drawn side by side, so that none hides another."
    figure.supxlabel(note, fontsize=8, color="0.35")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title=_legend_title(rows))
    for kind in ("png", "svg"):
        figure.savefig(folder / f"quality.{kind}", dpi=150)


def _size(methods: Sequence[str]) -> tuple[float, float]:
    """Return width and height in inches, with room for the legend beside the panels."""
    texts = [line for method in methods for line in _wrapped(method).splitlines()]
    return 4.2 * len(PANELS) + 1.2 + 0.085 * max(map(len, texts), default=0), max(4.4, 1.2 + 0.2 * len(texts))


def _wrapped(method: str) -> str:
    return "\n".join(wrap(method, width=40))


def _reference(rows: Sequence[Row]) -> tuple[float | None, str]:
    """Return height and name of the horizontal line; no height where there is more than one model or text."""
    if len({row.conditions for row in rows}) > 1:
        return None, ""
    plain = min((row for row in rows if row.is_plain), key=badness, default=None)
    name = plain.method if plain else "dense model before training"
    level = plain.mean("quality") if plain else rows[0].mean("dense")
    return (level, name) if math.isfinite(level) else (None, name)


def _by_quality(rows: Sequence[Row]) -> list[str]:
    """Return the methods, the worst first as in the figure from the top, by their smallest models."""
    smallest = {row.method: row for row in rows}  # the rows' order is from large to small
    return sorted(smallest, key=lambda method: -badness(smallest[method]))


def _panel(axis: Any, key: str, lines: Mapping[str, Line]) -> None:
    title, label, scale = PANELS[key]
    places, centers = _places(key, lines, scale)
    for index, (method, rows) in enumerate(lines.items()):
        spreads = [row.spread("quality") for row in rows]
        deviations = [found.std or 0.0 for found in spreads]
        axis.errorbar(
            [places[method, row.runs[0].target] for row in rows],
            [found.mean for found in spreads],
            yerr=deviations if any(deviations) else None,
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            linewidth=1.5,
            capsize=3,
            label=_wrapped(method),
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(label)
    if all(right - left > TICKS_APART * (centers[-1] - centers[0]) for left, right in pairwise(centers)):
        axis.set_xticks(centers, [f"{center:.3g}" for center in centers])
    if len(centers) == 1:
        axis.set_xlim((1 - ALONE) * centers[0], (1 + ALONE) * centers[0])
    axis.grid(alpha=0.3)


def _clusters(values: Sequence[float]) -> list[list[float]]:
    """Return the values in order, those together that could not be distinguished on an axis."""
    ordered = sorted(set(values))
    found: list[list[float]] = []
    for value in ordered:
        if found and value - found[-1][0] <= SAME * (ordered[-1] - ordered[0]):
            found[-1].append(value)
        else:
            found.append([value])
    return found


def _places(key: str, lines: Mapping[str, Line], scale: float) -> tuple[dict[tuple[str, float], float], list[float]]:
    """Say where points lie on the x axis: those that would hide each other stand side by side.

    Returns:
        each point's place, by method and target, and the values that they stand around.
    """
    exact = {(row.method, row.runs[0].target): scale * row.mean(key) for rows in lines.values() for row in rows}
    clusters = _clusters(list(exact.values()))
    centers = [mean(cluster) for cluster in clusters]
    gaps = [right - left for left, right in pairwise(centers)]
    found = dict(exact)
    for cluster, center in zip(clusters, centers, strict=True):
        crowd = [point for point in exact if exact[point] in cluster]
        step = min(APART * sum(gaps), 0.6 * min(gaps) / len(crowd)) if gaps else 1.5 * ALONE * center / len(crowd)
        for place, point in enumerate(crowd):
            found[point] = center + step * (place - (len(crowd) - 1) / 2)
    return found, centers


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Make the axis of quality logarithmic where values are far apart."""
    if values and max(values) > LOG_FROM * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _title(rows: Sequence[Row]) -> str:
    models = {Path(str(row.runs[0].settings["model"])).name for row in rows}
    title = f"{rows[0].runs[0].metric.capitalize()} after pruning"
    return f"{title}: {models.pop()}" if len(models) == 1 else title


def _legend_title(rows: Sequence[Row]) -> str:
    seeds = {len({run.settings["seed"] for run in row.runs}) for row in rows}
    counts = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return "one seed each" if seeds == {1} else f"mean and standard deviation\nover {counts} seeds"

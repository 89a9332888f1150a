"""Figures of an analysis, as PNG and SVG, for readers who have not seen the code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

from scale_prune.inspection.analysis import GroupAnalysis
from scale_prune.inspection.analysis_tables import ratios, summary, weights_of

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for the color-blind
MARKERS = ("o", "s", "^", "D", "v", "P")
Found = Mapping[str, Sequence[GroupAnalysis]]


def draw_all(folder: Path, found: Found, baseline: str | None, kept: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Draw every figure that the models allow.

    Args:
        folder: an existing folder.
        found: groups by the model's name.
        baseline: name of the dense model, if there is one.
        kept: indices of the kept neurons of the baseline, by pruned model and group, where they are known.
    """
    if baseline is not None and len(found) > 1:
        _save(folder, "redundancy", _redundancy(found, baseline))
    for name, groups in found.items():
        _save(folder, f"sensitivity_by_neuron_{_file(name)}", _heat_map(name, groups))
    _save(folder, "nearest_neighbours", _neighbors(found))
    if baseline is not None and kept:
        _save(folder, "kept_neurons", _kept(found[baseline], baseline, kept))


def _redundancy(found: Found, baseline: str) -> Any:
    """Draw the paper's two plots: what is left of sensitivity and uniqueness against what is left of the neurons."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    titles = {"sensitivity_sum": "Sensitivity left", "uniqueness": "Uniqueness, against the dense model"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, (name, groups) in enumerate(found.items()):
            ratio = ratios(groups, found[baseline])
            style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
            axis.plot(100 * ratio["neurons"], ratio[key], linestyle="", markersize=9, label=name, **style)
        axis.axhline(1.0, color="0.5", linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_xlabel("neurons left, % of the dense model")
        axis.set_ylabel(f"ratio to {baseline}")
        axis.grid(alpha=0.3)
    _legend_below(figure, axes[0])
    return figure


def _heat_map(name: str, groups: Sequence[GroupAnalysis]) -> Any:
    """Draw each layer's neurons from the most to the least sensitive, all layers on one scale of colors."""
    width = max(int(group.live.sum()) for group in groups)
    rows = torch.full((len(groups), width), torch.nan)
    for row, group in enumerate(groups):
        values = group.sensitivity[group.live].sort(descending=True).values
        rows[row, : len(values)] = values.clamp(min=1e-12).log10()
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.32 * len(groups)))
    low, high = _limits(rows)
    image = axis.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
    axis.set_facecolor("0.85")
    axis.set_yticks(range(len(groups)), [str(group.layer) for group in groups])
    axis.set_xlabel("neurons of the layer, from the most to the least sensitive (gray: no neuron)")
    axis.set_ylabel("layer")
    axis.set_title(f"How much the loss would change without each neuron\n{name}")
    figure.colorbar(image, ax=axis, label="sensitivity, log10 of |w dL/dw|")
    figure.tight_layout()
    return figure


def _limits(rows: Tensor) -> tuple[float, float]:
    """Return the range of colors, without the lowest and highest per cent."""
    values = rows[rows.isfinite()]
    return float(values.quantile(0.01)), float(values.quantile(0.99))


def _neighbors(found: Found) -> Any:
    """Draw how near each neuron's nearest neighbor is, by cosine and by correlation."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    titles = {
        "nearest": ("By activation", "largest |cosine| to another neuron of the layer"),
        "correlated": ("By what varies (means removed)", "largest |correlation| to another neuron of the layer"),
    }
    for axis, (key, (title, label)) in zip(axes, titles.items(), strict=True):
        for place, (name, groups) in enumerate(found.items()):
            values = torch.cat([getattr(group, key)[group.sampled] for group in groups])
            weights = torch.cat([weights_of(group)[group.sampled] for group in groups])
            axis.hist(
                values.numpy(),
                bins=40,
                range=(0, 1),
                weights=(100 * weights / weights.sum()).numpy(),
                histtype="step",
                linewidth=2,
                linestyle=("-", "--", ":", "-.")[place % 4],
                color=COLORS[place % len(COLORS)],
                label=f"{name} ({summary(groups)['neurons']:,} neurons)",
            )
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the neurons")
    _legend_below(figure, axes[0])
    return figure


def _kept(dense: Sequence[GroupAnalysis], baseline: str, kept: Mapping[str, Mapping[str, Sequence[int]]]) -> Any:
    """Draw the dense model's neurons by sensitivity and similarity, and which share of them each run kept."""
    figure, axes = plt.subplots(
        1, len(kept), figsize=(5.2 * len(kept) + 1, 4.8), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    sensitivity = torch.cat([group.sensitivity for group in dense]).clamp(min=1e-12)
    uniqueness = 1 - torch.cat([group.similarity for group in dense])
    for axis, (name, indices) in zip(axes[0], kept.items(), strict=True):
        stays = torch.cat([_mask(group, indices[group.name]) for group in dense]).float()
        scale = {"xscale": "log", "gridsize": 40, "cmap": "RdYlBu", "vmin": 0, "vmax": 1}
        cells = axis.hexbin(sensitivity.numpy(), uniqueness.numpy(), C=stays.numpy(), **scale)
        axis.set_title(f"{name}, {stays.mean():.0%} kept")
        axis.set_xlabel("sensitivity, |w dL/dw|")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("1 - mean |cosine| to the other neurons")
    figure.suptitle(f"Neurons of {baseline}: which share of them each run kept")
    figure.colorbar(cells, ax=list(axes[0]), label="share kept of the neurons in a cell")
    return figure


def _mask(group: GroupAnalysis, indices: Sequence[int]) -> Tensor:
    mask = torch.zeros(len(group.live), dtype=torch.bool)
    mask[list(indices)] = True
    return mask


def _legend_below(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(labels)), frameon=False, markerscale=1.5)


def _save(folder: Path, name: str, figure: Any) -> None:
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=150)
    plt.close(figure)


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)

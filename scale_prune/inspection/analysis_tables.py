"""What an analysis found, in numbers: of the model, of each layer, of each neuron; JSON and a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scale_prune.inspection.analysis import GroupAnalysis
from scale_prune.system import markdown_table

COLUMNS = {
    "neurons": "neurons",
    "sensitivity_sum": "sensitivity, sum",
    "sensitivity_mean": "sensitivity, mean of a neuron",
    "uniqueness": "uniqueness",
    "similarity_mean": "mean abs. cosine",
    "nearest_median": "nearest neighbor, median abs. cosine",
    "correlated_median": "nearest neighbor, median abs. correlation",
    "explained_mean": "explained by others, mean R^2",
}
RATIOS = ("sensitivity_sum", "sensitivity_mean", "uniqueness")


def summary(groups: Sequence[GroupAnalysis]) -> dict[str, float]:
    """Return the numbers of some groups together, by the keys of COLUMNS; each group counts by its live neurons."""
    live = torch.cat([group.live for group in groups])
    sampled = torch.cat([group.sampled for group in groups])
    weights = torch.cat([weights_of(group) for group in groups])[sampled]
    counts = [len(group.explained) for group in groups]  # of some of the sampled neurons
    each = [torch.full((count,), int(g.live.sum()) / max(1, count)) for g, count in zip(groups, counts, strict=True)]
    explained, stand_for = torch.cat([group.explained for group in groups]), torch.cat(each)

    def values(name: str) -> Tensor:
        return torch.cat([getattr(group, name) for group in groups]).double()

    return {
        "neurons": int(live.sum()),
        "sensitivity_sum": float(values("sensitivity")[live].sum()),
        "sensitivity_mean": float(values("sensitivity")[live].mean()),
        "uniqueness": 1.0 - float(values("similar")[sampled] @ weights / weights.sum()),
        "similarity_mean": float(values("similarity")[live].mean()),
        "nearest_median": _median(values("nearest")[sampled], weights),
        "correlated_median": _median(values("correlated")[sampled], weights),
        "explained_mean": float(explained @ stand_for / stand_for.sum()),
    }


def weights_of(group: GroupAnalysis) -> Tensor:
    """Return (N,) for how many live neurons each sampled one stands; 0 for those that are not sampled."""
    return group.sampled.double() * (int(group.live.sum()) / max(1, int(group.sampled.sum())))


def _median(values: Tensor, weights: Tensor) -> float:
    """Return the smallest value below or at which half of the weight is."""
    order = values.argsort()
    reached = weights[order].cumsum(0) >= weights.sum() / 2 * (1 - 1e-12)
    return float(values[order][reached][0]) if len(values) else float("nan")


def as_json(found: Mapping[str, Sequence[GroupAnalysis]], baseline: str | None) -> dict[str, Any]:
    """Return everything for a JSON file: {model: {model: ..., layers: [...], neurons: {group: ...}}}."""
    contents: dict[str, Any] = {"baseline": baseline, "models": {}}
    for name, groups in found.items():
        contents["models"][name] = {
            "model": summary(groups),
            "layers": [{"name": group.name, **summary([group])} for group in groups],
            "neurons": {group.name: _neurons(group) for group in groups},
        }
        if baseline is not None:
            contents["models"][name]["ratio"] = ratios(groups, found[baseline])
    return contents


def ratios(groups: Sequence[GroupAnalysis], baseline: Sequence[GroupAnalysis]) -> dict[str, float]:
    """Return what remains of the baseline: neurons, sensitivity, uniqueness."""
    own, dense = summary(groups), summary(baseline)
    return {name: own[name] / dense[name] if dense[name] else float("nan") for name in ("neurons", *RATIOS)}


def as_table(found: Mapping[str, Sequence[GroupAnalysis]], baseline: str | None) -> str:
    """Lay the models out, one row each; with a baseline its ratios stand behind the numbers."""
    rows = []
    for name, groups in found.items():
        own = summary(groups)
        ratio = ratios(groups, found[baseline]) if baseline is not None else {}
        rows.append([name, *(_number(own[key]) + (f" ({ratio[key]:.3f})" if key in ratio else "") for key in COLUMNS)])
    lines = [*markdown_table(["model", *COLUMNS.values()], rows)]
    if baseline is not None:
        lines += ["", f"In brackets: ratio to {baseline}."]
    return "\n".join(lines) + "\n"


def _neurons(group: GroupAnalysis) -> dict[str, list[Any]]:
    names = ("live", "sampled", "sensitivity", "similarity", "explained")
    found = {name: getattr(group, name).tolist() for name in names}
    looked_at = (group.sampled | ~group.live).tolist()
    for name in ("nearest", "correlated", "similar"):
        values = getattr(group, name).tolist()
        found[name] = [value if known else None for value, known in zip(values, looked_at, strict=True)]
    return found


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

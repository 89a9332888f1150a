"""What a run leaves in words and numbers: report.json, report.md, kept.json, scores, and the model card."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from scale_prune.core import UnitGroup
from scale_prune.system import REPORT, json_text, markdown_table, whole_or_absent, write_atomically


def write_kept(folder: Path, groups: Sequence[UnitGroup], masks: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    """Write kept.json, {group: [indices in the dense model]}, and scores.safetensors, {group: (N,) float32}."""
    kept = {group.name: mask.nonzero().flatten().tolist() for group, mask in zip(groups, masks, strict=True)}
    write_atomically(folder / "kept.json", json.dumps(kept) + "\n")
    final = {group.name: score.float().cpu().contiguous() for group, score in zip(groups, scores, strict=True)}
    with whole_or_absent(folder / "scores.safetensors") as partial:
        save_file(final, partial)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.md, then report.json, which says that the run is complete.

    A number that is not finite, such as a perplexity, is null in report.json: JSON knows neither infinity nor NaN.
    """
    write_atomically(folder / "report.md", as_markdown(report))
    write_atomically(folder / REPORT, json_text(report))


def as_markdown(report: Mapping[str, Any]) -> str:
    """Lay a report out for people: results first, then widths, time, settings."""
    perplexity, parameters, remaining = report["perplexity"], report["parameters"], report["remaining"]
    heads = report.get("heads", [])  # none in reports of earlier versions
    whole = {"neuron": "neurons", "component": "factorized weights' parameters", "head": "heads"}[report["unit"]]
    if heads and report["unit"] == "neuron":
        whole = "parameters of neurons and heads"
    lines = [
        f"# {report['model']}, {report['criterion']}, {remaining['measured']:.1%} of the {whole}",
        "",
        f"Dense is {report['model']} as it was loaded, before any fine-tuning; pruned is what {_effort(report)} made.",
        "",
        "| | dense | pruned | ratio |",
        "|---|---|---|---|",
        _row("parameters", parameters["dense"], parameters["pruned"]),
        _row("parameters in the file", parameters["dense"], parameters["stored"]),
        *_quality(perplexity, report.get("metrics", {})),
        *_reference(report),
        f"Remaining: target {remaining['target']:.2%}, measured {remaining['measured']:.2%}{_by_gates(remaining)}. "
        f"Layout {report['layout']}, widths {report['widths']}{f', heads {heads}' if heads else ''}.",
        "",
        *_clusters(report["embedding"]),
        *_rounds(report.get("rounds", [])),
        *_repair(report.get("repair", {})),
        "| seconds | |",
        "|---|---|",
        *(f"| {part} | {seconds:.1f} |" for part, seconds in report["seconds"].items()),
        "",
        *_step_seconds(report["step_seconds"]),
        f"{report['steps']} steps, {report['tokens']:,} tokens, {report['world_size']} ranks, peak memory "
        f"{', '.join(f'{peak / 2**30:.2f} GiB' for peak in report['peak_memory_bytes'])}{_since(report)}.",
        "",
        *_origin(report),
        "| setting | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in report["settings"].items() if value is not None),
        "",
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


def _since(report: Mapping[str, Any]) -> str:
    """Say from when on a process has measured its peak."""
    return f" since it was resumed after step {report['resumed_at'][-1]}" if report.get("resumed_at") else ""


def _effort(report: Mapping[str, Any]) -> str:
    if not report["steps"]:
        return "pruning alone, without training,"
    return f"pruning and {report['steps']:,} steps of training on {report['tokens']:,} tokens"


def _reference(report: Mapping[str, Any]) -> list[str]:
    """Return the result beside that of the reference, or what one would be good for."""
    quality = [{"validation perplexity": report["perplexity"].get(stage)} for stage in ("reference", "exported")]
    theirs, ours = (
        told | report.get("metrics", {}).get(stage, {})
        for told, stage in zip(quality, ("reference", "exported"), strict=True)
    )
    rows = [_row(key, value, ours[key]) for key, value in theirs.items() if value is not None and ours[key] is not None]
    if rows:
        head = ["| | reference | pruned | ratio |", "|---|---|---|---|"]
        return ["", f"Reference is {report['settings']['reference']}.", "", *head, *rows, ""]
    hint = "What pruning alone has done shows beside a dense model after the same steps: `--reference`."
    return ["", hint, ""] if report["steps"] else [""]


def _origin(report: Mapping[str, Any]) -> list[str]:
    """Return when, where and by what it was made."""
    if "host" not in report:  # of an earlier version
        return []
    host = report["host"]
    where = f"{host['processor']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB"
    where += f", {host['accelerator']}" if host["accelerator"] else ""
    commit = f" Commit {report['commit']}." if report["commit"] else ""
    return [f"{report['date']}, {where}.{commit}", "", f"    {report['command']}", ""]


def _step_seconds(tenths: Sequence[float]) -> list[str]:
    shown = ", ".join(f"{mean:.2f}" for mean in tenths)
    return [f"Seconds a step, by tenths of the run: {shown}.", ""] if tenths else []


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the rounds in which neurons left for good, nothing where there are none."""
    rows = [[str(each["step"]), f"{each['remaining']:.2%}", f"{sum(each['seconds'].values()):.1f}"] for each in rounds]
    return [*markdown_table(["round after step", "remaining", "seconds"], rows, texts=0), ""] if rounds else []


def _repair(repair: Mapping[str, Any]) -> list[str]:
    """Say what became of a repair at the end of masks, where one was asked for."""
    if not repair:
        return []
    losses = f"loss {_number(repair['loss_with'])} on the calibration text, {_number(repair['loss_without'])} without"
    return [f"Repair at the end of the masks: {losses}; {'' if repair['taken'] else 'not '}taken.", ""]


def _clusters(clusters: Sequence[Mapping[str, int]]) -> list[str]:
    """Return a table of the clusters of a factorized embedding, nothing where there are none."""
    if not clusters:
        return []
    names = list(clusters[0])
    rows = [[f"{cluster[name]:,}" for name in names] for cluster in clusters]
    return [*markdown_table([name.replace("_", " ") for name in names], rows, texts=0), ""]


def _by_gates(remaining: Mapping[str, float | None]) -> str:
    """Say what the gates came to by themselves, before the budget was made exact, where there are any."""
    return f" (by gates {remaining['gates']:.2%})" if remaining["gates"] is not None else ""


def _quality(perplexity: Mapping[str, float | None], metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the rows of perplexity and metrics, and the stages' perplexities where the task has such."""
    rows = [_row(name, metrics["dense"][name], value) for name, value in metrics.get("exported", {}).items()]
    if perplexity["exported"] is None:
        return [*rows, ""]
    stages = {"dense": "dense before training", "exported": "exported and re-loaded"}
    measured = [f"{stages.get(name, name)} {_number(value)}" for name, value in perplexity.items() if value is not None]
    return [
        _row("validation perplexity", perplexity["dense"] or math.nan, perplexity["exported"]),
        *rows,
        "",
        f"Perplexity: {', '.join(measured)}.",
    ]


def tenths(seconds: Sequence[float]) -> list[float]:
    """Return the means of ten consecutive parts, fewer where there are fewer numbers."""
    parts = min(10, len(seconds))
    bounds = [len(seconds) * part // parts for part in range(parts + 1)] if parts else []
    return [fmean(seconds[first:last]) for first, last in pairwise(bounds)]


def _row(name: str, dense: float, pruned: float) -> str:
    ratio = f"{pruned / dense:.3f}" if dense else ""
    return f"| {name} | {_number(dense)} | {_number(pruned)} | {ratio} |"


def _cell(value: Any) -> str:
    """Return a setting as one cell of a table: templates have new lines and bars."""
    return str(value).replace("\n", "\\n").replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"

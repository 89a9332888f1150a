"""The command that compares finished runs: `launch/compare.py RUN [RUN ...]`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_prune.config import AS_LINES, Config
from scale_prune.study.rows import CONDITIONS, LOWER_IS_BETTER, PERPLEXITY, PLAIN, FinishedRun, Row, ratio_of
from scale_prune.system import RECIPE, REPORT, is_set_aside, json_text, markdown_table

UNSAID = {"bos": "never", "rounds": 0, "repair": "none"}
"""What held in runs from before there was the setting."""


def find(paths: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Find the reports of runs, each once.

    Args:
        paths: folders of runs, or folders with runs anywhere below.

    Returns:
        the reports, and the folders of runs below the paths that have none yet.

    Raises:
        ValueError: a path does not exist, is not a folder or has no report in it.
    """
    reports: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}; give folders of runs")
        found = [path / REPORT] if (path / REPORT).is_file() else _below(path, REPORT)
        if not found:
            raise ValueError(_no_report(path))
        reports |= {report.resolve(): report for report in found}
        begun = [recipe.parent for recipe in _below(path, RECIPE) if not (recipe.parent / REPORT).is_file()]
        unfinished |= {run.resolve(): run for run in begun}
    return list(reports.values()), list(unfinished.values())


def _below(path: Path, name: str) -> list[Path]:
    """Return the files of a name below a folder, but not those of runs that wait to be replaced."""
    found = sorted(path.rglob(name))
    return [file for file in found if not any(map(is_set_aside, file.parent.relative_to(path).parts))]


def read(path: Path, metric: str = PERPLEXITY) -> FinishedRun:
    """Read a report.

    Args:
        path: a report.json.
        metric: the number that quality is.

    Raises:
        ValueError: it is not JSON, lacks a key or the metric, or has something else than a number where one must be.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    settings = _value(path, report, "settings", dict)
    for name in ("criterion", "seed", "model", "block_size"):
        _value(path, report, f"settings.{name}", object)
    if size := (report.get("ds_config") or {}).get("train_batch_size"):  # by the ranks, where none was asked for
        settings = settings | {"train_batch_size": size}
    validation = str(report.get("validation") or settings.get("validation_file") or settings.get("dataset"))
    as_they_were = {"rows": "lines" if AS_LINES in validation else "documents"}  # whatever they were taken for by
    return FinishedRun(
        folder=path.parent,
        settings=Config().flat() | UNSAID | settings | as_they_were,
        validation=validation,
        target=_number(path, report, "remaining.target"),
        measured=_number(path, report, "remaining.measured"),
        metric=metric,
        quality=_quality(path, report, metric, "exported"),
        dense=_quality(path, report, metric, "dense"),
        parameters=_number(path, report, "parameters.pruned"),
        seconds=_number(path, report, "seconds.total"),
    )


def check_same(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs whose quality does not compare.

    Raises:
        ValueError: two of them differ in the model or the data; both and their values are named.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in CONDITIONS:
            values = first.settings[name], run.settings[name]
            if values[0] != values[1]:
                raise ValueError(
                    f"{first.folder} and {run.folder} differ in {name}, {values[0]} and {values[1]}; their "
                    f"{first.metric} does not compare, --any puts them into one table nevertheless"
                )


def as_table(rows: Sequence[Row], unfinished: Sequence[Path]) -> str:
    """Lay the rows out as a Markdown table, and say below what its numbers mean."""
    plain = any(row.is_plain for row in rows)
    ratio = f"ratio to {PLAIN if plain else 'dense'}"
    columns = ["method", "remaining", "runs", rows[0].runs[0].metric, ratio, "parameters", "seconds"]
    lines = markdown_table(columns, (_cells(row, rows) for row in rows))
    return "\n".join([*lines, "", *_notes(rows, unfinished, plain)]) + "\n"


def as_json(rows: Sequence[Row], unfinished: Sequence[Path]) -> str:
    """Return the rows as JSON; what is not finite or not known is null."""
    found = {
        "metric": rows[0].runs[0].metric,
        "reference": PLAIN if any(row.is_plain for row in rows) else "dense",
        "rows": [_as_dict(row, rows) for row in rows],
        "unfinished": [str(folder) for folder in unfinished],
    }
    return json_text(found)


def _no_report(path: Path) -> str:
    if (path / RECIPE).is_file():
        return f"{path} is a run that is not finished, it has no {REPORT}; `launch/prune.py --resume` goes on with it"
    begun = next((recipe.parent for recipe in sorted(path.rglob(RECIPE))), None)
    return f"{path} has no {REPORT} in it, nor below" + (f"; the run in {begun} is not finished" if begun else "")


def _value(path: Path, report: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return what stands under a dotted name."""
    value = report
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{path} is not the report of a run: it lacks {name}")
        value = value[part]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
        raise ValueError(f"{path} is not the report of a run: {name} is {json.dumps(value)[:40]}")
    return value


def _number(path: Path, report: Any, name: str) -> float:
    return float(_value(path, report, name, (int, float)))


def _quality(path: Path, report: Any, metric: str, stage: str) -> float:
    """Return a number by which models are compared; a perplexity is null where it is not finite."""
    measured = report.get("metrics", {}).get(stage, {})
    if metric != PERPLEXITY:
        if metric not in measured:
            raise ValueError(f"--metric {metric}: {path} has {', '.join([PERPLEXITY, *measured])}")
        return _number(path, report, f"metrics.{stage}.{metric}")
    value = _value(path, report, f"perplexity.{stage}", (int, float, type(None)))
    if value is None and "loss" in measured:
        raise ValueError(f"{path} has no perplexity, give --metric with one of {', '.join(measured)}")
    return math.inf if value is None else float(value)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    ratio, quality = ratio_of(row, rows), row.spread("quality")
    return [
        row.method,
        f"{row.mean('measured'):.1%}",
        str(len(row.runs)),
        f"{quality.mean:,.2f}" + ("" if quality.std is None else f" ± {quality.std:.2f}"),
        "" if ratio is None else f"{ratio:.3f}",
        f"{row.mean('parameters'):,.0f}",
        f"{row.mean('seconds'):,.0f}",
    ]


def _notes(rows: Sequence[Row], unfinished: Sequence[Path], plain: bool) -> list[str]:
    runs = [run for row in rows for run in row.runs]
    first, metric = runs[0].settings, runs[0].metric
    lines = [
        f"{metric.capitalize()} is that of the exported model, loaded again, "
        f"{'lower' if metric in LOWER_IS_BETTER else 'higher'} is better; "
        + ("± is the sample standard deviation over seeds." if _has_std(rows) else "one seed each, so no deviation."),
        "The reference is plain fine-tuning, the runs with remaining 1.0 (the best of them, where they differ)."
        if plain
        else "The reference is the dense model before training: there is no run with remaining 1.0.",
    ]
    if len({run.conditions for run in runs}) == 1:
        lines.append(
            f"Model {first['model']}, validation text {runs[0].validation}, blocks of {first['block_size']} tokens; "
            f"dense before training {runs[0].dense:,.2f}."
        )
    else:
        lines.append("The runs differ in model or data: quality compares only where these are the same.")
    if any(len(row.runs) > len({run.settings["seed"] for run in row.runs}) for row in rows):
        lines.append("Runs of the same method and seed count as one, their mean.")
    if unfinished:
        lines.append(f"Left out, because they are not finished: {', '.join(map(str, unfinished))}.")
    return lines


def _has_std(rows: Sequence[Row]) -> bool:
    return any(row.spread("quality").std is not None for row in rows)


def _as_dict(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    metric = row.runs[0].metric
    keys = {"measured": "measured", metric: "quality"} | {key: key for key in ("dense", "parameters", "seconds")}
    spreads = {name: row.spread(key) for name, key in keys.items()}
    return {
        "method": row.method,
        "remaining": row.runs[0].target,
        "seeds": sorted({run.settings["seed"] for run in row.runs}),
        "runs": [str(run.folder) for run in row.runs],
        "ratio": ratio_of(row, rows),
        **{key: {"mean": found.mean, "std": found.std} for key, found in spreads.items()},
    }

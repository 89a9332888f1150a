"""From the reports of runs to the rows of a table: one for each method and remaining fraction, over all seeds.

A method is a criterion, a scope and whatever other settings differ between the runs; its label names only what differs.
Fine-tuning with all neurons is a method of its own, whatever criterion it was given.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scale_prune.config import FOLLOWS, IGNORED, MUST_AGREE, PruningConfig, settings_where
from scale_prune.study.naming import differing, short

PLAIN = "plain fine-tuning"
CONDITIONS = settings_where("compared", MUST_AGREE)
PERPLEXITY = "perplexity"
LOWER_IS_BETTER = (PERPLEXITY, "loss")

NO_METHOD = frozenset(settings_where("compared", IGNORED))
FOLLOWING = frozenset(settings_where("compared", FOLLOWS))
PARTS = frozenset(
    {"micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "generation_batch_size"}
)
"""How a batch is cut up, which changes no result where its size is given."""

PRUNING = frozenset(spec.name for spec in fields(PruningConfig)) | FOLLOWING


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a report says.

    Attributes:
        folder: the run's folder.
        settings: all settings by their flags' names.
        validation: what the validation text is, in words.
        target: fraction of the neurons, or of the targets' parameters, that was to be kept.
        measured: that fraction, as it was kept.
        metric: name of the number that the models' quality is compared by.
        quality: that number of the exported model; a perplexity is infinite where the report has null.
        dense: that number of the dense model before training.
        parameters: of the pruned model.
        seconds: of the whole run.
    """

    folder: Path
    settings: dict[str, Any]
    validation: str
    target: float
    measured: float
    metric: str
    quality: float
    dense: float
    parameters: float
    seconds: float

    @property
    def conditions(self) -> tuple[Any, ...]:
        """The model and the data."""
        return tuple(self.settings[name] for name in CONDITIONS)

    @property
    def is_plain(self) -> bool:
        """Whether all neurons stay."""
        return self.target == 1.0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation over seeds; no deviation where there is one seed or a value is infinite."""

    mean: float
    std: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one method at one remaining fraction."""

    method: str
    runs: tuple[FinishedRun, ...]

    def spread(self, key: str) -> Spread:
        """Return mean and sample standard deviation (n - 1) over seeds; runs of one seed count as their mean.

        Args:
            key: a number's name in `FinishedRun`.
        """
        by_seed = defaultdict(list)
        for run in self.runs:
            by_seed[run.settings["seed"]].append(getattr(run, key))
        return spread([mean(values) for values in by_seed.values()])

    def mean(self, key: str) -> float:
        """Return the mean over seeds of a number's name in `FinishedRun`."""
        return self.spread(key).mean

    @property
    def conditions(self) -> tuple[Any, ...]:
        """The model and the data."""
        return self.runs[0].conditions

    @property
    def is_plain(self) -> bool:
        """Whether all neurons stay."""
        return self.runs[0].is_plain


def badness(row: Row) -> float:
    """Return a row's mean quality with the sign by which less is better."""
    value = row.mean("quality")
    return value if row.runs[0].metric in LOWER_IS_BETTER else -value


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation (n - 1) of numbers, at least one."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(mean=mean(values), std=stdev(values) if known else None)


def rows_of(runs: Sequence[FinishedRun]) -> list[Row]:
    """Return the rows, the largest models first, then the best."""
    found = defaultdict(list)
    for run, method in zip(runs, labels(runs), strict=True):
        found[method, run.target].append(run)
    rows = [Row(method=method, runs=tuple(of_method)) for (method, _), of_method in found.items()]
    return sorted(rows, key=lambda row: (-row.runs[0].target, badness(row), row.method))


def labels(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the name of each run's method: criterion, then the settings that tell the methods apart."""
    settings = [_of_any_target(_of_any_seed(run.settings)) for run in runs]
    unnamed = NO_METHOD | FOLLOWING | (PARTS if all(each.get("train_batch_size") for each in settings) else set())
    named = [name for name in differing(settings) if name not in unnamed]
    named.sort(key=lambda name: name != "scope")
    texts = {name: short(each.get(name) for each in settings) for name in {*named, *FOLLOWING}}
    found = []
    for run, each in zip(runs, settings, strict=True):
        names = [name for name in (*named, *_own(run, runs)) if name != "criterion"]
        own = [name for name in names if not (run.is_plain and name in PRUNING)]
        described = [
            _with_value(name, texts[name][each.get(name)])
            for name in own
            if (name, each.get(name)) != ("teacher", None)
        ]
        found.append(", ".join([PLAIN if run.is_plain else run.settings["criterion"], *described]))
    return found


def _of_any_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that name one teacher where each seed has its own, in a folder named after the seed."""
    if not (teacher := settings.get("teacher")):
        return settings
    return settings | {"teacher": re.sub(rf"(seed\D?){settings['seed']}\b", r"\1*", teacher).removesuffix("/pruned")}


def _of_any_target(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that say only whether a size was chosen by time: to how much, a run's target says."""
    return settings | ({"latency_target": "given"} if settings.get("latency_target") is not None else {})


def reference_of(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the quality that a row is compared with.

    Returns:
        that of the best plain fine-tuning of the same model on the same data; where no run at all kept all neurons,
        that of the dense model before training; None where the others did and this model's did not.
    """
    plain = [other for other in rows if other.is_plain]
    if not plain:
        return row.mean("dense")
    best = min((other for other in plain if other.conditions == row.conditions), key=badness, default=None)
    return None if best is None else best.mean("quality")


def ratio_of(row: Row, rows: Sequence[Row]) -> float | None:
    """Return a row's quality as a multiple of its reference; None where either is unknown or infinite."""
    reference, own = reference_of(row, rows), row.mean("quality")
    return own / reference if reference and math.isfinite(reference) and math.isfinite(own) else None


def _own(run: FinishedRun, runs: Sequence[FinishedRun]) -> list[str]:
    """Return the settings that usually follow from criterion and scope, and differ between runs that share both."""
    kind = [run.settings.get("criterion"), run.settings.get("scope")]
    alike = [other.settings for other in runs if [other.settings.get(n) for n in ("criterion", "scope")] == kind]
    return [name for name in differing(alike) if name in FOLLOWING]


def _with_value(name: str, text: str) -> str:
    return text if name == "scope" else f"{name} {text}"

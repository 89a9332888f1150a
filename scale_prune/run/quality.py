"""How good a run's model is at each stage: what was measured, kept for the report and for going on after a kill."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale_prune.run.monitor import Monitor
from scale_prune.system import Seconds, write_atomically
from scale_prune.tasks import Measured, Task

THOROUGH = ("dense", "masked", "exported", "reference")
"""Stages at which text is generated; at the others only what is cheap is measured."""

GENERATIONS = "generations.jsonl"

OF_PRODUCTS = 0.03
"""How far apart perplexities may be where factors are multiplied out in 16 bits; rounding alone has made 2 %."""


class Quality:
    """What was measured of a run's model.

    Args:
        task: what it is measured by.
        monitor: where it is written to as it is known.
        seconds: where the time of it is added, as "evaluation".
    """

    def __init__(self, task: Task, monitor: Monitor, seconds: Seconds) -> None:
        self.task, self.monitor, self.seconds = task, monitor, seconds
        self.stages: dict[str, Measured] = {}

    def measure(self, engine: Any, step: int, stage: str | None = None) -> Measured:
        """Measure an engine's model after a step; it is kept where the stage of the run has a name. A collective."""
        with self.seconds.measure("evaluation"):
            measured = self.task.measure(engine, thorough=stage in THOROUGH)
        self.keep(measured, step, stage)
        return measured

    def keep(self, measured: Measured, step: int, stage: str | None) -> None:
        """Keep what was measured after a step, where the stage has a name, and show it."""
        if stage is not None:
            self.stages[stage] = measured
        perplexity = {} if measured.perplexity is None else {"perplexity": measured.perplexity}
        numbers = perplexity | measured.metrics
        if stage != "reference":  # another model, which is no point of this one's curve
            self.monitor.scalars(step, {f"validation/{name}": value for name, value in numbers.items()})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        self.monitor.say(f"step {step}: validation {shown}{f' ({stage})' if stage else ''}")

    def check_exported(self, folder: Path, *, rounded: bool) -> None:
        """See that the model that was exported and loaded again is the one that it was written from.

        Args:
            folder: where it is.
            rounded: products of factors were rounded to 16 bits, which what lies between the factors was before.

        Raises:
            RuntimeError: it is not.
        """
        before = self.stages.get("recovered") or self.stages["compacted"]
        expected, found = before.checked, self.stages["exported"].checked
        masked, compacted = self.stages["masked"].checked, self.stages["compacted"].checked
        # Removal changed the order of sums, and so does padding; a model that is cut to pieces tells it by percents.
        rounding = abs(masked - compacted) / max(compacted, 1e-5)
        allowed = max(OF_PRODUCTS if rounded else 1e-3, min(2 * rounding, 0.1))  # what is farther apart is no rounding
        alike = math.isclose(expected, found, rel_tol=allowed, abs_tol=1e-5)
        if not alike and not (math.isnan(expected) and math.isnan(found)):
            name = "loss" if self.stages["exported"].perplexity is None else "perplexity"
            raise RuntimeError(f"the model in {folder} has {name} {found}, the one it was written from {expected}")

    @property
    def perplexities(self) -> dict[str, float | None]:
        """The perplexity at each stage."""
        return {stage: found.perplexity for stage, found in self.stages.items()}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The other metrics at each stage that has any."""
        return {stage: found.metrics for stage, found in self.stages.items() if found.metrics}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "perplexities": self.perplexities,
            "metrics": self.metrics,
            "generated": {stage: found.generated for stage, found in self.stages.items() if found.generated},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        metrics, generated = state.get("metrics", {}), state.get("generated", {})
        for stage, perplexity in state["perplexities"].items():
            found = Measured(perplexity=perplexity, metrics=metrics.get(stage, {}), generated=generated.get(stage, []))
            self.stages[stage] = found

    def write_generations(self, folder: Path) -> None:
        """Write some prompts with references and completions, one a line, where the task has such."""
        generated = {stage: found.generated for stage, found in self.stages.items() if found.generated}
        if generated:
            lines = [json.dumps(sample, ensure_ascii=False) for sample in self.task.samples(generated)]
            write_atomically(folder / GENERATIONS, "\n".join(lines) + "\n")

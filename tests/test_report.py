"""The report: strict JSON, and a table that people can read."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_prune.run.figure import _over_steps as draw_over_steps
from scale_prune.run.figure import draw, stairs
from scale_prune.run.monitor import Monitor
from scale_prune.run.quality import Quality
from scale_prune.run.report import as_markdown, tenths, write_report
from scale_prune.system import Seconds
from scale_prune.tasks import Measured


def report(exported: float) -> dict[str, Any]:
    return {
        "model": "a-model",
        "criterion": "gum",
        "layout": "pad",
        "remaining": {"target": 0.5, "measured": 0.497, "gates": 0.46},
        "unit": "component",
        "embedding": [{"tokens": 30, "components_after": 7}, {"tokens": 3000, "components_after": 5}],
        "step_seconds": [2.0, 1.5],
        "widths": [7, 5],
        "parameters": {"dense": 2000, "pruned": 1000, "stored": 1100},
        "perplexity": {"recovered": None, "dense": 20.0, "masked": 25.0, "compacted": 25.0, "exported": exported},
        "history": [{"step": 10, "stage": "exported", "perplexity": exported, "remaining": 0.5}],
        "seconds": {"total": 61.0},
        "steps": 10,
        "tokens": 1280,
        "world_size": 2,
        "peak_memory_bytes": [2**30, 2**31],
        "settings": {"seed": 0, "dataset": None, "prompt_template": "{a}\n{b} | c"},
        "versions": {"python": "3"},
        "date": "2026-11-26T12:00:00+00:00",
        "host": {"processor": "A CPU", "cores": 2, "memory_bytes": 2**34, "accelerator": None},
        "commit": "abc1234",
        "command": "deepspeed launch/prune.py --remaining 0.5",
    }


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize(("exported", "written"), [(25.0, 25.0), (math.inf, None), (math.nan, None)])
def test_the_report_is_strict_json(tmp_path: Path, exported: float, written: float | None) -> None:
    write_report(tmp_path, report(exported))
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["perplexity"] == report(exported)["perplexity"] | {"exported": written}
    assert read["history"] == [report(exported)["history"][0] | {"perplexity": written}]
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


def test_metrics_stand_beside_the_perplexity_or_in_its_place(tmp_path: Path) -> None:
    none = dict.fromkeys(("dense", "masked", "compacted", "exported"))
    metrics = {"dense": {"accuracy": 80.0, "loss": 0.5}, "exported": {"accuracy": 60.0, "loss": math.nan}}
    write_report(tmp_path, report(25.0) | {"perplexity": none, "metrics": metrics})
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["metrics"]["exported"] == {"accuracy": 60.0, "loss": None}
    text = (tmp_path / "report.md").read_text()
    assert "| accuracy | 80.000 | 60.000 | 0.750 |" in text
    assert "perplexity" not in text.lower()
    assert "| accuracy | 80.000 |" in as_markdown(report(25.0) | {"metrics": metrics})


def test_the_table_has_the_ratios_and_no_setting_without_a_value() -> None:
    text = as_markdown(report(25.0))
    assert "| parameters | 2,000 | 1,000 | 0.500 |" in text
    assert "| parameters in the file | 2,000 | 1,100 | 0.550 |" in text
    assert "| validation perplexity | 20.000 | 25.000 | 1.250 |" in text
    assert "| seed | 0 |" in text
    assert "| prompt_template | {a}\\n{b} \\| c |" in text
    assert "dataset" not in text
    assert "49.7% of the factorized weights' parameters" in text
    assert "| tokens | components after |" in text
    assert "| 3,000 | 5 |" in text
    assert "measured 49.70% (by gates 46.00%)" in text
    assert "by tenths of the run: 2.00, 1.50." in text


def test_the_report_says_what_is_compared_and_where_it_was_made() -> None:
    text = as_markdown(report(25.0))
    assert "Dense is a-model as it was loaded, before any fine-tuning" in text
    assert "10 steps of training on 1,280 tokens" in text
    assert "beside a dense model after the same steps: `--reference`" in text
    assert "2026-11-26T12:00:00+00:00, A CPU, 2 cores, 16 GiB. Commit abc1234." in text
    referred = report(25.0) | {"settings": {"reference": "plain"}}
    referred["perplexity"] |= {"reference": 12.5}
    assert "| validation perplexity | 12.500 | 25.000 | 2.000 |" in as_markdown(referred)
    without = as_markdown(report(25.0) | {"steps": 0})
    assert "pruning alone, without training, made" in without
    assert "--reference" not in without


def test_tenths_are_means_of_consecutive_parts() -> None:
    assert tenths([]) == []
    assert tenths([3.0, 1.0]) == [3.0, 1.0]
    assert tenths([float(step) for step in range(40)]) == [1.5 + 4 * part for part in range(10)]


@pytest.mark.parametrize(
    ("masked", "compacted", "exported", "rounded", "agrees"),
    [
        (20.0, 20.0, 20.01, False, True),
        (20.0, 20.0, 20.1, False, False),
        (20.0, 20.0, 20.1, True, True),
        (20.0, 20.0, 21.0, True, False),
        (20.0, 20.01, 20.1, False, False),
        (55985.5, 57214.4, 56907.4, False, True),  # cut to half without repair, in bf16, padded
        (55985.5, 57214.4, 60907.4, False, False),
        (math.nan, math.nan, math.nan, False, True),
        (20.0, 20.0, math.nan, False, False),
        (20.0, 30.0, 35.0, False, False),  # however far apart masked and compacted are
    ],
)
def test_another_model_than_the_one_that_was_written_is_an_error(
    masked: float, compacted: float, exported: float, rounded: bool, agrees: bool
) -> None:
    nothing: Any = None
    quality = Quality(nothing, nothing, Seconds())
    found = {"masked": masked, "compacted": compacted, "exported": exported}
    quality.stages = {stage: Measured(perplexity=each) for stage, each in found.items()}
    if agrees:
        quality.check_exported(Path("pruned"), rounded=rounded)
    else:
        with pytest.raises(RuntimeError, match="perplexity"):
            quality.check_exported(Path("pruned"), rounded=rounded)


def test_what_leaves_in_rounds_is_drawn_as_stairs(tmp_path: Path) -> None:
    measured = [(0, 1.0, 30.0), (8, 0.5, 40.0), (10, 0.5, 35.0)]
    history = [{"step": step, "remaining": left, "perplexity": found} for step, left, found in measured]
    rounds = [{"step": step, "remaining": left} for step, left in ((4, 0.75), (8, 0.5))]
    drawn = report(21.0) | {"history": history, "rounds": rounds}
    assert stairs(drawn) == ([0, 4, 8, 8, 10], [100, 75, 50, 50, 50])
    draw(tmp_path, drawn)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_a_task_without_perplexity_is_drawn_by_its_loss() -> None:
    history = [
        {"step": step, "remaining": 1.0, "perplexity": None, "metrics": {"loss": loss}}
        for step, loss in ((0, 0.7), (4, 0.5))
    ]
    axes: Any = Figure().subplots()
    draw_over_steps(axes, report(21.0) | {"history": history, "rounds": []})
    assert axes.get_ylabel() == "validation loss"
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.7], [4, 0.5]]


def test_what_was_measured_of_another_model_is_no_point_of_the_curve(tmp_path: Path) -> None:
    monitor, nothing = Monitor(tmp_path, total_steps=1, active=True), cast(Any, None)
    quality = Quality(nothing, monitor, Seconds())
    for stage, perplexity in (("exported", 20.0), ("reference", 15.0)):
        quality.keep(Measured(perplexity=perplexity), 4, stage)
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("validation/perplexity")] == [20.0]
    assert quality.perplexities == {"exported": 20.0, "reference": 15.0}

"""The comparison of finished runs: numbers computed by hand, names of methods, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import errors_of
from outcomes import outcome_of

from scale_prune.commands.compare import main
from scale_prune.config.settings import AS_LINES, Config
from scale_prune.study.comparison import UNSAID, as_table, check_same, find, read
from scale_prune.study.rows import PLAIN, FinishedRun, labels, ratio_of, rows_of, spread

BASE = {"model": "/models/tiny", "train_file": "/text/train.txt", "validation_file": "/text/validation.txt"}


def report(perplexity: float | None, **settings: Any) -> dict[str, Any]:
    """Return the report of a run, as far as it is compared."""
    given: dict[str, Any] = {"criterion": "gum", "scope": "global", "remaining": 0.5} | BASE | settings
    remaining = given["remaining"]
    return {
        "settings": {**Config().flat(), **given},
        "remaining": {"target": remaining, "measured": remaining},
        "perplexity": {"dense": 20.0, "exported": perplexity},
        "parameters": {"dense": 1000, "pruned": int(1000 * remaining), "stored": 1000},
        "seconds": {"total": 60.0},
    }


def write(folder: Path, contents: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return folder


def runs(tmp_path: Path, *reports: dict[str, Any]) -> list[FinishedRun]:
    return [read(write(tmp_path / f"run{i}", each) / "report.json") for i, each in enumerate(reports)]


outcome = partial(outcome_of, main)


def test_mean_and_deviation_are_those_of_a_sample() -> None:
    assert (spread([10.0, 14.0]).mean, spread([10.0, 14.0]).std) == (12.0, pytest.approx(8**0.5))
    assert (spread([2.0, 4.0, 9.0]).mean, spread([2.0, 4.0, 9.0]).std) == (5.0, pytest.approx(13**0.5))
    assert spread([7.0]).std is None
    assert (spread([7.0, float("inf")]).mean, spread([7.0, float("inf")]).std) == (float("inf"), None)


def test_rows_are_methods_and_fractions_over_seeds(tmp_path: Path) -> None:
    found = rows_of(
        runs(
            tmp_path,
            *(report(value, seed=seed) for seed, value in enumerate((30.0, 33.0, 36.0))),
            *(report(value, seed=seed, criterion="random", remaining=1.0) for seed, value in enumerate((14.0, 16.0))),
            report(50.0, remaining=0.25),
        )
    )
    assert [(row.method, row.runs[0].target, len(row.runs)) for row in found] == [
        (PLAIN, 1.0, 2),
        ("gum", 0.5, 3),
        ("gum", 0.25, 1),
    ]
    perplexity = found[1].spread("quality")
    assert (perplexity.mean, perplexity.std) == (33.0, 3.0)
    assert [ratio_of(row, found) for row in found] == [1.0, 33.0 / 15.0, 50.0 / 15.0]


def test_batches_of_other_sizes_are_other_methods_and_a_resumed_run_is_not(tmp_path: Path) -> None:
    small, large = ({"ds_config": {"train_batch_size": size}} for size in (16, 32))
    resumed = report(33.0, seed=1, train_batch_size=16) | small
    found = rows_of(runs(tmp_path, report(30.0) | small, resumed, report(36.0, seed=2) | large))
    assert {row.method: len(row.runs) for row in found} == {
        "gum, train_batch_size 16": 2,
        "gum, train_batch_size 32": 1,
    }


def test_runs_of_the_same_seed_count_once(tmp_path: Path) -> None:
    twice = [report(value, remaining=1.0, criterion=name) for name, value in (("gum", 10.0), ("random", 12.0))]
    (row,) = rows_of(runs(tmp_path, *twice, report(15.0, remaining=1.0, seed=1)))
    perplexity = row.spread("quality")
    assert (perplexity.mean, perplexity.std) == (13.0, pytest.approx(8**0.5))


def test_a_run_that_waits_to_be_replaced_does_not_count(tmp_path: Path) -> None:
    for name in ("run", "run.replaced-0a1b2c3d"):
        write(tmp_path / name, report(30.0))
    assert [path.parent.name for path in find([str(tmp_path)])[0]] == ["run"]
    (given,) = find([str(tmp_path / "run.replaced-0a1b2c3d")])[0]
    assert given.parent.name == "run.replaced-0a1b2c3d"


def test_without_plain_fine_tuning_the_dense_model_is_the_reference(tmp_path: Path) -> None:
    found = rows_of(runs(tmp_path, report(30.0), report(40.0, criterion="movement")))
    assert [ratio_of(row, found) for row in found] == [1.5, 2.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{}, {"seed": 1}, {"output_dir": "other", "log_every": 3, "remaining": 0.25}], ["gum"] * 3),
        (
            [{"criterion": "movement"}, {"criterion": "movement", "scope": "per_group"}, {}],
            ["movement, global", "movement, per_group", "gum, global"],
        ),
        ([{}, {"learning_rate": 1e-4}], ["gum, learning_rate 0.0005", "gum, learning_rate 0.0001"]),
        ([{"remaining": 0.7}, {"latency_target": 0.7}], ["gum, latency_target none", "gum, latency_target given"]),
        ([{"regularization": 1.0}, {"criterion": "random", "layout": "pad"}], ["gum", "random"]),
        (
            [{"regularization": 1.0}, {"regularization": 0.1}, {"criterion": "random"}],
            ["gum, regularization 1", "gum, regularization 0.1", "random"],
        ),
        (
            [{"train_batch_size": 8, "micro_batch_size": 1}, {"train_batch_size": 8, "gradient_checkpointing": True}],
            ["gum"] * 2,
        ),
        ([{"micro_batch_size": 1}, {"micro_batch_size": 2}], ["gum, micro_batch_size 1", "gum, micro_batch_size 2"]),
        ([{"teacher": "/a/big"}, {"teacher": None}], ["gum, teacher big", "gum"]),
        (
            [{"teacher": f"/a/plain-seed{seed}/pruned", "seed": seed} for seed in (1, 12)],
            ["gum"] * 2,
        ),
        (
            [{"teacher": "/a/plain-seed1/pruned", "seed": seed} for seed in (1, 2)],
            ["gum, teacher plain-seed*", "gum, teacher plain-seed1"],
        ),
        ([{"teacher": "/a/big"}, {"teacher": "/b/big"}], ["gum, teacher /a/big", "gum, teacher /b/big"]),
        (
            [{"remaining": 1.0, "scope": "per_group", "max_steps": 5}, {"remaining": 1.0, "criterion": "random"}],
            [f"{PLAIN}, max_steps 5", f"{PLAIN}, max_steps 300"],
        ),
    ],
)
def test_a_label_names_what_differs(settings: list[dict[str, Any]], expected: list[str], tmp_path: Path) -> None:
    assert labels(runs(tmp_path, *(report(30.0, **each) for each in settings))) == expected


def test_a_run_from_before_there_was_a_setting_is_of_the_same_method(tmp_path: Path) -> None:
    old = report(30.0)
    for name in UNSAID:
        del old["settings"][name]
    assert labels(runs(tmp_path, old, report(31.0, **UNSAID))) == ["gum", "gum"]


def test_validation_text_that_was_held_out_is_named(tmp_path: Path) -> None:
    rows = rows_of(runs(tmp_path, report(30.0, validation_file=None) | {"validation": "a twentieth of train.txt"}))
    assert "validation text a twentieth of train.txt, blocks of 128 tokens" in as_table(rows, [])


def test_the_command_leaves_a_table_numbers_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs(tmp_path / "all", report(30.0), report(34.0, seed=1), report(None, criterion="random"))
    write(tmp_path / "plain", report(15.0, remaining=1.0))
    other = write(tmp_path / "other", report(31.0, criterion="movement"))
    (tmp_path / "all" / "half").mkdir()
    (tmp_path / "all" / "half" / "recipe.yaml").touch()
    output = tmp_path / "output"
    assert outcome(tmp_path / "all", tmp_path / "plain", other, tmp_path / "plain", "--output_dir", output)[0] == 0
    assert {path.name for path in output.iterdir()} == {"table.md", "comparison.json", "quality.png", "quality.svg"}
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| gum | 50.0% | 2 | 32.00 ± 2.83 | 2.133 | 500 | 60 |" in table
    assert "| movement | 50.0% | 1 | 31.00 | 2.067 | 500 | 60 |" in table
    assert "| random | 50.0% | 1 | inf |  | 500 | 60 |" in table
    assert f"not finished: {tmp_path / 'all' / 'half'}." in table
    found = json.loads((output / "comparison.json").read_text())
    assert found["reference"] == PLAIN
    assert [row["perplexity"]["mean"] for row in found["rows"]] == [15.0, 31.0, 32.0, None]
    assert found["rows"][2]["seeds"] == [0, 1]
    drawing = (output / "quality.svg").read_text()
    texts = ("gum", "movement", "plain fine-tuning (15.00)", "% of the neurons, or of the targets' parameters")
    assert all(f"<!-- {text}" in drawing for text in texts)


def lacks(folder: Path) -> list[Path]:
    contents = report(30.0)
    del contents["perplexity"]["exported"]
    return [write(folder / "run", contents)]


def unfinished(folder: Path) -> list[Path]:
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").touch()
    return [folder / "run"]


def two(folder: Path, **settings: Any) -> list[Path]:
    return [write(folder / "one", report(30.0)), write(folder / "two", report(30.0, **settings))]


def old_and(folder: Path, **settings: Any) -> list[Path]:
    """Return a run from before there was a setting for BOS, and one of now."""
    old = report(30.0)
    del old["settings"]["bos"]
    return [write(folder / "old", old), write(folder / "two", report(30.0, **settings))]


def other_rows(folder: Path) -> list[Path]:
    """Return a run whose text was read as documents, as all were, whatever it is told now, and one of lines."""
    documents = write(folder / "one", report(30.0, rows="auto"))
    return [documents, write(folder / "two", report(30.0) | {"validation": f"validation.jsonl, {AS_LINES}"})]


BAD: list[tuple[Callable[[Path], list[Path]], str]] = [
    (lambda folder: [folder / "nowhere"], "nowhere does not exist; give folders of runs"),
    (lambda folder: [write(folder / "run", "{}") / "report.json"], "report.json is not a folder; give folders of runs"),
    (lambda folder: [folder], "has no report.json in it, nor below"),
    (unfinished, "run is a run that is not finished, it has no report.json"),
    (lambda folder: [*unfinished(folder), folder][1:], "run is not finished"),
    (lambda folder: [write(folder / "run", "{")], "report.json is not valid JSON: Expecting property name"),
    (lambda folder: [write(folder / "run", "[]")], "is not the report of a run: it lacks settings"),
    (lacks, "is not the report of a run: it lacks perplexity.exported"),
    (
        lambda folder: [write(folder / "run", report(30.0) | {"seconds": {"total": "long"}})],
        'seconds.total is "long"',
    ),
    (lambda folder: two(folder, block_size=64), "two differ in block_size, 128 and 64; their"),
    (lambda folder: two(folder, model="/m"), "two differ in model, /models/tiny and /m; their"),
    (lambda folder: two(folder, eval_tokens=9), "two differ in eval_tokens, 0 and 9; their"),
    (other_rows, "two differ in rows, documents and lines; their"),
    (lambda folder: old_and(folder, bos="always"), "two differ in bos, never and always; their"),
    (lambda folder: two(folder, validation_file="v"), "differ in validation_file, /text/validation.txt and v; their"),
]


@pytest.mark.parametrize(("make", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_what_cannot_be_compared_is_one_message(
    make: Callable[[Path], list[Path]], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    code, stderr = outcome(*make(tmp_path / "runs"), "--output_dir", tmp_path / "output")
    assert code == 2
    (error,) = errors_of(stderr)
    assert expected in error
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_rows_were_taken_for_by_makes_no_difference(tmp_path: Path) -> None:
    check_same(runs(tmp_path, report(30.0), report(30.0, rows="documents"), report(30.0, rows="lines")))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    run = write(tmp_path / "run", report(30.0))
    code, stderr = outcome(run, "--output_dir", run)
    assert (code, len(errors_of(stderr))) == (2, 1)
    assert "holds something; give a new or empty folder" in stderr
    assert [path.name for path in run.iterdir()] == ["report.json"]


def test_any_metric_of_the_reports_can_be_compared(tmp_path: Path) -> None:
    def measured(value: float, **settings: Any) -> dict[str, Any]:
        return report(30.0, **settings) | {"metrics": {"dense": {"bleu": 60.0}, "exported": {"bleu": value}}}

    reports = [
        measured(50.0, remaining=1.0),
        measured(20.0),
        measured(30.0, seed=1),
        measured(40.0, criterion="random"),
    ]
    for index, each in enumerate(reports):
        write(tmp_path / "runs" / f"run{index}", each)
    output = tmp_path / "output"
    assert outcome(tmp_path / "runs", "--metric", "bleu", "--output_dir", output)[0] == 0
    table = (output / "table.md").read_text()
    assert table.index("| random | 50.0% | 1 | 40.00 | 0.800 |") < table.index(
        "| gum | 50.0% | 2 | 25.00 ± 7.07 | 0.500 |"
    )
    assert "Bleu is that of the exported model, loaded again, higher is better" in table
    found = json.loads((output / "comparison.json").read_text())
    assert (found["metric"], found["rows"][1]["bleu"]["mean"]) == ("bleu", 40.0)
    assert "validation bleu (higher is better)" in (output / "quality.svg").read_text()


def test_a_metric_that_a_report_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    run = write(tmp_path / "run", report(30.0) | {"metrics": {"exported": {"accuracy": 90.0}}})
    code, stderr = outcome(run, "--metric", "bleu", "--output_dir", tmp_path / "output")
    assert (code, errors_of(stderr)) == (2, [f"error: --metric bleu: {run / 'report.json'} has perplexity, accuracy"])
    run = write(tmp_path / "other", report(None) | {"metrics": {"exported": {"loss": 1.0, "accuracy": 90.0}}})
    code, stderr = outcome(run, "--output_dir", tmp_path / "output")
    assert "has no perplexity, give --metric with one of loss, accuracy" in errors_of(stderr)[0]


def test_any_tells_models_apart(tmp_path: Path) -> None:
    paths = [*two(tmp_path, model="/models/big"), write(tmp_path / "plain", report(10.0, remaining=1.0))]
    assert outcome(*paths, "--any", "--output_dir", tmp_path / "output")[0] == 0
    rows = json.loads((tmp_path / "output" / "comparison.json").read_text())["rows"]
    assert {row["method"]: row["ratio"] for row in rows} == {
        f"{PLAIN}, model tiny": 1.0,
        "gum, model tiny": 3.0,
        "gum, model big": None,
    }


def test_the_command_needs_neither_torch_nor_deepspeed() -> None:
    heavy = {"torch", "deepspeed", "transformers"}
    code = f"import scale_prune.commands.compare, sys; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

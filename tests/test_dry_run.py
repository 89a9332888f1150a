"""The check before the queue: everything that is wrong at once, figures without weights, nothing written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import STEPS, arguments, errors_of, outcome, text
from models import LAYERS, WIDTH, own_registrations, tiny_config
from test_end_to_end import BAD, content, files
from test_families import BLOOM
from transformers import AutoConfig, AutoTokenizer

from scale_prune.commands import analyze, evaluate
from scale_prune.config import Config
from scale_prune.core.schedule import Schedule
from scale_prune.data.embedded import train_tokenizer
from scale_prune.models.families import register
from scale_prune.preflight import fill_in, timing, unused_settings


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, and a model that has a config and a tokenizer but no weights."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "train.txt").write_text(text(200, seed=0))
    (folder / "validation.txt").write_text(text(20, seed=1))
    tokenizer = train_tokenizer([text(200, seed=0)], 300)
    tokenizer.save_pretrained(folder / "model")
    tiny_config("gpt_neo", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    return folder


def dry(work: Path, **settings: Any) -> tuple[int, list[str]]:
    """Return the exit code and the errors of a dry run whose output folder does not exist."""
    code, stderr = outcome(["--dry_run", *arguments(work, work / "never", **settings)])
    assert "Traceback" not in stderr
    return code, errors_of(stderr)


def rows(printed: str, header: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with `header`, below its rule."""
    lines = printed.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(header))
    table = [line.strip("| ").split(" | ") for line in lines[start + 2 :]]
    return table[: next((place for place, cells in enumerate(table) if cells == [""]), len(table))]


def test_a_run_that_can_start_is_described(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(work)
    code, errors = dry(work, criterion="gum", remaining=0.4, world_size=2)
    printed = capsys.readouterr().out
    assert (code, errors) == (0, [])
    assert f"groups: {LAYERS}, of {WIDTH} neurons; {LAYERS * WIDTH} neurons in all" in printed
    assert "batch: 4 blocks = 2 in a forward pass x 1 accumulated x 2 ranks; 64 tokens a step" in printed
    for table in ("| memory of a rank, host |", "| bytes that a rank receives in a step |", "| disk |"):
        assert rows(printed, table)
    assert content(work) == before
    assert not (work / "never").exists()


def test_the_table_of_rounds_has_the_steps_at_which_units_leave(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(work, criterion="kfac", max_steps=50, remaining=0.4, rounds=3) == (0, [])
    steps = [int(cells[0]) for cells in rows(capsys.readouterr().out, "| step")]
    assert steps == [1, *Schedule(total_steps=50, target=0.4, rounds=3).removal_steps, 50]


def test_the_table_is_the_schedule(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(work, criterion="gum", remaining=0.4, max_steps=50) == (0, [])
    schedule = Schedule(total_steps=50, target=0.4)
    table = rows(capsys.readouterr().out, "| step |")
    steps = [int(cells[0]) for cells in table]
    assert {1, schedule.warmup_steps, schedule.last_descent_step, 50} <= set(steps)
    assert [cells[1] for cells in table] == [f"{schedule.remaining(step):.4f}" for step in steps]
    assert [int(cells[2]) for cells in table] == [
        int(schedule.remaining(step) * LAYERS * WIDTH + 1e-6) for step in steps
    ]


def test_more_ranks_take_less_each(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(work, ds_config="zero3", world_size=4, precision="bf16") == (0, [])
    printed = capsys.readouterr().out
    assert "| memory of a rank, GPU |" in printed
    assert "on each of 4 ranks" in printed


@pytest.mark.parametrize("targets", ["mlp", "mlp,attention,embedding"])
def test_the_memory_of_components_is_known(targets: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(work, criterion="flop", targets=targets, remaining=0.4, max_steps=50, recovery_steps=10) == (0, [])
    printed = capsys.readouterr().out
    assert rows(printed, "| memory of a rank, host |")
    assert "steps: 35 with pruning, 25 after" in printed
    assert "memory is not known" not in printed


def test_what_removes_nothing_trains_under_any_criterion(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for criterion in ("ddp", "random"):
        assert dry(work, criterion=criterion, remaining=1.0, world_size=2) == (0, [])
        assert {"master", "optimizer"} <= {name for name, *_ in rows(capsys.readouterr().out, "| memory of a rank")}


def test_how_little_memory_a_round_can_do_with_is_said(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ranks, budget, said in ((1, "uniform", True), (LAYERS, "uniform", False), (1, "measured", False)):
        settings = {"criterion": "obs", "max_steps": 0, "budget": budget}
        assert dry(work, **settings, world_size=ranks, train_batch_size=4 * ranks) == (0, [])
        printed = capsys.readouterr().out
        assert (f"the text is read up to {LAYERS} times" in printed) == said
        assert ("keeps one of its Gram matrices at a time" in printed) == said


@pytest.mark.parametrize("settings", [{"criterion": "kfac", "rounds": 2}, {"criterion": "ddp", "recovery_steps": 5}])
def test_the_time_follows_from_measured_passes(
    settings: dict[str, Any], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulation = {"train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert dry(work, measure=True, world_size=2, **accumulation, **settings) == (0, [])
    printed = capsys.readouterr().out
    forward, both = map(float, re.findall(r": ([\d.e-]+) s a forward pass, ([\d.e-]+) s with", printed)[0])
    assert forward > 0
    seconds = {name: float(spent) for name, spent in rows(printed, "| what takes time |")}
    *parts, whole = seconds.values()
    assert whole == pytest.approx(sum(parts), abs=0.05 * len(seconds))
    of_dense = forward * (settings["criterion"] == "ddp")
    assert seconds[f"{STEPS} steps with pruning"] == pytest.approx(STEPS * 2 * (both + of_dense), abs=0.06, rel=0.01)
    assert ("2 rounds, calibration, passes" in seconds) == ("rounds" in settings)
    assert ("repair, calibration, passes" in seconds) == (settings["criterion"] == "ddp")
    assert ("5 steps after" in seconds) == ("recovery_steps" in settings)
    assert ("gates: all are open to learn until step" in printed) == (settings["criterion"] == "ddp")


@pytest.mark.parametrize(
    ("criterion", "more", "part", "forwards"),
    [
        ("obs", {}, "calibration", 1),
        ("kfac", {}, "calibration", 0),
        ("fisher", {}, "gradients", 0),
        ("fisher", {"recovery_steps": 5}, "gradients", 0),
    ],
)
def test_the_time_of_a_round_is_that_of_its_passes(
    criterion: str,
    more: dict[str, Any],
    part: str,
    forwards: int,
    work: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"criterion": criterion, "max_steps": 0, "calibration_tokens": 64 * 500, **more}
    assert dry(work, measure=True, world_size=2, **settings) == (0, [])
    printed = capsys.readouterr().out
    forward, both = map(float, re.findall(r": ([\d.e-]+) s a forward pass, ([\d.e-]+) s with", printed)[0])
    seconds = {name: float(spent) for name, spent in rows(printed, "| what takes time |")}
    a_pass = forwards * forward + (criterion != "obs") * both
    assert seconds[f"1 rounds, {part}, passes"] == pytest.approx(500 * a_pass, abs=0.06, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "part", "forwards"),
    [
        ({"criterion": "gum"}, "repair", 0),
        ({"criterion": "magnitude", "rounds": 2, "repair": "none"}, "2 rounds", 0),
        ({"criterion": "magnitude", "rounds": 0, "repair": "least_squares"}, "repair", 3),
        ({"criterion": "factorize", "factors": "whitened"}, "factors", 1),
    ],
)
def test_the_calibration_text_takes_time_where_it_is_read(
    settings: dict[str, Any], part: str, forwards: int, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(work, measure=True, world_size=2, calibration_tokens=64 * 500, **settings) == (0, [])
    printed = capsys.readouterr().out
    forward = float(re.findall(r": ([\d.e-]+) s a forward pass", printed)[0])
    seconds = {name: float(spent) for name, spent in rows(printed, "| what takes time |")}
    (found,) = [spent for name, spent in seconds.items() if "calibration, passes" in name] or [0.0]
    assert found == pytest.approx(500 * forwards * forward, abs=0.06, rel=0.01)
    assert (f"{part}, calibration, passes" in seconds) == (forwards > 0)


def test_a_model_too_large_to_measure_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "own_device", lambda: (torch.device("cpu"), 1000))
    code, (error,) = dry(work, measure=True)
    assert code == 2
    assert "--measure makes one pass of the whole model, 0.0 GiB with its activations; cpu has 0.0 free" in error


def test_what_nothing_uses_is_said(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"gate_l1": 0.5, "min_kept": 2, "score_learning_rate": 0.01, "distill_alpha": 0.3, "num_beams": 2}
    assert dry(work, criterion="movement", **settings) == (0, [])
    said = "nothing uses --min_kept 2, --gate_l1 0.5, --distill_alpha 0.3, --num_beams 2 in this run, of --criterion"
    assert said in capsys.readouterr().out
    labeled = Config.from_flat({"task": "classification", "eval_tokens": 9})
    assert unused_settings(fill_in(labeled)).startswith("nothing uses --eval_tokens 9 in this run")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"criterion": "sensitivity", "rounds": 0}, ["calibration_tokens", "repair_damping"]),
        ({"criterion": "sensitivity", "rounds": 0, "repair": "mean"}, ["repair_damping"]),
        ({"criterion": "sensitivity", "rounds": 2, "repair": "none"}, ["calibration_tokens", "repair_damping"]),
        ({"criterion": "sensitivity", "rounds": 2}, []),
        ({"criterion": "sensitivity", "repair": "none", "max_steps": 0}, ["repair_damping"]),
        ({"criterion": "flap", "rounds": 2, "repair": "none"}, ["repair_damping"]),
        ({"criterion": "obs", "repair": "none"}, []),
        ({"criterion": "factorize", "factors": "whitened"}, []),
        ({"criterion": "factorize"}, ["calibration_tokens", "repair_damping"]),
        ({"remaining": 1.0}, []),
    ],
    ids=str,
)
def test_calibration_that_nothing_needs_is_named(settings: dict[str, Any], named: list[str]) -> None:
    given = {"model": "m", "calibration_tokens": 9999, "repair_damping": 0.5}
    said = unused_settings(fill_in(Config.from_flat(given | settings)))
    assert [name for name in ("calibration_tokens", "repair_damping") if f"--{name} " in said] == named


def test_every_bad_input_is_found(work: Path) -> None:
    paths = files(work) | {"bad": work / "bad"}
    for settings, expected in BAD:
        named = {name: paths.get(str(value), value) for name, value in settings.items()}
        code, errors = dry(work, world_size=2, **named)
        assert code == 2
        assert [error for error in errors if expected in error], (expected, errors)
    assert not (work / "never").exists()


def test_all_that_is_wrong_is_listed_at_once(work: Path) -> None:
    paths = files(work)
    code, errors = dry(
        work,
        remaining=1.5,
        max_steps="ten",
        remainin=0.5,
        criterion="sparsity",
        model="nowhere",
        ds_config=paths["stage2.json"],
        train_file=paths["empty.txt"],
        validation_file=paths["columns.jsonl"],
        output_dir=work / "bad",
    )
    expected = [
        "unknown flag --remainin, did you mean --remaining?",
        "--max_steps ten is not valid",
        "--remaining 1.5 is out of range",
        "--criterion sparsity is unknown",
        "holds something that is not a run",
        "--model nowhere: its model cannot be read",
        "--model nowhere: its tokenizer cannot be read",
        '"zero_optimization.stage": 2',
        "empty.txt cannot be read: it is empty",
        "has no column 'text'",
    ]
    assert code == 2
    assert len(errors) == len(expected)
    for piece in expected:
        assert [error for error in errors if piece in error], piece


def test_mistakes_that_a_run_would_meet_late_are_found(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"train_file": files(work)["short.txt"], "max_steps": 5, "update_every": 10, "world_size": 60}
    code, errors = dry(work, train_batch_size=60, **short)
    assert code == 2
    for piece in ("short.txt has ", "chooses masks only once", "60 ranks are more than the 51 units"):
        assert [error for error in errors if piece in error], piece
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    code, (error,) = dry(work, save_every=2)
    assert code == 2
    assert "is on a disk with 1,000 B free, the run needs" in error


def test_layers_dropped_by_chance_are_refused_on_more_than_one_rank(work: Path, tmp_path: Path) -> None:
    model = shutil.copytree(work / "model", tmp_path / "opt")
    tiny_config("opt", vocab_size=300, layerdrop=0.25).save_pretrained(model)
    assert dry(work, model=model, world_size=1) == (0, [])
    code, (error,) = dry(work, model=model, world_size=2)
    assert code == 2
    assert "drops layers by chance (layerdrop 0.25), other ones on every rank" in error


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma3", "give a folder of that part alone, of model type gemma3_text"),
        ("mistral3", "of model type mistral"),
        ("qwen3_5", "of model type qwen3_5_text, a family that has to be registered first"),
        ("bloom", "neurons cannot be pruned"),
    ],
)
def test_models_that_cannot_be_pruned_are_one_message(work: Path, model_type: str, message: str) -> None:
    folder = Path(shutil.copytree(work / "model", work / model_type))
    with own_registrations():
        register(BLOOM)
        config = tiny_config("bloom", vocab_size=300) if model_type == "bloom" else AutoConfig.for_model(model_type)
        config.save_pretrained(folder)
        code, (error,) = dry(work, model=folder)
    assert code == 2
    assert message in error


def with_config(work: Path, name: str, config: Any, **told: Any) -> Path:
    """Return a model's folder with the tokenizer of `work`, and more in its config.json."""
    folder = Path(shutil.copytree(work / "model", work / name))
    (folder / "config.json").write_text(json.dumps(config.to_dict() | told))
    return folder


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_quantised_weights_are_refused_in_one_message(method: str, work: Path, capsys: Any) -> None:
    config = AutoConfig.from_pretrained(work / "model")
    model = with_config(work, method, config, quantization_config={"quant_method": method})
    for flag in ("model", "teacher"):
        code, (error,) = dry(work, **{flag: model})
        assert code == 2
        assert f"--{flag} {model} has weights quantized by {method}, which can be neither" in error
        assert error.endswith("give the 16-bit model that they were made from")
    for command in (evaluate, analyze):
        with pytest.raises(SystemExit):
            command.main(["--model", str(model), "--dataset", str(work / "train.txt"), "--block_size", "16"])
        assert f"has weights quantized by {method}" in errors_of(capsys.readouterr().err)[0]


def test_tokens_beyond_the_embedding_are_found_where_the_text_has_them(work: Path) -> None:
    config = AutoConfig.from_pretrained(work / "model")
    size = config.vocab_size
    code, errors = dry(work, model=with_config(work, "small", config, vocab_size=size // 2))
    assert code == 2
    assert "text has the token" in errors[0]
    assert f"knows {size // 2}; the tokenizer is of another model" in errors[0]
    larger = with_config(work, "larger", config)  # a token that no text has is no mistake
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["<never>"])
    tokenizer.save_pretrained(larger)
    assert dry(work, model=larger) == (0, [])


def test_a_mistake_in_the_settings_is_not_the_only_one_that_is_found(work: Path) -> None:
    """What they leave to the criterion is known all the same."""
    code, errors = dry(work, criterion="auto", rounds=500, block_size=500)
    assert code == 2
    assert len(errors) == 2, errors


def test_another_model_has_the_positions_that_it_is_asked_for(work: Path) -> None:
    short = with_config(work, "short", AutoConfig.from_pretrained(work / "model"), max_position_embeddings=20)
    rows = "mr,ref\n" + "".join(f"{word},{word}\n" for word in ("keeps", "drops"))
    (work / "rows.csv").write_text(rows)
    tables = {"train_file": work / "rows.csv", "validation_file": work / "rows.csv", "max_new_tokens": 8}
    for flag in ("teacher", "reference"):
        code, (error,) = dry(work, **{flag: short}, block_size=21)
        assert code == 2
        assert f"--block_size 21 is more than the 20 positions of --{flag} {short}" in error
    assert dry(work, **tables, task="data_to_text", reference=short, block_size=20) == (0, [])
    code, (error,) = dry(work, **tables | {"max_new_tokens": 14}, task="data_to_text", reference=short, block_size=20)
    assert f"is more than the 20 positions of {short}; give at most" in error


def test_labels_are_held_against_the_classes_of_the_model(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer.pad_token = tokenizer.eos_token
    size, labels = len(tokenizer), {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    told = labels | {"architectures": ["BertForSequenceClassification"]}
    made = {
        "single": with_config(work, "single", tiny_config("bert", vocab_size=size), **told),
        "multi": with_config(
            work, "multi", tiny_config("bert", vocab_size=size), problem_type="multi_label_classification", **told
        ),
        "regression": with_config(
            work, "number", tiny_config("bert", vocab_size=size), **told, problem_type="regression"
        ),
        "few": with_config(work, "few", tiny_config("bert", vocab_size=20), **told),
        "swapped": with_config(
            work, "swapped", tiny_config("bert", vocab_size=size), **told | {"id2label": {"0": "b", "1": "a"}}
        ),
        "encoder": with_config(work, "encoder", tiny_config("bert", vocab_size=size), architectures=["BertModel"]),
        "nowhere": work / "nowhere",
    }
    for name in made.keys() - {"nowhere"}:
        tokenizer.save_pretrained(made[name])
    for name, labels_there in {"good": "ab", "bad": "ac", "one": "aa", "whole": "13"}.items():
        rows = "".join(f"the model learns,{labels_there[row % 2]}\n" for row in range(40))
        (work / f"{name}.csv").write_text(f"text,label\n{rows}")
    other = "is no classifier of the 2 classes of the data"
    for model, file, reference, piece in [
        ("single", "good", "single", ""),
        ("single", "one", None, ""),
        ("multi", "good", None, ""),
        ("regression", "whole", "regression", ""),
        ("single", "bad", None, "has the unknown label 'c', known are a, b,"),
        ("regression", "good", None, "has the label 'a', which is no number, in column 'label'"),
        ("few", "good", None, "knows 20; the tokenizer is of another model"),
        ("single", "good", "swapped", f"--reference {made['swapped']} {other}"),
        ("single", "good", "encoder", f"--reference {made['encoder']} {other}"),
        ("encoder", "good", "regression", f"--reference {made['regression']} {other}"),
        ("regression", "whole", "single", f"--reference {made['single']} is no predictor of the numbers of the data"),
        ("single", "good", "nowhere", f"--reference {made['nowhere']}"),
    ]:
        files = dict.fromkeys(("train_file", "validation_file"), work / f"{file}.csv")
        compared = {"reference": made[reference]} if reference else {}
        code, errors = dry(work, model=made[model], task="classification", **files, **compared)
        assert (code, len(errors) > 0) == ((2, True) if piece else (0, False)), errors
        assert all(piece in error for error in errors)
        assert reference == "nowhere" or len(errors) < 2


def test_a_checkpoint_that_is_none_is_found(work: Path) -> None:
    code, errors = dry(work, resume=work / "nowhere", remaining=2)
    assert code == 2
    assert len(errors) == 2
    assert "nowhere is not a whole checkpoint" in errors[1]


def test_without_a_model_the_embedded_one_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(["--dry_run", "--max_steps", str(STEPS)]) == (0, "")
    assert "groups: 4, of 768 neurons; 3,072 neurons in all" in capsys.readouterr().out
    code, stderr = outcome(["--dry_run", "--max_steps", str(STEPS), "--validation_file", "nowhere.txt"])
    assert (code, errors_of(stderr)) == (2, ["error: data set nowhere.txt is missing: there is no such file"])
    assert not list(tmp_path.iterdir())


def test_one_rank_speaks(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dry(work) == (0, [])
    assert dry(work, train_batch_size=3) == (2, [])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert dry(work) == (0, [])
    assert "x 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--world_size", "8"], "--world_size belongs to --dry_run"),
        (["--dry_run", "--world_size", "0"], "--world_size 0 is not valid, it must be a whole number, at least 1"),
        (["--dry_run", "--world_size", "many"], "--world_size many is not valid"),
        (["--dry_run", "--world_size"], "--world_size: expected one argument"),
        (["--measure"], "--measure belongs to --dry_run"),
    ],
)
def test_a_flag_of_the_dry_run_that_is_wrong_is_one_sentence(flags: list[str], expected: str) -> None:
    code, stderr = outcome(flags)
    assert code == 2
    (error,) = errors_of(stderr)
    assert expected in error

"""Labelled texts and encoders, by the command itself: learnt, measured, pruned in every layout, loaded again."""

import csv
import hashlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from command import SENTENCE, arguments, errors_of, outcome, outcomes, report_of
from distributed import run_ranks
from models import tiny_config, tiny_model
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from scale_prune.commands import evaluate
from scale_prune.data.embedded import train_tokenizer
from scale_prune.data.rows import Text, say
from scale_prune.data.tokens import Pieces, Tokens
from scale_prune.tasks.classification import Labeled
from scale_prune.tasks.label_metrics import measured
from scale_prune.tasks.labels import Labels, of_rows

pytestmark = pytest.mark.distributed

CLASSES = ("fast", "layer", "neuron")
TASK = {
    "task": "classification",
    "prompt_template": "{sentence}",
    "block_size": 28,
    "learning_rate": 0.01,
    "remaining": 0.4,
    "max_steps": 9,
    "train_batch_size": 6,
}


def write_rows(path: Path, count: int, seed: int) -> None:
    """Write texts that begin with the name of their class, and a number that follows from it."""
    rng, words = random.Random(seed), SENTENCE.split()
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sentence", "label", "number"])
        for _ in range(count):
            name = rng.choice(CLASSES)
            text = " ".join([name] * 3 + rng.choices(words, k=rng.randint(0, 5)))
            table.writerow([text, name, CLASSES.index(name) + rng.random() / 2])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and with encoders that are no classifiers yet."""
    work = tmp_path_factory.mktemp("work")
    write_rows(work / "train.csv", 60, seed=0)
    write_rows(work / "validation.csv", 31, seed=1)
    tokenizer = train_tokenizer([SENTENCE] * 9, 300)
    tokenizer.pad_token = tokenizer.eos_token
    for model_type in ("bert", "roberta"):
        tokenizer.save_pretrained(work / model_type)
        without: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = tiny_config(model_type, vocab_size=len(tokenizer), num_labels=2, pad_token_id=0, **without)
        encoder = AutoModel.from_config(config)
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        encoder.save_pretrained(work / model_type)
    return work


def flags(work: Path, output: Path, model: str = "bert", **settings: Any) -> list[str]:
    files = {"train_file": work / "train.csv", "validation_file": work / "validation.csv", "model": work / model}
    return arguments(work, output, **files | TASK | settings)


def predicted(folder: Path, rows: Path, column: str) -> tuple[Tensor, list[str]]:
    """Return a plain model's outputs, one text at a time without padding, and the labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with rows.open(newline="") as file:
        table = list(csv.DictReader(file))
    with torch.no_grad():
        outputs = [model(**tokenizer(row["sentence"], return_tensors="pt")).logits[0] for row in table]
    return torch.stack(outputs), [row[column] for row in table]


LAYOUTS = [
    ("bert", "gum", {"layout": "per_layer"}),
    ("roberta", "random", {"scope": "per_group"}),
    ("bert", "flop", {"targets": "mlp,attention,embedding"}),
]
MORE_LAYOUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("roberta", "movement", {"layout": "pad", "scope": "global"}),
    ("roberta", "neuron_l0", {}),
    ("bert", "magnitude", {}),
]


@pytest.mark.parametrize(
    ("model", "criterion", "more"),
    [
        *LAYOUTS,
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_LAYOUTS),
    ],
    ids=[criterion for _, criterion, _ in LAYOUTS + MORE_LAYOUTS],
)
def test_a_pruned_classifier_is_measured_as_anyone_can(
    model: str, criterion: str, more: dict[str, Any], work: Path
) -> None:
    output = work / criterion
    assert [code for code, _ in run_ranks(outcome, 2, flags(work, output, model, criterion=criterion, **more))] == [
        0,
        0,
    ]
    report = report_of(output)
    assert (report["task"], set(report["perplexity"].values())) == ("classification", {None})
    assert report["validation"] == str(work / "validation.csv")
    found = report["metrics"]
    settles = criterion in ("flop", "neuron_l0")  # then what remains is trained on after compaction
    stages = {"dense", "masked", "compacted", "exported"} | ({"recovered"} if settles else set())
    assert set(found) == stages | ({"factorized"} if criterion == "flop" else set())
    first = report["history"][0]
    assert (first["stage"], first["remaining"]) == ("dense", 1.0)
    assert found["compacted"] == pytest.approx({name: found["masked"][name] for name in found["compacted"]}, rel=1e-4)
    trained = found["recovered"] if settles else found["masked"]
    assert found["exported"] == pytest.approx(trained, rel=1e-4)
    assert found["exported"]["accuracy"] > found["dense"]["accuracy"]
    logits, names = predicted(output / "pruned", work / "validation.csv", "label")
    config = json.loads((output / "pruned" / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(CLASSES)}
    guessed = [CLASSES[index] for index in logits.argmax(-1).tolist()]
    assert found["exported"]["accuracy"] == pytest.approx(100 * accuracy_score(names, guessed))
    assert "AutoModelForSequenceClassification" in (output / "pruned" / "README.md").read_text()
    assert sum(report["widths"]) == sum(int(0.4 * 17) for _ in range(3)) if more.get("scope") == "per_group" else True


def test_numbers_are_predicted_by_rank_correlation_and_evaluate_agrees(work: Path) -> None:
    output, result = work / "numbers", work / "evaluation.json"
    assert run_ranks(outcome, 1, flags(work, output, criterion="sensitivity", label_column="number"))[0][0] == 0
    found = report_of(output)["metrics"]["exported"]
    assert list(found) == ["loss", "spearman"]
    values, numbers = predicted(output / "pruned", work / "validation.csv", "number")
    assert found["spearman"] == pytest.approx(100 * spearmanr(values[:, 0], list(map(float, numbers))).statistic)
    words = ["--model", output / "pruned", "--task", "classification", "--prompt_template", "{sentence}"]
    words += ["--label_column", "number", "--validation_file", work / "validation.csv", "--block_size", 28]
    words += ["--trust_remote_code", "--output", result]
    run_ranks(evaluate.main, 2, list(map(str, words)))
    again = json.loads(result.read_text())["models"]["numbers"]
    assert again.pop("perplexity") is None
    assert again == pytest.approx(found, rel=1e-4)


def test_ranks_do_not_matter_and_a_classifier_teaches_itself_and_goes_on(work: Path) -> None:
    settings: dict[str, Any] = {"criterion": "movement", "save_every": 5}
    assert run_ranks(outcome, 1, flags(work, work / "one", **settings, max_steps=10))[0][0] == 0
    assert run_ranks(outcome, 2, flags(work, work / "two", **settings, max_steps=10))[0][0] == 0
    assert (work / "one" / "kept.json").read_bytes() == (work / "two" / "kept.json").read_bytes()
    one, two = (report_of(work / name)["metrics"]["exported"]["loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)
    resumed = flags(work, work / "three", **settings, max_steps=10, resume=work / "two/checkpoints/step-00000005")
    assert run_ranks(outcome, 2, resumed)[0][0] == 0
    assert report_of(work / "three")["metrics"] == report_of(work / "two")["metrics"]
    taught = flags(work, work / "taught", model="one/pruned", teacher="self", trust_remote_code=True, max_steps=4)
    assert run_ranks(outcome, 1, taught)[0][0] == 0
    dense = report_of(work / "taught")["metrics"]["dense"]
    assert dense == pytest.approx(report_of(work / "one")["metrics"]["exported"], rel=1e-5)


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_are_those_of_their_packages(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(41, classes, generator=generator), torch.arange(41) % classes
    guessed, found = logits.argmax(-1), measured(logits, labels)
    assert found["loss"] == pytest.approx(float(-logits.log_softmax(-1)[torch.arange(41), labels].mean()))
    assert found["accuracy"] == 100 * accuracy_score(labels, guessed)
    assert found["macro_f1"] == 100 * f1_score(labels, guessed, average="macro")
    assert found["matthews"] == 100 * matthews_corrcoef(labels, guessed)
    assert measured(torch.ones(41, 1), labels.float())["spearman"] == 0.0


def labelled(values: list[Any], names: list[str] | None = None) -> Text:
    rows = datasets.Dataset.from_dict({"label": values})
    rows = rows.cast_column("label", datasets.ClassLabel(names=names)) if names else rows
    return Text(name="rows", rows=rows, columns=(), label="label")


NAMES = ["neg", "pos"]
LABELS: list[tuple[list[Any], list[str] | None, tuple[str, ...] | None, tuple[str, ...], list[Any], str]] = [
    (["b", "a ", " b", None], None, None, ("a", "b"), [1, 0, 1], "has labels with blanks around, as ' b'"),
    (["yes ", "yes"], None, ("yes", "yes "), ("yes", "yes "), [1, 0], ""),
    (["Yes", "yes", "no"], None, None, ("Yes", "no", "yes"), [0, 2, 1], "differ in case alone: Yes, yes"),
    ([10, 2, 10], None, None, ("2", "10"), [1, 0, 1], ""),
    ([-1, 1], None, None, ("-1", "1"), [0, 1], ""),
    ([-1, 0, 1], None, ("-1", "0", "1"), ("-1", "0", "1"), [0, 1, 2], ""),
    ([1.0, 0.0, None], None, None, ("0", "1"), [1, 0], "has 0.0 and 1.0 only: these are two classes"),
    ([1.0, 0.0], None, (), (), [1.0, 0.0], ""),
    ([1.0, 3.0, 2.0], None, None, (), [1.0, 3.0, 2.0], "are predicted as numbers; write 1, not 1.0, to have classes"),
    ([2.0, 0.0, 1.0], None, ("0", "1", "2"), ("0", "1", "2"), [2, 0, 1], ""),
    ([1.5, 1.0], None, None, (), [1.5, 1.0], ""),
    ([1, 0, 1], NAMES, None, ("neg", "pos"), [1, 0, 1], ""),
    ([1, 0, 1], NAMES, ("0", "1"), ("0", "1"), [1, 0, 1], ""),
    ([1, 0, 1], NAMES, ("pos", "neg", "none"), ("pos", "neg", "none"), [0, 1, 0], ""),
    ([1, 0, 2], ["1", "2", "3"], ("0", "1", "2"), ("0", "1", "2"), [1, 0, 2], ""),
]


@pytest.mark.parametrize(("values", "names", "own", "classes", "encoded", "told"), LABELS)
def test_labels_are_the_classes_that_people_mean(
    values: list[Any],
    names: list[str] | None,
    own: tuple[str, ...] | None,
    classes: tuple[str, ...],
    encoded: list[Any],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    say.cache_clear()
    caplog.set_level(logging.WARNING, logger="scale_prune.data.rows")  # an earlier rank 1 in this process was quiet
    labels = of_rows(labelled(values, names)) if own is None else Labels(own)
    assert labels.classes == classes
    text = labelled([value for value in values if value is not None], names)
    assert labels.encode(text).tolist() == encoded
    messages = " ".join(record.message for record in caplog.records)
    assert told in messages
    assert bool(told) == bool(messages)
    if None in values:
        with pytest.raises(ValueError, match=rf"row {len(values)} of rows has no label in column 'label'"):
            labels.encode(labelled(values, names))


@pytest.mark.distributed
@pytest.mark.parametrize("asked", [640, 40_000])
def test_the_tokens_of_short_texts_are_counted_and_each_is_read_once(asked: int, work: Path) -> None:
    settings = {"criterion": "obs", "max_steps": 0, "recovery_steps": 1, "calibration_tokens": asked}
    assert run_ranks(outcome, 1, flags(work, work / f"short-{asked}", "bert", **settings))[0][0] == 0
    found = report_of(work / f"short-{asked}")["rounds"][0]["calibration_tokens"]
    with (work / "train.csv").open(newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    there = sum(map(len, AutoTokenizer.from_pretrained(work / "bert")(texts)["input_ids"]))
    assert 0 < found < 640 if asked == 640 else found == there


def test_a_row_is_held_against_what_the_model_predicts_whatever_the_others_are() -> None:
    assert Labels(()).encode(labelled([1, 3, 3])).tolist() == [1.0, 3.0, 3.0]
    assert Labels(("a", "b")).encode(labelled(["b", "b"])).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"row 3 of rows has the unknown label 0\.5, known are 0, 1, in column"):
        Labels(("0", "1")).encode(labelled([0.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="row 1 of rows has the label 'a', which is no number, in column 'label'"):
        Labels(()).encode(labelled(["a", "b"]))
    with pytest.raises(ValueError, match=r"row 3 of rows has the label 'x', which is no number, in column 'label'"):
        Labels(()).encode(labelled(["3.5", "1", "x"]))  # as a csv file has them


def test_a_model_may_have_the_numbers_of_the_data_sets_names() -> None:
    named, numbered, swapped = Labels(("neg", "pos")), Labels(("0", "1")), Labels(("pos", "neg"))
    assert named.agrees(numbered, labelled([0, 1], NAMES))
    assert numbered.agrees(named, labelled([0, 1], NAMES))
    assert not named.agrees(numbered, labelled([0, 1]))
    assert not named.agrees(swapped, labelled([0, 1], NAMES))
    assert not named.agrees(None, labelled([0, 1], NAMES))


def test_a_fingerprint_is_that_of_earlier_checkpoints() -> None:
    texts = [torch.tensor([3, 1, 2], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)]
    tokens = Tokens(torch.cat(texts).numpy(), np.array([3, 1], dtype=np.int32))
    data = Labeled(texts=Pieces(tokens, np.arange(2)), labels=torch.tensor([1, 0]), padding=0, dropped=0)
    whole = b"".join(
        np.array(part, dtype).tobytes() for part, dtype in (([3, 1], "q"), ([3, 1, 2, 5], "i"), ([1, 0], "q"))
    )
    assert data.fingerprint() == hashlib.sha256(whole).hexdigest()


# --- bad input -----------------------------------------------------------------------------------------------------


def write_bad(work: Path) -> None:
    rows = {
        "no_label.csv": ["a,fast", "b,", "c,layer"],
        "one_class.csv": ["a,fast", "b,fast"],
        "unknown.csv": ["a,fast", "b,slow"],
    }
    for name, lines in rows.items():
        (work / name).write_text("\n".join(["sentence,label", *lines]) + "\n")
    (work / "unquoted.csv").write_text("sentence,label\na,fast\nb, c,layer\n")
    numbers = [{"sentence": "a", "label": number} for number in (0, -1, 1, 2)]
    (work / "minus_one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    lists = [{"sentence": "a", "label": ["x"]}, {"sentence": "b", "label": ["y"]}]
    (work / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"label_column": "intent"}, "has no column 'intent', its columns are sentence, label, number"),
    ({"train_file": "lists.jsonl"}, "holds list of string, not a label (string or number)"),
    (
        {"train_file": "unquoted.csv"},
        "unquoted.csv cannot be read: row 2 has 3 fields, the header 2; a text with a comma",
    ),
    ({"validation_file": "unquoted.csv"}, "unquoted.csv cannot be read: row 2 has 3 fields, the header 2"),
    ({"train_file": "minus_one.jsonl"}, "minus_one.jsonl has the label -1 beside 0, 1, 2; if it says that there is no"),
    ({"task": "lm", "prompt_template": None}, "--task lm does not go with --model"),
    ({"completion_template": "{label}"}, "--completion_template belongs to a task with completions"),
    ({"model": "gpt"}, "--task classification does not go with --model"),
    (
        {"text_column": "sentence"},
        "--text_column sentence belongs to --task lm; --task classification reads the columns",
    ),
]
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"train_file": "no_label.csv"}, "row 2 of {}/no_label.csv has no label in column 'label'"),
    ({"train_file": "one_class.csv"}, "one_class.csv has the label fast only, at least 2 are needed"),
    (
        {"validation_file": "unknown.csv"},
        "row 2 of {}/unknown.csv has the unknown label 'slow', known are fast, layer, neuron, in column 'label'",
    ),
    ({"teacher": "self"}, "--teacher self is no classifier of the 3 classes of the data"),
    (
        {"criterion": "ddp"},
        "is no classifier yet, and --criterion ddp, before any weight is trained, would choose units by classes",
    ),
    (
        {"criterion": "kfac", "max_steps": 0, "recovery_steps": 3},
        "is no classifier yet, and --criterion kfac, before any weight is trained, would choose units by classes",
    ),
    (
        {"criterion": "magnitude", "budget": "measured", "max_steps": 0, "recovery_steps": 3},
        "is no classifier yet, and --budget measured, before any weight is trained, would choose units by classes",
    ),
    ({"criterion": "obs", "max_steps": 0}, "is no classifier, there is nothing to measure"),
]


def bad_flags(work: Path, settings: dict[str, Any]) -> list[str]:
    named = {k: work / v if k.endswith("_file") or k == "model" else v for k, v in settings.items()}
    words = flags(work, work / "never", **named)
    return [word for word in words if word not in ("--prompt_template", "None")] if None in named.values() else words


def test_bad_input_ends_in_one_message(work: Path) -> None:
    write_bad(work)
    tokenizer = AutoTokenizer.from_pretrained(work / "bert")
    tokenizer.save_pretrained(work / "gpt")
    tiny_model("gpt_neo", vocab_size=len(tokenizer)).save_pretrained(work / "gpt")
    found = run_ranks(outcomes, 1, [bad_flags(work, settings) for settings, _ in BAD])[0]
    for (_, expected), (code, stderr) in zip(BAD, found, strict=True):
        assert code == 2, expected
        assert expected in errors_of(stderr)[0]
    for settings, expected in BAD_ROWS:
        (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, bad_flags(work, settings))
        assert (code, other_code, errors_of(other_stderr)) == (2, 2, [])
        assert expected.format(work) in errors_of(stderr)[0]
    assert not (work / "never").exists()

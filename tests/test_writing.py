"""Tasks of completing prompts, by the command itself: learnt, generated, measured, pruned, exported, resumed."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from command import BATCH, SENTENCE, STEPS, arguments, errors_of, make_work, outcome, outcomes, report_of
from distributed import run_ranks
from models import tiny_model, tokens
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scale_prune.commands import evaluate
from scale_prune.config.settings import TaskConfig
from scale_prune.tasks.generation import complete, neutral
from scale_prune.tasks.metrics import bleu
from scale_prune.zero3 import Runtime
from scale_prune.zero3.loading import load_model
from scale_prune.zero3.rebuild import release
from scale_prune.zero3.runtime import inference_engine

pytestmark = pytest.mark.distributed

PROMPTS, NEW = 5, 6
TASK = {
    "task": "data_to_text",
    "prompt_template": "{mr}:",
    "block_size": 28,
    "eval_examples": PROMPTS,
    "max_new_tokens": NEW,
    "long_examples": "drop",
    "criterion": "movement",
    "remaining": 0.4,
    "learning_rate": 0.05,
}


HOSTILE: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1},
    {"forced_eos_token_id": 0, "exponential_decay_length_penalty": [1, 9.0]},
    {"suppress_tokens": [*range(1, 200)]},
    {"bad_words_ids": [[number] for number in range(1, 200)]},
    {"sequence_bias": [[[7], 1e4]]},
    {"do_sample": True, "temperature": 9.0, "min_new_tokens": 6},
)
"""What a checkpoint's generation_config may ask for, each of which changes what is written."""


def write_examples(path: Path, rows: int, seed: int) -> None:
    """Write prompts of 1 to 5 words, every other one twice, and completions that begin alike."""
    rng, words = random.Random(seed), SENTENCE.split()
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["mr", "other", "ref"])
        for number in range(rows):
            prompt = " ".join(rng.choices(words, k=rng.randint(1, 5)))
            for _ in range(1 + number % 2):
                table.writerow([prompt, "unused", " ".join(["a"] * 6 + rng.choices(words, k=rng.randint(0, 3)))])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = make_work(tmp_path_factory.mktemp("work"))
    write_examples(work / "train.csv", 60, seed=0)
    write_examples(work / "validation.csv", 20, seed=1)
    (work / "model" / "generation_config.json").write_text(json.dumps(HOSTILE[0] | {"eos_token_id": 0}))
    return work


def flags(work: Path, output: Path, **settings: Any) -> list[str]:
    files = {"train_file": work / "train.csv", "validation_file": work / "validation.csv"}
    return arguments(work, output, **files | TASK | settings)


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    """Return the output folder of a run on two ranks, which leaves a checkpoint."""
    ranks = run_ranks(outcome, 2, flags(work, work / "out", save_every=4, micro_batch_size=1))
    assert [code for code, _ in ranks] == [0, 0], ranks[0][1]
    return work / "out"


def alone(model: Any, tokenizer: Any, prompt: str, **more: Any) -> str:
    """Return what a plain model writes after one prompt, without any padding, and without a generation_config."""
    model.generation_config = GenerationConfig()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options | more)[0, ids.shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]


def test_what_two_ranks_generate_is_what_the_exported_folder_generates(finished: Path, work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "pruned")
    exported = AutoModelForCausalLM.from_pretrained(finished / "pruned", trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(work / "model")
    found, own = samples(finished), json.loads((work / "model" / "generation_config.json").read_text())
    assert own.items() <= json.loads((finished / "pruned" / "generation_config.json").read_text()).items()
    assert report_of(finished)["bos"] is False
    assert len({sample["prompt"] for sample in found}) == PROMPTS
    assert any(len(sample["references"]) > 1 for sample in found)
    for sample in found:
        assert sample["exported"] == sample["masked"] == alone(exported, tokenizer, sample["prompt"])
        assert sample["dense"] == alone(dense, tokenizer, sample["prompt"])


def test_the_report_has_the_metrics_of_what_was_generated(finished: Path) -> None:
    report, found = report_of(finished), samples(finished)
    assert report["task"] == "data_to_text"
    assert list(report["metrics"]) == ["dense", "masked", "exported"]
    references = [sample["references"] for sample in found]
    for stage, metrics in report["metrics"].items():
        assert list(metrics) == ["bleu", "rouge1", "rouge2", "rougeL", "chrf"]
        assert metrics["bleu"] == pytest.approx(bleu([sample[stage] for sample in found], references)["bleu"])
        assert f"{metrics['rougeL']:,.3f}" in (finished / "report.md").read_text() or stage == "masked"
    assert report["metrics"]["exported"]["rouge1"] > report["metrics"]["dense"]["rouge1"]
    perplexity = report["perplexity"]
    assert perplexity["masked"] == pytest.approx(perplexity["exported"], rel=1e-5)
    assert perplexity["exported"] < perplexity["dense"]
    assert 0 < report["tokens"] < STEPS * BATCH * 28
    assert 0 < report["dropped_examples"]["train"] < 30
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert events.Scalars("validation/rougeL")[0].value == pytest.approx(report["metrics"]["dense"]["rougeL"], rel=1e-5)


def test_the_number_of_ranks_and_the_cut_of_a_batch_do_not_matter(finished: Path, work: Path) -> None:
    """Completions have unequal numbers of tokens, so that a mean of means would come out otherwise."""
    assert run_ranks(outcome, 1, flags(work, work / "alone", micro_batch_size=BATCH))[0][0] == 0
    together, alone = report_of(finished), report_of(work / "alone")
    assert (work / "alone" / "kept.json").read_bytes() == (finished / "kept.json").read_bytes()
    assert together["perplexity"]["exported"] == pytest.approx(alone["perplexity"]["exported"], rel=1e-4)
    assert together["tokens"] == alone["tokens"]


def test_what_a_token_costs_does_not_depend_on_what_is_beside_it(work: Path) -> None:
    """Second order without training: rows of a pass are padded to the longest, and prompts are not predicted."""
    settings = {"criterion": "kfac", "max_steps": 0, "calibration_tokens": 600, "train_batch_size": BATCH}
    for name, world_size, size in (("in one", 1, BATCH), ("one by one", 2, 1)):
        cut = flags(work, work / name, **settings, micro_batch_size=size)
        assert [code for code, _ in run_ranks(outcome, world_size, cut)] == [0] * world_size
    scores, others = (load_file(work / name / "scores.safetensors") for name in ("in one", "one by one"))
    for group, values in scores.items():
        torch.testing.assert_close(others[group], values, rtol=1e-2, atol=1e-3 * float(values.max()))


def test_a_resumed_run_goes_on_with_the_same_examples(finished: Path, work: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000004"
    resumed = flags(work, work / "resumed", save_every=4, micro_batch_size=1, resume=checkpoint)
    other = flags(work, work / "other", save_every=4, resume=checkpoint, train_file=work / "validation.csv")
    assert run_ranks(outcome, 2, resumed)[0][0] == 0
    code, stderr = run_ranks(outcome, 2, other)[0]
    assert code == 2
    assert "the train text has other tokens than the run's" in errors_of(stderr)[0]
    for key in ("perplexity", "metrics", "tokens"):
        assert report_of(work / "resumed")[key] == report_of(finished)[key]
    assert samples(work / "resumed") == samples(finished)


def test_evaluate_measures_the_folder_as_the_run_did(finished: Path, work: Path) -> None:
    result = work / "evaluation.json"
    words = ["--model", finished / "pruned", "--baseline", work / "model", "--trust_remote_code", "--output", result]
    for name in ("task", "prompt_template", "block_size", "eval_examples", "max_new_tokens", "long_examples"):
        words += [f"--{name}", TASK[name]]
    words += ["--validation_file", work / "validation.csv", "--micro_batch_size", 2]
    run_ranks(evaluate.main, 2, [str(word) for word in words])
    assert "| model | perplexity | bleu | rouge1 |" in evaluate.as_table(json.loads(result.read_text())["models"], None)
    found, report = json.loads(result.read_text())["models"], report_of(finished)
    for name, stage in (("out", "exported"), ("model", "dense")):
        assert found[name].pop("perplexity") == pytest.approx(report["perplexity"][stage], rel=1e-5)
        assert found[name] == report["metrics"][stage]


def test_a_teacher_and_similarity_go_with_a_task_of_other_metrics(work: Path) -> None:
    output = work / "taught"
    other = {"task": "text_to_sql", "completion_template": " {ref}", "criterion": "gum", "similarity_every": 2}
    taught = flags(work, output, teacher="self", bos="always", **other)
    assert run_ranks(outcome, 1, taught)[0][0] == 0
    assert report_of(output)["bos"] is True
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    dense = AutoModelForCausalLM.from_pretrained(work / "model")
    for sample in samples(output):
        assert sample["prompt"].endswith(":")
        assert not sample["prompt"].startswith(tokenizer.bos_token)
        assert sample["dense"] == alone(dense, tokenizer, tokenizer.bos_token + sample["prompt"])
    assert list(report_of(output)["metrics"]["exported"]) == ["exact_match", "exact_match_normalised"]
    assert report_of(output)["distillation"]["seconds"] > 0


# --- generation ----------------------------------------------------------------------------------------------------

FAMILIES = ("gpt_neo", "gptj", "gpt2", "llama", "gpt_neox", "opt")
TEXTS = ("a b", "a", "the neuron keeps a model", "layer", "prunes fast")


def test_nothing_of_a_checkpoints_generation_config_is_filled_in_but_special_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every field that transformers knows, so that the next one it learns is held as well."""
    monkeypatch.setattr(GenerationConfig, "validate", lambda *_, **__: None)  # one text stands for all kinds of values
    model: Any = tiny_model("gpt_neo")
    plain, own = GenerationConfig(eos_token_id=5), GenerationConfig(eos_token_id=5, of_the_model="own")
    for name in plain.to_dict().keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}:
        setattr(own, name, "from the checkpoint")

    def merged(config: GenerationConfig) -> dict[str, Any]:
        model.generation_config = config
        found: dict[str, Any] = model._prepare_generation_config(GenerationConfig(num_beams=3))[0].to_dict()
        return found

    expected = merged(plain)
    assert len([name for name, value in merged(own).items() if value == "from the checkpoint"]) > 40
    model.generate = custom = lambda **_: pytest.fail("the checkpoint's own generate")
    with neutral(model):
        assert merged(model.generation_config) == expected
        model.generate(tokens(), max_new_tokens=1)
        model.generation_config = own
    assert model.generation_config is own
    assert model.generate is custom


def completions(folder: Path, num_beams: int) -> dict[str, list[str]]:
    """Return what two ranks write, of which one has fewer prompts than the other in the last batch."""
    found, runtime = {}, Runtime()
    runtime.rank, runtime.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    runtime.device = torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    for family in FAMILIES:
        engine = inference_engine(load_model(str(folder / family), ds_config), ds_config)
        spec = TaskConfig(task="data_to_text", max_new_tokens=NEW, num_beams=num_beams)
        found[family] = complete(engine, prompts, spec, tokenizer=tokenizer, batch_size=2, runtime=runtime)
        release(engine)
    return found


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_of_prompts_over_ranks_are_completed_like_each_alone(num_beams: int, work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer.save_pretrained(work)
    models = {family: tiny_model(family, vocab_size=len(tokenizer), seed=3) for family in FAMILIES}
    for (family, model), asked in zip(models.items(), HOSTILE, strict=True):
        model.save_pretrained(work / family)
        (work / family / "generation_config.json").write_text(json.dumps(asked))
    ranks = run_ranks(completions, 2, work, num_beams)
    assert ranks[0] == ranks[1]
    for family, model in models.items():
        expected = [alone(model, tokenizer, text, num_beams=num_beams) for text in TEXTS]
        assert ranks[0][family] == expected, family


# --- bad input -----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt_template": "{meaning}:"}, "has no column 'meaning', its columns are mr, other, ref"),
    ({"prompt_template": "{mr"}, "--prompt_template '{mr' is not a template"),
    ({"task": "translation"}, "--task translation is unknown, choose one of lm, text_to_sql"),
    ({"task": "lm"}, "--prompt_template belongs to a task with prompts"),
]

BAD_TOKENS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 30}, "--max_new_tokens 30 after the longest prompt, of "),
    ({"long_examples": "refuse"}, "a larger --block_size, or --long_examples drop"),
]


def test_a_dry_run_reads_the_examples(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["--dry_run", *flags(work, work / "never")])[0] == 0
    assert (
        "batch: 4 examples = 4 in a forward pass x 1 accumulated x 1 ranks; at most 112 tokens"
        in capsys.readouterr().out
    )
    for settings, expected in (*BAD, *BAD_TOKENS):
        code, stderr = outcome(["--dry_run", *flags(work, work / "never", **settings)])
        assert code == 2
        assert [error for error in errors_of(stderr) if expected in error], (expected, stderr)


def test_bad_input_ends_in_one_message(work: Path) -> None:
    cases = [flags(work, work / "never", **settings) for settings, _ in BAD]
    ranks = run_ranks(outcomes, 2, cases)
    for (_, expected), (code, stderr), (other_code, other_stderr) in zip(BAD, *ranks, strict=True):
        assert (code, other_code) == (2, 2), expected
        assert len(errors_of(stderr)) == 1, (expected, stderr)
        assert expected in errors_of(stderr)[0]
        assert errors_of(other_stderr) == []
    assert not (work / "never").exists()


@pytest.mark.parametrize(("settings", "expected"), BAD_TOKENS)
def test_what_only_the_tokens_show_is_one_message_too(settings: dict[str, Any], expected: str, work: Path) -> None:
    (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, flags(work, work / "never", **settings))
    assert (code, other_code) == (2, 2)
    assert expected in errors_of(stderr)[0]
    assert errors_of(other_stderr) == []
    assert not (work / "never").exists()

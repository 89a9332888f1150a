"""Tasks of lm-evaluation-harness from local files: scores of the plain model on any number of ranks; refusals."""

import copy
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import BLOCK, SENTENCE, errors_of, make_work
from distributed import run_ranks
from models import WIDTHS, compact_model, export, random_keep
from outcomes import outcome_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scale_prune.commands import evaluate
from scale_prune.inspection.harness import as_table
from scale_prune.models.layer_units import unit_groups

pytestmark = pytest.mark.distributed

DOCUMENTS = 7
NEXT_WORD = """
task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def documents() -> list[dict[str, str]]:
    words, rng = SENTENCE.split(), random.Random(0)
    return [{"text": " ".join(rng.choices(words, k=4)), "word": rng.choice(words)} for _ in range(DOCUMENTS)]


GO_ON = """
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["never"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def task_folder(folder: Path, yaml: str = NEXT_WORD) -> Path:
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents()))
    (folder / "task.yaml").write_text(yaml.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with text, a dense model, one with layers of different widths, and tasks."""
    work = make_work(tmp_path_factory.mktemp("work"))
    model: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    groups = unit_groups(model)
    dense = copy.deepcopy(model)
    smaller = compact_model(model, groups, random_keep(groups, WIDTHS["per_layer"]))
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    export(work / "small" / "pruned", model, smaller, "per_layer", tokenizer=tokenizer)
    rows = [each | {"written": written(dense, tokenizer, each["text"])} for each in documents()]
    (work / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task_folder(work / "tasks") / "go_on.yaml").write_text(GO_ON.format(data=work / "written.jsonl"))
    asked = {"eos_token_id": 0, "repetition_penalty": 1.8, "no_repeat_ngram_size": 1}
    (work / "model" / "generation_config.json").write_text(json.dumps(asked))
    return work


def written(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return what the model writes after a prompt where its generation_config asks for nothing."""
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def flags(work: Path, *more: str) -> list[str]:
    text = ["--validation_file", str(work / "validation.txt"), "--block_size", str(BLOCK)]
    return ["--model", str(work / "model"), *text, *more]


def expected(folder: Path) -> dict[str, float]:
    """Score the documents one by one, word by word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    likelihoods, greedy = [], []
    for document in documents():
        prompt = tokenizer(document["text"], return_tensors="pt").input_ids
        whole = tokenizer(f"{document['text']} {document['word']}", return_tensors="pt").input_ids
        with torch.no_grad():
            predictions = model(whole).logits[0, :-1].log_softmax(-1)[prompt.shape[1] - 1 :]
        word = whole[0, prompt.shape[1] :]
        likelihoods.append(float(predictions.gather(1, word[:, None]).sum()))
        greedy.append(bool((predictions.argmax(-1) == word).all()))
    return {"perplexity": math.exp(-sum(likelihoods) / DOCUMENTS), "acc": sum(greedy) / DOCUMENTS}


@pytest.mark.parametrize("world_size", [1, 2])
def test_scores_are_those_of_the_plain_model_on_any_number_of_ranks(world_size: int, work: Path) -> None:
    pytest.importorskip("lm_eval")
    folders = {"model": work / "model", "small": work / "small" / "pruned"}
    models = ["--baseline", str(folders["model"]), "--model", str(folders["small"]), "--trust_remote_code"]
    task = ["--lm_eval", "next_word", "go_on", "--lm_eval_include", str(work / "tasks")]
    task += ["--output", str(work / "found.json")]
    run_ranks(evaluate.main, world_size, [*flags(work)[2:], *models, *task])
    found = json.loads((work / "found.json").read_text())["models"]
    for name, folder in folders.items():
        scores = found[name]["lm_eval"]
        assert scores["n-samples"]["next_word"] == {"original": DOCUMENTS, "effective": DOCUMENTS}
        for metric, value in expected(folder).items():
            assert scores["results"]["next_word"][f"{metric},none"] == pytest.approx(value, rel=1e-4)
    assert found["model"]["lm_eval"]["results"]["go_on"]["exact_match,none"] == 1.0


def broken(tmp_path: Path, name: str, old: str, new: str) -> list[str]:
    assert old in NEXT_WORD
    folder = task_folder(tmp_path / name, NEXT_WORD.replace(old, new))
    return ["--lm_eval", "next_word", "--lm_eval_include", str(folder)]


def test_what_cannot_be_run_is_named(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("WORLD_SIZE", "2")  # rank 0 of 2, which does not come as far as to join the other
    include = ["--lm_eval_include", str(work / "tasks")]
    cases = {
        "next_wort is no task of lm_eval and": ["--lm_eval", "next_wort", *include],
        "holds no task file": ["--lm_eval", "next_word", "--lm_eval_include", str(work / "model")],
        "ScannerError": broken(tmp_path, "a", "test_split: test", "test_split: 'test"),
        "FileNotFoundError": broken(tmp_path, "b", "test_split", "include: nowhere.yaml\ntest_split"),
        "task.yaml cannot be used: ": broken(tmp_path, "c", "{{word}}", "{{word"),
        "Got invalid output_type 'logs'": broken(tmp_path, "d", "loglikelihood", "logs"),
        "KeyError: 'valid'": broken(tmp_path, "e", "test_split: test", "test_split: valid"),
        "next_word has 1 documents for 2 ranks": ["--lm_eval", "next_word", *include, "--lm_eval_limit", "1"],
        "--lm_eval is done, which is missing": include,
    }
    for message, case in cases.items():
        code, stderr = outcome_of(evaluate.main, *flags(work, *case))
        (error,) = errors_of(stderr)
        assert code == 2
        assert message in error, error


def test_a_missing_package_is_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "scale_prune.inspection.lm_eval_tasks", raising=False)
    code, stderr = outcome_of(evaluate.main, *flags(work, "--lm_eval", "next_word"))
    (error,) = errors_of(stderr)
    assert code == 2
    assert error.endswith("is not installed; pip install lm_eval")


def test_the_table_has_a_row_a_metric_and_a_column_a_model() -> None:
    metrics = {"alias": "t", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 1.0}
    other = metrics | {"acc,none": 0.75, "acc_stderr,none": "N/A"}
    table = as_table({"dense": {"results": {"t": metrics}}, "small": {"results": {"t": other}}})
    assert table.splitlines() == [
        "| task | metric | dense | small |",
        "|---|---|---:|---:|",
        "| t | acc | 0.5000 ± 0.2500 | 0.7500 |",
        "| t | f1,strict | 1.0000 | 1.0000 |",
    ]

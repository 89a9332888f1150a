"""The embedded default is made from this Python installation alone, the same every time, whole or not at all."""

import json
import sysconfig
from functools import partial
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale_prune.config import Config
from scale_prune.data import embedded
from scale_prune.data.embedded import END_OF_TEXT, SHORT, build, corpus
from scale_prune.run import start
from scale_prune.system import REPORT
from scale_prune.zero3 import Runtime

FEW = {"vocab_size": 300, "max_documents": 31}


def long_paragraphs(documents: list[str]) -> list[str]:
    return [text for document in documents for text in document.split("\n\n") if len(text) >= SHORT]


def test_the_corpus_is_about_two_megabytes_of_distinct_text() -> None:
    train, validation = corpus()
    sizes = [sum(map(len, part)) for part in (train, validation)]
    assert 1.3e6 < sum(sizes) < 3e6
    assert 0.02 < sizes[1] / sum(sizes) < 0.1
    paragraphs = long_paragraphs(train + validation)
    assert len(paragraphs) == len(set(paragraphs))


def test_the_corpus_is_the_same_on_every_call() -> None:
    assert corpus(83) == corpus(83)
    assert [len(part) for part in corpus(83)] == [83 - len(corpus(83)[1]), len(corpus(83)[1])]


def test_docstrings_come_from_source_that_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = "This sentence stands in two files, but it is wanted in only one of them."
    alone = "Another sentence, which is long enough to be a document of its own."
    sources = {
        "a.py": f'"""First."""\nraise SystemExit\n\ndef f():\n    """{repeated}\n\n    Short."""\n\n"not \\d one"\n',
        "b/c.py": f'class C:\n    """{repeated}\n\n    {alone}"""\n',
        "b/test/d.py": f'"""{repeated} In a test."""\n',
        "site-packages/e.py": f'"""{repeated} Installed."""\n',
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setattr(embedded, "topics", {})
    assert sorted(chain(*corpus())) == [
        alone,
        f"First.\n\n{repeated}\n\nShort.",
    ]


def test_what_is_built_loads_and_is_the_same_every_time(tmp_path: Path) -> None:
    folder = build(tmp_path / "one", **FEW)
    again = build(tmp_path / "two", **FEW)
    written = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert written == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / path).read_bytes() == (again / path).read_bytes() for path in written)

    for name, documents in zip(("train", "validation"), corpus(FEW["max_documents"]), strict=True):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["text"] for line in lines] == documents

    tokenizer = AutoTokenizer.from_pretrained(folder / "untrained")
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (FEW["vocab_size"], END_OF_TEXT, 0)
    text = "größer\n  than ≥ 7"
    assert tokenizer.decode(tokenizer.encode(text)) == text

    model = AutoModelForCausalLM.from_pretrained(folder / "untrained")
    assert model.config.vocab_size == len(tokenizer)
    assert set(model.config.attention_layers) == {"global", "local"}
    ids = torch.tensor([tokenizer.encode(text)])
    loss = model.train()(input_ids=ids, labels=ids).loss
    assert loss.item() == model(input_ids=ids, labels=ids).loss.item(), "there is dropout"
    assert loss.item() == pytest.approx(torch.tensor(len(tokenizer)).log().item(), rel=0.1)


def test_a_build_is_found_again_by_its_settings(tmp_path: Path) -> None:
    folder = build(tmp_path, **FEW)
    (folder / "mark").touch()
    assert build(tmp_path, **FEW) == folder
    assert (folder / "mark").exists()
    other = build(tmp_path, **FEW, seed=1)
    assert other != folder
    weights = "untrained/model.safetensors"
    assert (other / weights).read_bytes() != (folder / weights).read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([folder, other])


def test_a_build_that_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_untrained_model", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, **FEW)
    assert list(tmp_path.iterdir()) == []


def test_two_builds_at_once_leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corpus_while_another_builds(max_documents: int | None) -> tuple[list[str], list[str]]:
        monkeypatch.undo()
        (build(tmp_path, **FEW) / "mark").touch()
        return corpus(max_documents)

    monkeypatch.setattr(embedded, "corpus", corpus_while_another_builds)
    folder = build(tmp_path, **FEW)
    assert (folder / "mark").exists()
    assert list(tmp_path.iterdir()) == [folder]


def text_of_default(folder: Path, **given: str) -> tuple[str | None, str | None]:
    with patch.object(start, "build", return_value=folder):  # it takes minutes until there is a trained base
        config = start.embedded_default(Config.from_flat(given), frozenset(given), Runtime.start())
    return config.data.train_file, config.data.validation_file


@pytest.mark.distributed
def test_a_run_without_a_model_keeps_the_texts_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / REPORT).touch()
    own = tuple(str(tmp_path / f"{split}.jsonl") for split in ("train", "validation"))
    for given, expected in (
        ({}, own),
        ({"validation_file": "mine.txt"}, (own[0], "mine.txt")),
        ({"train_file": "mine.txt"}, ("mine.txt", None)),
    ):
        assert run_ranks(partial(text_of_default, tmp_path, **given), 1) == [expected]

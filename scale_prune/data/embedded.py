"""The embedded default: a text, a tokenizer and an untrained model from what every Python installation carries.

The text is the language reference that `help()` shows and the docstrings of the standard library, about 2 MB of English
(it differs a little between Python versions). Nothing is downloaded, and of the library only the source is read.
"""

import ast
import hashlib
import json
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

MODEL: dict[str, Any] = {
    "hidden_size": 192,
    "num_layers": 4,
    "num_heads": 6,
    "intermediate_size": 768,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 64,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
}

# Tests, programs for people, and what is not part of the library.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
SHORT = 60
VALIDATION_SHARE = 0.05


def build(cache: Path, *, vocab_size: int = 2048, seed: int = 0, max_documents: int | None = None) -> Path:
    """Make the embedded default's files, unless they are there.

    They appear all at once: a build that is cut off leaves nothing that a later one takes for whole.

    Args:
        cache: the folder that holds one folder for each Python version and choice of settings.
        vocab_size: tokens of the vocabulary, at least 257 (every byte and the end-of-text token).
        seed: seed of the model's first weights, at least 0.
        max_documents: as in `corpus`.

    Returns:
        the folder with `train.jsonl` and `validation.jsonl` (column "text") and `untrained/`, a Hugging Face folder
        with a GPT-Neo of about 2 M parameters and its tokenizer.
    """
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made_by = {"code": code, "python": platform.python_version()}
    asked = {"vocab_size": vocab_size, "seed": seed, "max_documents": max_documents}
    folder = cache / _key(made_by | asked | MODEL)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as temporary:
        _write(Path(temporary) / folder.name, corpus(max_documents), vocab_size, seed)
        try:
            os.rename(Path(temporary) / folder.name, folder)
        except OSError:
            # Another process was faster; the folder it left is the same.
            if not folder.is_dir():
                raise
    return folder


def model_config(vocab_size: int = 2048) -> GPTNeoConfig:
    """Return the configuration of the embedded model."""
    return GPTNeoConfig(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **MODEL)


def corpus(max_documents: int | None = None) -> tuple[list[str], list[str]]:
    """Collect the embedded text, the same on every call with one Python installation.

    A document is a topic of the language reference or all docstrings of a source file. A longer paragraph that comes
    more than once is kept only where it comes first, so that no paragraph is in both parts.

    Args:
        max_documents: the number of documents that are read, from the start; None reads all.

    Returns:
        the documents for training and, about 5 % of the text, those for validation.
    """
    train: list[str] = []
    validation: list[str] = []
    for document in islice(_without_repeats(_documents()), max_documents):
        share = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4]) / 2**32
        (validation if share < VALIDATION_SHARE else train).append(document)
    return train, validation


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: what it learns from.
        vocab_size: tokens of the vocabulary, at least 257; fewer come out where the text is too short for more.

    Returns:
        a tokenizer whose only special token is the end-of-text token, number 0, which begins a text as well.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, parts: tuple[list[str], list[str]], vocab_size: int, seed: int) -> None:
    folder.mkdir()
    for name, documents in zip(("train", "validation"), parts, strict=True):
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer(parts[0], vocab_size)
    tokenizer.save_pretrained(folder / "untrained")
    _untrained_model(len(tokenizer), seed).save_pretrained(folder / "untrained")


def _untrained_model(vocab_size: int, seed: int) -> GPTNeoForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoForCausalLM(model_config(vocab_size))


def _documents() -> Iterator[list[str]]:
    """Yield the paragraphs of each document, the language reference first."""
    for topic in sorted(topics):
        yield topics[topic].strip().split("\n\n")
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)
        for file in sorted(files):
            if file.endswith(".py"):
                docstrings = _docstrings(Path(folder, file))
                yield [paragraph for docstring in docstrings for paragraph in docstring.split("\n\n")]


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file, in its order."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(path.read_bytes())
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, holders)), key=_line)
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _without_repeats(documents: Iterable[list[str]]) -> Iterator[str]:
    """Yield the documents that have anything left once repeated paragraphs are gone."""
    seen: set[str] = set()
    for paragraphs in documents:
        fresh = [text for text in dict.fromkeys(paragraphs) if text not in seen]
        seen.update(text for text in fresh if len(text) >= SHORT)
        if any(len(text) >= SHORT for text in fresh):
            yield "\n\n".join(fresh)

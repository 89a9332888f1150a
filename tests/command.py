"""The command as tests use it: what it needs, its flags, and how it is started."""

import json
import math
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from distributed import run_ranks
from memory_backend import steady_model
from outcomes import errors_of, outcome_of
from transformers import AutoTokenizer

from scale_prune.commands.prune import main
from scale_prune.data.embedded import train_tokenizer

__all__ = ["errors_of"]

ROOT = Path(__file__).resolve().parents[1]
BLOCK, STEPS, BATCH = 16, 7, 4
SENTENCE = "the a neuron layer model keeps drops learns prunes fast slowly and then again while training on text"


def text(lines: int, seed: int) -> str:
    rng, words = random.Random(seed), SENTENCE.split()
    return "".join(" ".join(rng.choices(words, k=rng.randint(3, 12))) + ".\n" for _ in range(lines))


def make_work(folder: Path, model_type: str = "gpt_neo", **settings: Any) -> Path:
    """Put a tiny model, its tokenizer and a little text into a folder."""
    (folder / "train.txt").write_text(text(200, seed=0))
    (folder / "validation.txt").write_text(text(20, seed=1))
    tokenizer = train_tokenizer([text(200, seed=0)], 300)
    tokenizer.save_pretrained(folder / "model")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    steady_model(model_type, vocab_size=len(tokenizer), **ids, **settings).save_pretrained(folder / "model")
    return folder


def arguments(work: Path, output: Path, **settings: Any) -> list[str]:
    usual = {
        "model": work / "model",
        "train_file": work / "train.txt",
        "validation_file": work / "validation.txt",
        "block_size": BLOCK,
        "max_steps": STEPS,
        "train_batch_size": BATCH,
        "log_every": 2,
        "output_dir": output,
        "criterion": "gum",
    }
    words = [[f"--{name}", *([] if value is True else [str(value)])] for name, value in (usual | settings).items()]
    return list(chain.from_iterable(words))


GROUPED_HEADS = {"hidden_size": 24, "num_attention_heads": 6, "head_dim": 4, "num_key_value_heads": 3}
"""Of a Llama: three heads of keys and values a layer, each with two of queries."""


def pruned(work: Path, name: str, world_size: int, **settings: Any) -> dict[str, Any]:
    """Run the command on some ranks, into a folder of a name; return its report."""
    codes = run_ranks(outcome, world_size, arguments(work, work / name, **settings))
    assert [code for code, _ in codes] == [0] * world_size, codes
    return report_of(work / name)


def launch(flags: list[str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start `deepspeed launch/prune.py` on two ranks, as the leader of a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(port),
    ]
    return subprocess.Popen(
        [*launcher, str(ROOT / "launch" / "prune.py"), *flags],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 150) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return output


def outcome(flags: list[str]) -> tuple[int, str]:
    """Return the exit code and what was written to stderr, of the command on this rank."""
    return outcome_of(main, *flags)


def said_by(flags: list[str]) -> str:
    """Run the command on this rank to its end, and return what it wrote to stdout."""
    with redirect_stdout(StringIO()) as written:
        main(flags)
    return written.getvalue()


def outcomes(cases: list[list[str]]) -> list[tuple[int, str]]:
    """Return the same for several command lines, in one process group."""
    return [outcome(flags) for flags in cases]


def recomputed_perplexity(model: Any, folder: Path, file: Path, begin: Sequence[int] = ()) -> float:
    """Measure as the report says: lines keep their newline, blocks are consecutive, the last shorter one counts.

    `begin` holds the BOS token, where there is one.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [token for line in file.read_text().splitlines(True) for token in tokenizer(line)["input_ids"]]
    total, count = 0.0, 0
    text = BLOCK - len(begin)
    for start in range(0, len(ids), text):
        block = torch.tensor([*begin, *ids[start : start + text]])[None]
        with torch.no_grad():
            predictions = model(block).logits[0, :-1].log_softmax(-1)
        total -= float(predictions.gather(1, block[0, 1:, None]).sum())
        count += block.shape[1] - 1
    return math.exp(total / count)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def pids_of(argument: str) -> list[int]:
    """Return the training processes, by an argument of their own, in order of rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        for word in words:
            if argument in words and word.startswith("--local_rank="):
                found[word] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def wait_until(happened: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)

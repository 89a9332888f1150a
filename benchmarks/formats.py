"""Perplexity and speed of a model in the engines that people serve with, beside its own: benchmarks/formats.md.

    python benchmarks/formats.py --dense smollm2 --pruned out/quickstart/pruned --text validation.txt \\
        --llama_cpp .venv/bin/python --vllm .cache/serving/vllm/bin/python
"""

import argparse
import gzip
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale_prune.core.likelihood import perplexity
from scale_prune.export import convert, open_folder

BLOCK, PROMPT, NEW, TURNS = 256, 64, 64, 3

LLAMA_CPP = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
file, asked = sys.argv[1], json.load(open(sys.argv[2]))
model = Llama(file, logits_all=True, n_ctx=asked["block"], n_batch=asked["block"], n_threads=2, verbose=False)
total = counted = 0
for ids in asked["blocks"]:
    model.reset()
    model.eval(ids)
    scores = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
    wanted = scores[np.arange(len(ids) - 1), ids[1:]]
    total += float((np.logaddexp.reduce(scores, axis=1) - wanted).sum())
    counted += len(ids) - 1
model = Llama(file, n_ctx=asked["block"], n_threads=2, verbose=False)
seconds = []
for _ in range(asked["turns"]):
    model.reset()
    model.eval(asked["blocks"][0][: asked["prompt"]])
    started = time.perf_counter()
    for number, token in enumerate(model.generate([], temp=0.0, reset=False)):
        if number == asked["new"]:
            break
    seconds.append(time.perf_counter() - started)
speed = asked["new"] / sorted(seconds)[len(seconds) // 2]
print(json.dumps({"perplexity": float(np.exp(total / counted)), "tokens_per_second": speed}))
"""

VLLM = """
import json, os, sys, time
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}

def main(folder, asked):
    import math
    from vllm import LLM, SamplingParams
    asked = json.load(open(asked))
    model = LLM(folder, skip_tokenizer_init=True, trust_remote_code=True, dtype="bfloat16", enforce_eager=True,
                max_model_len=asked["block"] + 1, max_num_seqs=4)
    ways = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    told = model.generate([{"prompt_token_ids": ids} for ids in asked["blocks"]], ways, use_tqdm=False)
    chosen = []
    for each, ids in zip(told, asked["blocks"]):
        chosen += [prob[token].logprob for prob, token in zip(each.prompt_logprobs[1:], ids[1:])]
    ways = SamplingParams(temperature=0, max_tokens=asked["new"], detokenize=False, ignore_eos=True)
    seconds = []
    for _ in range(asked["turns"]):
        started = time.perf_counter()
        model.generate([{"prompt_token_ids": asked["blocks"][0][: asked["prompt"]]}], ways, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"perplexity": math.exp(-sum(chosen) / len(chosen)),
                      "tokens_per_second": asked["new"] / sorted(seconds)[len(seconds) // 2]}))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def main() -> None:
    """Measure both models in every form, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dense", "pruned", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("llama_cpp", "vllm"):
        parser.add_argument(f"--{name}", help=f"a Python that has {name}")
    parser.add_argument("--tokens", type=int, default=4096)
    own = parser.parse_args()
    blocks = blocks_of(own.text, own.dense, own.tokens)
    asked = {"block": BLOCK, "prompt": PROMPT, "new": NEW, "turns": TURNS, "blocks": blocks.tolist()}
    print("| model | form | perplexity | tokens a second |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as work:
        question = Path(work) / "asked.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        for name in ("dense", "pruned"):
            folder = getattr(own, name)
            row(name, "transformers, fp32", {"perplexity": in_transformers(folder, blocks)})
            for dtype in ("f16", "q8_0") if own.llama_cpp else ():
                file = Path(work) / f"{name}-{dtype}.gguf"
                convert(open_folder(folder), "gguf", file, dtype=dtype)
                size = file.stat().st_size / 2**20
                row(name, f"GGUF {dtype}, llama.cpp, {size:.0f} MiB", ask(own.llama_cpp, LLAMA_CPP, file, question))
            for form in ("nemotron_nas", "pad") if own.vllm else ():
                convert(open_folder(folder), form, Path(work) / f"{name}-{form}")
                row(name, f"{form}, vLLM, bf16", ask(own.vllm, VLLM, Path(work) / f"{name}-{form}", question))


def blocks_of(text: Path, model: Path, tokens: int) -> torch.Tensor:
    """Return the first tokens of a text in blocks, (tokens // BLOCK, BLOCK)."""
    raw = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    ids = AutoTokenizer.from_pretrained(model)(raw.decode(), verbose=False)["input_ids"]
    return torch.tensor(ids[: tokens // BLOCK * BLOCK]).view(-1, BLOCK)


def in_transformers(folder: Path, blocks: torch.Tensor) -> float:
    """Return the perplexity as transformers computes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    return perplexity(lambda ids: model(ids, use_cache=False).logits, ((each[None], each[None]) for each in blocks))


def ask(python: str, script: str, model: Path, question: Path) -> dict[str, Any]:
    """Run a script in an engine's own environment, and return what it prints last."""
    file = question.with_name("ask.py")
    file.write_text(script, encoding="utf-8")
    done = subprocess.run([python, file, model, question], capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def row(name: str, form: str, told: dict[str, Any]) -> None:
    """Print a row."""
    speed = told.get("tokens_per_second", math.nan)
    print(f"| {name} | {form} | {told['perplexity']:.3f} | {'' if math.isnan(speed) else f'{speed:.1f}'} |", flush=True)


if __name__ == "__main__":
    main()

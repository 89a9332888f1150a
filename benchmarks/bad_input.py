"""Try bad input on the whole command, on two ranks, and print what each says.

    python benchmarks/bad_input.py > table.md

Every case has a folder of its own with a tiny model, a little text, a ds_config, a recipe and a run with checkpoints,
and spoils one thing in it. The law: the command runs, or all ranks end with exit code 2 and one message from rank 0;
no traceback, no rank that waits for ever, nothing changed in what was there before. The exit code is 1 where a case
breaks the law. `--only WORD` tries the cases whose name has that word.

The ranks are processes that run `launch/prune.py`, forked from a server that has imported everything already, which
saves most of their start; cases whose name begins with "launcher" go through `deepspeed` itself.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
TIMEOUT = 90.0
PRELOADED = [
    *("torch", "torch.distributed", "deepspeed", "transformers.generation.utils", "scale_prune.commands.prune"),
    *("deepspeed.runtime.zero.stage3", "torch._dynamo.debug_utils", "torch._inductor.compile_fx"),
]
SENTENCE = "the a neuron layer model keeps drops learns prunes fast slowly and then again while training on text"
MODEL = "--model model"
USUAL = (
    "--train_file train.txt --validation_file validation.txt --block_size 16 --max_steps 4 --train_batch_size 4 "
    "--output_dir out"
)
CHECKPOINT = "run/checkpoints/step-00000004"
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        name: what is bad, for the table.
        flags: flags after the usual ones, of which the last one counts; paths are in the case's own folder.
        changes: what is spoilt in the case's own folder.
        usual: the flags before.
    """

    name: str
    flags: str = ""
    changes: tuple[Change, ...] = ()
    usual: str = f"{MODEL} {USUAL}"

    @property
    def words(self) -> list[str]:
        """All words of the command line."""
        return shlex.split(f"{self.usual} {self.flags}")


@dataclass
class Outcome:
    """What a case came to: exit codes and stderr by rank, and whether anything that was there before has changed."""

    codes: list[int | None]
    errors: list[str]
    touched: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def messages(self) -> list[str]:
        """Messages of all ranks."""
        return [line for text in self.errors for line in text.splitlines() if line.startswith("error: ")]

    @property
    def verdict(self) -> str:
        """One of ran, refused, and the ways to break the law."""
        if None in self.codes:
            return "hang"
        if any("Traceback" in text for text in self.errors):
            return "traceback"
        if set(self.codes) == {0}:
            return "ran"
        if set(self.codes) != {2}:
            return f"exit codes {self.codes}"
        if len(self.messages) != 1 or self.messages[0] not in self.errors[0]:
            return f"{len(self.messages)} messages"
        return f"changed {self.touched[0]}" if self.touched else "refused"


# --- what is spoilt ------------------------------------------------------------------------------------------------


def put(name: str, content: Any) -> Change:
    """Write a file: bytes and texts as they are, anything else as JSON."""

    def change(folder: Path) -> None:
        raw = content if isinstance(content, bytes | str) else json.dumps(content)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    return change


def remove(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def cut(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def flip(name: str, place: int) -> Change:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[place % len(raw)] ^= 0xFF
        (folder / name).write_bytes(raw)

    return change


def edit(name: str, path: str, *value: Any) -> Change:
    """Give a key of a JSON file another value, or remove it; the path's keys are joined with dots."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        *sections, key = path.split(".")
        section = content
        for each in sections:
            section = section.setdefault(each, {})
        if value:
            section[key] = value[0]
        else:
            del section[key]
        (folder / name).write_text(json.dumps(content))

    return change


def seal(checkpoint: str = CHECKPOINT) -> Change:
    """Make a checkpoint's manifest fit its files again."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / checkpoint / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            raw = (folder / checkpoint / name).read_bytes()
            entry |= {"bytes": len(raw), "sha256": sha256(raw).hexdigest()}
        (folder / checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return change


def weights(change_of: Callable[[dict[str, Any]], Any]) -> Change:
    """Write the model's weights anew, after a change."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model" / "model.safetensors")
        change_of(tensors)
        save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})

    return change


def spoil_weight(name: str, value: Callable[[Any], Any]) -> Change:
    return weights(lambda tensors: tensors.update({name: value(tensors[name]).contiguous()}))


def parquet(columns: dict[str, Any]) -> Change:
    def change(folder: Path) -> None:
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table(columns), folder / "train.parquet")

    return change


def mount_read_only(folder: Path) -> None:
    (folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder / "disk")], check=False)


# --- the cases -----------------------------------------------------------------------------------------------------


def flag_cases() -> Iterator[Case]:
    yield Case("unknown flag", "--sparsity 0.5")
    yield Case("misspelt flag", "--remainin 0.5")
    yield Case("flag with a single dash", "-remaining 0.5")
    yield Case("abbreviated flag", "--remain 0.5")
    yield Case("argument without a flag", "out2")
    yield Case("flag of another program", "--deepspeed ds.json")
    yield Case("flag without its value", "--seed")
    yield Case("flag with two values", "--seed 1 2")
    yield Case("switch with a value", "--overwrite=yes")
    yield Case("text for a number", "--learning_rate fast")
    yield Case("fraction for a whole number", "--max_steps 1.5")
    yield Case("exponent for a whole number", "--max_steps 1e3")
    yield Case("comma in a number", "--remaining 0,5")
    yield Case("percent sign", "--remaining 50%")
    yield Case("number of another script", "--max_steps ٤")
    yield Case("unicode in a text", "--criterion 🙂")
    yield Case("line break in a value", "--criterion 'gum\nerror: no'")
    yield Case("empty text", "--train_file ''")
    yield Case("empty number", "--seed ''")
    yield Case("negative number", "--max_steps -1")
    yield Case("negative after =", "--remaining=-0.5")
    yield Case("not a number", "--remaining nan")
    yield Case("not a number, learning rate", "--learning_rate nan")
    yield Case("infinity", "--weight_decay inf")
    yield Case("infinite waiting", "--collective_timeout 1e300")
    yield Case("huge seed", f"--seed {10**30}")
    yield Case("huge block", f"--block_size {10**30}")
    yield Case("huge floor", f"--min_kept {10**30} --criterion gum")
    yield Case("huge multiple", f"--width_multiple {10**30}")
    yield Case("huge sample", f"--similarity_tokens {10**30} --criterion gum")
    yield Case("huge evaluation", f"--eval_tokens {10**30}")
    yield Case("huge batch", f"--train_batch_size {10**30}")
    yield Case("huge number of steps between logs", f"--log_every {10**30} --eval_every {10**30}")
    yield Case("huge number of steps between saves", f"--save_every {10**30} --keep_checkpoints {10**30}")
    yield Case("too many digits", f"--max_steps {'9' * 5000}")
    yield Case("huge learning rate", "--learning_rate 1e38 --warmup_fraction 0.9 --cooldown_fraction 0")
    yield Case("batch that the ranks do not divide", "--train_batch_size 3")
    yield Case("batches that do not multiply", "--micro_batch_size 3 --gradient_accumulation_steps 2")
    yield Case("contradicting layout and scope", "--layout uniform --scope global")
    yield Case("contradicting fractions", "--warmup_fraction 0.6 --cooldown_fraction 0.6")
    yield Case("configuration without a data set", "--dataset_config en")
    yield Case("the same flag twice", "--remaining 0.4 --remaining 0.5")
    yield Case("unknown choice", "--precision int8")
    yield Case("precision that the ds_config contradicts", "--ds_config zero3 --precision fp32")
    yield Case("no data at all", usual=f"{MODEL} --block_size 16 --max_steps 2 --output_dir out")


def recipe_cases() -> Iterator[Case]:
    recipe = "--config recipe.yaml"
    yield Case("recipe that is missing", "--config nowhere.yaml")
    yield Case("recipe that is a folder", "--config model")
    yield Case("recipe: not YAML", recipe, (put("recipe.yaml", "remaining: [0.5\n"),))
    yield Case("recipe: tab", recipe, (put("recipe.yaml", "remaining:\n\t- 0.5\n"),))
    yield Case("recipe: binary", recipe, (put("recipe.yaml", bytes(range(256))),))
    yield Case("recipe: null bytes", recipe, (put("recipe.yaml", b"seed: 1\0\n"),))
    yield Case("recipe: a list", recipe, (put("recipe.yaml", "- remaining\n- 0.5\n"),))
    yield Case("recipe: unknown key", recipe, (put("recipe.yaml", "remainin: 0.5\n"),))
    yield Case("recipe: key that is a number", recipe, (put("recipe.yaml", "1: 0.5\n"),))
    yield Case("recipe: key that is a list", recipe, (put("recipe.yaml", "? [a, b]\n: 0.5\n"),))
    yield Case("recipe: key twice", recipe, (put("recipe.yaml", "seed: 1\nseed: 2\n"),))
    yield Case("recipe: text for a number", recipe, (put("recipe.yaml", "remaining: half\n"),))
    yield Case("recipe: list for a number", recipe, (put("recipe.yaml", "remaining: [0.5]\n"),))
    yield Case("recipe: true for a number", recipe, (put("recipe.yaml", "seed: true\n"),))
    yield Case("recipe: not a number", recipe, (put("recipe.yaml", "remaining: .nan\n"),))
    yield Case("recipe: huge number", recipe, (put("recipe.yaml", f"remaining: {10**400}\n"),))
    yield Case("recipe: no value", recipe, (put("recipe.yaml", "seed:\n"),))
    yield Case("recipe: date for a text", recipe, (put("recipe.yaml", "text_column: 2020-01-01\n"),))
    yield Case("recipe: impossible date", recipe, (put("recipe.yaml", "text_column: 2020-13-41\n"),))
    yield Case("recipe: a Python object", recipe, (put("recipe.yaml", "seed: !!python/object:os.system {}\n"),))
    yield Case("recipe: alias of itself", recipe, (put("recipe.yaml", "seed: &a [*a]\n"),))
    yield Case("recipe: unknown alias", recipe, (put("recipe.yaml", "seed: *a\n"),))
    yield Case("recipe: merge of a number", recipe, (put("recipe.yaml", "<<: 3\n"),))
    yield Case("recipe: two documents", recipe, (put("recipe.yaml", "seed: 1\n---\nseed: 2\n"),))
    yield Case("recipe: null byte in a path", "--config recipe.yaml", (put("recipe.yaml", 'ds_config: "d\\0s"\n'),))
    yield Case("recipe: empty", recipe, (put("recipe.yaml", ""),))


def ds_cases() -> Iterator[Case]:
    def spoilt(name: str, *changes: Change, flags: str = "") -> Case:
        return Case(f"ds_config: {name}", f"--ds_config ds.json {flags}", changes)

    def value(path: str, *values: Any) -> Iterator[Case]:
        for each in values:
            yield spoilt(f'"{path}": {json.dumps(each)[:40]}', edit("ds.json", path, each))

    yield Case("ds_config that is missing", "--ds_config nowhere.json")
    yield Case("ds_config that is a folder", "--ds_config model")
    yield spoilt("not JSON", put("ds.json", "{"))
    yield spoilt("empty", put("ds.json", ""))
    yield spoilt("binary", put("ds.json", bytes(range(256))))
    yield spoilt("deeply nested", put("ds.json", "[" * 100_000))
    yield spoilt("a list", put("ds.json", "[]"))
    yield spoilt("null", put("ds.json", "null"))
    yield spoilt("a key twice", put("ds.json", '{"a": 1, "a": 2}'))
    yield spoilt("no sections at all", put("ds.json", {}))
    yield spoilt("no ZeRO section", edit("ds.json", "zero_optimization"))
    yield spoilt("no optimizer section", edit("ds.json", "optimizer"))
    yield spoilt("no scheduler section", edit("ds.json", "scheduler"))
    yield spoilt("optimizer without a type", edit("ds.json", "optimizer.type"))
    yield spoilt("scheduler without a type", edit("ds.json", "scheduler.type"))
    yield spoilt("both precisions", edit("ds.json", "bf16.enabled", True), edit("ds.json", "fp16.enabled", True))
    yield spoilt("batch sizes that do not multiply", edit("ds.json", "train_micro_batch_size_per_gpu", 3))
    yield spoilt(
        "learning rate that a flag contradicts", edit("ds.json", "optimizer.params.lr", 1), flags="--learning_rate 2"
    )
    yield from value("compression_training", {})
    yield from value("zero_optimization", 3, [3], True)
    yield from value("zero_optimization.stage", 2, "3", 3.0, True, [3])
    yield from value("zero_optimization.reduce_bucket_size", -1, "big", None, 1e400)
    yield from value("zero_optimization.stage3_prefetch_bucket_size", -1, 2.5)
    yield from value("zero_optimization.stage3_max_live_parameters", "many")
    yield from value("zero_optimization.sub_group_size", 0, -1)
    yield from value("zero_optimization.overlap_comm", "no", 7)
    yield from value("zero_optimization.stage3_prefetch", 1)
    yield from value(
        "zero_optimization.offload_optimizer", "cpu", {"device": "nvme"}, {"device": "gpu"}, {"devise": "cpu"}
    )
    yield from value("zero_optimization.offload_param", {"device": "cpu", "pin_memory": "x"})
    yield from value("optimizer", "AdamW", [], 1)
    yield from value(
        "optimizer.type", "AdamWW", 3, "", "Optimizer", "SGD", "Lamb", "Lion", "OneBitAdam", "Muon", "LBFGS"
    )
    yield from value("optimizer.params", [1], "lr")
    yield from value("optimizer.params.learning_rate", 0.1)
    yield from value("optimizer.params.lr", "fast", -1, float("nan"), [0.1], True)
    yield from value(
        "optimizer.params.betas", [-0.9, 0.999], [0.9], [0.9, 0.99, 0.999], "0.9", 0.9, [1.0, 2.0], ["a", "b"]
    )
    yield from value("optimizer.params.eps", -1, "small", [])
    yield from value("optimizer.params.weight_decay", -1, "x", float("nan"))
    yield from value("optimizer.params.torch_adam", "yes")
    yield from value("optimizer.params.max_grad_norm", 1.0)
    yield from value("scheduler", "WarmupLR")
    yield from value("scheduler.type", "Warmup", 3, "StepLR", "lr_scheduler", "OneCycle", "get_torch_optimizer", "Enum")
    yield from value("scheduler.params", [1])
    yield from value("scheduler.params.warmup_steps", 3)
    yield from value("scheduler.params.warmup_num_steps", 0, -1, 2.5, "few", 10**9)
    yield from value("scheduler.params.total_num_steps", 0, -1, "many")
    yield from value("scheduler.params.warmup_min_lr", "x", [0.0, 0.1], -1)
    yield from value("scheduler.params.warmup_type", "cosine", 3)
    yield from value("gradient_clipping", -1, "x", True, float("nan"))
    yield from value("train_batch_size", 0, -4, 4.0, "4", True, [4])
    yield from value("bf16", True)
    yield from value("bf16.enabled", "yes", 1)
    yield from value("fp16", {"enabled": True, "loss_scale": "x"}, {"enabled": True, "initial_scale_power": -5})
    yield from value("wall_clock_breakdown", "x")
    yield from value("steps_per_print", 0, -1, "x")
    yield from value("unknown_section", {"a": 1})
    yield from value("activation_checkpointing", 3, {"partition_activations": "x"})
    yield from value("aio", 3)
    yield from value("flops_profiler", {"enabled": "x"})
    yield from value("tensorboard", 3, {"enabled": True, "output_path": 3})
    yield from value("comms_logger", {"enabled": True, "prof_ops": 3})
    yield from value("communication_data_type", "fp99")
    yield from value("data_types", 3, {"grad_accum_dtype": "fp99"})
    yield from value("checkpoint", 3, {"tag_validation": "x"})
    yield from value("prescale_gradients", "x", True)
    yield from value("gradient_predivide_factor", 0, "x")
    yield from value("sparse_gradients", True)
    yield from value("zero_allow_untested_optimizer", "x")
    yield from value("data_efficiency", {"enabled": True})
    yield from value("seed", "x")


def model_cases() -> Iterator[Case]:
    config = "model/config.json"
    yield Case("model that is missing", "--model nowhere")
    yield Case("model that is a missing path", "--model ./nowhere/model")
    yield Case("model that is a file", "--model train.txt")
    yield Case("model: name that cannot be", "--model 'a/b/c d'")
    yield Case("model: empty folder", "--model empty", (lambda folder: (folder / "empty").mkdir(),))
    yield Case("model: no weights", "", (remove("model/model.safetensors"),))
    yield Case("model: no config", "", (remove(config),))
    yield Case("model: no tokenizer", "", (remove("model/tokenizer.json"), remove("model/tokenizer_config.json")))
    yield Case("model: broken tokenizer", "", (cut("model/tokenizer.json", 100),))
    yield Case("model: tokenizer that is no object", "", (put("model/tokenizer.json", "[]"),))
    yield Case("model: broken tokenizer config", "", (put("model/tokenizer_config.json", "[]"),))
    yield Case("model: unknown tokenizer class", "", (edit("model/tokenizer_config.json", "tokenizer_class", "Nope"),))
    yield Case("model: tokens beyond the embedding", "", (edit(config, "vocab_size", 7), weights(small_vocabulary)))
    yield Case("model: config is not JSON", "", (put(config, "{"),))
    yield Case("model: config is a list", "", (put(config, "[]"),))
    yield Case("model: config is binary", "", (put(config, bytes(range(256))),))
    yield Case("model: unknown type", "", (edit(config, "model_type", "gpt9"),))
    yield Case("model: no type", "", (edit(config, "model_type"), edit(config, "architectures")))
    yield Case("model: encoder", "", (edit(config, "model_type", "bert"), edit(config, "architectures", ["BertModel"])))
    yield Case("model: encoder and decoder", "", (edit(config, "model_type", "t5"),))
    yield Case("model: causal, but of no family", "", (edit(config, "model_type", "mamba"),))
    yield Case("model: text for a width", "", (edit(config, "hidden_size", "wide"),))
    yield Case("model: text for a count", "", (edit(config, "num_layers", "2"),))
    yield Case("model: negative width", "", (edit(config, "hidden_size", -4),))
    yield Case("model: heads that do not divide", "", (edit(config, "num_heads", 5),))
    yield Case("model: unknown activation", "", (edit(config, "activation_function", "nope"),))
    yield Case("model: layers of unknown attention", "", (edit(config, "attention_layers", ["nope"] * 2),))
    yield Case("model: layers miscounted", "", (edit(config, "attention_layers", ["global"] * 5),))
    yield Case("model: unknown dtype", "", (edit(config, "dtype", "float99"),))
    yield Case("model: width of another model", "", (edit(config, "hidden_size", 16),))
    yield Case("model: neurons of another model", "", (edit(config, "intermediate_size", 24),))
    yield Case(
        "model: more layers than weights",
        "",
        (edit(config, "num_layers", 4), edit(config, "attention_layers", ["global"] * 4)),
    )
    yield Case(
        "model: fewer layers than weights",
        "",
        (edit(config, "num_layers", 1), edit(config, "attention_layers", ["global"])),
    )
    yield Case("model: no neurons", "", (edit(config, "intermediate_size", 0),))
    yield Case("model: truncated weights", "", (cut("model/model.safetensors", 1000),))
    yield Case(
        "model: weights cut at the end",
        "",
        (
            lambda folder: os.truncate(
                folder / "model/model.safetensors", (folder / "model/model.safetensors").stat().st_size - 10
            ),
        ),
    )
    yield Case("model: empty weights", "", (cut("model/model.safetensors", 0),))
    yield Case("model: weights are text", "", (put("model/model.safetensors", "weights"),))
    yield Case(
        "model: weights are a Git LFS pointer",
        "",
        (put("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),),
    )
    yield Case(
        "model: weights of another shape", "", (spoil_weight("transformer.h.0.mlp.c_fc.weight", lambda w: w[:5]),)
    )
    yield Case(
        "model: a weight is missing", "", (weights(lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.weight")),)
    )
    yield Case("model: weights of other names", "", (weights(other_names),))
    yield Case(
        "model: weights are whole numbers", "", (spoil_weight("transformer.h.0.mlp.c_fc.weight", lambda w: w.int()),)
    )
    yield Case(
        "model: weights are not numbers",
        "",
        (spoil_weight("transformer.h.0.mlp.c_fc.weight", lambda w: w * float("nan")),),
    )
    yield Case(
        "model: index of files that are missing",
        "",
        (
            remove("model/model.safetensors"),
            put("model/model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "b.safetensors"}}),
        ),
    )
    yield Case(
        "model: broken index", "", (remove("model/model.safetensors"), put("model/model.safetensors.index.json", "{"))
    )
    yield Case(
        "model: pickle that is none", "", (remove("model/model.safetensors"), put("model/pytorch_model.bin", b"junk"))
    )
    yield Case("model: broken generation config", "", (put("model/generation_config.json", "{"),))
    yield Case(
        "model: code that is missing",
        "--trust_remote_code",
        (edit(config, "auto_map", {"AutoModelForCausalLM": "code.Model"}),),
    )
    yield Case(
        "model: code that is not trusted",
        "",
        (
            edit(config, "auto_map", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.Model"}),
            edit(config, "model_type", "own"),
        ),
    )
    yield Case(
        "model: code that fails",
        "--trust_remote_code",
        (
            edit(config, "auto_map", {"AutoConfig": "code.C"}),
            edit(config, "model_type", "own"),
            put("model/code.py", "1 / 0\n"),
        ),
    )


def small_vocabulary(tensors: dict[str, Any]) -> None:
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:7].contiguous()


def other_names(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def data_cases() -> Iterator[Case]:
    def text(name: str, file: str, content: Any, flags: str = "") -> Case:
        return Case(f"data: {name}", f"--train_file {file} {flags}", (put(file, content),))

    line = json.dumps({"text": "the model learns"}) + "\n"
    rows = line * 200
    yield Case("data: file that is missing", "--train_file nowhere.txt")
    yield Case("data: a folder that is no data set", "--dataset model")
    yield Case("data: a folder for a file", "--train_file model")
    yield Case("data: name that cannot be", "--dataset 'a/b/c d' --train_file train.txt")
    yield Case(
        "data: data set that is missing",
        "--dataset nowhere-at-all",
        usual=f"{MODEL} --block_size 16 --max_steps 2 --output_dir out",
    )
    yield text("file of no known format", "train.docx", "text")
    yield text("empty", "train.txt", "")
    yield text("white space only", "train.txt", " \n" * 5)
    yield text("one short line", "train.txt", "the model\n")
    yield text("invalid UTF-8", "train.txt", b"the model \xff\xfe\n" * 200)
    yield text("UTF-16", "train.txt", ("the model learns\n" * 200).encode("utf-16"))
    yield text("binary in txt", "train.txt", random.Random(0).randbytes(5000))
    yield text("null bytes", "train.txt", b"\0" * 5000)
    yield text("broken line in jsonl", "train.jsonl", f"{rows}{{broken\n")
    yield text("jsonl: numbers", "train.jsonl", "1\n2\n3\n")
    yield text("jsonl: other columns by row", "train.jsonl", f"{rows}{json.dumps({'body': 'x'})}\n")
    yield text("jsonl: other types by row", "train.jsonl", f"{rows}{json.dumps({'text': [1]})}\n")
    yield text("jsonl: no such column", "train.jsonl", rows, "--text_column body")
    yield text("jsonl: column of numbers", "train.jsonl", (json.dumps({"text": 3}) + "\n") * 200)
    yield text("jsonl: column of nulls", "train.jsonl", (json.dumps({"text": None}) + "\n") * 200)
    yield text("jsonl: invalid UTF-8", "train.jsonl", (rows.encode()) + b'{"text": "\xff"}\n')
    yield text("binary in jsonl", "train.jsonl", random.Random(0).randbytes(5000))
    yield text("csv with ragged rows", "train.csv", "text,n\na,1\nb,2,3,4\nc\n" * 50)
    yield text("csv: no such column", "train.csv", "body,n\na,1\n")
    yield text("csv: header only", "train.csv", "text\n")
    yield text("csv: open quote", "train.csv", 'text\n"the model\n' * 50)
    yield text("csv: binary", "train.csv", random.Random(0).randbytes(5000))
    yield text("gz that is none", "train.txt.gz", "the model learns\n")
    yield text("gz cut off", "train.txt.gz", gzip.compress(b"the model learns\n" * 500, mtime=0)[:50])
    yield text("gz with a wrong checksum", "train.jsonl.gz", gzip.compress(rows.encode(), mtime=0)[:-8] + b"12345678")
    yield text("parquet that is none", "train.parquet", "the model learns\n")
    yield Case(
        "data: parquet cut off",
        "--train_file train.parquet",
        (parquet({"text": ["the model"] * 99}), cut("train.parquet", 300)),
    )
    yield Case("data: parquet with numbers", "--train_file train.parquet", (parquet({"text": [1, 2]}),))
    yield Case("data: parquet without rows", "--train_file train.parquet", (parquet({"text": []}),))
    yield Case("data: parquet of lists", "--train_file train.parquet", (parquet({"text": [["a"], ["b"]]}),))
    yield Case(
        "data: broken data set folder",
        "--dataset saved",
        (put("saved/dataset_info.json", "{"), put("saved/state.json", "{}")),
        usual=f"{MODEL} --block_size 16 --max_steps 2 --output_dir out",
    )
    yield Case(
        "data: no validation text",
        "--train_file one.txt",
        (put("one.txt", "the model learns " * 50),),
        usual=f"{MODEL} --block_size 16 --max_steps 2 --output_dir out",
    )
    yield Case("data: empty validation", "--validation_file v.txt", (put("v.txt", "\n"),))


def output_cases() -> Iterator[Case]:
    yield Case("output: a file", "--output_dir train.txt")
    yield Case("output: below a file", "--output_dir train.txt/out")
    yield Case("output: not a run", "--output_dir model")
    yield Case("output: not a run, overwrite", "--output_dir model --overwrite")
    yield Case("output: holds a run", "--output_dir run")
    yield Case("output: read-only disk", "--output_dir disk/out", (mount_read_only,))
    yield Case("output: read-only disk, empty folder", "--output_dir disk", (mount_read_only,))
    yield Case("output: name too long", f"--output_dir {'x' * 300}")
    yield Case(
        "output: broken link", "--output_dir link", (lambda folder: (folder / "link").symlink_to("nowhere/at/all"),)
    )
    yield Case("output: link to itself", "--output_dir link", (lambda folder: (folder / "link").symlink_to("link"),))
    yield Case("output: in a system folder", "--output_dir /proc/out")
    yield Case("output: here", "--output_dir .")
    yield Case("output: parents that are missing", "--output_dir some/where/out")


def checkpoint_cases() -> Iterator[Case]:
    state, manifest = f"{CHECKPOINT}/state.json", f"{CHECKPOINT}/manifest.json"
    slices = f"{CHECKPOINT}/rank-00000-0000.safetensors"
    asked, newest = f"--resume {CHECKPOINT}", "--output_dir run --resume"

    def spoilt(name: str, *changes: Change, flags: str = asked) -> Case:
        return Case(f"checkpoint: {name}", f"{CHECKPOINTED} {flags}", changes)

    def stated(path: str, *value: Any) -> Case:
        said = f"{json.dumps(value[0])[:40]}" if value else "missing"
        return spoilt(f'state.json, sealed again, "{path}": {said}', edit(state, path, *value), seal())

    yield spoilt("that is missing", flags="--resume nowhere")
    yield spoilt("that is a file", flags="--resume train.txt")
    yield spoilt("that is a model", flags="--resume model")
    yield spoilt("that is a run", flags="--resume run")
    yield spoilt("empty name", flags="--resume ''")
    yield spoilt("no checkpoints yet", remove("run/checkpoints"), flags=newest)
    yield spoilt(
        "empty folder of checkpoints",
        remove("run/checkpoints"),
        lambda folder: (folder / "run/checkpoints").mkdir(),
        flags=newest,
    )
    yield spoilt("checkpoints that is a file", remove("run/checkpoints"), put("run/checkpoints", "x"), flags=newest)
    yield spoilt("files cut off", cut(slices, 100))
    yield spoilt("files altered", flip(slices, -5))
    yield spoilt("newest altered, the one before taken", flip(slices, -5), flags=newest)
    yield spoilt(
        "all altered",
        flip(slices, -5),
        flip("run/checkpoints/step-00000002/rank-00001-0000.safetensors", -5),
        flags=newest,
    )
    yield spoilt("file missing", remove(slices))
    yield spoilt("file is a folder", remove(slices), lambda folder: (folder / slices).mkdir())
    yield spoilt("no manifest", remove(manifest))
    yield spoilt("manifest is not JSON", put(manifest, "{"))
    yield spoilt("manifest is binary", put(manifest, bytes(range(256))))
    yield spoilt("manifest is a list", put(manifest, []))
    yield spoilt("manifest names no files", put(manifest, {"format": 1}))
    yield spoilt(
        "manifest of wrong types", put(manifest, {"format": 1, "files": {"state.json": {"bytes": "x", "sha256": 3}}})
    )
    yield spoilt(
        "manifest with nulls", put(manifest, {"format": 1, "files": {"state.json": {"bytes": None, "sha256": None}}})
    )
    yield spoilt("manifest without the slices", keep_state_only)
    yield spoilt("manifest that leads outside", lead_outside)
    yield spoilt("future format", edit(manifest, "format", 99))
    yield spoilt("format as a text", edit(manifest, "format", "1"))
    yield spoilt("state.json altered", flip(state, 50))
    yield spoilt("state.json, sealed again, not JSON", put(state, "{"), seal())
    yield spoilt("state.json, sealed again, a list", put(state, []), seal())
    yield spoilt("state.json, sealed again, empty", put(state, {}), seal())
    for key in ("step", "world_size", "settings", "ds_config", "pruner", "engine", "texts", "measured"):
        yield stated(key)
    for key in ("step", "settings", "ds_config", "pruner", "engine", "texts", "measured"):
        yield stated(key, "x")
    yield stated("step", -1)
    yield stated("step", 2.5)
    yield stated("world_size", 3)
    yield stated("settings.max_steps")
    yield stated("settings.max_steps", None)
    yield stated("ds_config.train_batch_size")
    yield stated("ds_config.optimizer", 3)
    yield stated("pruner.groups")
    yield stated("pruner.groups", 3)
    yield stated("pruner.groups", {})
    yield stated("pruner.scalars", {})
    yield stated("pruner.churn", "x")
    yield stated("pruner.step", None)
    yield stated("pruner.sampled", "x")
    yield stated("engine.counters", {})
    yield stated("engine.moments", ["nope"])
    yield stated("engine.moments", 3)
    yield stated("engine.scalars", {"step": "x"})
    yield stated("engine.options", [])
    yield stated("engine.options", [{"lr": "x"}])
    yield stated("engine.scheduler", 3)
    yield stated("engine.scheduler", {"nope": 1})
    yield stated("engine.loss_scaler", 3)
    yield stated("texts", {})
    yield stated("texts.train", "other")
    yield stated("measured.seconds", 3)
    yield stated("measured.perplexities", [])
    yield stated("measured.resumed_at", 3)
    yield stated("measured.total_seconds", "x")
    yield spoilt("slices, sealed again, not safetensors", put(slices, "x"), seal())
    yield spoilt("slices, sealed again, cut off", cut(slices, 500), seal())
    yield spoilt("slices, sealed again, without their offsets", foreign_slices, seal())
    yield spoilt("of another criterion", flags=f"{asked} --criterion movement")
    yield spoilt("of another target", flags=f"{asked} --remaining 0.7")
    yield spoilt("of another seed", flags=f"{asked} --seed 9")
    yield spoilt("of another batch", flags=f"{asked} --train_batch_size 8")
    yield spoilt("of another text", put("train.txt", "the model learns on text\n" * 300))
    yield spoilt("of another tokenizer", other_tokenizer)
    yield spoilt("of another model", other_model)
    yield spoilt("of a wider model", other_model_of(32))
    yield spoilt("past the steps", flags=f"{asked} --max_steps 3")


CHECKPOINTED = "--criterion gum --similarity_every 1 --max_steps 5 --save_every 2"


def keep_state_only(folder: Path) -> None:
    path = folder / CHECKPOINT / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"state.json": manifest["files"]["state.json"]}
    path.write_text(json.dumps(manifest))


def lead_outside(folder: Path) -> None:
    path = folder / CHECKPOINT / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../nowhere.safetensors"] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))


def foreign_slices(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, folder / CHECKPOINT / "rank-00000-0000.safetensors")


def other_tokenizer(folder: Path) -> None:
    make_tokenizer(folder / "model", 290)


def other_model(folder: Path) -> None:
    make_model(folder / "model", num_layers=1)


def other_model_of(hidden_size: int) -> Change:
    return lambda folder: make_model(folder / "model", hidden_size=hidden_size)


def component_cases() -> Iterator[Case]:
    def flop(name: str, flags: str, *changes: Change) -> Case:
        return Case(f"components: {name}", f"--criterion flop --max_steps 8 {flags}", changes)

    config = "model/config.json"
    yield flop("unknown target", "--targets mlp,lm_head")
    yield flop("no target", "--targets ''")
    yield flop("target twice", "--targets mlp,mlp")
    yield flop("targets with a blank", "--targets 'mlp, attention'")
    yield flop("rank above the full one", "--initial_rank 99")
    yield flop("rank 0", "--initial_rank 0")
    yield flop("less than one component each", "--remaining 0.001")
    yield flop("less than one component each, per weight", "--remaining 0.01 --scope per_group")
    yield flop("floor above the target", "--remaining 0.3 --min_kept 11")
    yield flop("gates that never close", "--initial_drop_rate 0")
    yield flop("gates that are never open", "--initial_drop_rate 1")
    yield flop("huge gate learning rate", "--gate_learning_rate 1e38")
    yield flop("negative gate learning rate", "--gate_learning_rate -1")
    yield flop("gate learning rate that is no number", "--gate_learning_rate nan")
    yield flop("multipliers that stand still", "--lambda_learning_rate 0")
    yield flop("huge multipliers", "--lambda_learning_rate 1e38")
    yield flop("warm-up of the target beyond the run", "--target_warmup_fraction 2")
    yield flop("target at once", "--target_warmup_fraction 0")
    yield flop("negative l1", "--gate_l1 -1")
    yield flop("one width for all", "--layout uniform")
    yield flop("zeros for components", "--layout pad")
    yield flop("unknown factors", "--factors qr")
    yield flop("no clusters", "--targets embedding --embedding_clusters 0")
    yield flop("more clusters than tokens", "--targets embedding --embedding_clusters 1000")
    yield flop("tied embeddings that are not", "--targets embedding --tie_embeddings", untie)
    yield flop("factorised already", "", edit(config, "factorized", {"transformer.h.0.mlp.c_fc": 3}))
    yield flop("one step", "--max_steps 1")
    yield flop("weights that are not numbers", "", spoil_weight("transformer.h.0.mlp.c_fc.weight", lambda w: w / 0))
    yield Case("components: targets of a neuron criterion", "--criterion neuron_l0 --max_steps 8 --targets attention")
    yield Case("components: a checkpoint of neurons", f"{CHECKPOINTED} --criterion flop --resume {CHECKPOINT}")


def untie(folder: Path) -> None:
    edit("model/config.json", "tie_word_embeddings", False)(folder)
    weights(lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))(folder)


def teacher_cases() -> Iterator[Case]:
    teacher = "--teacher teacher"

    def copied(*changes: Change) -> tuple[Change, ...]:
        return (lambda folder: shutil.copytree(folder / "model", folder / "teacher"), *changes)

    def of_other_vocabulary(folder: Path) -> None:
        make_tokenizer(folder / "teacher", 290)
        make_model(folder / "teacher")

    yield Case("teacher that is missing", "--teacher nowhere")
    yield Case("teacher that is a file", "--teacher train.txt")
    yield Case("teacher: empty name", "--teacher ''")
    yield Case("teacher: of another vocabulary", teacher, copied(of_other_vocabulary))
    yield Case("teacher: no weights", teacher, copied(remove("teacher/model.safetensors")))
    yield Case("teacher: truncated weights", teacher, copied(cut("teacher/model.safetensors", 1000)))
    yield Case("teacher: config is not JSON", teacher, copied(put("teacher/config.json", "{")))
    yield Case("teacher: unknown type", teacher, copied(edit("teacher/config.json", "model_type", "gpt9")))
    yield Case("teacher: another width", teacher, copied(lambda folder: make_model(folder / "teacher", 32)))
    yield Case("teacher: alpha above 1", "--teacher self --distill_alpha 1.5")
    yield Case("teacher: alpha that is no number", "--teacher self --distill_alpha nan")
    yield Case("teacher: temperature 0", "--teacher self --distill_temperature 0")
    yield Case("teacher: infinite temperature", "--teacher self --distill_temperature inf")
    yield Case("teacher: alpha without a teacher", "--distill_alpha 0.3")


def task_cases() -> Iterator[Case]:
    header, row = "mr,ref,label,number", "the model learns,a neuron drops,yes,0.5"
    rows = "\n".join([header, *[row, "the layer,prunes fast,no,1.5"] * 20]) + "\n"
    tasked = "--block_size 28 --train_file rows.csv --validation_file rows.csv --eval_examples 2 --max_new_tokens 4"

    def written(name: str, flags: str = "", content: str = rows, *changes: Change) -> Case:
        return Case(f"task: {name}", f"--task data_to_text {tasked} {flags}", (put("rows.csv", content), *changes))

    def labelled(name: str, flags: str = "", content: str = rows, *changes: Change) -> Case:
        told = f"--task classification --model encoder --prompt_template {{mr}} {tasked} {flags}"
        return Case(f"task: labels, {name}", told, (make_encoder, put("rows.csv", content), *changes))

    yield Case("task: unknown", "--task translation")
    yield Case("task: template without a task", "--prompt_template '{text}'")
    yield Case("task: rows of text alone", "--task data_to_text")
    yield written("as it should be")
    yield written("unknown column", "--prompt_template '{meaning}'")
    yield written("template without a column", "--prompt_template 'say:'")
    yield written("template with an open brace", "--completion_template '{ref'")
    yield written("template with a number", "--completion_template '{0}'")
    yield written("template with an attribute", "--completion_template '{ref.x}'")
    yield written("empty template", "--prompt_template ''")
    yield written("empty completions", content=rows.replace("a neuron drops", ""))
    yield written("no completions at all", content=f"{header}\nthe model,,yes,1\n")
    yield written("prompt longer than a block", content=rows.replace("the model", "the model " * 40))
    yield written("prompt longer than a block, dropped", "--long_examples drop", rows.replace("the", "the " * 40))
    yield written("unknown way with long ones", "--long_examples skip")
    yield written("more new tokens than positions", "--max_new_tokens 1000")
    yield written("no new tokens", "--max_new_tokens 0")
    yield written("no beams", "--num_beams 0")
    yield written("more beams than tokens", "--num_beams 5000")
    yield written("batch of no prompts", "--generation_batch_size 0")
    yield written("huge number of examples", f"--eval_examples {10**30}")
    yield written("header alone", content=f"{header}\n")
    yield written("binary", "", "\0" * 500)
    yield labelled("as it should be")
    yield labelled("model that is no encoder", "--model model")
    yield labelled("unknown column", "--label_column class")
    yield labelled("numbers", "--label_column number")
    yield labelled("one class", content=rows.replace("no,1.5", "yes,1.5"))
    yield labelled("missing here and there", content=f"{rows}the model,a neuron,,2\n")
    yield labelled("missing everywhere", content=rows.replace("no,1.5", ",1").replace("yes,", ","))
    yield labelled("numbers and words", content=rows.replace("no,1.5", "3,1.5"))
    yield labelled("column without a task", "--task lm --label_column label")
    yield labelled("components", "--criterion flop --targets mlp,attention,embedding --max_steps 8")
    yield labelled("completion", "--completion_template '{ref}'")


def make_encoder(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    shutil.copytree(folder / "model", folder / "encoder", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder / "encoder")


def launcher_cases() -> Iterator[Case]:
    yield Case("launcher: misspelt flag", "--remainin 0.5")
    yield Case("launcher: truncated weights", "", (cut("model/model.safetensors", 1000),))
    yield Case("launcher: unknown optimizer", "--ds_config ds.json", (edit("ds.json", "optimizer.type", "AdamWW"),))
    yield Case(
        "launcher: damaged checkpoint",
        f"{CHECKPOINTED} --resume {CHECKPOINT}",
        (flip(f"{CHECKPOINT}/rank-00000-0000.safetensors", -5),),
    )


# --- fuzz ----------------------------------------------------------------------------------------------------------

JUNK: list[Any] = ["", "x", "auto", "-1", "nan", -1, 0, 0.5, 1.5, None, True, [], {}, [1, 2], "\u00fc", 2**63]


def fuzz_cases(per_kind: int, seed: int) -> Iterator[tuple[str, Case]]:
    """Yield cases with random changes, by kind."""
    for kind, make in (
        ("command line", fuzzed_flags),
        ("ds_config", fuzzed_ds_config),
        ("recipe", fuzzed_recipe),
        ("checkpoint", fuzzed_checkpoint),
        ("data", fuzzed_data),
    ):
        rng = random.Random(f"{seed} {kind}")
        for number in range(per_kind):
            yield kind, make(f"fuzz: {kind} {number}", rng)


def fuzzed_flags(name: str, rng: random.Random) -> Case:
    # The model stays: without it another one would be trained first.
    words = f"{USUAL} --criterion gum --remaining 0.5 --seed 3 --ds_config ds.json --overwrite".split()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(words))
        words[place : place + 1] = rng.choice(([], [words[place]] * 2, [str(rng.choice(JUNK))]))
    return Case(name, usual=f"{MODEL} {shlex.join(words)}")


def fuzzed_ds_config(name: str, rng: random.Random) -> Case:
    state = rng.getrandbits(32)
    return Case(name, "--ds_config ds.json", (lambda folder: mutate_json(folder / "ds.json", random.Random(state)),))


def mutate_json(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    for _ in range(rng.randint(1, 2)):
        places = list(places_of(content))
        section, key = rng.choice(places)
        if rng.random() < 0.3:
            del section[key]
        else:
            section[key] = rng.choice(JUNK)
    path.write_text(json.dumps(content))


def places_of(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in section.items():
        yield section, key
        if isinstance(value, dict):
            yield from places_of(value)


def fuzzed_recipe(name: str, rng: random.Random) -> Case:
    recipe: dict[Any, Any] = {"criterion": "gum", "remaining": 0.5, "seed": 3, "min_kept": 2, "learning_rate": 1e-3}
    recipe |= {"update_every": 2, "overwrite": True, "layout": "pad", "text_column": "text", "eval_tokens": 50}
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(recipe))
        if rng.random() < 0.3:
            recipe[rng.choice(["", "x", 3, None, f"{key}s"])] = recipe.pop(key)
        else:
            recipe[key] = rng.choice(JUNK)
    raw = yaml.safe_dump(recipe, sort_keys=False).encode()
    if rng.random() < 0.3:
        raw = flipped(raw, rng)
    return Case(name, "--config recipe.yaml", (put("recipe.yaml", raw),))


def fuzzed_checkpoint(name: str, rng: random.Random) -> Case:
    file = rng.choice(["state.json", "manifest.json", "rank-00000-0000.safetensors", "rank-00001-0000.safetensors"])
    state = rng.getrandbits(32)

    def change(folder: Path) -> None:
        path = folder / CHECKPOINT / file
        path.write_bytes(flipped(path.read_bytes(), random.Random(state)))

    changes = (change, seal()) if file != "manifest.json" and rng.random() < 0.5 else (change,)
    return Case(name, f"{CHECKPOINTED} --resume {CHECKPOINT}", changes)


def fuzzed_data(name: str, rng: random.Random) -> Case:
    rows = [" ".join(rng.choices(SENTENCE.split(), k=9)) for _ in range(200)]
    jsonl = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    file, raw = rng.choice(
        [
            ("train.txt", "\n".join(rows).encode()),
            ("train.jsonl", jsonl),
            ("train.csv", "\n".join(["text", *rows]).encode()),
            ("train.jsonl.gz", gzip.compress(jsonl, mtime=0)),
        ]
    )
    return Case(name, f"--train_file {file}", (put(file, flipped(raw, rng)),))


def flipped(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# --- what the cases start from --------------------------------------------------------------------------------------


def make_template(folder: Path) -> None:
    """Make everything that a run needs, and a run of 5 steps with checkpoints after 2 and 4."""
    rng = random.Random(0)
    for name, lines in (("train", 200), ("validation", 20)):
        text = "".join(" ".join(rng.choices(SENTENCE.split(), k=rng.randint(3, 12))) + ".\n" for _ in range(lines))
        (folder / f"{name}.txt").write_text(text)
    make_tokenizer(folder / "model", 300)
    make_model(folder / "model")
    shutil.copy(ROOT / "ds_configs" / "zero3_cpu.json", folder / "ds.json")
    outcome = try_on_ranks(Case("a run", f"{CHECKPOINTED} --output_dir run").words, folder, TIMEOUT)
    if set(outcome.codes) != {0}:
        sys.exit("the run that the cases start from failed:\n" + "\n".join(outcome.errors))
    (folder / "run" / "report.json").unlink()  # as if it had been killed, so that it can go on


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    from scale_prune.data.embedded import train_tokenizer

    train_tokenizer([(folder.parent / "train.txt").read_text()], vocabulary).save_pretrained(folder)


def make_model(folder: Path, hidden_size: int = 12, num_layers: int = 2) -> None:
    import torch
    from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention_types=[[["global"], num_layers]],
        num_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)


# --- trying them -----------------------------------------------------------------------------------------------------


def try_case(case: Case, template: Path, place: Path, timeout: float) -> Outcome:
    """Give a case a folder of its own, spoil it, and run the command in it."""
    folder = place / "case"
    shutil.copytree(template, folder, symlinks=True)
    try:
        for change in case.changes:
            change(folder)
        before = {path: contents_of(path) for path in folder.rglob("*")}
        started = time.monotonic()
        run = try_by_launcher if case.name.startswith("launcher") else try_on_ranks
        outcome = run(case.words, folder, timeout)
        outcome.seconds = time.monotonic() - started
        outcome.errors = [text.replace(f"{folder}/", "") for text in outcome.errors]
        outcome.touched = [str(path.relative_to(folder)) for path in before if contents_of(path) != before[path]]
        return outcome
    finally:
        if (folder / "disk").is_mount():
            subprocess.run(["umount", "-l", str(folder / "disk")], check=True)
        shutil.rmtree(folder)


def contents_of(path: Path) -> Any:
    """Return what a file holds, or the names in a folder."""
    if path.is_file():
        return path.read_bytes()
    return sorted(os.listdir(path)) if path.is_dir() else path.exists()


def try_on_ranks(words: list[str], folder: Path, timeout: float) -> Outcome:
    """Run the command in processes of a process group of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as logs:
        port = free_port()
        processes = [
            context.Process(target=be_rank, args=(rank, port, words, str(folder), logs)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        errors = [(Path(logs) / f"{rank}.err").read_text(errors="replace") for rank in range(RANKS)]
    return Outcome(codes, errors)


def be_rank(rank: int, port: int, words: list[str], folder: str, logs: str) -> None:
    """Be a rank: run the command's own file, as a launcher does."""
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{logs}/{rank}.{suffix}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    sys.argv = [str(ROOT / "launch" / "prune.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def try_by_launcher(words: list[str], folder: Path, timeout: float) -> Outcome:
    """Run the command as a user does. The launcher ends with the exit code of a rank, and mixes what they write."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)]
    process = subprocess.Popen(
        [*launcher, "--master_port", str(free_port()), str(ROOT / "launch" / "prune.py"), *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return Outcome([None], [process.communicate()[1]])
    return Outcome([process.returncode], [errors])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse()
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        template = Path(place) / "template"
        template.mkdir()
        make_template(template)

        def outcomes(cases: Iterable[tuple[str, Case]]) -> Iterator[tuple[str, Case, Outcome]]:
            for kind, case in cases:
                if args.only in (kind, case.name) or args.only in case.name:
                    outcome = try_case(case, template, Path(place), args.timeout)
                    print(f"{outcome.seconds:5.1f} s  {outcome.verdict:10}  {case.name}", file=sys.stderr, flush=True)
                    if args.verbose:
                        print(shlex.join(case.words), *outcome.errors, sep="\n---\n", file=sys.stderr, flush=True)
                    yield kind, case, outcome

        listed = [
            *(("flags", case) for case in flag_cases()),
            *(("recipe", case) for case in recipe_cases()),
            *(("ds_config", case) for case in ds_cases()),
            *(("model", case) for case in model_cases()),
            *(("data", case) for case in data_cases()),
            *(("output", case) for case in output_cases()),
            *(("checkpoint", case) for case in checkpoint_cases()),
            *(("components", case) for case in component_cases()),
            *(("teacher", case) for case in teacher_cases()),
            *(("task", case) for case in task_cases()),
            *(("launcher", case) for case in launcher_cases()),
        ]
        tried = list(outcomes(listed))
        fuzzed = list(outcomes(fuzz_cases(args.fuzz, args.seed)))
    print_table(tried)
    print_summary("input", tried)
    print_summary("fuzzed", fuzzed)
    sys.exit(any(outcome.verdict not in ("ran", "refused") for _, _, outcome in [*tried, *fuzzed]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="try only cases whose name has this in it")
    parser.add_argument("--fuzz", type=int, default=8, help="random changes of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random changes")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds after which a case counts as hanging")
    parser.add_argument("--verbose", action="store_true", help="show what every rank wrote")
    return parser.parse_args()


def print_table(tried: list[tuple[str, Case, Outcome]]) -> None:
    print("| input | exit code | message |\n|---|---:|---|")
    for _, case, outcome in tried:
        codes = ", ".join(str(code) for code in sorted(set(outcome.codes), key=str))
        print(f"| {cell(case.name)} | {codes} | {cell(said(outcome))} |")


def said(outcome: Outcome) -> str:
    if outcome.verdict == "refused":
        return outcome.messages[0].removeprefix("error: ")
    last = (outcome.errors[0].strip().splitlines() or [""])[-1]
    return "runs" if outcome.verdict == "ran" else f"BROKEN, {outcome.verdict}: {last}"


def cell(text: str) -> str:
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text).replace("|", "\\|")
    return shown if len(shown) <= 330 else f"{shown[:300]} ..."


def print_summary(name: str, tried: list[tuple[str, Case, Outcome]]) -> None:
    print(f"\n| {name} | tried | ran | refused with one message | broke the law |\n|---|---:|---:|---:|---:|")
    for kind in [*dict.fromkeys(kind for kind, _, _ in tried), "all"]:
        verdicts = Counter(outcome.verdict for each, _, outcome in tried if kind in (each, "all"))
        ran, refused = verdicts.pop("ran", 0), verdicts.pop("refused", 0)
        broken = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or 0
        print(f"| {kind} | {ran + refused + sum(verdicts.values())} | {ran} | {refused} | {broken} |")


if __name__ == "__main__":
    main()

"""The cases of `bad_inputs.yaml`: what is spoiled in a folder of its own, and what the command says to it.

A folder has a tiny model, a little text, `ds.json` and, where ranks have made it, a run with checkpoints.
`test_bad_input.py` tries the cases that are refused before ranks meet, `benchmarks/bad_input.py` all of them on ranks.
"""

import gzip
import json
import os
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from command import ROOT, make_work, text
from memory_backend import steady_model
from models import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from scale_prune.data.embedded import train_tokenizer

MODEL = "--model model"
DATA = "--train_file train.txt --validation_file validation.txt"
USUAL = f"{DATA} --block_size 16 --max_steps 4 --train_batch_size 4 --output_dir out"
WITHOUT_DATA = "--block_size 16 --max_steps 2 --output_dir out"
CHECKPOINT = "run/checkpoints/step-00000004"
A_RUN = "--criterion gum --similarity_every 1 --max_steps 5 --save_every 2"
FLAGS = {
    "recipe": "--config recipe.yaml",
    "ds_config": "--ds_config ds.json",
    "checkpoint": f"{A_RUN} --resume {CHECKPOINT}",
    "components": "--criterion flop --max_steps 8",
    "teacher": "--teacher teacher",
    "rows": "--task data_to_text",
    "labels": "--task classification --model encoder --prompt_template {mr}",
}
"""Flags of a kind's cases, before their own."""

ROWS = "mr,ref,label,number\n" + 20 * "the model learns,a neuron drops,yes,0.5\nthe layer,prunes fast,no,1.5\n"
TASKED = "--block_size 28 --train_file rows.csv --validation_file rows.csv --eval_examples 2 --max_new_tokens 4"
WEIGHTS, WEIGHT = "model/model.safetensors", "transformer.h.0.mlp.c_fc.weight"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bad input.

    Attributes:
        name: what is bad.
        kind: the part of the table.
        flags: the command line, as a user would type it; paths are in the case's own folder.
        spoils: what is done to the folder: file or function, and with what, by verb.
        says: what the message contains; None where the run is to go well.
        late: only ranks find it.
    """

    name: str
    kind: str
    flags: str = ""
    spoils: dict[str, Any] = field(default_factory=dict)
    says: str | None = None
    late: bool = False

    @property
    def words(self) -> list[str]:
        """All words of the command line; where two set the same, the last one counts."""
        return shlex.split(f"{MODEL} {self.flags}")

    @property
    def is_found_early(self) -> bool:
        """Whether one process finds it, before ranks meet and without a run to go on with."""
        return self.says is not None and not self.late and "run" not in re.split(r"[\s/]", self.flags)

    def spoil(self, folder: Path) -> None:
        """Make the input bad."""
        if self.kind in ("rows", "labels"):
            (folder / "rows.csv").write_text(ROWS)
        if self.kind == "labels":
            make_encoder(folder)
        for verb, what in self.spoils.items():
            for target in what if isinstance(what, list | dict) else [what]:
                value = [what[target]] if isinstance(what, dict) else []
                if verb == "do":
                    SPOILERS[target](folder)
                else:
                    VERBS[verb](folder / str(target).replace("@", f"{CHECKPOINT}/"), *value)


def read_cases() -> Iterator[Case]:
    """Yield the cases of the table, then the values that its mappings of keys list."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for kind, lines in table["cases"].items():
        for line in lines:
            known = {key: line.pop(key) for key in ("name", "says", "late") if key in line}
            data = line.pop("data", f"{USUAL} {TASKED}" if kind in ("rows", "labels") else USUAL)
            flags = f"{data or WITHOUT_DATA} {FLAGS.get(kind, '')} {line.pop('flags', '')}".replace("NINES", "9" * 5000)
            yield Case(kind=kind, flags=flags, spoils=line, **known)
    for kind, (file, verbs) in {"ds_config": ("ds.json", {}), "checkpoint": ("@state.json", {"do": ["seal"]})}.items():
        for key, values in table["values"][kind].items():
            for value, says, *late in values:
                name, spoils = f'"{key}": {json.dumps(value)}', {"edit": {file: {key: value}}} | verbs
                flags = f"{USUAL} {FLAGS[kind]}"
                yield Case(name=name, kind=kind, flags=flags, spoils=spoils, says=says, late=bool(late))


def make_template(folder: Path) -> Path:
    """Make everything that a run needs."""
    shutil.copy(ROOT / "ds_configs" / "zero3_cpu.json", folder / "ds.json")
    return make_work(folder)


# --- what spoils a file ----------------------------------------------------------------------------------------------


def put(path: Path, content: Any) -> None:
    """Write a file: bytes and texts as they are, a text and how often as [count, text, what follows], or JSON."""
    if isinstance(content, list) and len(content) > 1:
        count, repeated, *rest = content
        content = b"".join(each if isinstance(each, bytes) else each.encode() for each in (count * repeated, *rest))
    raw = content if isinstance(content, bytes | str) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())


def edit(path: Path, values: dict[str, Any]) -> None:
    """Give keys of a JSON file other values; the keys of a path are joined with dots."""
    content = json.loads(path.read_text())
    for keys, value in values.items():
        *sections, key = keys.split(".")
        section = content
        for each in sections:
            section = section.setdefault(each, {})
        section[key] = value
    put(path, content)


def drop(path: Path, names: list[str]) -> None:
    content = json.loads(path.read_text())
    for name in names:
        *sections, key = name.split(".")
        section = content
        for each in sections:
            section = section[each]
        del section[key]
    path.write_text(json.dumps(content))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path, size: int) -> None:
    """Cut a file to a size, or by as much where it is negative."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= 0xFF
    path.write_bytes(raw)


def replace(path: Path, texts: dict[str, str]) -> None:
    for old, new in texts.items():
        path.write_text(path.read_text().replace(old, new))


def parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"text": rows}), path)


VERBS: dict[str, Callable[..., object]] = {
    "put": put,
    "edit": edit,
    "drop": drop,
    "remove": remove,
    "cut": cut,
    "flip": flip,
    "replace": replace,
    "parquet": parquet,
    "folder": Path.mkdir,
    "link": Path.symlink_to,
    "junk": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "gz": lambda path: path.write_bytes(gzip.compress(200 * b'{"text": "the model learns"}\n', mtime=0)),
}


# --- what spoils a folder --------------------------------------------------------------------------------------------


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Write the model's weights anew, after a change."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def spoil_weight(value: Callable[[Any], Any]) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({WEIGHT: value(tensors[WEIGHT]).contiguous()}))


def rename(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def seal(folder: Path) -> None:
    """Make a checkpoint's manifest fit its files again."""
    manifest = json.loads((folder / CHECKPOINT / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        raw = (folder / CHECKPOINT / name).read_bytes()
        entry |= {"bytes": len(raw), "sha256": sha256(raw).hexdigest()}
    (folder / CHECKPOINT / "manifest.json").write_text(json.dumps(manifest))


def list_in_manifest(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / CHECKPOINT / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"files": change(manifest["files"])}))

    return spoil


def other_tokenizer(name: str) -> Callable[[Path], object]:
    return lambda folder: train_tokenizer([text(200, seed=0)], 290).save_pretrained(folder / name)


def other_model(name: str, **sizes: Any) -> Callable[[Path], None]:
    """Put a model of other sizes, and of its tokenizer's vocabulary, in the place of one."""

    def spoil(folder: Path) -> None:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        vocabulary = len(AutoTokenizer.from_pretrained(folder / name))
        steady_model("gpt_neo", vocab_size=vocabulary, **ids, **sizes).save_pretrained(folder / name)

    return spoil


def make_encoder(folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "encoder", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "encoder")
    AutoModel.from_config(tiny_config("bert", vocab_size=len(tokenizer))).save_pretrained(folder / "encoder")


def untie(folder: Path) -> None:
    edit(folder / "model/config.json", {"tie_word_embeddings": False})
    weights(lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))(folder)


def mount_read_only(folder: Path) -> None:
    (folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder / "disk")], check=False)


SPOILERS: dict[str, Callable[[Path], object]] = {
    "name the weights otherwise": weights(rename),
    "round a weight": spoil_weight(lambda weight: weight.int()),
    "make a weight nan": spoil_weight(lambda weight: weight * float("nan")),
    "untie the output": untie,
    "seal": seal,
    "list the state alone": list_in_manifest(lambda files: {"state.json": files["state.json"]}),
    "list a file outside": list_in_manifest(lambda files: files | {"../../../x.safetensors": files["state.json"]}),
    "write slices without offsets": lambda folder: save_file(
        {"a": torch.zeros(3)}, folder / CHECKPOINT / "rank-00000-0000.safetensors"
    ),
    "copy the teacher": lambda folder: shutil.copytree(folder / "model", folder / "teacher"),
    "train another tokenizer": other_tokenizer("model"),
    "train another tokenizer for the teacher": other_tokenizer("teacher"),
    "make a shorter model": other_model("model", num_hidden_layers=1, attention_types=[[["global"], 1]]),
    "make a wider model": other_model("model", hidden_size=23),
    "fit the teacher to its tokenizer": other_model("teacher"),
    "make a wider teacher": other_model("teacher", hidden_size=23),
    "mount a read-only disk": mount_read_only,
}

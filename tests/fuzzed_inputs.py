"""Valid inputs with random changes: of the command line, of a ds_config, a recipe, a checkpoint and a text."""

import gzip
import json
import random
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from bad_inputs import CHECKPOINT, FLAGS, SPOILERS, USUAL, Case
from command import ROOT, text

JUNK: list[Any] = ["", "x", "auto", "-1", "nan", -1, 0, 0.5, 1.5, None, True, [], {}, [1, 2], "\u00fc", 2**63]
RECIPE = {"criterion": "gum", "remaining": 0.5, "seed": 3, "min_kept": 2, "learning_rate": 1e-3, "update_every": 2}


def fuzz_cases(per_kind: int, seed: int) -> Iterator[Case]:
    """Yield cases with random changes, of which any message will do."""
    for kind in ("command line", "ds_config", "recipe", "checkpoint", "data"):
        rng = random.Random(f"{seed} {kind}")
        for number in range(per_kind):
            flags, spoils = fuzzed_flags(rng), {}
            if kind != "command line":
                flags, spoils = f"{USUAL} {FLAGS.get(kind, '')}", FUZZED[kind](rng)
            if kind == "data":
                flags += f" --train_file {next(iter(spoils['put']))}"
            yield Case(name=f"fuzz: {kind} {number}", kind=kind, flags=flags, spoils=spoils, says="")


def fuzzed_flags(rng: random.Random) -> str:
    # The model stays: without it another one would be trained first.
    words = f"{USUAL} --criterion gum --remaining 0.5 --seed 3 --ds_config ds.json --overwrite".split()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(words))
        words[place : place + 1] = rng.choice(([], [words[place]] * 2, [str(rng.choice(JUNK))]))
    return shlex.join(words)


def fuzzed_ds_config(rng: random.Random) -> dict[str, Any]:
    content = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    for _ in range(rng.randint(1, 2)):
        section, key = rng.choice(list(places_of(content)))
        if rng.random() < 0.3:
            del section[key]
        else:
            section[key] = rng.choice(JUNK)
    return {"put": {"ds.json": content}}


def places_of(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in section.items():
        yield section, key
        if isinstance(value, dict):
            yield from places_of(value)


def fuzzed_recipe(rng: random.Random) -> dict[str, Any]:
    recipe: dict[Any, Any] = RECIPE | {"overwrite": True, "layout": "pad", "text_column": "text", "eval_tokens": 50}
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(recipe))
        if rng.random() < 0.3:
            recipe[rng.choice(["", "x", 3, None, f"{key}s"])] = recipe.pop(key)
        else:
            recipe[key] = rng.choice(JUNK)
    raw = yaml.safe_dump(recipe, sort_keys=False).encode()
    return {"put": {"recipe.yaml": flipped(raw, rng) if rng.random() < 0.3 else raw}}


def fuzzed_checkpoint(rng: random.Random) -> dict[str, Any]:
    file = rng.choice(["state.json", "manifest.json", "rank-00000-0000.safetensors", "rank-00001-0000.safetensors"])
    state, path = rng.getrandbits(32), f"{CHECKPOINT}/{file}"
    change = f"flip bits of {file} by {state}"
    SPOILERS[change] = lambda folder: (folder / path).write_bytes(
        flipped((folder / path).read_bytes(), random.Random(state))
    )
    return {"do": [change, "seal"] if file != "manifest.json" and rng.random() < 0.5 else [change]}


def fuzzed_data(rng: random.Random) -> dict[str, Any]:
    rows = text(200, seed=rng.getrandbits(32)).splitlines()
    jsonl = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    files = {
        "train.txt": "\n".join(rows).encode(),
        "train.jsonl": jsonl,
        "train.csv": "\n".join(["text", *rows]).encode(),
        "train.jsonl.gz": gzip.compress(jsonl, mtime=0),
    }
    name = rng.choice(list(files))
    return {"put": {name: flipped(files[name], rng)}}


def flipped(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


FUZZED = {"ds_config": fuzzed_ds_config, "recipe": fuzzed_recipe, "checkpoint": fuzzed_checkpoint, "data": fuzzed_data}

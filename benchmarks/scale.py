"""Prune a model of a large shape on this machine, and watch the memory of every rank: benchmarks/scale.md.

    python benchmarks/scale.py --work out/scale --shape gptj --tokenizer smollm2 --train_file train.txt \\
        --validation_file validation.txt -- --max_steps 0 --criterion obs --calibration_tokens 512

What follows `--` goes to launch/prune.py. The weights are random, from seeds, and are written once, layer by layer: 12
GB for GPT-J's shape. Remove the folder afterwards.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from scale_prune.config import Config
from scale_prune.data import calibration_steps, prepare, training_batches
from scale_prune.system import markdown_table
from scale_prune.system.tensor_files import INDEX, TensorFiles

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "gptj": {"model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64},
    "700m": {"model_type": "gptj", "n_layer": 18, "n_embd": 1536, "n_head": 16, "rotary_dim": 64},
    "tiny": {"model_type": "gptj", "n_layer": 3, "n_embd": 64, "n_head": 4, "rotary_dim": 16},
    "gpt-neo-1.3b": {
        "model_type": "gpt_neo",
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "attention_types": [[["global", "local"], 12]],
    },
    "tiny-neo": {
        "model_type": "gpt_neo",
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
    },
}
GIB = 2**30
KINDS = {
    "Pss": "largest share, GiB",
    "Pss_Anon": "of its own",
    "Pss_Shmem": "of shared memory",
    "Pss_File": "of files",
    "VmHWM": "resident at most",
}
TOLERATED = 1.15  # of the memory that the dry run foretells
EVERY = 5.0  # seconds between two looks at the memory, each of which walks through all pages of a rank


def main() -> None:
    args = parse()
    model, output = args.work / f"model-{args.shape}", args.work / "run"
    make_model(model, args.shape, args.tokenizer)
    flags = ["--model", model, "--output_dir", output, "--train_file", args.train_file, *args.flags]
    flags += ["--validation_file", args.validation_file, "--overwrite", "--no-tensorboard", "--precision", "bf16"]
    command = [
        "deepspeed",
        "--num_accelerators",
        args.ranks,
        ROOT / "launch/prune.py",
        "--ds_config",
        args.ds_config,
        *flags,
    ]
    started, words = time.perf_counter(), [str(word) for word in command]
    peaks = watched(words)
    print(f"{time.perf_counter() - started:.0f} s\n\n{memory_table(peaks)}\n")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    reported = [round(peak / GIB, 2) for peak in report["peak_memory_bytes"]]
    print(f"peak GiB by the report, of the GPU where there is one: {reported}\n")
    print(parts_table(report))
    on_gpu = torch.cuda.is_available()
    most = max(report["peak_memory_bytes"]) if on_gpu else max((own["Pss"] for own in peaks.values()), default=0)
    bound = foretold(words[words.index("--ds_config") :], args.ranks, report["rounds"])
    resident = max((own["VmHWM"] for own in peaks.values()), default=0)
    print(f"\nmemory of a rank: {most / GIB:.2f} GiB, {most / bound:.2f} of what the dry run foretells")
    print(f"between the looks, by the kernel: {resident / GIB:.2f} GiB, {resident / bound:.2f} of it")
    if not report["steps"]:  # weights that were trained are compared with nothing
        print(f"\n{compare_rows(model, output)}")
        if SHAPES[args.shape]["model_type"] == "gptj":
            print(compare_repair(model, output))
    print(copy_rate(output / "pruned"))
    if most > TOLERATED * bound:
        sys.exit(f"more than {TOLERATED} of it")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="folder of the model and the run")
    parser.add_argument("--shape", default="gptj", choices=SHAPES)
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder of a tokenizer of at most 50,257 tokens")
    parser.add_argument("--train_file", required=True, type=Path)
    parser.add_argument("--validation_file", required=True, type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ds_config", default="zero3_cpu")
    parser.add_argument("flags", nargs="*", help="of launch/prune.py, after --")
    return parser.parse_args()


def make_model(folder: Path, shape: str, tokenizer: Path) -> None:
    """Write a random model, one file a layer, unless it is there."""
    if (folder / INDEX).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**SHAPES[shape], dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and "lm_head" in name)
    }
    weight_map = {}
    for number, (_, names) in enumerate(groupby(state, key=lambda name: ".".join(name.split(".")[:3]))):
        tensors = {name: random_tensor(name, tuple(state[name].shape)) for name in names}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what a model begins with, from a seed of its own."""
    if len(shape) == 1:
        return torch.full(shape, float("ln" in name and name.endswith("weight")), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


def watched(command: list[str]) -> dict[int, dict[str, int]]:
    """Run a command; return the largest memory of each rank by kind, in bytes."""
    process = subprocess.Popen(command)
    peaks: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    while process.poll() is None:
        for rank, memory in memory_of_ranks(process.pid):
            for kind, size in memory.items():
                peaks[rank][kind] = max(peaks[rank][kind], size)
        time.sleep(EVERY)
    if process.returncode:
        sys.exit(process.returncode)
    return peaks


def memory_of_ranks(launcher: int) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield the proportional set size in bytes, in all and by kind, of each rank below a process, as Linux tells it."""
    for folder in (Path(f"/proc/{each.pid}") for each in psutil.Process(launcher).children(recursive=True)):
        try:
            if b"launch/prune.py" not in (words := (folder / "cmdline").read_bytes()) or b"--local_rank" not in words:
                continue
            environment = dict(
                line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line
            )
            told = [line.split() for line in (folder / "smaps_rollup").read_text().splitlines()[1:]]
            told += [line.split() for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM")]
        except (OSError, ValueError):
            continue  # it has ended
        sizes = {words[0].rstrip(":"): 1024 * int(words[1]) for words in told}
        if "RANK" in environment:
            yield int(environment["RANK"]), {kind: sizes.get(kind, 0) for kind in KINDS}


def memory_table(peaks: dict[int, dict[str, int]]) -> str:
    rows = [[str(rank), *(f"{peaks[rank][kind] / GIB:.2f}" for kind in KINDS)] for rank in sorted(peaks)]
    header = ["rank", *KINDS.values()]
    return "\n".join(markdown_table(header, rows))


def foretold(flags: list[str], ranks: int, rounds: list[dict[str, int]]) -> float:
    """Return the bytes of a rank that the dry run tells of a run that kept so many Gram matrices at a time."""
    dry = [sys.executable, str(ROOT / "launch/prune.py"), "--dry_run", "--world_size", str(ranks), *flags]
    told = subprocess.run(dry, stdout=subprocess.PIPE, text=True, check=True).stdout
    keeps_freed = torch.cuda.is_available() or "MALLOC_MMAP_THRESHOLD_" in os.environ  # as launch/setup.sh sets it
    peak = size_of(told.partition("peak of a rank: " if keeps_freed else "phases add up; ")[2])
    kept = max((each.get("gram_matrices", 0) for each in rounds), default=0)
    if found := re.search(r"one of its Gram matrices at a time: (.*) of .* in the place of (.*), .* to (\d+) t", told):
        least, whole, matrices = size_of(found[1]), size_of(found[2]), int(found[3])
        if kept < matrices:
            return least + (kept - 1) * (whole - least) / (matrices - 1)
    return peak


def size_of(text: str) -> float:
    """Return the bytes that a text like "1.50 GiB of ..." begins with."""
    number, unit = text.split()[:2]
    return float(number.replace(",", "")) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)


def parts_table(report: dict[str, object]) -> str:
    seconds = report["seconds"]
    assert isinstance(seconds, dict)
    rows = [[part, f"{spent:.1f}"] for part, spent in seconds.items()]
    return "\n".join(markdown_table(["part", "seconds"], rows)) + f"\n\nperplexity: {report['perplexity']}"


def compare_rows(model: Path, output: Path) -> str:
    """Compare the first and last layer's exported rows with those of the same neurons in the model, bit by bit."""
    dense, pruned = TensorFiles(model), TensorFiles(output / "pruned")
    kept = json.loads((output / "kept.json").read_text(encoding="utf-8"))
    layers = sorted(
        {name.split(".mlp")[0] for name in pruned.names if ".mlp." in name}, key=lambda name: int(name.split(".")[2])
    )
    for layer in (layers[0], layers[-1]):
        units = torch.tensor(next(own for name, own in kept.items() if name.startswith(f"{layer}.")))
        name = next(name for name in pruned.names if re.fullmatch(rf"{layer}\.mlp\.(fc_in|c_fc)\.weight", name))
        assert torch.equal(pruned.read(name), dense.read(name)[units]), name
    return f"rows that make neurons in {layers[0]} and {layers[-1]}: those of the dense model, bit by bit"


@torch.no_grad()
def compare_repair(model: Path, output: Path) -> str:
    """Repair the first layer once more, by itself and by other formulas, and compare what it writes with the export.

    GPT-J's attention stands beside its MLP, so that of the first layer the embedding is all that is read. With fewer
    tokens T than neurons least squares is solved by T x T matrices, of activations without their means: the bias takes
    these over.
    """
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    config = Config.from_flat(report["settings"])
    if config.pruning.repair != "least_squares":
        return f"repair: {config.pruning.repair}"
    dense, pruned, first = TensorFiles(model), TensorFiles(output / "pruned"), "transformer.h.0"
    rows = calibration_rows(config, report["ds_config"]["train_batch_size"], AutoTokenizer.from_pretrained(model))
    x = functional.embedding(rows.flatten(), dense.read("transformer.wte.weight"))
    scale, shift = (dense.read(f"{first}.ln_1.{name}") for name in ("weight", "bias"))
    x = functional.layer_norm(x, x.shape[-1:], scale, shift)
    x = functional.linear(x, *(dense.read(f"{first}.mlp.fc_in.{name}") for name in ("weight", "bias")))
    h, out = functional.gelu(x, approximate="tanh").double(), dense.read(f"{first}.mlp.fc_out.weight").double()
    kept = json.loads((output / "kept.json").read_text(encoding="utf-8"))
    keep = torch.zeros(h.shape[1], dtype=torch.bool)
    keep[next(own for name, own in kept.items() if name.startswith(f"{first}."))] = True
    damping = config.pruning.damping_of(h.shape[1] + 1) * h.square().sum(0).mean()
    centered = h - h.mean(0)
    products = centered[:, keep] @ centered[:, keep].T + damping * torch.eye(len(h))
    takeover = centered[:, keep].T @ torch.linalg.solve(products, centered[:, ~keep])
    expected, found = out[:, keep] + out[:, ~keep] @ takeover.T, pruned.read(f"{first}.mlp.fc_out.weight")
    rounded = expected.to(found.dtype).double()
    gain = (expected - out[:, keep]).norm()
    apart, rounding = float((found - rounded).norm() / gain), float((rounded - expected).norm() / gain)
    left = centered @ out.T - centered[:, keep] @ found.double().T
    still = float(left.norm() / (centered[:, ~keep] @ out[:, ~keep].T).norm())
    return (
        f"repair of {first}: {apart:.4f} of its gain apart from that by other formulas, whose rounding is "
        f"{rounding:.4f} of it; {still:.4f} of the output's error is left on these {len(h)} tokens"
    )


def calibration_rows(config: Config, size: int, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the blocks that a run of so many blocks a step is calibrated on."""
    batches = training_batches(
        prepare(config.data, "train", tokenizer),
        batch_size=size,
        micro_batch_size=size,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=config.training.seed,
    )
    return torch.cat([rows for (rows,) in islice(batches, calibration_steps(config, size))])


def copy_rate(folder: Path) -> str:
    """Say how fast the exported bytes are copied on the same disk."""
    copy = folder.with_name("copy")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    started = time.perf_counter()
    shutil.copytree(folder, copy)
    subprocess.run(["sync"], check=True)
    spent = time.perf_counter() - started
    shutil.rmtree(copy)
    return f"{size / GIB:.2f} GiB of weights; a plain copy of the folder takes {spent:.1f} s"


if __name__ == "__main__":
    main()

"""Show that two commits compute the same, bit for bit, by fourteen short runs of each on 1, 2 and 3 ranks.

    python benchmarks/same.py OLD NEW [--ranks 1 2 3] [--cells gum flop ...] [--new_seed 1]

OLD and NEW are commits, or `.` for the working tree. Compared are the SHA-256 of exported weights, scores, kept.json,
and all of report.json but times, memory, paths, versions and commit; keys that only NEW has are printed and are no
difference. In the row "killed by OLD" NEW goes on from OLD's checkpoint. The exit code is 1 where anything differs.
Ranks run the commit's launch/prune.py with what a launcher sets in the environment; to save time they are forked from a
process that has imported libraries, but nothing of scale_prune.
"""

import argparse
import functools
import gc
import hashlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
LIBRARIES = "deepspeed.runtime.zero.muon.muon_optimizer torch._inductor.compile_fx datasets rouge_score.rouge_scorer"
say_once = functools.cache(print)
KILLED, SAVED = "killed", "checkpoints/step-00000003"
WORDS = "# ? the a neuron layer model keeps drops learns prunes fast slowly and then again while training text"
# Every setting that decides a result, so that defaults may change.
USUAL = """--ds_config zero3_cpu --precision fp32 --collective_timeout 120 --task lm --block_size 16 --eval_tokens 99
--max_steps 7 --recovery_steps 2 --train_batch_size 6 --gradient_accumulation_steps 1 --no-gradient_checkpointing
--learning_rate 0.01 --weight_decay 0.01 --lr_warmup_fraction 0.1 --max_grad_norm 1 --save_every 0 --eval_every 4
--log_every 2 --no-tensorboard --remaining 0.4 --warmup_fraction 0.1 --cooldown_fraction 0.3 --update_every 1
--scope per_group --layout uniform --min_kept 1 --width_multiple 1 --score_learning_rate 0.01 --score_optimizer adam
--regularization 0 --uniqueness 0 --similarity batch --similarity_every 2 --similarity_tokens 60 --similarity_weight 0.9
--targets mlp --factors svd --embedding_clusters 3 --no-tie_embeddings --gate_learning_rate 2 --lambda_learning_rate 4
--target_warmup_fraction 0.4 --initial_drop_rate 0.05 --gate_range unit --gate_l1 0 --distill_alpha 0.5
--distill_temperature 2 --bos never --budget uniform --rounds 0 --repair none --repair_damping 0.01
--calibration_tokens 192"""
GUM = "--criterion gum --scope global --layout per_layer --regularization 1 --uniqueness 10"
COMPONENTS = "--targets mlp,attention,embedding --scope global --layout per_layer"
REPAIRED = "--scope global --layout per_layer --repair least_squares"
ROWS = "--long_examples refuse --block_size 30 --eval_examples 7 --prompt_template {text}"
CELLS = {
    "gum": GUM,
    "movement": "--criterion movement --train_batch_size 12 --gradient_accumulation_steps 2",
    "sensitivity": "--criterion sensitivity --scope global --layout pad --gradient_checkpointing",
    "magnitude": "--criterion magnitude --width_multiple 2 --recovery_steps 0",
    "random": "--criterion random --scope global --layout pad --min_kept 3",
    "soft_movement": "--criterion soft_movement --regularization 100 --score_learning_rate 1",
    "kfac": f"--criterion kfac --targets mlp,attention --rounds 2 {REPAIRED}",
    "ddp": f"--criterion ddp {REPAIRED}",
    "flop": f"--criterion flop {COMPONENTS}",
    "factorize": f"--criterion factorize {COMPONENTS}",
    "data_to_text": f"{GUM} {ROWS} --task data_to_text --completion_template {{end}} --max_new_tokens 3 --num_beams 2",
    "classification": f"{GUM} {ROWS} --task classification --label_column label",
    "teacher": f"{GUM} --teacher self --score_optimizer sgd",
    KILLED: f"{GUM} --similarity running --save_every 3 --keep_checkpoints 9",
}
OF_THE_MACHINE = {"seconds", "step_seconds", "peak_memory_bytes", "versions", "date", "host", "commit"}
PATHS = {"model", "dataset", "train_file", "validation_file", "output_dir", "teacher", "resume", "settings.ds_config"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT", help="OLD, then NEW")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME", help=", ".join(CELLS))
    parser.add_argument("--new_seed", type=int, default=0, help="of NEW; with another one than 0 the results differ")
    parser.add_argument("--anew", action="store_true", help="start each rank as a Python process of its own")
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn" if args.anew else "forkserver")
    multiprocessing.set_forkserver_preload(LIBRARIES.split())
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile scale_prune for itself
    table: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENT | {"HF_HOME": f"{folder}/cache"})
        make_inputs(Path(folder))
        for side, commit in zip(("old", "new"), args.commits, strict=True):
            check_out(commit, Path(folder, side, "code"))
        for cell in args.cells:
            for ranks in args.ranks:
                begun = time.monotonic()
                for row, result in compare(cell, ranks, Path(folder), args.new_seed).items():
                    print(f"{row}, ranks {ranks}: {result}, {time.monotonic() - begun:.0f} s", flush=True)
                    table.setdefault(row, []).append(result)
    print("\n| ranks |", *(f"{ranks} |" for ranks in args.ranks), "\n|---" + "|---" * len(args.ranks) + "|")
    print(*(f"| {row} | {' | '.join(results)} |" for row, results in table.items()), sep="\n")
    sys.exit(any(result != "same" for results in table.values() for result in results))


def check_out(commit: str, folder: Path) -> None:
    folder.parent.mkdir()
    if commit == ".":
        folder.symlink_to(ROOT)
    else:
        subprocess.run(["git", "-C", ROOT, "archive", "--output", f"{folder}.tar", commit], check=True)
        shutil.unpack_archive(f"{folder}.tar", folder, filter="data")


def make_inputs(folder: Path) -> None:
    """Write rows of text, a GPT-Neo with dropout, and an encoder that is no classifier yet."""
    words = WORDS.split()
    texts = [[words[2 + i * j % 17] for j in range(3, 7 + i % 11)] for i in range(211)]
    rows = [json.dumps({"text": " ".join(text), "end": text[-1], "label": text[0][0]}) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    by_word = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "#")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=by_word, unk_token="?", **ends)
    sizes: dict[str, Any] = {"hidden_size": 22, "intermediate_size": 17, "max_position_embeddings": 31}
    sizes |= {"vocab_size": len(words)} | dict.fromkeys((f"{end}_id" for end in ends), 0)
    layers: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    transformers.set_seed(0)
    neo = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes, **layers, window_size=5, resid_dropout=0.2))
    bert = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=1))
    for name, model in (("neo", neo), ("bert", bert)):
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def compare(cell: str, ranks: int, folder: Path, new_seed: int) -> dict[str, str]:
    """Run a cell on both sides; return by row "same", what differs, or which side failed."""
    old, new, mixed = (folder / place for place in (f"old/{cell}-{ranks}", f"new/{cell}-{ranks}", f"new/mixed-{ranks}"))
    problem = ""
    if cell == KILLED:
        problem = run(cell, ranks, old, 0, kill=True) or run(cell, ranks, new, new_seed, kill=True)
        if not problem:
            shutil.copytree(old, mixed)
    problem = problem or run(cell, ranks, old, 0) or run(cell, ranks, new, new_seed)
    results = {cell: problem or difference(old, new)}
    if cell == KILLED:
        results["killed by OLD"] = problem or run(cell, ranks, mixed, 0) or difference(old, mixed)
    return results


def run(cell: str, ranks: int, output: Path, seed: int, *, kill: bool = False) -> str:
    """Run a cell, from a checkpoint if there is one, to its end, or kill it once there is; return what went wrong."""
    inputs, model = output.parents[1], "bert" if cell == "classification" else "neo"
    flags = f"{USUAL} {CELLS[cell]} --seed {seed} --dataset={inputs}/rows.jsonl --model={inputs}/{model}".split()
    flags += [f"--output_dir={output}", *([f"--resume={output}/{SAVED}"] if (output / SAVED).exists() else [])]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [multiprocessing.Process(target=be_rank, args=(output, flags, each), daemon=True) for each in places]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and not (kill and (output / SAVED).exists()):
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    for left_behind in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left_behind.unlink()
    codes = {process.exitcode for process in processes}
    was_killed = (output / SAVED).exists() and not (output / "report.json").exists()
    if was_killed if kill else codes == {0}:
        return ""
    errors = [line.partition("rror: ")[2] for line in output.with_suffix(".log").read_text().splitlines()]
    return f"{output.parent.name} ended with {codes}: {' '.join(errors).strip()[:200]}"


def be_rank(output: Path, flags: list[str], environment: dict[str, str]) -> None:
    """Run the command of the side that the output is of, in this process."""
    with output.with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = output.parent / "code"
    os.environ.update(environment | {"PYTHONPATH": str(code)})
    datasets.config.HF_DATASETS_CACHE = output.parent / "cache"  # no side reads tokens that the other has made
    sys.argv, sys.path = [f"{code}/launch/prune.py", *flags], [f"{code}/launch", str(code), *sys.path]
    found = importlib.util.find_spec("scale_prune")
    assert str(found and found.origin).startswith(str(code)), f"{found} is not of {code}"
    gc.freeze()  # DeepSpeed collects garbage often, and of the libraries none is
    runpy.run_path(sys.argv[0], run_name="__main__")


def difference(old: Path, new: Path) -> str:
    before, after = facts_of(old), facts_of(new)
    if grown := sorted(after.keys() - before.keys()):
        say_once(f"only NEW has {', '.join(grown)}")
    names = [name for name, value in before.items() if name not in after or after[name] != value]
    return f"{len(names)} differ: {', '.join(names[:6])}" if names else "same"


def facts_of(output: Path) -> dict[str, Any]:
    """Return by name what must be the same: hashes of files, values of the report."""
    files = [*sorted(output.glob("pruned/*.safetensors")), output / "scores.safetensors", output / "kept.json"]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return hashes | flat(json.loads((output / "report.json").read_text()))


def flat(report: dict[str, Any], above: str = "") -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in report.items():
        if not {key, above + key} & (OF_THE_MACHINE | PATHS):
            if isinstance(value, list) and any(isinstance(each, dict) for each in value):
                value = {str(index): each for index, each in enumerate(value)}  # rounds, for example
            facts |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return facts


if __name__ == "__main__":
    main()

"""Compare the criteria: the same base, text and steps for each of them, one ordinary pruning run a cell.

    python benchmarks/criteria.py --part smollm2 --base smollm2 --train_file wikitext2_train.txt.gz \
        --validation_file wikitext2_validation.txt.gz --output_dir out/criteria-smollm2 --table smollm2.md

Restartable: a cell whose folder holds report.json is done, an unfinished one is run again from its start. The table is
written anew after every cell, from the reports that there are. Flags that this script does not know go to every run.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = "deepspeed --num_accelerators 2 launch/prune.py"
PLAIN = "plain fine-tuning"
METHODS = {
    PLAIN: "--criterion random --remaining 1.0",
    "random": "--criterion random",
    "magnitude": "--criterion magnitude",
    "sensitivity": "--criterion sensitivity",
    "movement": "--criterion movement --scope per_group",
    "movement, global": "--criterion movement --scope global",
    "soft_movement": "--criterion soft_movement",
    "gum": "--criterion gum",
}
GRID = {
    f"gum, lambda_f {penalty}, lambda_gum {unique}": f"--criterion gum --regularization {penalty} --uniqueness {unique}"
    for penalty, unique in ((0, 0), (0.1, 1), (0.1, 10), (1, 10))
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table: what its runs have in common, the methods that differ, and the seeds of each.

    Attributes:
        common: flags of every run.
        methods: flags of a method by its name; they come after the common ones and win.
        seeds: every method runs once with each.
    """

    common: str
    methods: dict[str, str]
    seeds: tuple[int, ...]


GPT_NEO = (
    "--remaining 0.25 --block_size 128 --train_batch_size 16 --learning_rate 5e-4 --precision bf16 --eval_tokens 20000 "
    "--similarity_every 5"
)
PARTS = {
    "smollm2": Part(
        common="--remaining 0.75 --max_steps 60 --block_size 256 --train_batch_size 4 --learning_rate 1e-4 "
        "--precision bf16 --eval_tokens 8192 --similarity_every 5",
        methods=METHODS,
        seeds=(0,),
    ),
    "gpt_neo": Part(common=f"{GPT_NEO} --max_steps 100", methods=METHODS, seeds=(0, 1)),
    "gum_constants": Part(common=f"{GPT_NEO} --max_steps 100", methods=GRID, seeds=(7,)),
}


def main() -> None:
    args, extra = parse()
    part = PARTS[args.part]
    cells = [(method, seed) for seed in part.seeds for method in part.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [
            pool.submit(run, cell(args.output_dir, *key), flags(part, args, *key, extra), args.master_port + index)
            for index, key in enumerate(cells)
        ]
        for done in as_completed(running):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            done.result()
            write_table(as_table(part, args, extra), args.table)


def flags(part: Part, args: argparse.Namespace, method: str, seed: int, extra: list[str]) -> list[str]:
    """Return the flags of one run; where two of them set the same, the last one wins."""
    paths = {"model": args.base, "train_file": args.train_file, "validation_file": args.validation_file}
    inputs = [f"--{name}={Path(path).resolve()}" for name, path in paths.items()]
    return [*inputs, *part.common.split(), *part.methods[method].split(), f"--seed={seed}", *extra]


def write_table(text: str, file: Path | None) -> None:
    print(text, flush=True)
    if file:
        file.write_text(text, encoding="utf-8")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=PARTS)
    parser.add_argument("--base", required=True, help="folder of the model that every run starts from")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder that gets one folder a cell")
    parser.add_argument("--table", type=Path, help="file for the table, which is printed anyway")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each of two processes")
    parser.add_argument("--master_port", type=int, default=29511, help="port of the first cell, the others count up")
    return parser.parse_known_args()


def cell(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method.replace(', ', '-').replace(' ', '_')}-seed{seed}"


def run(folder: Path, settings: list[str], port: int) -> None:
    """Run one cell unless it is done; its output is in the file beside its folder."""
    if (folder / "report.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    launcher, *rest = COMMAND.split()
    command = [launcher, f"--master_port={port}", *rest, *settings, f"--output_dir={folder.resolve()}"]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    if not (folder / "report.json").is_file():
        raise RuntimeError(f"{shlex.join(command)} left no report; see {folder.with_suffix('.log')}")


def as_table(part: Part, args: argparse.Namespace, extra: list[str]) -> str:
    """Lay out the reports that there are: one row a method, then how much the seeds can tell, then the conditions."""
    found = {method: reports(args.output_dir, method, part.seeds) for method in part.methods}
    complete = [method for method, of_method in found.items() if len(of_method) == len(part.seeds)]
    reference = perplexity(found[PLAIN]) if PLAIN in complete else None
    values = [f"perplexity, seed {seed}" for seed in part.seeds] if len(part.seeds) > 1 else []
    columns = ["method", "scope", "perplexity", *values, "ratio to plain", "parameters", "remaining", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * 2 + "|---:" * (len(columns) - 2) + "|"]
    for method in sorted(complete, key=lambda method: perplexity(found[method])):
        lines.append(f"| {' | '.join(row(method, found[method], reference))} |")
    lines += ["", *spread(found, complete, part), "", *conditions(part, args, extra, found)]
    return "\n".join(lines) + "\n"


def reports(folder: Path, method: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    files = [cell(folder, method, seed) / "report.json" for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def perplexity(of_method: list[dict[str, Any]]) -> float:
    """Return the mean over seeds, of the exported model as it was loaded again."""
    return mean(report["perplexity"]["exported"] for report in of_method)


def row(method: str, of_method: list[dict[str, Any]], reference: float | None) -> list[str]:
    value, first = perplexity(of_method), of_method[0]
    each = [f"{report['perplexity']['exported']:.2f}" for report in of_method] if len(of_method) > 1 else []
    return [
        method,
        "" if method == PLAIN else first["scope"],
        f"{value:.2f}",
        *each,
        f"{value / reference:.3f}" if reference else "",
        f"{mean(report['parameters']['pruned'] for report in of_method):,.0f}",
        f"{mean(report['remaining']['measured'] for report in of_method):.2%}",
        f"{mean(report['seconds']['total'] for report in of_method):.0f}",
    ]


def spread(found: dict[str, list[dict[str, Any]]], complete: list[str], part: Part) -> list[str]:
    """Say how far apart seeds are, and how far plain fine-tuning is from random: what the table can resolve."""
    lines = []
    if len(part.seeds) > 1 and complete:
        apart = {method: differing(found[method]) for method in complete}
        widest = max(apart, key=lambda method: apart[method])
        lines.append(f"Seeds lie {mean(apart.values()):.2f} apart on average, at most {apart[widest]:.2f} ({widest}).")
    if PLAIN in complete and "random" in complete:
        distance = perplexity(found["random"]) - perplexity(found[PLAIN])
        lines.append(f"From plain fine-tuning to random it is {distance:.2f}: the range that a criterion can win.")
    first = next((of_method[0] for of_method in found.values() if of_method), None)
    if first:
        lines.append(f"Before any training the perplexity is {first['perplexity']['dense']:.2f}.")
    return lines


def differing(of_method: list[dict[str, Any]]) -> float:
    values = [report["perplexity"]["exported"] for report in of_method]
    return float(max(values) - min(values))


def conditions(
    part: Part, args: argparse.Namespace, extra: list[str], found: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Say what was run, from which commit, on what, when."""
    versions: dict[str, str] = next((of_method[0]["versions"] for of_method in found.values() if of_method), {})
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    common = " ".join([part.common, *extra])
    return [
        f"Every run: `{COMMAND} --model {Path(args.base).name} --train_file {Path(args.train_file).name} "
        f"--validation_file {Path(args.validation_file).name} {common}`, with",
        "",
        *(f"- {method}: `{flags}`" for method, flags in part.methods.items()),
        "",
        f"Commit {commit()}, {processor()}, {os.cpu_count()} cores, OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}, {numbers}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    ]


def commit() -> str:
    """Return the commit of this copy, with `+` where files differ from it."""
    described = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def processor() -> str:
    """Return the name of the processor's model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

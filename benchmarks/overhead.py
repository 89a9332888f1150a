"""Measure what pruning adds to a training step: plain and pruned steps take turns on one engine, in one process group.

    deepspeed --num_accelerators 2 benchmarks/overhead.py --output_dir out/overhead

The model has the shape of GPT-Neo-125M and random weights, which are saved once. A pruned step makes the pruner's two
calls, `after_backward` and `after_step`, and chooses masks anew; a plain one does not. What slows the machine down for
a while slows both. `--profile 15` tells in which functions these calls spend most, and makes them slower.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from cProfile import Profile
from pathlib import Path
from pstats import SortKey, Stats
from statistics import mean, median
from typing import Any

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from scale_prune.config.ds_config import load, resolve
from scale_prune.config.settings import Config
from scale_prune.models.layer_units import unit_groups
from scale_prune.pruning.pruner import Pruner
from scale_prune.system import markdown_table, versions
from scale_prune.zero3 import Runtime, Zero3Backend, load_model, training_engine

WARM_UP = 3


def main() -> None:
    args = parse()
    runtime = Runtime.start()
    try:
        folder = args.output_dir / "model"
        with runtime.main_first():
            if not folder.exists():
                save_random_model(args, folder)
        bench = Bench(args, runtime, folder)
        rows = [bench.measure(criterion) for criterion in args.criteria]
        if runtime.is_main:
            print(as_table(rows, args, runtime.world_size))
    finally:
        runtime.stop()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder that keeps the random model")
    parser.add_argument("--criteria", nargs="+", default=["movement", "gum"])
    parser.add_argument("--steps", type=int, default=60, help="pruned steps of a criterion, and as many plain ones")
    parser.add_argument("--profile", type=int, default=0, help="functions of rank 0 to print, by their own time")
    parser.add_argument("--ds_config", default="zero3_cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--micro_batch_size", type=int, default=2, help="blocks a rank and step")
    parser.add_argument("--block_size", type=int, default=128, help="tokens a block")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--num_heads", type=int, default=12)
    parser.add_argument("--intermediate_size", type=int, default=3072)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def save_random_model(args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        attention_types=[[["global", "local"], args.num_layers // 2]],
        num_heads=args.num_heads,
        intermediate_size=args.intermediate_size,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)


class Bench:
    """One engine, on which steps with and without the pruner are timed."""

    def __init__(self, args: argparse.Namespace, runtime: Runtime, folder: Path) -> None:
        self.args, self.runtime, self.profile = args, runtime, Profile()
        settings = {"precision": args.precision, "micro_batch_size": args.micro_batch_size}
        config = Config.from_flat(settings)
        ds_config = resolve(
            load(args.ds_config), config, frozenset(settings), runtime.world_size, hidden_size=args.hidden_size
        )
        model = load_model(str(folder), ds_config)
        self.groups = unit_groups(model)
        self.engine = training_engine(model, ds_config)
        self.engine.train()
        self.generator = torch.Generator().manual_seed(runtime.rank)
        for _ in range(WARM_UP):
            self.step(None)

    def measure(self, criterion: str) -> dict[str, Any]:
        """Time plain and pruned steps in turns; a step whose activations are sampled follows a pruned one at once."""
        pruning = Config.from_flat({"criterion": criterion, "remaining": 0.5, "warmup_fraction": 0.0}).pruning
        backend = Zero3Backend(self.engine)
        pruner = Pruner(backend, self.groups, pruning, total_steps=self.args.steps + pruning.similarity_every, seed=0)
        plain: list[float] = []
        pruned: list[float] = []
        sampling: list[float] = []
        for step in range(-pruning.similarity_every, self.args.steps):
            if step == 0:  # the first turns, a sample among them, load what they use
                for each in (plain, pruned, sampling, pruner.seconds):
                    each.clear()
                self.profile.clear()
            samples = "activation" in pruner.scoring.criterion.needs and step % pruning.similarity_every == 0
            if not samples:  # the sampler's hooks are in place already, and must not catch a plain step
                plain.append(self.step(None))
                pruner.calls.go_on()  # it counts the engine's steps, and has not seen this one
            (sampling if samples else pruned).append(self.step(pruner))
        if self.args.profile and self.runtime.is_main:
            print(f"{criterion}, {self.args.steps} steps:")
            Stats(self.profile).strip_dirs().sort_stats(SortKey.TIME).print_stats(self.args.profile)
        return {
            "criterion": criterion,
            "plain": plain,
            "pruned": pruned,
            "sampling": sampling,
            "parts": {part: seconds / self.args.steps for part, seconds in pruner.seconds.items()},
        }

    def step(self, pruner: Pruner | None) -> float:
        """Make one training step and return its seconds, from when all ranks are ready until all are done."""
        shape = (self.args.micro_batch_size, self.args.block_size)
        input_ids = torch.randint(self.args.vocab_size, shape, generator=self.generator).to(self.runtime.device)
        self.wait_for_all()
        started = time.perf_counter()
        loss = self.engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        self.engine.backward(loss)
        if pruner is not None:
            self.call(pruner.after_backward)
        self.engine.step()
        if pruner is not None:
            self.call(pruner.after_step)
        self.wait_for_all()
        return time.perf_counter() - started

    def call(self, function: Callable[[], None]) -> None:
        if self.args.profile:
            self.profile.runcall(function)
        else:
            function()

    def wait_for_all(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self.runtime.barrier()


def as_table(rows: Sequence[dict[str, Any]], args: argparse.Namespace, world_size: int) -> str:
    columns = ["criterion", "plain, median ms", "pruned, median ms", "ratio", "ratio of means", "sampling step, ms"]
    parts = sorted({part for row in rows for part in row["parts"]})
    header = [*columns, *(f"{part}, mean ms a step" for part in parts)]
    cells = []
    for row in rows:
        every_pruned = row["pruned"] + row["sampling"]
        found = [
            row["criterion"],
            f"{1000 * median(row['plain']):.1f}",
            f"{1000 * median(every_pruned):.1f}",
            f"{median(every_pruned) / median(row['plain']):.3f}",
            f"{mean(every_pruned) / mean(row['plain']):.3f}",
            f"{1000 * median(row['sampling']):.1f}" if row["sampling"] else "",
            *(f"{1000 * row['parts'].get(part, 0.0):.1f}" for part in parts),
        ]
        cells.append(found)
    shape = f"hidden {args.hidden_size}, {args.num_layers} layers, intermediate {args.intermediate_size}"
    lines = [
        *markdown_table(header, cells),
        "",
        f"{shape}, vocabulary {args.vocab_size}; {world_size} ranks, {args.micro_batch_size} x {args.block_size} "
        f"tokens a rank and step, {args.precision}, {args.ds_config}, {args.steps} pruned steps.",
        ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
        f"`deepspeed --num_accelerators {world_size} benchmarks/overhead.py {' '.join(sys.argv[1:])}`",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

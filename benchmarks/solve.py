"""Time the repair of one wide projection: its Gram matrix, and what the survivors take over; on a GPU, if there is one.

    python benchmarks/solve.py --features 16384

Activations are random; every other feature goes. The Gram matrix is added up in slices of rows, as by a rank that keeps
it. Peaks are the whole process's so far on a CPU, and each part's own on a GPU, what lives before it included.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from scale_prune.core.repair import gram_root, least_squares
from scale_prune.pruning.calibration import ROWS_AT_ONCE
from scale_prune.system import markdown_table, versions

DAMPING = 1e-2
GIB = 2**30


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    few = torch.rand(64, 32, device=device)  # the first use of a library loads it
    least_squares(gram_of(few), keep_half(few), DAMPING)
    gram_root(gram_of(few), few.shape[1], DAMPING)
    h = torch.rand(args.tokens, args.features, device=device)
    keep = keep_half(h)
    gram, *first = timed(lambda: gram_of(h), device)
    takeover, *second = timed(lambda: least_squares(gram, keep, DAMPING), device)
    _, *third = timed(lambda: gram_root(gram, args.features, DAMPING), device)
    names = ("Gram matrix", "least squares", "root")
    rows = [
        [name, f"{seconds:.3f}", f"{peak / GIB:.2f}"]
        for name, (seconds, peak) in zip(names, (first, second, third), strict=True)
    ]
    print("\n".join(markdown_table(["part", "seconds", "peak GiB"], rows)))
    error = (h[:, ~keep] - h[:, keep] @ takeover).square().mean() / h[:, ~keep].square().mean()
    print(f"\n{args.features} features, {args.tokens} tokens; error that is left: {float(error):.4f}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(", ".join([name, *(f"{package} {number}" for package, number in versions().items())]) + ".")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=32768)
    return parser.parse_args()


def keep_half(h: Tensor) -> Tensor:
    return torch.arange(h.shape[1], device=h.device) % 2 == 0


def gram_of(h: Tensor) -> Tensor:
    gram = h.new_zeros(h.shape[1], h.shape[1])
    for rows in gram.split(ROWS_AT_ONCE):
        first = rows.storage_offset() // h.shape[1]
        rows += h[:, first : first + len(rows)].T @ h
    return gram


def timed(part: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int]:
    """Return what a part makes, its seconds and its peak memory in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    made = part()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return made, time.perf_counter() - started, torch.cuda.max_memory_allocated()
    return made, time.perf_counter() - started, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()

"""How long a run would take, from one step's passes that are measured on this machine.

What moves between ranks, the optimizer and evaluations come on top; that steps get faster when units leave is not taken
off.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from scale_prune.criteria import CRITERIA, freezes, observes
from scale_prune.preflight.job import Job
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.round_needs import (
    reads,
    round_operations,
    trial_passes,
    trials,
    tries_repair,
    whitening_memory,
)
from scale_prune.system import markdown_table
from scale_prune.zero3 import own_device

GIB = 2**30
SIDE = 2048  # of the matrices whose product is measured


def about_time(reading: Reading, job: Job, measure: Callable[[torch.device], tuple[float, float]]) -> Iterator[str]:
    """Yield the seconds of a run by part, of the rank that does the most.

    Args:
        reading: the inputs of the run.
        job: the same, in numbers.
        measure: returns the seconds of a forward pass of a micro batch on a device, and of a forward and backward pass.

    Raises:
        ValueError: a rank's passes with the whole model do not fit into this machine's memory.
    """
    device, free = own_device()
    needed = job.num_parameters * job.width + job.rehearsed.buffers + job.rehearsed.activations
    if needed > free:
        raise ValueError(
            f"--measure makes one pass of the whole model, {needed / GIB:.1f} GiB with its activations; {device} "
            f"has {free / GIB:.1f} free; give a smaller --micro_batch_size, --gradient_checkpointing, or leave it out"
        )
    with _share_of_cores(reading.world_size):
        forward, both = measure(device)
        seconds = _of_steps(reading, job, forward, both) | _of_a_round(reading, job, forward, both, _rate(device))
        processor = f"{platform.processor() or platform.machine()} CPU ({torch.get_num_threads()} cores)"
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor
    yield ""
    yield f"time of a rank like {name}: {forward:.3g} s a forward pass, {both:.3g} s with its backward pass; without"
    yield "the optimizer, what moves between ranks, and evaluations; all steps as long as the first"
    yield ""
    seconds |= {"**sum**": sum(seconds.values())}
    yield from markdown_table(
        ["what takes time", "seconds"], [[part, f"{spent:,.1f}"] for part, spent in seconds.items()]
    )


@contextmanager
def _share_of_cores(world_size: int) -> Iterator[None]:
    """Compute as a rank does that shares this machine with all others, where the environment does not say otherwise."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, before // world_size))
    yield
    torch.set_num_threads(before)


def _of_steps(reading: Reading, job: Job, forward: float, both: float) -> dict[str, float]:
    training, heard = reading.config.training, forward * job.has_teacher
    own = forward if freezes(job.pruning) else heard  # of the dense model
    return {
        f"{steps:,} steps {when}": steps * job.accumulation * (both + more)
        for steps, when, more in ((training.max_steps, "with pruning", own), (training.recovery_steps, "after", heard))
        if steps
    }


def _of_a_round(reading: Reading, job: Job, forward: float, both: float, rate: float) -> dict[str, float]:
    """Return the seconds of all rounds, or of the repair at the end.

    What is not a pass goes by its arithmetic, at the rate of a product in float32.
    """
    tokens = job.calibration_steps * int(job.ds_config["train_batch_size"]) * reading.config.data.block_size
    operations = round_operations(job, tokens)
    criterion = CRITERIA[job.pruning.criterion]
    micro_batches = job.calibration_steps * job.accumulation
    whitens = bool(whitening_memory(job))
    a_reading = (both if "output_grad" in criterion.needs else forward) * (reads(job) or whitens)
    passes = {
        "calibration, passes": micro_batches * (a_reading + 2 * forward * tries_repair(job)),
        "gradients, passes": micro_batches * both * observes(job.pruning, trains=job.trains),
        "budget, passes": trials(job) * trial_passes(job, tokens) * forward / max(job.removals, 1),
    }
    every = {part: passes.get(part, count / rate) for part, count in operations.items()}
    what = f"{job.removals} rounds" if job.pruning.rounds else "factors" if whitens else "repair"
    return {f"{what}, {part}": job.removals * spent for part, spent in every.items() if spent}


def _rate(device: torch.device) -> float:
    """Return the operations a second of a product of float32 matrices."""
    one = torch.ones(SIDE, SIDE, device=device)
    float((one @ one).sum())  # warms up
    started = time.perf_counter()
    float((one @ one).sum())  # the number has to be there
    return 2 * SIDE**3 / (time.perf_counter() - started)

"""What a run writes: the bytes of a checkpoint and of the exported model, and whether the disk has room for them."""

import math
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

from scale_prune.checkpoint import newest_first
from scale_prune.preflight.job import FP32, Job
from scale_prune.preflight.output import goes_on
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.sizes import criterion_state, products
from scale_prune.system import markdown_table


def export_size(job: Job, layout: str) -> int:
    """Return the bytes of the exported weights, at most: padding may reach up to the dense widths.

    Beside a GGUF file there is a folder; components are multiplied out in the file, and in layout "uniform".
    """
    factorized = [group for group in job.groups if group.kind == "component"]
    factors = sum(prod(member.shape) for group in factorized for member in group.members)
    dense = job.num_parameters - factors + sum(group.dense_cost for group in factorized)
    elements = {"pad": dense, "uniform": dense if factorized else job.num_pruned, "gguf": job.num_pruned + dense}
    return elements.get(layout, job.num_pruned) * job.width


def checkpoint_size(job: Job) -> int:
    """Return the bytes of a checkpoint of all ranks: masters and moments; masks, scores, and the criterion's state.

    Where nothing is trained before the units leave, masters are those of the smaller model.
    """
    replicated = job.layout.num_units * (FP32 + 1)
    sharded = criterion_state(job) + products(job) + FP32 * job.layout.per_rank  # similarity
    trained = job.num_parameters if job.trains else job.num_pruned * job.recovers
    return trained * FP32 * (1 + job.moments) + replicated + job.world_size * sharded


def check_disk(reading: Reading, job: Job) -> None:
    """Refuse an output folder on a disk that is too full."""
    folder = Path(reading.config.output.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, _needed_disk(reading, job)
    if free < needed:
        raise ValueError(
            f"--output_dir {reading.config.output.output_dir} is on a disk with {of_size(free)} free, the run needs "
            f"{of_size(needed)} for its checkpoints and the exported model"
        )


def _needed_disk(reading: Reading, job: Job) -> int:
    """Return the bytes of the export and of the checkpoints that are there at a time, but for those there already."""
    return export_size(job, str(reading.config.output.layout)) + _new_checkpoints(reading) * checkpoint_size(job)


def _new_checkpoints(reading: Reading) -> int:
    checkpoint = reading.config.checkpoint
    there = len(newest_first(Path(reading.config.output.output_dir))) if goes_on(reading.config) else 0
    return checkpoint.keep_checkpoints + 1 - min(there, checkpoint.keep_checkpoints) if checkpoint.save_every else 0


def about_disk(reading: Reading, job: Job) -> Iterator[str]:
    saved = f"{_new_checkpoints(reading)} at a time" if reading.config.checkpoint.save_every else "none is saved"
    sizes = {
        "exported model": export_size(job, str(reading.config.output.layout)),
        "a checkpoint": checkpoint_size(job),
        f"all, with new checkpoints: {saved}": _needed_disk(reading, job),
    }
    yield ""
    yield from markdown_table(["disk", ""], [[name, of_size(size)] for name, size in sizes.items()])


def of_size(size: float) -> str:
    """Return a number of bytes with a unit in which it is easy to read."""
    power = min(int(math.log2(max(size, 1))) // 10, 3)
    return f"{size / 1024**power:,.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"

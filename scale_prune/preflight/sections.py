"""What a dry run prints: the model, the batch, the schedule, and what the run needs of memory, network and disk."""

import math
from collections.abc import Iterator, Sequence

from scale_prune.config import PruningConfig
from scale_prune.core import Schedule, budget, remaining_fraction
from scale_prune.criteria import CRITERIA, Flop, freezes, schedule_of, with_defaults
from scale_prune.preflight.disk import about_disk, of_size
from scale_prune.preflight.inputs import unused_settings
from scale_prune.preflight.job import Job
from scale_prune.preflight.memory import KEPT, memory, peak, total
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.round_needs import (
    GRAM_MATRICES,
    one_gram_matrix,
    round_bytes,
    round_operations,
    solves,
    trials,
)
from scale_prune.preflight.rounds import calibration_warning
from scale_prune.preflight.traffic import communication
from scale_prune.system import markdown_table


def about_run(reading: Reading) -> Iterator[str]:
    """Yield what the run would do, as far as its inputs could be read."""
    for section in (_model, _batch, _unused, _schedule):
        yield from section(reading)


def about_needs(reading: Reading, job: Job) -> Iterator[str]:
    """Yield what the run would need of memory, of the network and of the disk."""
    yield from _memory(job)
    yield from _communication(job)
    yield from _rounds(reading, job)
    yield from about_disk(reading, job)


def _pruning(reading: Reading) -> PruningConfig:
    return with_defaults(reading.config.pruning)


def planned_schedule(reading: Reading) -> Schedule:
    """Return the schedule that the run would follow."""
    groups = reading.groups
    initial = remaining_fraction(groups, [group.num_units for group in groups]) if groups else 1.0
    steps = reading.config.training.max_steps or reading.config.pruning.rounds or 1
    return schedule_of(_pruning(reading), steps, initial=initial)


def _model(reading: Reading) -> Iterator[str]:
    if not reading.groups:
        return
    assert reading.model_config is not None
    name = reading.config.training.model or "the embedded GPT-Neo, which the run builds and trains first"
    yield f"model: {name} ({reading.model_config.model_type})"
    for unit in dict.fromkeys(group.kind for group in reading.groups):
        widths = [group.num_units for group in reading.groups if group.kind == unit]
        yield f"groups: {len(widths)}, of {_listed(widths)} {unit}s; {sum(widths):,} {unit}s in all"


def _listed(widths: Sequence[int]) -> str:
    return f"{widths[0]:,}" if len(set(widths)) == 1 else ", ".join(f"{width:,}" for width in widths)


def _batch(reading: Reading) -> Iterator[str]:
    if not reading.ds_config:
        return
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    blocks, micro, accumulation = (int(reading.ds_config[key]) for key in keys)
    training, tokens = reading.config.training, blocks * reading.config.data.block_size
    rows, most = ("blocks", "") if reading.config.task.task == "lm" else ("examples", "at most ")
    yield (
        f"batch: {blocks:,} {rows} = {micro:,} in a forward pass x {accumulation:,} accumulated x "
        f"{reading.world_size:,} ranks; {most}{tokens:,} tokens a step"
    )
    steps = training.max_steps + training.recovery_steps
    pruning = planned_schedule(reading).last_pruning_step if training.max_steps else 0
    yield f"steps: {pruning:,} with pruning, {steps - pruning:,} after; {most}{steps * tokens:,} tokens"


def _unused(reading: Reading) -> Iterator[str]:
    if line := unused_settings(reading.config):
        yield line


def _schedule(reading: Reading) -> Iterator[str]:
    if not reading.groups:
        return
    schedule, pruning = planned_schedule(reading), _pruning(reading)
    yield ""
    if issubclass(CRITERIA[pruning.criterion], Flop):
        rise = schedule.warmup_steps + int(pruning.target_warmup_fraction * schedule.total_steps)
        yield (
            f"gates: their budget falls from {schedule.initial:.4f} of the dense model to {schedule.target:.4f} "
            f"between the steps {schedule.warmup_steps:,} and {rise:,}; what remains is settled at step "
            f"{schedule.last_descent_step:,}"
        )
        return
    if freezes(pruning):
        yield (
            f"gates: all are open to learn until step {schedule.last_descent_step:,}, when units are cut to "
            f"{schedule.target:.4f}"
        )
        return
    counted = "neurons" if {group.kind for group in reading.groups} == {"neuron"} else "parameters"
    rows = []
    for step in schedule_steps(schedule):
        remaining = schedule.remaining(step)
        rate = pruning.score_learning_rate * schedule.learning_rate(step)
        rows.append([f"{step:,}", f"{remaining:.4f}", f"{_kept(reading, remaining):,}", f"{rate:.3g}"])
    yield from markdown_table(["step", "remaining", counted, "score learning rate"], rows, texts=0)


def _kept(reading: Reading, remaining: float) -> int:
    """Return how many neurons, or parameters of the factorized weights, a fraction of the dense model is."""
    counts = [group.dense_cost for group in reading.groups]
    if _pruning(reading).scope != "per_group" or reading.groups[0].kind == "component":
        return int(remaining * sum(counts) + 1e-6)
    return sum(budget(remaining, count) for count in counts)


def schedule_steps(schedule: Schedule) -> list[int]:
    """Return the steps worth showing: the first and the last, and the rounds, or eighths of the descent."""
    if schedule.rounds:
        return sorted({1, *schedule.removal_steps, schedule.total_steps})
    first, last = schedule.warmup_steps, schedule.last_descent_step
    descent = [first + math.ceil(eighth * (last - first) / 8) for eighth in range(9)]
    return sorted({1, *descent, schedule.total_steps} - {0})


def _memory(job: Job) -> Iterator[str]:
    """Lay out each place's parts by phase."""
    phases = memory(job)
    yield ""
    yield (
        f"parameters: {job.num_parameters:,}, {job.num_pruned:,} when pruned; "
        f"{job.shards:,} on each of {job.world_size:,} ranks"
    )
    for place in ("GPU", "host"):
        names = dict.fromkeys(part.name for parts in phases.values() for part in parts if part.place == place)
        if names:
            rows = []
            for name in names:
                sizes = [sum(p.size for p in parts if (p.name, p.place) == (name, place)) for parts in phases.values()]
                rows.append([name, *(of_size(size) if size else "" for size in sizes)])
            rows.append(["**sum**", *(of_size(total(parts, place)) for parts in phases.values())])
            yield ""
            yield from markdown_table([f"memory of a rank, {place}", *phases], rows)
    yield ""
    if job.on_gpu:
        yield f"peak of a rank: {of_size(peak(phases, 'GPU'))} of GPU memory, without the CUDA context and what the"
        yield f"allocator cannot use again, and {of_size(peak(phases, 'host'))} of the host's"
    else:
        parts = {name: parts for name, parts in phases.items() if name != KEPT}
        yield f"peak of a rank: {of_size(peak(phases, 'host'))} with the settings of launch/setup.sh, under which glibc"
        yield f"keeps what is freed, so that phases add up; {of_size(peak(parts, 'host'))} without them"


def _communication(job: Job) -> Iterator[str]:
    rows = [[name, of_size(size)] for name, size in communication(job).items() if size]
    if rows:
        yield ""
        yield from markdown_table(["bytes that a rank receives in a step", ""], rows)


def _rounds(reading: Reading, job: Job) -> Iterator[str]:
    """Say what a round reads, sends and computes, or a repair at the end."""
    rounds = job.pruning.rounds
    if not (job.removals and (rounds or solves(job))):
        return
    what, when = ("a round", f"rounds: {rounds}; each") if rounds else ("the repair", "the repair at the end")
    tokens = job.calibration_steps * int(reading.ds_config["train_batch_size"]) * reading.config.data.block_size
    yield ""
    yield f"{when} reads {tokens:,} tokens of the training text; --repair {job.pruning.repair}"
    if line := calibration_warning(reading.config, job.groups):
        yield line
    yield from _portions(job)
    received = [[name, of_size(size)] for name, size in round_bytes(job, tokens).items() if size]
    counted = [[name, f"{count / 1e12:,.3f}"] for name, count in round_operations(job, tokens).items() if count]
    for heading, unit, rows in (
        (f"bytes that a rank receives in {what}", "", received),
        (f"arithmetic of the busiest rank in {what}", "TFLOP", counted),
    ):
        if rows:
            yield ""
            yield from markdown_table([heading, unit], rows)


def _portions(job: Job) -> Iterator[str]:
    """Say how little memory a round can do with, where a rank keeps several Gram matrices."""
    readings, place, gram = -(-len(job.groups) // job.world_size), job.place(), GRAM_MATRICES
    rounds = [parts for name, parts in memory(job).items() if name.startswith("round")]
    kept = max((part.size for parts in rounds for part in parts if part.name == gram), default=0)
    if readings > 1 and kept and not trials(job):  # which need all of them
        most = max(total(parts, place) for parts in rounds)
        least = of_size(most - kept + one_gram_matrix(job))
        yield (
            f"a rank with little memory keeps one of its {gram} at a time: {least} of {place} memory then in the "
            f"place of {of_size(most)}, and the text is read up to {readings} times"
        )

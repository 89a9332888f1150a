"""The check before the queue: what a run would do and need, and everything that is wrong with it, in seconds.

One process; no GPU, no weights, no engine, nothing is written. The sections that are printed are those whose inputs
could be read.
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scale_prune.checkpoint import filled_from, glance
from scale_prune.config import CLASSIFICATION, DEFAULT, Mistakes, PruningConfig, parse, precision
from scale_prune.core import Schedule, budget, remaining_fraction
from scale_prune.criteria import CRITERIA, Flop, check_uniqueness, schedule_of, with_defaults
from scale_prune.data import Split, Text, check_tokens, embedded
from scale_prune.data import text as data
from scale_prune.preflight.estimate import KEPT, checkpoint_size, communication, export_size, memory, peak, total
from scale_prune.preflight.inputs import CHECKS, Reading, unused_settings
from scale_prune.preflight.job import Job
from scale_prune.preflight.output import check_output
from scale_prune.preflight.rehearsal import rehearse
from scale_prune.preflight.same_run import check_same
from scale_prune.pruning import sketch_units
from scale_prune.tasks import check_positions, classification, of_rows, questions_of
from scale_prune.tasks.examples import prepare

DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dry_run(argv: Sequence[str], world_size: int, *, speaks: bool) -> int:
    """Check a command line, print what its run would need, and list every mistake on stderr.

    Args:
        argv: the arguments, without the program's name.
        world_size: number of ranks that the run would have.
        speaks: False keeps this process silent, where another one prints the same.

    Returns:
        the exit code: 0, or 2 where there is a mistake.
    """
    mistakes = Mistakes()
    with redirect_stdout(sys.stdout if speaks else None):
        config, explicit = parse(argv, criteria=tuple(CRITERIA), noted=mistakes.noted)
    reading = Reading(config=config, explicit=explicit, world_size=world_size)
    if config.training.model is None:
        reading.model_config = embedded.model_config()
    later = (_check_same, _check_tokens, _check_updates, _check_ranks)
    for check in (_check_output, _glance, _check_uniqueness, *CHECKS, *later):
        with mistakes.noted():
            check(reading)
    sections: tuple[Callable[[Reading], Iterator[str]], ...] = (_model, _batch, _unused, _schedule)
    lines = [line for section in sections for line in section(reading)]
    if reading.groups and reading.ds_config:
        try:
            job = _job(reading)
        except RuntimeError as error:  # code that looks at numbers, or a block that is too long
            lines.append(f"memory is not known, the model does not run on fake tensors: {' '.join(str(error).split())}")
        else:
            lines += [*_memory(job), *_communication(job), *_disk(reading, job)]
            with mistakes.noted():
                _check_disk(reading, job)
    if speaks:
        print("\n".join(lines))
        for mistake in dict.fromkeys(mistakes):  # two checks may meet the same one
            print(f"error: {mistake}", file=sys.stderr, flush=True)
    return 2 if mistakes else 0


# --- checks that a run makes later, or not at all ------------------------------------------------------------------


def _check_output(reading: Reading) -> None:
    check_output(reading.config)


def _glance(reading: Reading) -> None:
    reading.config = filled_from(glance(reading.config), reading.config)


def _check_uniqueness(reading: Reading) -> None:
    if glance(reading.config) is None:
        check_uniqueness(reading.config.pruning)


def _check_same(reading: Reading) -> None:
    if reading.model_config is not None and reading.tokenizer is not None and reading.ds_config:
        checkpoint = glance(reading.config)
        if checkpoint is not None:
            check_same(checkpoint, reading.inputs())


def _check_tokens(reading: Reading) -> None:
    if reading.tokenizer is None:
        return
    for split, text in reading.texts.items():
        tokens = _tokens(reading, split, text, reading.tokenizer)
        if tokens is not None and reading.model_config is not None:
            check_tokens({split: int(tokens.max())}, reading.inputs())


def _tokens(reading: Reading, split: Split, text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Return the tokens of a text, None where only their number had to be known."""
    config, knows_model = reading.config, reading.model_config is not None
    if config.task.task == "lm":
        if max(tokenizer.get_vocab().values()) < getattr(reading.model_config, "vocab_size", math.inf):
            data.check_length(config.data, split, text, tokenizer)
            return None
        return data.prepare(config.data, split, tokenizer).tokens
    if config.task.task == CLASSIFICATION:
        train = reading.texts.get("train", text)
        labels_for = partial(classification.labels_for, training_follows=True)
        labels = labels_for(reading.inputs(), train) if knows_model else of_rows(train)
        return torch.cat(classification.prepare(config, text, tokenizer, labels).texts)
    examples = prepare(config, split, tokenizer)
    if split == "validation" and knows_model:
        check_positions(reading.inputs(), questions_of(examples, config.task))
    return torch.cat([*examples.prompts, *examples.completions])


def _check_updates(reading: Reading) -> None:
    """Refuse a schedule that goes from dense to the target in one update."""
    schedule = _schedule_of(reading)
    updates = sum(schedule.updates(step) for step in range(1, schedule.last_descent_step + 1))
    if schedule.target < 1 and updates < 2:
        raise ValueError(
            f"--max_steps {schedule.total_steps} with --update_every {schedule.update_every} chooses masks only once "
            f"on the way to the target, so all units go at one step; give more steps, a smaller --update_every or "
            f"smaller --warmup_fraction and --cooldown_fraction"
        )


def _check_ranks(reading: Reading) -> None:
    units = sum(group.num_units for group in reading.groups)
    if reading.groups and reading.world_size > units:
        raise ValueError(f"{reading.world_size} ranks are more than the {units} units of the model, use fewer")


def _check_disk(reading: Reading, job: Job) -> None:
    """Refuse an output folder on a disk that is too full."""
    folder = Path(reading.config.output.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, _needed_disk(reading, job)
    if free < needed:
        raise ValueError(
            f"--output_dir {reading.config.output.output_dir} is on a disk with {_size(free)} free, the run needs "
            f"{_size(needed)} for its checkpoints and the exported model"
        )


def _needed_disk(reading: Reading, job: Job) -> int:
    """Return the bytes of the export and of the checkpoints: those that are kept, and the one being written."""
    checkpoint = reading.config.checkpoint
    checkpoints = checkpoint.keep_checkpoints + 1 if checkpoint.save_every else 0
    return export_size(job, str(reading.config.output.layout)) + checkpoints * checkpoint_size(job)


# --- what is printed -----------------------------------------------------------------------------------------------


def _pruning(reading: Reading) -> PruningConfig:
    return with_defaults(reading.config.pruning)


def _schedule_of(reading: Reading) -> Schedule:
    groups = reading.groups
    initial = remaining_fraction(groups, [group.num_units for group in groups]) if groups else 1.0
    return schedule_of(_pruning(reading), reading.config.training.max_steps, initial=initial)


def _model(reading: Reading) -> Iterator[str]:
    if not reading.groups:
        return
    assert reading.model_config is not None
    widths = [group.num_units for group in reading.groups]
    name = reading.config.training.model or "the embedded GPT-Neo, which the run builds and trains first"
    yield f"model: {name} ({reading.model_config.model_type})"
    unit = reading.groups[0].kind
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
    steps, pruning = training.max_steps + training.recovery_steps, _schedule_of(reading).last_pruning_step
    yield f"steps: {pruning:,} with pruning, {steps - pruning:,} after; {most}{steps * tokens:,} tokens"


def _unused(reading: Reading) -> Iterator[str]:
    if line := unused_settings(reading.config):
        yield line


def _schedule(reading: Reading) -> Iterator[str]:
    if not reading.groups:
        return
    schedule, pruning = _schedule_of(reading), _pruning(reading)
    yield ""
    if issubclass(CRITERIA[pruning.criterion], Flop):
        rise = schedule.warmup_steps + int(pruning.target_warmup_fraction * schedule.total_steps)
        yield (
            f"gates: their budget falls from {schedule.initial:.4f} of the dense model to {schedule.target:.4f} "
            f"between the steps {schedule.warmup_steps:,} and {rise:,}; what remains is settled at step "
            f"{schedule.last_descent_step:,}"
        )
        return
    counted = "neurons" if reading.groups[0].kind == "neuron" else "parameters"
    yield f"| step | remaining | {counted} | score learning rate |"
    yield "|---:|---:|---:|---:|"
    for step in schedule_steps(schedule):
        remaining = schedule.remaining(step)
        rate = pruning.score_learning_rate * schedule.learning_rate(step)
        yield f"| {step:,} | {remaining:.4f} | {_kept(reading, remaining):,} | {rate:.3g} |"


def _kept(reading: Reading, remaining: float) -> int:
    """Return how many neurons, or parameters of the factorised weights, a fraction of the dense model is."""
    counts = [group.dense_cost for group in reading.groups]
    if _pruning(reading).scope == "global" or reading.groups[0].kind == "component":
        return int(remaining * sum(counts) + 1e-6)
    return sum(budget(remaining, count) for count in counts)


def schedule_steps(schedule: Schedule) -> list[int]:
    """Return the steps worth showing: the ends of warm-up, descent and run, and eighths of the descent."""
    first, last = schedule.warmup_steps, schedule.last_descent_step
    descent = [first + math.ceil(eighth * (last - first) / 8) for eighth in range(9)]
    return sorted({1, *descent, schedule.total_steps} - {0})


def _job(reading: Reading) -> Job:
    """Return what the needs follow from."""
    assert reading.model_config is not None
    training, ds_config = reading.config.training, reading.ds_config
    shown = rehearse(
        reading.model_config,
        dtype=DTYPES[precision(ds_config)],
        batch=int(ds_config["train_micro_batch_size_per_gpu"]),
        block=reading.config.data.block_size,
        gradient_checkpointing=training.gradient_checkpointing,
        trust_remote_code=training.trust_remote_code,
        prepare=partial(sketch_units, pruning=_pruning(reading)),
    )
    return Job(
        numels=shown.numels,
        buffers=shown.buffers,
        activations=shown.activations,
        groups=reading.groups,
        pruning=_pruning(reading),
        ds_config=ds_config,
        world_size=reading.world_size,
        on_gpu=Path(training.ds_config or DEFAULT).stem != DEFAULT,  # not by this machine, which may be another one
        taught=reading.config.distillation.teacher is not None,
    )


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
            yield ""
            yield f"| memory of a rank, {place} | {' | '.join(phases)} |"
            yield f"|---{'|---:' * len(phases)}|"
            for name in names:
                sizes = [sum(p.size for p in parts if (p.name, p.place) == (name, place)) for parts in phases.values()]
                yield f"| {name} | {' | '.join(_size(size) if size else '' for size in sizes)} |"
            yield f"| **sum** | {' | '.join(_size(total(parts, place)) for parts in phases.values())} |"
    yield ""
    if job.on_gpu:
        yield f"peak of a rank: {_size(peak(phases, 'GPU'))} of GPU memory, without the CUDA context and what the"
        yield f"allocator cannot use again, and {_size(peak(phases, 'host'))} of the host's"
    else:
        parts = {name: parts for name, parts in phases.items() if name != KEPT}
        yield f"peak of a rank: {_size(peak(phases, 'host'))} with the settings of launch/setup.sh, under which glibc"
        yield f"keeps what is freed, so that phases add up; {_size(peak(parts, 'host'))} without them"


def _communication(job: Job) -> Iterator[str]:
    yield ""
    yield "| bytes that a rank receives in a step | |"
    yield "|---|---:|"
    yield from (f"| {name} | {_size(size)} |" for name, size in communication(job).items() if size)


def _disk(reading: Reading, job: Job) -> Iterator[str]:
    checkpoint = reading.config.checkpoint
    yield ""
    yield "| disk | |"
    yield "|---|---:|"
    yield f"| exported model | {_size(export_size(job, str(reading.config.output.layout)))} |"
    yield f"| a checkpoint | {_size(checkpoint_size(job))} |"
    kept = f"{checkpoint.keep_checkpoints} kept and one being written" if checkpoint.save_every else "none is saved"
    yield f"| all, with checkpoints: {kept} | {_size(_needed_disk(reading, job))} |"


def _size(size: float) -> str:
    """Return a number of bytes with a unit in which it is easy to read."""
    power = min(int(math.log2(max(size, 1))) // 10, 3)
    return f"{size / 1024**power:,.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"

"""What a run keeps in a checkpoint, and how another process goes on from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import set_seed

from scale_prune import pruner_state
from scale_prune.checkpoint import NEWEST, Checkpoint, DamagedError, newest_first, newest_whole, open_checkpoint, save
from scale_prune.checkpoint import damage as damage_of
from scale_prune.config import Config
from scale_prune.core.shards import FlatSlice
from scale_prune.criteria import schedule_of
from scale_prune.ds_limits import get
from scale_prune.inputs import Inputs
from scale_prune.pruner import Pruner
from scale_prune.report import versions
from scale_prune.zero3 import Runtime, Zero3Backend, engine_state
from scale_prune.zero3.randomness import random_state, set_random_state

MAY_CHANGE = frozenset(
    # where things are: the text's tokens are compared, not its path
    {"model", "dataset", "dataset_config", "train_file", "validation_file", "output_dir", "overwrite"}
    # how the steps are cut up: the global batch is compared
    | {"ds_config", "train_batch_size", "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    # how long, how fast, what is written
    | {"max_steps", "recovery_steps", "learning_rate", "weight_decay", "lr_warmup_fraction", "max_grad_norm"}
    | {"eval_every", "log_every", "tensorboard", "layout", "collective_timeout", "trust_remote_code"}
    | {"save_every", "keep_checkpoints", "resume", "generation_batch_size"}
)
OLD_HOLDOUT = (
    ". An earlier version began the run: where no validation text was given, that held out the last 5 % of the rows; "
    "if so, give these rows as --validation_file and those before them as --train_file"
)
FIXED_IN_DS_CONFIG = ("train_batch_size", "optimizer.type", "scheduler.type", "bf16.enabled", "fp16.enabled")


# --- which checkpoint --------------------------------------------------------------------------------------------


def glance(config: Config) -> Checkpoint | None:
    """Return the checkpoint that a run will probably go on from, without reading its tensors or talking to other ranks.

    Raises:
        ValueError: `resume` names a folder that is no checkpoint, or a damaged one.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None
    if wanted != NEWEST:
        try:
            return open_checkpoint(Path(wanted))
        except DamagedError as error:
            raise ValueError(_unusable(wanted, str(error), config)) from error
    for folder in newest_first(Path(config.output.output_dir)):
        try:
            return open_checkpoint(folder)
        except DamagedError:
            continue
    return None


def choose(config: Config, runtime: Runtime) -> Checkpoint | None:
    """Return the checkpoint to go on from, all of whose files were read and compared. A collective.

    Raises:
        ValueError: the one that `resume` names is damaged, or all of the run's are.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None
    if wanted == NEWEST:
        return newest_whole(Path(config.output.output_dir), runtime, say=runtime.say)
    problem = damage_of(Path(wanted), runtime)
    if problem is not None:
        raise ValueError(_unusable(wanted, problem, config))
    return open_checkpoint(Path(wanted))


def _unusable(wanted: str, problem: str, config: Config) -> str:
    others = [str(path) for path in newest_first(Path(config.output.output_dir)) if path != Path(wanted)]
    there = f"{config.output.output_dir} has {', '.join(others)}" if others else "there is no other one"
    return f"--resume {wanted} is not a whole checkpoint: {problem}; {there}"


# --- what must be the same ---------------------------------------------------------------------------------------


def filled_from(checkpoint: Checkpoint | None, config: Config) -> Config:
    """Return the settings with the checkpoint's global batch and BOS, where they leave them open."""
    found: dict[str, Any] = {}
    if checkpoint is not None and config.training.train_batch_size is None:
        found["train_batch_size"] = checkpoint.state["ds_config"]["train_batch_size"]
    if checkpoint is not None and config.data.bos == "auto":
        found["bos"] = checkpoint.state["settings"].get("bos", "never")  # as it was before there was the setting
    return Config.from_flat(config.flat() | found)


def check_same(checkpoint: Checkpoint, inputs: Inputs) -> list[str]:
    """Refuse settings under which the run would not be the same one.

    Returns:
        A line for every other setting that has changed.

    Raises:
        ValueError: a setting that must not change has changed, or the run is past the steps that are asked for.
    """
    before, now = checkpoint.state["settings"], inputs.config.flat()
    changed = [name for name in now if name in before and now[name] != before[name]]
    for name in changed:
        if name not in MAY_CHANGE:
            raise ValueError(
                f"--{name} {now[name]} is not the run's {before[name]}, which cannot change on the way; "
                f"leave it as it was, or start another run"
            )
    for path in FIXED_IN_DS_CONFIG:
        old, new = get(checkpoint.state["ds_config"], path), get(inputs.ds_config, path)
        if old != new:
            raise ValueError(
                f'the ds_config has "{path}": {new}, but the run has {old}, which cannot change on the way'
            )
    _check_steps(checkpoint, inputs.config)
    return [f"--{name} is now {now[name]}, was {before[name]}" for name in changed if name != "resume"]


def _check_steps(checkpoint: Checkpoint, config: Config) -> None:
    max_steps, total = config.training.max_steps, config.training.max_steps + config.training.recovery_steps
    before = checkpoint.state["settings"]["max_steps"]
    if checkpoint.compacted and max_steps != before:
        raise ValueError(
            f"--max_steps {max_steps} is not the run's {before}, and its model is compacted already (step "
            f"{checkpoint.step}); only --recovery_steps can change now"
        )
    last = total if checkpoint.compacted else schedule_of(config.pruning, max_steps).last_pruning_step
    if checkpoint.step > last:
        raise ValueError(
            f"the run has made {checkpoint.step} steps already, more than the {last} that --max_steps {max_steps} and "
            f"--recovery_steps {config.training.recovery_steps} leave for them; ask for more"
        )


def check_model_and_text(checkpoint: Checkpoint, pruner: Pruner, texts: Mapping[str, str]) -> None:
    """Refuse a model of other groups, and a text of other tokens, than the run began with.

    Raises:
        ValueError: they differ.
    """
    before = checkpoint.state["pruner"]["groups"]
    now = {group.name: group.num_units for group in pruner.groups}
    if now != before:
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        raise ValueError(
            f"the model has {now.get(name, 0)} neurons in {name}, the run's had {before.get(name, 0)}; "
            "give the --model that it began with"
        )
    for split, tokens in texts.items():
        if checkpoint.state["texts"][split] != tokens:
            held_out = "validation" not in checkpoint.state and checkpoint.state["settings"]["validation_file"] is None
            raise ValueError(
                f"the {split} text has other tokens than the run's; give the text that it began with"
                + (OLD_HOLDOUT if held_out else "")
            )


# --- out and in --------------------------------------------------------------------------------------------------


def save_run(
    inputs: Inputs,
    runtime: Runtime,
    backend: Zero3Backend,
    pruner: Pruner,
    *,
    step: int,
    texts: Mapping[str, str],
    measured: dict[str, Any],
) -> Path:
    """Write a checkpoint of a run between two steps. A collective.

    Args:
        inputs: what the run reads.
        runtime: its ranks.
        backend: its engine.
        pruner: its pruner.
        step: steps that were made, recovery included.
        texts: hashes of the texts' tokens.
        measured: what the report will need.

    Raises:
        ValueError: it cannot be written; the message says why.
    """
    config = inputs.config
    state = {
        "step": step,
        "world_size": runtime.world_size,
        "settings": config.flat(),
        "ds_config": inputs.ds_config,
        "pruner": pruner_state.facts_of(pruner),
        "engine": engine_state.facts_of(backend),
        "texts": dict(texts),
        "validation": inputs.validation,
        "measured": measured,
        "versions": versions(),
    }
    slices = chain(
        ((f"pruner/{name}", each) for name, each in pruner_state.pruner_slices(pruner)),
        ((f"engine/{name}", each) for name, each in engine_state.engine_slices(backend)),
        _randomness(runtime.rank),
    )
    folder = Path(config.output.output_dir)
    return save(folder, state=state, slices=slices, runtime=runtime, keep=config.checkpoint.keep_checkpoints)


def restore_pruner(checkpoint: Checkpoint, pruner: Pruner) -> None:
    """Give a new pruner what the checkpoint holds for it."""
    with _one_message(checkpoint), checkpoint.reader() as reader:
        pruner_state.restore(
            pruner,
            checkpoint.state["pruner"],
            lambda name, start, count: reader.read(f"pruner/{name}", start, count),
        )


def restore_engine(checkpoint: Checkpoint, backend: Zero3Backend) -> None:
    """Give a new engine what the checkpoint holds for it: masters, optimizer, and the working copy from the masters."""
    with _one_message(checkpoint), checkpoint.reader() as reader:
        engine_state.restore(
            backend,
            checkpoint.state["engine"],
            lambda kind, name, start, count: reader.read(f"engine/{kind}/{name}", start, count),
        )
    engine_state.write_working_copy(backend)


def restore_randomness(checkpoint: Checkpoint, runtime: Runtime, seed: int) -> None:
    """Set this rank's random generators as they were; where the number of ranks is another one, seed them anew."""
    if runtime.world_size != checkpoint.state["world_size"]:
        set_seed((seed + 1_000_003 * checkpoint.step + runtime.rank) % 2**32)
        return
    prefix = f"random/{runtime.rank}/"
    with _one_message(checkpoint), checkpoint.reader() as reader:
        own = [name for name in reader.names() if name.startswith(prefix)]
        set_random_state({name.removeprefix(prefix): reader.whole(name) for name in own})


@contextmanager
def _one_message(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a checkpoint of another making comes to into a ValueError; its sums fit, so no disk has spoilt it."""
    try:
        yield
    except (SafetensorError, AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}".partition("\n")[0][:300]
        raise ValueError(
            f"the checkpoint {checkpoint.folder} does not hold what this version reads: {reason}"
        ) from error


def _randomness(rank: int) -> Iterator[tuple[str, FlatSlice]]:
    for name, state in random_state().items():
        yield f"random/{rank}/{name}", FlatSlice(0, state.cpu())

"""What a run keeps in a checkpoint, and how another process goes on from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import set_seed

from scale_prune.checkpoint.folder import Checkpoint, save
from scale_prune.core import FlatSlice
from scale_prune.data import Inputs
from scale_prune.pruning import Pruner
from scale_prune.pruning import state as pruner_state
from scale_prune.system import versions
from scale_prune.zero3 import Runtime, Zero3Backend, engine_state, random_state, set_random_state

OLD_HOLDOUT = (
    ". An earlier version began the run: where no validation text was given, that held out the last 5 % of the rows; "
    "if so, give these rows as --validation_file and those before them as --train_file"
)


# --- what must be the same ---------------------------------------------------------------------------------------


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
    folder, slices = Path(config.output.output_dir), _slices(pruner, backend, runtime.rank)
    return save(folder, state=state, slices=slices, runtime=runtime, keep=config.checkpoint.keep_checkpoints)


def restore_pruner(checkpoint: Checkpoint, pruner: Pruner) -> None:
    """Give a new pruner what the checkpoint holds for it."""
    with _one_message(checkpoint), checkpoint.reader() as reader:
        pruner_state.restore(
            pruner, checkpoint.state["pruner"], lambda name, start, count: reader.read(f"pruner/{name}", start, count)
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
    """Turn what a checkpoint of another making comes to into a ValueError; its sums fit, so no disk has damaged it."""
    try:
        yield
    except (SafetensorError, AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}".partition("\n")[0][:300]
        raise ValueError(
            f"the checkpoint {checkpoint.folder} does not hold what this version reads: {reason}"
        ) from error


def _slices(pruner: Pruner, backend: Zero3Backend, rank: int) -> Iterator[tuple[str, FlatSlice]]:
    """Yield everything that this rank holds of a run."""
    yield from ((f"pruner/{name}", each) for name, each in pruner_state.pruner_slices(pruner))
    yield from ((f"engine/{name}", each) for name, each in engine_state.engine_slices(backend))
    for name, state in random_state().items():
        yield f"random/{rank}/{name}", FlatSlice(0, state.cpu())

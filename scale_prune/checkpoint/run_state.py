"""What a run keeps in a checkpoint, and how another process goes on from it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import set_seed

from scale_prune.checkpoint.folder import Checkpoint
from scale_prune.checkpoint.writing import save
from scale_prune.core import FlatSlice, UnitGroup
from scale_prune.data import Inputs
from scale_prune.pruning import DenseUnits, Pruner
from scale_prune.pruning import state as pruner_state
from scale_prune.system import versions
from scale_prune.zero3 import Runtime, Zero3Backend, engine_state, random_state, set_random_state

OLD_HOLDOUT = (
    ". An earlier version began the run: where no validation text was given, that held out the last 5 % of the rows; "
    "if so, give these rows as --validation_file and those before them as --train_file"
)


# --- what must be the same ---------------------------------------------------------------------------------------


def check_model_and_text(checkpoint: Checkpoint, groups: Sequence[UnitGroup], texts: Mapping[str, str]) -> None:
    """Refuse a model of other groups, and a text of other tokens, than the run began with.

    Raises:
        ValueError: they differ.
    """
    before = checkpoint.kept_groups or checkpoint.state["pruner"]["groups"]
    now = {group.name: group.num_units for group in groups}
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
    inputs: Inputs, runtime: Runtime, backend: Zero3Backend, pruner: Pruner, dense: DenseUnits, facts: Mapping[str, Any]
) -> Path:
    """Write a checkpoint of a run between two steps. A collective.

    Args:
        inputs: what the run reads.
        runtime: its ranks.
        backend: its engine.
        pruner: its pruner.
        dense: what rounds before the pruner's have left of the dense model.
        facts: "step", the steps that were made, recovery included; "finished", whether all units that were to leave
            have left; "texts", hashes of their tokens; "measured", what the report will need.

    Raises:
        ValueError: it cannot be written; the message says why.
    """
    config = inputs.config
    state = {
        **facts,
        "world_size": runtime.world_size,
        "settings": config.flat(),
        "ds_config": inputs.ds_config,
        "kept_groups": {} if dense.untouched else {group.name: group.num_units for group in dense.groups},
        "pruner": pruner_state.facts_of(pruner),
        "engine": engine_state.plain(engine_state.facts_of(backend)),
        "validation": inputs.validation,
        "versions": versions(),
    }
    folder, slices = Path(config.output.output_dir), _slices(pruner, backend, dense, runtime.rank)
    return save(folder, state=state, slices=slices, runtime=runtime, keep=config.checkpoint.keep_checkpoints)


def read_kept(checkpoint: Checkpoint, groups: Sequence[UnitGroup]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what earlier rounds have kept of the dense model's groups, (N,) bool, and its units' scores."""
    sizes = [group.num_units for group in groups]
    with _one_message(checkpoint), checkpoint.reader() as reader:
        kept, scores = (reader.read(f"kept/{name}", 0, sum(sizes)) for name in ("masks", "scores"))
    return list(kept.bool().split(sizes)), list(scores.split(sizes))


def restore_pruner(checkpoint: Checkpoint, pruner: Pruner) -> None:
    """Give a new pruner what the checkpoint holds for it. A collective with gates."""
    with _one_message(checkpoint), checkpoint.reader() as reader:
        pruner_state.restore(
            pruner, checkpoint.state["pruner"], lambda name, start, count: reader.read(f"pruner/{name}", start, count)
        )
    pruner.prepare_step()


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


def _slices(pruner: Pruner, backend: Zero3Backend, dense: DenseUnits, rank: int) -> Iterator[tuple[str, FlatSlice]]:
    """Yield everything that this rank holds of a run."""
    yield from ((f"pruner/{name}", each) for name, each in pruner_state.pruner_slices(pruner))
    yield from ((f"engine/{name}", each) for name, each in engine_state.engine_slices(backend))
    if rank == 0 and not dense.untouched:
        yield "kept/masks", FlatSlice(0, torch.cat(dense.kept))
        yield "kept/scores", FlatSlice(0, torch.cat(dense.scores))
    for name, state in random_state().items():
        yield f"random/{rank}/{name}", FlatSlice(0, state.cpu())

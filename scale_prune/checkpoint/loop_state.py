"""What a pruner remembers, kept beside the checkpoint of a loop of one's own: a file a rank, and one for all."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from scale_prune.checkpoint.schema import problem_of_pruner
from scale_prune.pruning import Pruner, facts_of, pruner_slices, restore
from scale_prune.system import whole_or_absent, write_atomically
from scale_prune.system.slices import SliceReader, write_slices
from scale_prune.zero3 import told_to_all

STATE = "pruner.json"


def save_state(pruner: Pruner, folder: str | PathLike[str]) -> None:
    """Write what the pruner remembers, between two steps, beside the loop's own checkpoint of the engine.

    A collective: every rank writes a file of its own, then rank 0 what holds for all.

    Args:
        pruner: from `attach`.
        folder: an existing folder that all ranks see.

    Raises:
        ValueError: on all ranks, what keeps one of them from writing.
    """
    rank, folder = pruner.backend.rank, Path(folder)
    with told_to_all(folder), whole_or_absent(folder / f"pruner-{rank:05d}.safetensors") as partial:
        write_slices(partial, dict(pruner_slices(pruner)), pruner.step)
    with told_to_all(folder):
        if rank == 0:
            more: dict[str, Any] = {"criterion": pruner.config.criterion, "world_size": pruner.backend.world_size}
            more |= {"engine_steps": pruner.backend.steps_made()}
            write_atomically(folder / STATE, json.dumps(facts_of(pruner) | more))
    with told_to_all(folder, "gone on from later"):
        if not (folder / STATE).is_file():
            raise ValueError(
                f"rank {rank} does not see {STATE}, which rank 0 has written; give a folder of a shared disk"
            )


def load_state(pruner: Pruner, folder: str | PathLike[str]) -> None:
    """Give a new pruner what `save_state` wrote, on any number of ranks, and put its masks on. A collective.

    Args:
        pruner: from `attach`, with the same settings, around an engine that has loaded its own checkpoint.
        folder: as for `save_state`.

    Raises:
        ValueError: on all ranks, where one of them cannot read the folder, the groups or the criterion are not those of
            the folder, the engine's checkpoint is of another step, or `save_state` was cut off in between.
    """
    folder = Path(folder)
    with told_to_all(folder, "read"):
        facts = _facts_in(folder, pruner)
        files = sorted(folder.glob("pruner-*.safetensors"))  # more than were written, if there were more ranks once
        with SliceReader(files[: facts.get("world_size")]) as reader:
            if others := reader.steps - {facts["step"]}:
                raise ValueError(
                    f"it holds slices of the steps {sorted(others)} beside {STATE} of step {facts['step']}: "
                    "`save_state` was cut off; go on from an earlier folder"
                )
            restore(pruner, facts, reader.read)
    pruner.prepare_step()
    pruner.put_masks_on()


def _facts_in(folder: Path, pruner: Pruner) -> dict[str, Any]:
    """Return what `save_state` wrote in plain values.

    Raises:
        OSError: they cannot be read.
        ValueError: they are not those of this pruner's model, criterion and step.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{STATE} is not valid JSON") from error
    if problem := problem_of_pruner(facts):
        raise ValueError(f"{STATE} {problem}")
    groups = {group.name: group.num_units for group in pruner.groups}
    if facts["groups"] != groups:
        raise ValueError(f"it is of a model with the groups {facts['groups']}, this one has {groups}")
    own = pruner.config.criterion
    if (criterion := facts.get("criterion", own)) != own:  # which older folders do not tell
        raise ValueError(f"it is of criterion {criterion}, this is {own}")
    made = pruner.backend.steps_made()
    if made != facts.get("engine_steps", made):
        raise ValueError(
            f"it is of the time when the engine had made {facts['engine_steps']} steps, but it has made {made}; load "
            "the engine's checkpoint of that step first"
        )
    return facts

"""What a pruner remembers between steps, and how another one takes it over, on any number of ranks.

All of it is either the same on all ranks, and goes into plain values, or a line of M numbers by unit (N * N by group)
of which each rank has a slice. A step's activations are sampled by a generator that is seeded anew each time, so no
generator is part of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import FlatSlice, ReadSlice
from scale_prune.pruning.pruner import Pruner


def facts_of(pruner: Pruner) -> dict[str, Any]:
    """Return what is the same on all ranks that own units; rank 0 always does."""
    return {
        "step": pruner.step,
        "churn": pruner.masking.churn,
        "learned": pruner.scoring.learned,
        "due": pruner.observations.due,
        "sampled": any(rows.values is not None for rows in pruner.observations.similarities),
        "scalars": {name: float(value) for name, value in pruner.scoring.state.items() if value.dim() == 0},
        "groups": {group.name: group.num_units for group in pruner.groups},
    }


def pruner_slices(pruner: Pruner) -> Iterator[tuple[str, FlatSlice]]:
    """Yield this rank's slices of everything else, copied to the CPU."""
    line, observations = pruner.line, pruner.observations
    lines = {
        "masks": line.owned(pruner.masking.live),
        "scores": line.owned(torch.cat(pruner.scores)),
        "similarity": observations.similarity,
        **{f"state/{name}": value for name, value in pruner.scoring.state.items() if value.dim()},
    }
    for name, values in lines.items():
        yield name, FlatSlice(line.own.start, values.to("cpu", copy=True))
    for span, rows in zip(line.spans, observations.similarities, strict=True):
        for name, each in rows.remembered().items():
            yield f"{name}/{span.group.name}", FlatSlice(each.start, each.values.to("cpu", copy=True))


@torch.no_grad()
def restore(pruner: Pruner, facts: Mapping[str, Any], read: ReadSlice) -> None:
    """Give a new pruner of the same groups and settings what another one remembered.

    No communication: afterwards `pruner.prepare_step()` puts on what the coming step needs, and
    `pruner.put_masks_on()` the masks.

    Args:
        pruner: one that has not made a step.
        facts: of `facts_of`.
        read: reads what `pruner_slices` of all ranks held.
    """
    line, masking, scoring, observations = pruner.line, pruner.masking, pruner.scoring, pruner.observations
    device = line.backend.device

    def own(name: str) -> Tensor:
        return read(name, line.own.start, line.num_owned).to(device)

    def by_group(name: str) -> list[Tensor]:
        return line.by_group(read(name, 0, line.layout.num_units).to(device))

    pruner.step, masking.churn = facts["step"], facts["churn"]
    masking.put(by_group("masks"))
    scoring.scores = by_group("scores")
    scoring.learned = facts.get("learned", True)  # which checkpoints did not always have, as `due`
    scoring.state = {
        name: own(f"state/{name}").to(value) if value.dim() else torch.full_like(value, facts["scalars"][name])
        for name, value in scoring.state.items()
    }
    observations.similarity = own("similarity").clone()
    observations.due = facts.get("due", False)
    if facts["sampled"]:
        for span, rows in zip(line.spans, observations.similarities, strict=True):
            rows.go_on_from(observations.similarity[span.place].clone(), _reader_of(span.group.name, read))


@torch.no_grad()
def carry_over(pruner: Pruner, smaller: Pruner) -> None:
    """Give a pruner of the units that are left what another one knows of them, but for their similarity. A collective.

    Args:
        pruner: the other one; collectives of its backend still work.
        smaller: one whose groups are what the other's masks leave.
    """
    live = pruner.masking.live
    lines = {"masks": live[live], "scores": torch.cat(pruner.scores)[live], "similarity": torch.zeros(int(live.sum()))}
    for name, values in pruner.scoring.state.items():
        if values.dim():
            lines[f"state/{name}"] = pruner.line.gather(values)[live]
    facts = facts_of(pruner) | {"sampled": False, "churn": 0}
    restore(smaller, facts, lambda name, start, count: lines[name][start : start + count])
    smaller.prepare_step()
    smaller.seconds.update(pruner.seconds)


def _reader_of(group_name: str, read: ReadSlice) -> ReadSlice:
    return lambda name, start, count: read(f"{name}/{group_name}", start, count)

"""What the layers deserve, measured: how far the model's predictions move when units stay away."""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import top_mask
from scale_prune.core.level_table import GENERATIONS, OFFSPRING, TRIAL_TOKENS, LevelTable, levels_of, switched
from scale_prune.pruning import Calibration, takeovers_of
from scale_prune.run.calibrating import calibration_text
from scale_prune.run.level_times import level_times
from scale_prune.run.run import Run
from scale_prune.system import write_atomically
from scale_prune.zero3 import told_to_all, tried

TABLE = "table.json"
REMEMBERED = 2**30  # bytes of a rank


class Trials:
    """Trials without some units, on a part of the calibration text. Making them is a collective.

    A rank keeps the dense model's logits of its part on the host, 2 bytes a token and word of the vocabulary, and what
    it has solved for, up to REMEMBERED bytes.

    Args:
        run: the run, before anything has left.
        calibration: with Gram matrices, where the run repairs.
        scores: (N,) a group; the highest stay.
    """

    def __init__(self, run: Run, calibration: Calibration | None, scores: Sequence[Tensor]) -> None:
        self.run, self.engine, self.scores = run, run.student.engine, scores
        self.calibration = calibration if run.config.pruning.repair != "none" else None
        self.batches = self._rows()
        self.dense = [in_two_bytes(self._logits(inputs)) for inputs, _ in self.batches]
        self._solved: dict[tuple[int, int], Tensor | None] = {}

    def loss(self, widths: Sequence[int]) -> float:
        """Return how far predictions are from the dense model's, a mean over tokens, where groups keep so many units.

        A collective: the forward passes of the text, and what the repair of the groups that lose units moves.
        """
        student = self.run.student
        masks = [top_mask(scores, width) for scores, width in zip(self.scores, widths, strict=True)]
        with tried(student.backend, student.groups, masks, self._takeovers(masks)):
            return self._divergence()

    def _takeovers(self, masks: Sequence[Tensor]) -> dict[int, Tensor] | None:
        """Solve for groups that lose units, as far as that was not done before; None where nothing is repaired."""
        if self.calibration is None:
            return None
        pruning, groups = self.run.student.pruner.scoring.criterion.config, self.run.student.groups
        wanted = {index: (index, int(mask.sum())) for index, mask in enumerate(masks) if not mask.all()}
        sizes = [kept * groups[index].block ** 2 * (groups[index].num_units - kept) for index, kept in self._solved]
        if 4 * sum(sizes) > REMEMBERED * self.run.runtime.world_size:
            self._solved.clear()
        new = [index for index, key in wanted.items() if key not in self._solved]
        asked = [mask if index in new else torch.ones_like(mask) for index, mask in enumerate(masks)]
        solved = takeovers_of(self.calibration, asked, str(pruning.repair), pruning.damping_of)
        self._solved |= {wanted[index]: solved.get(index) for index in new}
        found = {index: self._solved[key] for index, key in wanted.items()}
        return {index: takeover for index, takeover in found.items() if takeover is not None}

    def _rows(self) -> list[tuple[dict[str, Tensor], int]]:
        """Return this rank's inputs, and how many of their rows count: of all ranks the first rows of the text.

        Every rank has a row in every pass, since all gather the parameters.
        """
        run, runtime, found = self.run, self.run.runtime, []
        wanted = -(-TRIAL_TOKENS // run.config.data.block_size)
        for number, batch in enumerate(calibration_text(self.engine, run.inputs, run.task, run.progress.step)):
            in_pass = len(batch.inputs["labels"])
            first = (number * runtime.world_size + runtime.rank) * in_pass  # as `batches.assigned` hands rows out
            if number * runtime.world_size * in_pass >= wanted:
                break
            count = min(max(wanted - first, 0), in_pass)
            found.append(({name: values[: max(count, 1)] for name, values in batch.inputs.items()}, count))
        return found

    def _divergence(self) -> float:
        total = torch.zeros(2, dtype=torch.float64)  # of rows, and how many they are
        for (inputs, count), dense in zip(self.batches, self.dense, strict=True):
            logits, labels = self._logits(inputs), inputs["labels"].to(self.engine.device)
            for row in (slice(place, place + 1) for place in range(count)):
                each = self.run.task.divergence(logits[row], dense[row].to(logits), labels[row], 1.0)
                total += torch.tensor([float(each), 1.0])
        summed, rows = self.run.runtime.add_over_ranks(total).tolist()
        return summed / rows

    @torch.no_grad()
    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        moved = {name: values.to(self.engine.device) for name, values in inputs.items()}
        logits: Tensor = self.engine(**{**moved, **self.run.task.options, "labels": None}).logits
        return logits


def in_two_bytes(logits: Tensor) -> Tensor:
    """Return logits, (..., V), on the host; where they are rounded the largest is 0: a large offset costs digits."""
    if logits.dtype == torch.float32:
        logits = (logits - logits.amax(-1, keepdim=True)).to(torch.bfloat16)
    return logits.cpu()


def measure_levels(run: Run, trials: Trials) -> LevelTable:
    """Measure every level of every group by itself, all others whole. A collective."""
    groups, losses = run.student.groups, []
    whole = [group.num_units for group in groups]
    for index, group in enumerate(groups):
        levels = levels_of(group.num_units)[:-1]
        own = [trials.loss([*whole[:index], kept, *whole[index + 1 :]]) for kept in levels]
        losses.append([*own, 0.0])
        run.monitor.say(f"{group.name}: {', '.join(f'{loss:.4f}' for loss in own)}")
    return LevelTable.of(groups, losses)


def write_table(run: Run, told: Mapping[str, Any]) -> None:
    """Write a table that this run has measured into its folder. A collective."""
    with told_to_all(run.folder / TABLE):
        if run.runtime.is_main:
            write_atomically(run.folder / TABLE, json.dumps(told, indent=1) + "\n")


def keep_in_time(run: Run) -> Callable[[Sequence[int]], bool]:
    """Take the widths that lose least within --latency_target, if there is one; return whether other widths keep to it.

    A collective.
    """
    criterion, target = run.student.pruner.scoring.criterion, run.config.pruning.latency_target
    if target is None:
        return lambda widths: True
    table = criterion.of_layers.table
    assert table is not None
    seconds, others = level_times(run, table.kept)
    criterion.of_layers.widths = table.widths_in_time(seconds, others, target)
    dense = others + sum(own[-1] for own in seconds)

    def taken(widths: Sequence[int]) -> float:
        places = map(bisect_left, table.kept, widths)  # between two levels the upper one's time
        return (others + sum(own[place] for own, place in zip(seconds, places, strict=True))) / dense

    run.monitor.say(
        f"matrices take {taken(criterion.of_layers.widths):.3f} of the dense model's time, {1000 * dense:.3g} ms a "
        "block here"
    )
    return lambda widths: taken(widths) <= target


def search_widths(run: Run, trials: Trials, table: LevelTable, fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """Improve on the table's widths at the run's target, or within its time, by trying all groups together.

    A collective.

    In each generation OFFSPRING variants of the best widths so far are tried; the best of them and it goes on.

    Source: the (1 + lambda) evolution of EvoPress (arXiv 2410.14649) and DarwinLM (arXiv 2502.07780), which begin with
    layers that are alike and train the candidates.
    """
    generator = torch.Generator().manual_seed(run.config.training.seed)
    widths = [*run.student.pruner.scoring.criterion.of_layers.widths] or table.widths(run.config.pruning.remaining)
    least = trials.loss(widths)
    run.monitor.say(f"search: divergence {least:.4f} by the table")
    for generation in range(GENERATIONS):
        for candidate in [switched(widths, table, generator) for _ in range(OFFSPRING)]:
            if candidate != widths and fits(candidate) and (loss := trials.loss(candidate)) < least:
                widths, least = candidate, loss
                run.monitor.say(f"search: divergence {least:.4f} in generation {generation + 1} of {GENERATIONS}")
    return widths

"""A round: units leave for good, and those that stay take over what they did."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import remaining_fraction
from scale_prune.core.level_table import LevelTable
from scale_prune.criteria import observes, repairs_masks
from scale_prune.preflight import read_table
from scale_prune.pruning import Calibration, choose, take_calibration, takeovers_of
from scale_prune.pruning.calibration import portions_of, side_by_side
from scale_prune.run.budgeting import Trials, keep_in_time, measure_levels, search_widths, write_table
from scale_prune.run.calibrating import read_back, read_text, text_loss
from scale_prune.run.losses import observe_gradients
from scale_prune.run.run import Run
from scale_prune.zero3 import repair_weights, tried, write_working_copy

FAR = 1.1  # times what is to remain, by gates


def remove(run: Run, step: int, *, finished: bool) -> None:
    """Choose the units that leave after a step, repair what stays, and rebuild the engine around it. A collective.

    Args:
        run: the run.
        step: of the schedule's removal steps.
        finished: no round comes after it.

    Raises:
        ValueError: scores cannot be ranked, or a Gram matrix cannot be solved.
        RuntimeError: masks did not take hold.
    """
    student, pruner = run.student, run.student.pruner
    with _noted(run) as note:
        if pruner.pruning:
            note["gram_matrices"] = _choose_and_repair(run, step)
            pruner.put_masks_on()
        if finished:
            _say_what_gates_lack(run)
            run.measure("masked")
        student.compact(run.progress.seconds, finished=finished)
    if finished:
        run.measure("compacted")


def _say_what_gates_lack(run: Run) -> None:
    """Say where gates were far from what they were to come to, and units were cut that they had left open."""
    gating, target = run.student.pruner.gating, run.student.pruner.schedule.target
    if gating is not None and gating.expected is not None and gating.expected > FAR * target:
        run.monitor.say(
            f"the gates came to {gating.expected:.1%}, not {target:.1%}, and what they left open was cut: give more "
            "--max_steps"
        )


def _choose_and_repair(run: Run, step: int) -> int:
    """Leave the weights repaired and the masks chosen, but not put on; return how many matrices a rank kept at once."""
    student, pruner, pruning = run.student, run.student.pruner, run.config.pruning
    repairs, chooses = pruning.repair != "none", bool(pruning.rounds)
    criterion = pruner.scoring.criterion
    needs = criterion.needs
    if chooses and observes(pruning, trains=run.config.training.max_steps > 0):
        observe_gradients(run)
    first = run.progress.rounds[0] if run.progress.rounds else {}  # what it has measured holds in all rounds
    criterion.of_layers.redundancy = first.get("redundancy", ())
    criterion.of_layers.table = LevelTable.from_told(first["table"]) if "table" in first else _given_table(run)
    compares = pruning.budget == "redundancy" and not criterion.of_layers.redundancy
    tries = _tries(run)
    portions = _portions(run) if repairs or "gram" in needs else [[]]  # one reading, without any matrix
    calibration = None
    if compares or (tries and repairs) or (chooses and needs & {"gram", "activity"}):
        to_choose = portions if len(portions) == 1 or "gram" in needs else [[]]
        calibration = take_calibration(pruner, _readings(run, to_choose, chooses=True, compares=compares))
    criterion.of_layers.widths = first.get("searched", ())
    if tries:
        _measure(run, calibration)
    elif criterion.of_layers.table is not None and not first:
        keep_in_time(run)
    if chooses:
        choose(pruner, step)
    if repairs and not chooses:
        write_working_copy(student.backend)  # what the masks hide is to be seen, and taken over
    if repairs_masks(pruning):
        _repair_if_better(run, portions)
    elif repairs:
        if len(portions) > 1:
            calibration = None  # whose last portion of matrices makes room for the first
        again = [calibration] if calibration is not None else _readings(run, portions)
        for each in again:
            with run.progress.seconds.measure("repair"):
                _repair(run, each)
    return max(-(-len(portion) // run.runtime.world_size) for portion in portions)


def _repair(run: Run, calibration: Calibration) -> None:
    """Repair a calibration's groups, of every rank one at a time, and let go of their Gram matrices. A collective."""
    student, pruning = run.student, run.student.pruner.scoring.criterion.config
    for together in side_by_side(calibration.portion, run.runtime.world_size):
        masks = [
            mask if index in together else torch.ones_like(mask) for index, mask in enumerate(student.pruner.masks)
        ]
        takeovers = takeovers_of(calibration, masks, str(pruning.repair), pruning.damping_of)
        repair_weights(student.backend, student.groups, masks, takeovers)
        for index in together:
            calibration.grams.pop(index, None)


def _repair_if_better(run: Run, portions: Sequence[Sequence[int]]) -> None:
    """Repair what masks hid while weights were trained, if the calibration text has less loss so. A collective.

    Weights that have learned to do without the hidden units would do twice what these did.
    """
    student, masks, takeovers = run.student, run.student.pruner.masks, dict[int, Tensor]()
    for calibration in _readings(run, portions):
        pruning = student.pruner.scoring.criterion.config
        with run.progress.seconds.measure("repair"):
            takeovers |= takeovers_of(calibration, masks, str(pruning.repair), pruning.damping_of)
        calibration.grams.clear()

    def loss(taken_over: dict[int, Tensor] | None) -> float:
        with run.progress.seconds.measure("repair"), tried(student.backend, student.groups, masks, taken_over):
            return text_loss(student.engine, run.inputs, run.task, run.progress.step, run.runtime)

    without, repaired = loss(None), loss(takeovers)
    taken = repaired < without
    run.progress.repair = {"loss_without": without, "loss_with": repaired, "taken": taken}
    run.monitor.say(
        f"repair: loss {repaired:.4f} on the calibration text, {without:.4f} without it"
        + ("" if taken else "; the weights have learned to do without what masks hid, nothing is repaired")
    )
    if taken:
        repair_weights(student.backend, student.groups, masks, takeovers)


@contextmanager
def _noted(run: Run) -> Iterator[dict[str, Any]]:
    """Note in the progress what the body leaves and costs, and what it says, where units leave in rounds."""

    def seconds() -> dict[str, float]:
        return {**run.progress.seconds, **run.student.pruner.seconds}

    before, criterion, said = seconds(), run.student.pruner.scoring.criterion, dict[str, Any]()
    yield said
    known = criterion.of_layers
    table = known.table.told() if known.table is not None else None
    measured = {"redundancy": list(known.redundancy), "table": table, "searched": list(known.widths)}
    if run.config.pruning.rounds and run.student.pruner.pruning:
        spent = {part: now - before.get(part, 0.0) for part, now in seconds().items()}
        widths = [group.num_units for group in run.student.groups]
        remaining = remaining_fraction(run.student.groups, widths)
        round_: dict[str, Any] = {"step": run.progress.step, "remaining": remaining, "widths": widths}
        round_ |= {name: each for name, each in {**said, **measured}.items() if each}
        if spent.get("calibration"):
            round_["calibration_tokens"] = criterion.config.calibration_tokens
        round_ |= {"seconds": {part: each for part, each in spent.items() if each and part != "evaluation"}}
        run.progress.rounds.append(round_)
        what = "neurons" if {group.kind for group in run.student.groups} == {"neuron"} else "targets' parameters"
        run.monitor.say(f"step {run.progress.step}: {remaining:.1%} of the {what} remain, for good")


def _measure(run: Run, calibration: Calibration | None) -> None:
    """Measure what the budget asks for, before anything has left. A collective."""
    student, budget = run.student, run.config.pruning.budget
    criterion = student.pruner.scoring.criterion
    with run.progress.seconds.measure("budget"):
        student.engine.eval()
        trials = Trials(run, calibration, student.pruner.scoring.rate())
        if criterion.of_layers.table is None:
            criterion.of_layers.table = measure_levels(run, trials)
            write_table(run, criterion.of_layers.table.told())
        fits = keep_in_time(run)
        if budget == "search":
            criterion.of_layers.widths = search_widths(run, trials, criterion.of_layers.table, fits)
        student.engine.empty_partition_cache()
        student.engine.train()


def _tries(run: Run) -> bool:
    """Tell whether models of other widths are tried, before anything has left."""
    pruning = run.config.pruning
    return not run.progress.rounds and (
        pruning.budget == "search" or (pruning.budget == "measured" and pruning.table is None)
    )


def _given_table(run: Run) -> LevelTable | None:
    """Return the table that the user has given, if any."""
    return read_table(path, run.student.groups) if (path := run.config.pruning.table) is not None else None


def _portions(run: Run) -> list[list[int]]:
    """Return the groups whose Gram matrices are kept at a time: all, if half of the free memory has room for them.

    Trials need them all.
    """
    groups = run.student.groups
    if _tries(run):
        return [[*range(len(groups))]]
    gradients = "output_grad" in run.student.pruner.scoring.criterion.needs
    portions = portions_of(groups, run.runtime.world_size, run.runtime.free_memory() / 2, gradients=gradients)
    if len(portions) > 1:
        run.monitor.say(
            f"the calibration text is read once for every {len(portions[0])} of {len(groups)} groups of units, whose "
            "products of activations fit into memory together"
        )
    return portions


def _readings(
    run: Run, portions: Sequence[Sequence[int]], *, chooses: bool = False, compares: bool = False
) -> Iterator[Calibration]:
    """Let the student read the calibration text, the same for every number of ranks, once a portion. A collective.

    Args:
        run: the run.
        portions: numbers of the groups whose Gram matrices are made in a reading.
        chooses: what the criterion asks for beside them is made too.
        compares: layers are compared for the budget.
    """
    student = run.student
    criterion = student.pruner.scoring.criterion
    activity = criterion.activity if chooses and "activity" in criterion.needs else None
    for portion in portions:
        calibration = Calibration(
            student.backend, student.groups, activity=activity, redundancy=compares, portion=portion
        )
        with run.progress.seconds.measure("calibration"):
            read = read_back if chooses and "output_grad" in criterion.needs else read_text
            read(student.engine, calibration, run.inputs, run.task, run.progress.step)
        # Rows that are short have fewer tokens than were asked for, and what is read twice counts once.
        passed, rows = run.inputs.calibration_steps * run.inputs.batch_size, run.inputs.calibration_rows
        tokens = int(run.runtime.add_over_ranks(torch.tensor([calibration.tokens]))) * rows // passed
        criterion.config = replace(criterion.config, calibration_tokens=tokens)
        if compares:
            criterion.of_layers.redundancy = calibration.redundancy()
        activity, compares = None, False
        yield calibration
        if portion is not portions[-1]:
            calibration.grams.clear()
            calibration.output_grams.clear()

"""Rounds, repair and pruning without training: what of them is settled, refused or warned of before a run."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from scale_prune.config import Config, PruningConfig
from scale_prune.core import UnitGroup
from scale_prune.criteria import CRITERIA, READERS, check_scope, freezes, learns_from_gradients, observes, schedule_of
from scale_prune.pruning import layer_of

USUAL_ROUNDS = 4


def settle_rounds(config: Config) -> Config:
    """Fill in what --rounds and --repair leave open; without training there is a round, and no warm-up.

    Gradients without training are those of checkpointed activations: they are taken once, and memory decides.

    Raises:
        ValueError: they cannot be met.
    """
    pruning, training, max_steps = config.pruning, config.training, config.training.max_steps
    criterion = CRITERIA[pruning.criterion]
    if not max_steps:
        pruning = replace(pruning, rounds=pruning.rounds or 1, warmup_fraction=0.0, cooldown_fraction=0.0)
    elif freezes(pruning):  # dense steps would teach nobody anything
        pruning = replace(pruning, warmup_fraction=0.0, cooldown_fraction=0.0)
    elif pruning.rounds is None:
        pruning = replace(pruning, rounds=min(USUAL_ROUNDS, schedule_of(pruning, max_steps).descent_steps))
    reads_back = learns_from_gradients(criterion) or "output_grad" in criterion.needs
    if reads_back and not (max_steps or training.recovery_steps):
        training = replace(training, gradient_checkpointing=True)
    if pruning.repair is None:
        repairs = criterion.kind == "neuron" and (pruning.rounds or freezes(pruning))
        pruning = replace(pruning, repair="least_squares" if repairs else "none")
    if pruning.remaining < 1:
        _check_criterion(pruning, max_steps)
        if criterion.freezes and config.distillation.teacher is not None and not training.recovery_steps:
            raise ValueError(
                f"--teacher {config.distillation.teacher}: --criterion {pruning.criterion} learns from the dense model "
                "itself, a teacher would be heard in --recovery_steps alone; give some, or no teacher"
            )
    return replace(config, pruning=pruning, training=training)


def _check_criterion(pruning: PruningConfig, max_steps: int) -> None:
    criterion, name = CRITERIA[pruning.criterion], f"--criterion {pruning.criterion}"
    check_scope(pruning)
    asked = f"--rounds {pruning.rounds}" if max_steps else "--max_steps 0"
    if criterion.kind == "component" and pruning.repair != "none":
        raise ValueError(
            f"--repair {pruning.repair} belongs to neurons, {name} removes components; leave it out, or give "
            "--criterion obs"
        )
    if pruning.rounds and "gate" in criterion.needs:
        raise ValueError(
            f"{name} trains gates that settle what leaves, which {asked} does not wait for; give --max_steps and no "
            "--rounds, or another criterion"
        )
    if pruning.rounds and max_steps and criterion.kind == "component":
        raise ValueError(
            f"{asked} belongs to neurons, {name} removes components; leave it out, or give --criterion obs"
        )
    if pruning.budget in READERS and not pruning.rounds:
        raise ValueError(
            f"--budget {pruning.budget} is measured where neurons leave at once, not under masks; give --rounds 1 or "
            "more"
        )
    for flag in ("table", "latency_target"):
        if (given := getattr(pruning, flag)) is not None and pruning.budget not in ("measured", "search"):
            raise ValueError(f"--{flag} {given} is for --budget measured or search, not {pruning.budget}")
    if "gram" in criterion.needs and not pruning.rounds:
        raise ValueError(f"{name} ranks neurons that leave at once, not under masks; give --rounds 1 or more")
    steps = schedule_of(pruning, max_steps).descent_steps
    if max_steps and pruning.rounds and pruning.rounds > steps:
        raise ValueError(
            f"--rounds {pruning.rounds} are more than the {steps} steps of the descent; give fewer, more --max_steps, "
            "or smaller --warmup_fraction and --cooldown_fraction"
        )


def check_repair(model: nn.Module, groups: Sequence[UnitGroup], pruning: PruningConfig) -> None:
    """Refuse to give means to biases that the model does not have, and to compare layers that it does not list.

    Raises:
        ValueError: it has none.
    """
    if pruning.budget == "redundancy":
        layer_of(model, groups[0].output)
    for output in (group.output for group in groups):
        if pruning.repair == "mean" and getattr(model.get_submodule(output), "bias", None) is None:
            raise ValueError(
                f"--repair mean gives the means of what is removed to the bias of {output}, which has none; give "
                "--repair least_squares, which needs none"
            )


def check_calibration(config: Config, batch_size: int) -> None:
    """Refuse less text than gradients are taken of at a time.

    Raises:
        ValueError: it is less.
    """
    pruning, tokens = config.pruning, batch_size * config.data.block_size
    if observes(pruning, trains=config.training.max_steps > 0) and pruning.calibration_tokens < tokens:
        raise ValueError(
            f"--calibration_tokens {pruning.calibration_tokens} are less than the {tokens} tokens of a step, of which "
            f"--criterion {pruning.criterion} takes the gradient; give at least {tokens}, or a smaller "
            "--train_batch_size"
        )


def reads_text(config: Config) -> bool:
    """Tell whether the calibration text is read."""
    pruning, criterion = config.pruning, CRITERIA[config.pruning.criterion]
    observed = observes(pruning, trains=config.training.max_steps > 0)
    chooses = "activity" in criterion.needs or observed or pruning.budget in READERS
    return pruning.remaining < 1 and (solves(pruning) or pruning.repair != "none" or bool(pruning.rounds and chooses))


def solves(pruning: PruningConfig) -> bool:
    """Tell whether matrices of products of the calibration text are solved for something."""
    return pruning.repair == "least_squares" or "gram" in CRITERIA[pruning.criterion].needs or _whitens(pruning)


def _whitens(pruning: PruningConfig) -> bool:
    return CRITERIA[pruning.criterion].kind == "component" and pruning.factors == "whitened"


def calibration_warning(config: Config, groups: Sequence[UnitGroup], found: int | None = None) -> str:
    """Return a line where there is less text than was asked for, or the damping decides more than it, else nothing.

    Args:
        config: the settings.
        groups: the model's.
        found: tokens that a round is calibrated on, where the text is known.
    """
    pruning, tokens = config.pruning, found or config.pruning.calibration_tokens
    widest = max(group.members[0].shape[1] if _whitens(pruning) else group.num_features for group in groups)
    asked, short = f"--calibration_tokens {pruning.calibration_tokens}", ""
    if not reads_text(config):
        return ""
    if tokens < pruning.calibration_tokens:
        short = f"{asked} are more than the training text has in whole steps, {tokens} at most"
    if not solves(pruning) or tokens >= widest:
        return short
    damping = f"{replace(pruning, calibration_tokens=tokens).damping_of(widest):.3g}"
    return (
        f"{f'{short} and' if short else asked} are fewer than the {widest} numbers a token whose products "
        f"are solved for, so --repair_damping {damping} decides as much as the text; a few times {widest} are better"
    )

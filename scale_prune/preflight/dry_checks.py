"""What a dry run checks beside `CHECKS`: what a run finds wrong elsewhere, late, or not at all."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scale_prune.checkpoint import filled_from, glance
from scale_prune.config import CLASSIFICATION
from scale_prune.criteria import check_uniqueness
from scale_prune.data import Split, Text, check_tokens
from scale_prune.data import text as data
from scale_prune.preflight.output import check_output
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.same_run import check_same
from scale_prune.preflight.sections import planned_schedule
from scale_prune.tasks import check_positions, classification, of_rows, questions_of
from scale_prune.tasks.examples import prepare


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
        return classification.prepare(config, text, tokenizer, labels).texts.joined()
    examples = prepare(config, split, tokenizer)
    if split == "validation" and knows_model:
        check_positions(reading.inputs(), questions_of(examples, config.task))
    return examples.all_tokens()


def _check_updates(reading: Reading) -> None:
    """Refuse a schedule that goes from dense to the target in one update."""
    schedule = planned_schedule(reading)
    if schedule.rounds or not reading.config.training.max_steps:
        return
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


LATE_CHECKS: tuple[Callable[[Reading], None], ...] = (_check_same, _check_tokens, _check_updates, _check_ranks)
"""What follows `CHECKS`; each raises ValueError."""

EARLY_CHECKS: tuple[Callable[[Reading], None], ...] = (_check_output, _glance, _check_uniqueness)
"""What goes before `CHECKS`; each raises ValueError."""

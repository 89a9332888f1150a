"""Everything that a run reads, checked before it costs anything: ds_config, model, text, output folder.

All ranks make the same checks on the same files, so all of them stop at the same mistake.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig

from scale_prune.config import CLASSIFICATION, TASKS, Config, DataConfig, TrainingConfig, get, load, resolve
from scale_prune.criteria import CRITERIA, freezes, unused, with_defaults
from scale_prune.data import SELF, SPLITS, Inputs, Split, bos_of, columns_of, load_text, with_templates
from scale_prune.export import AUTO, resolve_layout
from scale_prune.models import FAMILIES, classifies, positions_of
from scale_prune.preflight.groups import check_groups
from scale_prune.preflight.layout import check_layout_of
from scale_prune.preflight.named_models import built, check_weights, read, read_config
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.rounds import check_calibration, reads_text, settle_rounds, solves
from scale_prune.zero3 import ds_check


def read_inputs(
    config: Config,
    explicit: frozenset[str],
    world_size: int,
    splits: Sequence[Split] = SPLITS,
    *,
    needs_groups: bool = True,
) -> Inputs:
    """Read and check a run's inputs; nothing is written, no weights are loaded, no process talks to another.

    Args:
        config: the settings; `training.model` and a data set are given.
        explicit: names of the settings that the user gave.
        world_size: number of ranks.
        splits: the texts that are needed.
        needs_groups: False where the model is only used, not pruned, so that any model will do.

    Raises:
        ValueError: one of them cannot be used; the message says which, why and what would be valid.
    """
    reading = Reading(config=config, explicit=explicit, world_size=world_size, splits=splits, needs_groups=needs_groups)
    for check in CHECKS:
        check(reading)
    return reading.inputs()


def _fill_in(reading: Reading) -> None:
    reading.chooses_layout = reading.config.output.layout in (None, AUTO)
    # First, so that a dry run, which goes on after a mistake in the rest, knows the criterion.
    reading.config = replace(reading.config, pruning=with_defaults(reading.config.pruning))
    reading.config = fill_in(reading.config)


def _read_model_config(reading: Reading) -> None:
    training = reading.config.training
    if reading.model_config is None:  # a dry run knows that of the embedded model already
        found = read_config(training.model, training.trust_remote_code)
        if reading.needs_groups:
            _refuse_composite(found, training)
        reading.model_config = found


def _refuse_composite(model_config: PretrainedConfig, training: TrainingConfig) -> None:
    """Refuse a model that has others for images or sound beside the one for text."""
    text = model_config.get_text_config()
    if text is model_config:
        return
    known = "" if text.model_type in FAMILIES else ", a family that has to be registered first"
    raise ValueError(
        f"--model {training.model} is of model type {model_config.model_type}, a composite whose part for text "
        f"cannot be pruned inside it; give a folder of that part alone, of model type {text.model_type}{known}"
    )


def _check_task(reading: Reading) -> None:
    """Refuse a task that a model of this kind is not made for, or that has no text column."""
    text_column, templates = reading.config.data.text_column, columns_of(reading.config.task)
    if templates and text_column != DataConfig().text_column:
        raise ValueError(
            f"--text_column {text_column} belongs to --task lm; --task {reading.config.task.task} reads the columns "
            f'that --prompt_template names, as in --prompt_template "{{{text_column}}}"'
        )
    if reading.model_config is None:
        return
    task, encoder = reading.config.task.task, classifies(reading.model_config)
    if encoder != (task == CLASSIFICATION):
        can = f"--task {CLASSIFICATION}" if encoder else f"one of {', '.join(t for t in TASKS if t != CLASSIFICATION)}"
        raise ValueError(
            f"--task {task} does not go with --model {reading.config.training.model}, of model type "
            f"{reading.model_config.model_type}; give {can}"
        )


def _read_tokenizer(reading: Reading) -> None:
    training = reading.config.training
    if training.model is not None:
        reading.tokenizer = read("tokenizer", training.model, AutoTokenizer, training.trust_remote_code)


def _settle_bos(reading: Reading) -> None:
    """Say in the settings whether there is a BOS token; labeled texts have the tokenizer's special tokens instead."""
    data, labeled = reading.config.data, reading.config.task.task == CLASSIFICATION
    if labeled and data.bos == "always":
        raise ValueError(
            f"--bos always belongs to blocks and prompts; --task {CLASSIFICATION} takes the tokenizer's special tokens"
        )
    if reading.tokenizer is not None:
        begun = not labeled and bos_of(data.bos, reading.tokenizer) is not None
        reading.config = replace(reading.config, data=replace(data, bos="always" if begun else "never"))


def _check_teacher(reading: Reading) -> None:
    if (name := reading.config.distillation.teacher) != SELF:
        _check_other(reading, "teacher", name)


def _check_reference(reading: Reading) -> None:
    _check_other(reading, "reference", reading.config.output.reference)


def _check_other(reading: Reading, flag: str, name: str | None) -> None:
    """Refuse another model that cannot be loaded later, or predicts other tokens than the model."""
    model, trusted = reading.config.training.model, reading.config.training.trust_remote_code
    if name is None or reading.model_config is None or reading.tokenizer is None:
        return
    size = reading.model_config.vocab_size
    config = read_config(name, trusted, flag=flag)
    others = config.get_text_config().vocab_size
    if others != size:
        raise ValueError(
            f"--{flag} {name} predicts {others} tokens, --model {model} {size}; "
            f"a {flag} needs the model's own vocabulary"
        )
    tokenizer = read("tokenizer", name, AutoTokenizer, trusted, flag=flag)
    if tokenizer.get_vocab() != reading.tokenizer.get_vocab():
        raise ValueError(
            f"--{flag} {name} has other tokens than --model {model}, though as many; "
            f"a {flag} needs the model's own vocabulary"
        )
    _check_block(reading.config, f"--{flag} {name}", config)
    built(config, name, trusted, flag=flag)
    check_weights(Path(name), flag=flag)


def _read_ds_config(reading: Reading) -> None:
    raw = load(reading.config.training.ds_config)
    # Where the model cannot be read, any width serves to find what else is wrong.
    found = reading.model_config
    hidden_size = 1 if found is None else getattr(found.get_text_config(), "hidden_size", None)
    config = reading.config
    if freezes(config.pruning):  # the rates are of the steps in which weights learn
        config = replace(config, training=replace(config.training, max_steps=0))
    reading.ds_config = resolve(raw, config, reading.explicit, reading.world_size, hidden_size)
    if freezes(config.pruning) and get(reading.ds_config, "fp16.enabled"):
        raise ValueError(
            f"--criterion {config.pruning.criterion} learns gates whose gradients are sums over tokens, which fp16 may "
            "not hold; give --precision bf16 or fp32"
        )
    trains = (config.training.max_steps or config.training.recovery_steps) and reading.splits == SPLITS  # as a run does
    ds_check.check(reading.ds_config, trains=bool(trains))


def _check_calibration(reading: Reading) -> None:
    if reading.needs_groups and reading.ds_config:
        check_calibration(reading.config, int(reading.ds_config["train_batch_size"]))


def _check_weights(reading: Reading) -> None:
    if reading.config.training.model is not None:
        check_weights(Path(reading.config.training.model))


def _check_own_block(reading: Reading) -> None:
    if reading.model_config is not None:
        _check_block(reading.config, str(reading.config.training.model), reading.model_config)


def _check_block(config: Config, model: str, model_config: PretrainedConfig) -> None:
    positions = positions_of(model_config)
    if positions is not None and config.data.block_size > positions:
        raise ValueError(f"--block_size {config.data.block_size} is more than the {positions} positions of {model}")


def _read_text(reading: Reading, split: Split) -> None:
    data = reading.config.data
    task, columns = reading.config.task, columns_of(reading.config.task)
    if split not in reading.splits or (task.task != "lm" and not columns):
        return  # or a dry run, in which other mistakes have kept the templates from being filled in
    given = data.validation_file if split == "validation" else None
    if reading.config.training.model is None and not (data.dataset or data.train_file or given):
        return  # a dry run of the embedded model, whose text needs no check
    if split == "validation" and data.validation_file is not None:  # what is wrong with the training text is known
        data = replace(data, dataset=None, dataset_config=None, train_file=None)
    reading.texts[split] = load_text(data, split, columns, task.label_column)


CHECKS: tuple[Callable[[Reading], None], ...] = (
    _fill_in,
    _read_model_config,
    _check_task,
    _read_tokenizer,
    _settle_bos,
    _check_teacher,
    _check_reference,
    check_layout_of,
    check_groups,
    _read_ds_config,
    _check_own_block,
    _check_calibration,
    _check_weights,
    partial(_read_text, split="train"),
    partial(_read_text, split="validation"),
)
"""What is read and checked, in this order; each raises ValueError. A run stops at the first, a dry run at none."""


def fill_in(config: Config) -> Config:
    """Replace settings that were not given, and follow from the criterion or the task, by their values.

    Raises:
        ValueError: the layout cannot hold what the scope leaves, or a template is not one.
    """
    pruning = with_defaults(config.pruning)
    scope = str(pruning.scope) if pruning.budget == "uniform" else f"{pruning.scope} --budget {pruning.budget}"
    scope = scope if pruning.remaining < 1 else "per_group"  # nothing leaves, so that layers stay alike
    layout = resolve_layout(config.output.layout, scope, CRITERIA[pruning.criterion].kind)
    output = replace(config.output, layout=layout)
    return settle_rounds(replace(config, task=with_templates(config.task), pruning=pruning, output=output))


def unused_settings(config: Config) -> str:
    """Return a line about settings that were given and change nothing, empty where there are none."""
    flat, defaults, task = config.flat(), Config().flat(), config.task.task
    names = [] if config.distillation.teacher else ["distill_alpha", "distill_temperature"]
    names += ["max_new_tokens", "num_beams", "generation_batch_size"] if task in ("lm", CLASSIFICATION) else []
    names += ["long_examples", "eval_examples"] if task == "lm" else []
    names += ["eval_tokens"] if task == CLASSIFICATION else []
    if config.pruning.remaining < 1:
        names += [] if reads_text(config) else ["calibration_tokens"]
        names += [] if solves(config.pruning) else ["repair_damping"]
    names += ["rows"] if task != "lm" and flat["rows"] == "lines" else []
    found = unused(config.pruning) | {name: flat[name] for name in names if flat[name] != defaults[name]}
    listed = ", ".join(f"--{name} {value}" for name, value in found.items())
    return f"nothing uses {listed} in this run, of --criterion {config.pruning.criterion}" if listed else ""

"""Everything that a run reads, checked before it costs anything: ds_config, model, text, output folder.

All ranks make the same checks on the same files, so all of them stop at the same mistake.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from scale_prune.config import Config, TrainingConfig
from scale_prune.core.groups import UnitGroup
from scale_prune.criteria import with_defaults
from scale_prune.data import load_text
from scale_prune.ds_config import load, resolve
from scale_prune.export import check_layout, resolve_layout
from scale_prune.families import unit_groups
from scale_prune.pruner import check_min_kept
from scale_prune.report import write_atomically

SELF = "self"
RECIPE = "recipe.yaml"
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's inputs, all of them usable.

    Attributes:
        config: the settings, with scope and layout filled in.
        ds_config: a DeepSpeed configuration without "auto" values.
        model_config: the model's own configuration.
        tokenizer: the model's tokenizer.
    """

    config: Config
    ds_config: dict[str, Any]
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def batch_size(self) -> int:
        """Blocks in one optimizer step, over all ranks."""
        return int(self.ds_config["train_batch_size"])

    @property
    def micro_batch_size(self) -> int:
        """Blocks in one forward pass of a rank."""
        return int(self.ds_config["train_micro_batch_size_per_gpu"])


def read_inputs(config: Config, explicit: frozenset[str], world_size: int) -> Inputs:
    """Read and check a run's inputs; nothing is written, no weights are loaded, no process talks to another.

    Args:
        config: the settings; `training.model` and a data set are given.
        explicit: names of the settings that the user gave.
        world_size: number of ranks.

    Raises:
        ValueError: one of them cannot be used; the message says which, why and what would be valid.
    """
    config = fill_in(config)
    model_config, tokenizer = _read_model(config.training)
    check_layout(str(config.output.layout), model_config)
    check_min_kept(_groups_of(model_config, config.training), config.pruning)
    ds_config = resolve(load(config.training.ds_config), config, explicit, world_size, model_config.hidden_size)
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and config.data.block_size > positions:
        raise ValueError(
            f"--block_size {config.data.block_size} is more than the {positions} positions of {config.training.model}"
        )
    if config.distillation.teacher not in (None, SELF):
        _check_teacher(config, model_config, tokenizer)
    load_text(config.data, "train")
    load_text(config.data, "validation")
    return Inputs(config=config, ds_config=ds_config, model_config=model_config, tokenizer=tokenizer)


def fill_in(config: Config) -> Config:
    """Replace settings that were not given, and follow from the criterion, by their values.

    Raises:
        ValueError: the layout cannot hold what the scope leaves.
    """
    pruning = with_defaults(config.pruning)
    layout = resolve_layout(config.output.layout, str(pruning.scope))
    return replace(config, pruning=pruning, output=replace(config.output, layout=layout))


def check_output(config: Config) -> None:
    """Refuse an output folder that holds something.

    Raises:
        ValueError: the folder holds a run, and neither `overwrite` nor `resume` is on, or it holds something else.
    """
    folder = Path(config.output.output_dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECIPE).is_file():
        raise ValueError(f"--output_dir {folder} holds something that is not a run; give a new or empty folder")
    if not config.output.overwrite and config.checkpoint.resume is None:
        raise ValueError(
            f"--output_dir {folder} holds a run already; give another folder, --resume to go on with it, or "
            "--overwrite to replace it"
        )


def is_complete(config: Config) -> bool:
    """Tell whether the output folder holds a run that has come to its end."""
    return (Path(config.output.output_dir) / REPORT).is_file()


def make_output(config: Config) -> None:
    """Make the output folder with the run's settings in it; a run that is to be overwritten waits beside as `.old`."""
    folder = Path(config.output.output_dir)
    if is_complete(config):
        shutil.rmtree(_old(folder), ignore_errors=True)
        folder.rename(_old(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_recipe(config)


def write_recipe(config: Config) -> None:
    """Write the settings into the output folder, as a recipe that starts the same run anew."""
    settings = {name: value for name, value in config.flat().items() if value is not None and name != "resume"}
    write_atomically(Path(config.output.output_dir) / RECIPE, yaml.safe_dump(settings, sort_keys=False))


def drop_old_output(config: Config) -> None:
    """Remove the run that this complete one took the place of."""
    shutil.rmtree(_old(Path(config.output.output_dir)), ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _read_model(training: TrainingConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Read the model's configuration and tokenizer."""
    return (
        _read("model", training.model, AutoConfig, training.trust_remote_code),
        _read("tokenizer", training.model, AutoTokenizer, training.trust_remote_code),
    )


def _check_teacher(config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher that predicts other tokens than the model.

    Raises:
        ValueError: its vocabulary is another one.
    """
    name, trusted = config.distillation.teacher, config.training.trust_remote_code
    teacher = _read("model", name, AutoConfig, trusted, flag="teacher")
    if teacher.vocab_size != model_config.vocab_size:
        raise ValueError(
            f"--teacher {name} predicts {teacher.vocab_size} tokens, --model {config.training.model} "
            f"{model_config.vocab_size}; a teacher needs the model's own vocabulary"
        )
    if _read("tokenizer", name, AutoTokenizer, trusted, flag="teacher").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--teacher {name} has other tokens than --model {config.training.model}, though as many; a teacher needs "
            "the model's own vocabulary"
        )


def _groups_of(model_config: PretrainedConfig, training: TrainingConfig) -> tuple[UnitGroup, ...]:
    """Return the groups of a model that is not loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=training.trust_remote_code)
    return unit_groups(model)


def _read(what: str, name: str | None, kind: Any, trusted: bool, *, flag: str = "model") -> Any:
    assert name is not None
    try:
        return kind.from_pretrained(name, trust_remote_code=trusted)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--{flag} {name}: its {what} cannot be read, neither as a folder nor as a hub name: {reason}"
        ) from error

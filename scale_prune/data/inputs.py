"""What a run reads, once it is known to be usable."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from scale_prune.config import CLASSIFICATION, Config
from scale_prune.data.beginnings import bos_of

SELF = "self"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's inputs, all of them usable.

    Attributes:
        config: the settings, with scope, layout and bos filled in.
        ds_config: a DeepSpeed configuration without "auto" values.
        model_config: the model's own configuration.
        tokenizer: the model's tokenizer.
        validation: what the validation text is, in words.
        train_rows: blocks or examples of the training text; None before they are known, and where there is none.
    """

    config: Config
    ds_config: dict[str, Any]
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    validation: str = ""
    train_rows: int | None = None

    @property
    def bos(self) -> int | None:
        """The token that blocks and prompts begin with, if there is one."""
        return bos_of(self.config.data.bos, self.tokenizer)

    @property
    def begins_with_bos(self) -> bool | None:
        """Whether blocks and prompts begin with a BOS token; None for labeled texts, which have special tokens."""
        return None if self.config.task.task == CLASSIFICATION else self.bos is not None

    @property
    def batch_size(self) -> int:
        """Blocks in one optimizer step, over all ranks."""
        return int(self.ds_config["train_batch_size"])

    @property
    def calibration_steps(self) -> int:
        """Optimizer steps whose text a round is calibrated on: none reads a row again, but there is one at least."""
        asked = calibration_steps(self.config, self.batch_size)
        return asked if self.train_rows is None else min(asked, max(1, self.train_rows // self.batch_size))

    def calibration_start(self, step: int) -> int:
        """Return the step whose text calibration begins with: what comes next, and no step of this epoch has read.

        Where that goes on into another epoch, which may have the same rows again, it is the first of all.
        """
        needed = self.calibration_steps * self.batch_size
        fits = self.train_rows is None or step * self.batch_size % self.train_rows + needed <= self.train_rows
        return step if fits else 0

    @property
    def calibration_tokens(self) -> int:
        """Tokens that a round is calibrated on, at most: rows may be shorter than a block."""
        return min(self.config.pruning.calibration_tokens, self.calibration_rows * self.config.data.block_size)

    @property
    def calibration_rows(self) -> int:
        """Rows that a round is calibrated on, each counted once, also where a single step has more than there are."""
        read = self.calibration_steps * self.batch_size
        return read if self.train_rows is None else min(read, self.train_rows)

    @property
    def pruning_steps(self) -> int:
        """Steps that the pruner sees: those with pruning, or those of the calibration text where nothing is trained."""
        return self.config.training.max_steps or int(self.config.pruning.rounds or 1) * self.calibration_steps

    @property
    def micro_batch_size(self) -> int:
        """Blocks in one forward pass of a rank."""
        return int(self.ds_config["train_micro_batch_size_per_gpu"])


def calibration_steps(config: Config, batch_size: int) -> int:
    """Return the optimizer steps whose text a round is calibrated on, for blocks in such a step."""
    return -(-config.pruning.calibration_tokens // (batch_size * config.data.block_size))


def check_tokens(largest: Mapping[str, int], inputs: Inputs) -> None:
    """Refuse a text with tokens that the model has no embedding for, as under the tokenizer of another model.

    Args:
        largest: the largest token of each text.
        inputs: the model.

    Raises:
        ValueError: there are such tokens.
    """
    vocabulary = getattr(inputs.model_config.get_text_config(), "vocab_size", None)
    for split, token in largest.items():
        if vocabulary is not None and token >= vocabulary:
            raise ValueError(
                f"the {split} text has the token {token}, but --model {inputs.config.training.model} "
                f"knows {vocabulary}; the tokenizer is of another model"
            )

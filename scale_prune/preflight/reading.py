"""What the checks of a run's inputs have read so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from scale_prune.config import Config
from scale_prune.core import UnitGroup
from scale_prune.data import SPLITS, Inputs, Split, Text


@dataclass(kw_only=True)
class Reading:
    """What the checks have read so far; what could not be read stays None or empty, and what needs it is passed over.

    Attributes:
        config: the settings, with scope, layout and bos once they are filled in.
        explicit: names of the settings that the user gave.
        world_size: number of ranks.
        splits: the texts that are needed.
        needs_groups: False where the model is only used, not pruned.
        chooses_layout: the user leaves the layout open.
        model_config: the model's own configuration.
        tokenizer: the model's tokenizer.
        groups: the model's groups.
        ds_config: a DeepSpeed configuration without "auto" values.
        texts: the rows of "train" and "validation".
    """

    config: Config
    explicit: frozenset[str]
    world_size: int
    splits: Sequence[Split] = SPLITS
    needs_groups: bool = True
    chooses_layout: bool = False
    model_config: PretrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    groups: tuple[UnitGroup, ...] = ()
    ds_config: dict[str, Any] = field(default_factory=dict)
    texts: dict[Split, Text] = field(default_factory=dict)

    def inputs(self) -> Inputs:
        """Return what was read, where all of it could be."""
        assert self.model_config is not None
        assert self.tokenizer is not None
        return Inputs(
            config=self.config,
            ds_config=self.ds_config,
            model_config=self.model_config,
            tokenizer=self.tokenizer,
            validation=self.texts["validation"].part if "validation" in self.texts else "",
        )

    def take_per_layer(self) -> None:
        """Write layers in their own widths, where the user leaves the layout open."""
        self.config = replace(self.config, output=replace(self.config.output, layout="per_layer"))

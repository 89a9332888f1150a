"""What the needs of a run follow from: sizes of its model, and how DeepSpeed cuts and places it.

DeepSpeed's own defaults stand here for what a ds_config leaves out (0.19.8, ZeRO stage 3).

Shape letters: P elements of all parameters, S elements of a rank's shards, M units, W ranks.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from scale_prune.config import PruningConfig, get, precision
from scale_prune.core import UnitGroup, UnitLayout, remaining_fraction
from scale_prune.preflight.rehearsal import Rehearsal

FP32 = 4
# Tensors of the parameters' size that an optimizer keeps; Adam's two moments where the name is not listed.
MOMENTS = {"sgd": 1, "lion": 1, "adagrad": 1}

# DeepSpeed's defaults of what may be absent from a ds_config.
REDUCE_BUCKET, PREFETCH_BUCKET, SUB_GROUP, REUSE_DISTANCE, PERSISTENT = 5 * 10**8, 5 * 10**7, 10**9, 10**9, 10**5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the needs of a run follow from.

    Attributes:
        rehearsed: what one of its passes showed, with what a teacher adds.
        recomputes: whether activations are made once more on the way back.
        groups: the model's groups.
        pruning: settings of pruning, without None where the criterion has a default.
        ds_config: a DeepSpeed configuration without "auto" values.
        world_size: number of ranks, W.
        on_gpu: False where the ranks are processes without a GPU.
        trains: False where no weight is trained before the units leave.
        recovers: whether the smaller model is trained.
        calibration_steps: optimizer steps' worth of text that a round is calibrated on.
        has_teacher: whether there is a teacher.
    """

    rehearsed: Rehearsal
    recomputes: bool
    groups: tuple[UnitGroup, ...]
    pruning: PruningConfig
    ds_config: dict[str, Any]
    world_size: int
    on_gpu: bool
    trains: bool
    recovers: bool
    calibration_steps: int
    has_teacher: bool

    @property
    def removals(self) -> int:
        """How often units leave for good: in every round, or once at the end."""
        return (self.pruning.rounds or 1) if self.pruning.remaining < 1 else 0

    # --- sizes -----------------------------------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, P."""
        return sum(self.rehearsed.numels)

    @property
    def num_pruned(self) -> int:
        """Elements of all parameters once the units are gone, by the target."""
        units = sum(prod(member.shape) for group in self.groups for member in group.members)
        initial = remaining_fraction(self.groups, [group.num_units for group in self.groups])
        return self.num_parameters - round((1 - self.pruning.remaining / initial) * units)

    @property
    def shards(self) -> int:
        """Elements of a rank's shards, S: of every parameter the W-th part, rounded up."""
        return sum(self.shard_of(numel) for numel in self.rehearsed.numels)

    def shard_of(self, numel: int) -> int:
        """Return the elements that a rank holds of a tensor."""
        return -(-numel // self.world_size)

    @property
    def width(self) -> int:
        """Bytes of an element of the working copy."""
        return FP32 if precision(self.ds_config) is None else 2

    @property
    def gradient_width(self) -> int:
        """Bytes of an element of the averaged gradients, which have the working copy's type unless asked otherwise."""
        asked = get(self.ds_config, "data_types.grad_accum_dtype")
        return self.width if asked is None else FP32 if asked == "fp32" else 2

    @property
    def accumulation(self) -> int:
        """Forward passes of a rank in one optimizer step."""
        return int(self.ds_config["gradient_accumulation_steps"])

    @property
    def moments(self) -> int:
        """Tensors of the parameters' size that the optimizer keeps."""
        return MOMENTS.get(str(get(self.ds_config, "optimizer.type")).lower(), 2)

    @cached_property
    def layout(self) -> UnitLayout:
        """Who owns which units."""
        return UnitLayout(self.groups, self.world_size)

    def zero(self, key: str, default: int) -> int:
        """Return a number of the section zero_optimization."""
        value = get(self.ds_config, f"zero_optimization.{key}")
        return int(default if value is None else value)

    def place(self, offload: str | None = None) -> str:
        """Return where something lies that the section `offload` of zero_optimization may move away."""
        device = get(self.ds_config, f"zero_optimization.{offload}.device") or "none"
        return "GPU" if self.on_gpu and device == "none" else "host"

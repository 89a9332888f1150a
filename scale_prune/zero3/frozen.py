"""An engine whose weights are frozen, for the sake of the gradients of gates.

It has the calls of a DeepSpeed engine that trains, makes no master, no moments and no gradients of weights: a rank
holds its shards of the working copy, and receives parameters for the forward and the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from scale_prune.zero3.runtime import inference_engine


class FrozenEngine:
    """An engine that reads, around which backward passes can be made; everything else is the engine's own.

    Args:
        module: the model; its parameters are frozen.
        ds_config: without "auto" values.
    """

    def __init__(self, module: nn.Module, ds_config: dict[str, Any]) -> None:
        module.requires_grad_(False)
        self.engine = inference_engine(module, ds_config)
        self.micro_steps = self.global_steps = 0
        self.accumulation = int(ds_config["gradient_accumulation_steps"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Of what the engine itself returns DeepSpeed lets no gradient through."""
        return (self.engine.module if torch.is_grad_enabled() else self.engine)(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add to the gates' gradients those of a pass, a mean over the passes of a step."""
        (loss / self.accumulation).backward()

    def step(self) -> None:
        """Count a pass."""
        self.global_steps += int(self.is_gradient_accumulation_boundary())
        self.micro_steps += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        """Tell whether this pass is the last of a step."""
        return (self.micro_steps + 1) % self.accumulation == 0

    def gradient_accumulation_steps(self) -> int:
        """Return the passes of a step."""
        return self.accumulation

    def was_step_applied(self) -> bool:
        """Return True: no step is skipped."""
        return True

    def get_lr(self) -> list[float]:
        """Return the learning rate of the weights."""
        return [0.0]

"""An engine whose weights are frozen, for the sake of gradients that no step of theirs follows.

It has the calls of a DeepSpeed engine that trains, makes no master and no moments: a rank holds its shards of the
working copy, receives parameters for the forward and the backward pass, and keeps its slices of the gradients of those
weights alone that are asked for; of gates and activations they are others' business.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from scale_prune.zero3.backend import Collectives
from scale_prune.zero3.runtime import inference_engine
from scale_prune.zero3.shard import Shard

LOSS_SCALE = 2.0**12
"""What the loss is multiplied by in fp16, whose smallest number is 6e-8; no step follows that it could spoil."""


class FrozenEngine:
    """An engine that reads, around which backward passes can be made; everything else is the engine's own.

    Args:
        module: the model; its parameters are frozen.
        ds_config: without "auto" values.
        gradients_of: names of parameters whose gradients are kept.

    Attributes:
        gradients: (S,) float32 by name, this rank's slices of the step's gradients, still scaled as the loss is.
        loss_scaled_by: what the loss is multiplied by.
    """

    def __init__(self, module: nn.Module, ds_config: dict[str, Any], gradients_of: Iterable[str] = ()) -> None:
        module.requires_grad_(False)
        self.engine = inference_engine(module, ds_config)
        self.micro_steps = self.global_steps = 0
        self.accumulation = int(ds_config["gradient_accumulation_steps"])
        self.loss_scaled_by = LOSS_SCALE if self.engine.fp16_enabled() else 1.0
        self.gradients: dict[str, Tensor] = {}
        self._collectives = Collectives()
        for name in gradients_of:
            param = module.get_parameter(name).requires_grad_()
            self.gradients[name] = torch.zeros(Shard(param).count, device=self.engine.device)
            param.register_post_accumulate_grad_hook(partial(self._take, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Of what the engine itself returns DeepSpeed lets no gradient through."""
        return (self.engine.module if torch.is_grad_enabled() else self.engine)(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add to all gradients those of a pass, a mean over the passes of a step. A collective."""
        (loss * (self.loss_scaled_by / self.accumulation)).backward()

    def step(self) -> None:
        """Count a pass; after the last of a step gradients begin anew."""
        if self.is_gradient_accumulation_boundary():
            self.global_steps += 1
            for gradient in self.gradients.values():
                gradient.zero_()
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

    def destroy(self) -> None:
        """Take the engine apart."""
        self.gradients.clear()
        self.engine.destroy()

    def _take(self, name: str, param: Any) -> None:
        """Keep this rank's slice of a whole gradient, added up over ranks. A collective, 4 bytes an element."""
        world_size = self._collectives.world_size
        whole, param.grad = param.grad.flatten().float(), None
        own = self._collectives.reduce_scatter(pad(whole, (0, -len(whole) % world_size))) / world_size
        self.gradients[name] += own[: len(self.gradients[name])]

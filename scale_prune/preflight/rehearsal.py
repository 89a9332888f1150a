"""One training step of a model: on fake tensors, with shapes and lifetimes but no numbers; or in earnest, for its time.

Shape letters: B rows of a micro batch, T tokens in a row.
"""

import copy
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from scale_prune.models import auto_model, classifies, recompute_in_training


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a step showed.

    Attributes:
        numels: elements of each parameter, tied ones once.
        buffers: bytes of the model's buffers, which no rank shares with another.
        activations: most bytes that live at one time besides parameters and buffers: what the backward pass needs, its
            temporaries, and the gradients of the parameters just passed, which ZeRO-3 takes away one by one.
        reading: the same of a forward pass alone, without a loss.
        logits: bytes of the logits.
    """

    numels: tuple[int, ...]
    buffers: int
    activations: int
    reading: int
    logits: int


def rehearse(
    model_config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    batch: int,
    block: int,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    prepare: Callable[[PreTrainedModel], object] = lambda model: None,
) -> Rehearsal:
    """Make one forward and backward pass and count the bytes that live at one time.

    Counted are the tensors that PyTorch's operators return; scratch memory inside a kernel is not seen. Attention is
    what transformers chooses on a CPU; where it is fused there, it keeps what a fused kernel on a GPU keeps.

    Args:
        model_config: the model's configuration; no weights are needed.
        dtype: of parameters and activations.
        batch: rows of a micro batch, B.
        block: tokens in a row, T.
        gradient_checkpointing: recompute activations layer by layer.
        trust_remote_code: run code that comes with the model.
        prepare: what is done to the model before it is trained; called on fake tensors.
    """
    with FakeTensorMode():
        model = _built(model_config, dtype, gradient_checkpointing, trust_remote_code)
        prepare(model)
        reading = _peak_of_a_reading(model, batch, block)
        activations, logits = _peak_of_a_step(model, batch, block)
    return Rehearsal(
        numels=tuple(parameter.numel() for parameter in model.parameters()),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        activations=activations,
        reading=reading,
        logits=logits,
    )


def seconds_of_passes(
    device: torch.device,
    *,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    batch: int,
    block: int,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    prepare: Callable[[PreTrainedModel], object] = lambda model: None,
) -> tuple[float, float]:
    """Measure one forward pass, and one forward and backward pass, of the dense model with random weights on a device.

    The shortest of three in turns: the first warms up, and another process may be in the way of one. Gradients are
    dropped one by one, as ZeRO-3 takes them away. The other arguments are those of `rehearse`.
    """
    with device:
        model = _built(model_config, dtype, gradient_checkpointing, trust_remote_code)
        prepare(model)
        _drop_gradients(model)
        seconds = []
        for back in 3 * (False, True):
            started = _now(device)
            with torch.set_grad_enabled(back):
                loss, _ = _forward(model.train(), batch, block)
            if back:
                loss.backward()
            seconds.append(_now(device) - started)
    return min(seconds[::2]), min(seconds[1::2])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _built(
    model_config: PretrainedConfig, dtype: torch.dtype, gradient_checkpointing: bool, trust_remote_code: bool
) -> PreTrainedModel:
    model_config = copy.deepcopy(model_config)
    model_config.chunk_size_feed_forward = 0  # as where a run loads it
    if classifies(model_config):
        model_config.problem_type = None  # it follows from the labels that are given, one class a row, as in a run
    model = auto_model(model_config).from_config(model_config, dtype=dtype, trust_remote_code=trust_remote_code)
    if gradient_checkpointing:
        recompute_in_training(model)
    return model


def _forward(model: PreTrainedModel, batch: int, block: int) -> tuple[Tensor, int]:
    """Return the loss, and the bytes of the logits, which are gone: as in a run, only the loss is kept."""
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # which older transformers draw by a tensor, and fake ones have no numbers
            module.training = False
    input_ids = torch.zeros(batch, block, dtype=torch.int64)
    labels = input_ids[:, 0] if classifies(model.config) else input_ids
    output = model(input_ids=input_ids, labels=labels, use_cache=False)
    return output.loss, output.logits.nbytes


def _drop_gradients(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)


@torch.no_grad()
def _peak_of_a_reading(model: PreTrainedModel, batch: int, block: int) -> int:
    """Return the most bytes that live at one time in a forward pass, besides parameters and buffers."""
    live = _LiveBytes()
    live.leave_out([*model.parameters(), *model.buffers()])
    with live:
        model.eval()(input_ids=torch.zeros(batch, block, dtype=torch.int64), use_cache=False)
    return live.peak


def _peak_of_a_step(model: PreTrainedModel, batch: int, block: int) -> tuple[int, int]:
    """Return the most bytes that live at one time in a step, besides parameters and buffers; and of the logits."""
    live = _LiveBytes()
    model.train()
    _drop_gradients(model)
    live.leave_out([*model.parameters(), *model.buffers()])
    with live:
        loss, logits = _forward(model, batch, block)
        loss.backward()
    return live.peak, logits


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()

    def leave_out(self, tensors: list[Tensor]) -> None:
        """Never count these."""
        self._seen.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

"""How fast models generate: each by turns with the others, so that what slows the machine down slows all.

Two numbers make the latency: prefill, one pass over the prompt, and the time of each further token, which attends to
the cached keys and values. Beside them stand the ratios that arithmetic and memory traffic would give at best.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scale_prune.inspection.gguf_model import GgufModel

WARM_UP = 1
CACHES = ("past_key_values", "cache_params", "state")
"""What models call the memory of the text so far: those with attention, Mamba's relatives, RWKV."""


@dataclass(kw_only=True)
class Speed:
    """What was measured of one model.

    Attributes:
        parameters: elements, tied ones once.
        weight_bytes: bytes of all of them.
        flops_per_token: multiplications and additions of the weight matrices, the output's included, as PyTorch counts
            them in a pass; attention over the cache is not.
        prefill: seconds of a pass over the prompts, one a round.
        token: seconds of a further token of the batch, one a round.
        peak_bytes: most memory of the GPU that the model took during a round, its weights included and those of other
            models not; None without a GPU.
    """

    parameters: int
    weight_bytes: int
    flops_per_token: int
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def summary(self, batch: int) -> dict[str, Any]:
        """Return the medians, in milliseconds, and tokens generated in a second by the whole batch."""
        return {
            "prefill_ms": 1000 * median(self.prefill),
            "ms_per_token": 1000 * median(self.token),
            "tokens_per_second": batch / median(self.token),
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "flops_per_token": self.flops_per_token,
            "peak_bytes": self.peak_bytes,
        }


def speeds(
    models: Mapping[str, Any], *, vocabulary: int, batch: int, prompt: int, new_tokens: int, rounds: int
) -> dict[str, Speed]:
    """Measure models in turns, of which another one begins each time.

    Args:
        models: in evaluation mode, on one device, by name.
        vocabulary: tokens that prompts are drawn from.
        batch: prompts at once.
        prompt: tokens of a prompt.
        new_tokens: tokens that are generated after it, at least 1.
        rounds: times that each model has its turn, at least 1; one more is not counted.
    """
    measured = {name: describe(model) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    for number in range(WARM_UP + rounds):
        input_ids = torch.randint(vocabulary, (batch, prompt), generator=generator)
        names = [*models]
        for name in (*names[number % len(names) :], *names[: number % len(names)]):  # nobody is always the first
            model = models[name]
            prefill, token, peak = _turn(model, input_ids.to(model.device), new_tokens)
            if number >= WARM_UP:
                measured[name].prefill.append(prefill)
                measured[name].token.append(token)
                if peak is not None:
                    before = measured[name].peak_bytes or 0
                    measured[name].peak_bytes = max(before, peak + measured[name].weight_bytes)
    return measured


def describe(model: nn.Module | GgufModel) -> Speed:
    """Return the sizes of a model."""
    if isinstance(model, GgufModel):
        elements = {name: count for name, (count, _) in model.sizes.items()}
        output = elements.get("output.weight", elements["token_embd.weight"])  # where tied, the table is read as output
        layers = sum(count for name, count in elements.items() if name.startswith("blk.") and model.is_matrix[name])
        return Speed(
            parameters=sum(elements.values()),
            weight_bytes=sum(size for _, size in model.sizes.values()),
            flops_per_token=2 * (layers + output),
        )
    parameters = list(model.parameters())
    return Speed(
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        flops_per_token=_matrix_flops(model, parameters[0].device),
    )


@torch.no_grad()
def _matrix_flops(model: nn.Module, device: torch.device) -> int:
    """Return the operations of a pass over one token, in products with matrices of weights."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    counted = counter.get_flop_counts().get("Global", {})
    return sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))


@torch.no_grad()
def _turn(model: Any, input_ids: Tensor, new_tokens: int) -> tuple[float, float, int | None]:
    """Generate greedily; return seconds of the prefill, of a further token, and the most GPU memory beyond before."""
    on_gpu = input_ids.is_cuda
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = _now(on_gpu)
    output = model(input_ids, use_cache=True)
    prefilled = _now(on_gpu)
    for _ in range(new_tokens):
        chosen = output.logits[:, -1:].argmax(-1)
        output = model(chosen, **{name: output[name] for name in CACHES if name in output}, use_cache=True)
    ended = _now(on_gpu)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return prefilled - started, (ended - prefilled) / new_tokens, peak


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()

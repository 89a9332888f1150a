"""Perplexity equals the one of the definition, however the text is dealt to ranks and filled up."""

import math

import pytest
import torch
from models import VOCABULARY, logits, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scale_prune.core import likelihood as evaluation
from scale_prune.core.likelihood import negative_log_likelihood, perplexity
from scale_prune.data.batches import TokenBlocks, validation_batches
from scale_prune.models.families import FAMILIES

BLOCK = 7


class LargestFloat32(TorchDispatchMode):
    """Remember how many elements the largest float32 result had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's signature
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.numel = max(self.numel, result.numel())
        return result


def random_case(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits of `shape` (B, T, V) and labels (B, T), a quarter of which is not counted."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return values, labels.where(torch.rand(shape[:-1], generator=generator) > 0.25, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_likelihood_is_that_of_the_definition(
    dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, labels = random_case(3, 11, 23, dtype=dtype)
    monkeypatch.setattr(evaluation, "LOGITS_AT_A_TIME", positions * 23)
    total, counted = negative_log_likelihood(values, labels)
    expected = [
        -values[row, place - 1].double().log_softmax(0)[labels[row, place]].item()
        for row in range(3)
        for place in range(1, 11)
        if labels[row, place] != -100
    ]
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(math.fsum(expected), rel=1e-6)
    assert counted.item() == len(expected)


def test_likelihood_never_holds_all_logits_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = random_case(2, 41, 101, dtype=torch.bfloat16)
    monkeypatch.setattr(evaluation, "LOGITS_AT_A_TIME", 5 * 101)
    with LargestFloat32() as seen:
        negative_log_likelihood(values, labels)
    assert seen.numel == 5 * 101


@pytest.mark.parametrize(("world_size", "bos"), [(1, None), (2, None), (3, None), (2, 1)])
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not FAMILIES[name].classifies])
def test_perplexity_is_that_of_the_definition(model_type: str, world_size: int, bos: int | None) -> None:
    """With BOS every token of text is predicted, a block's first from BOS, and BOS itself never."""
    model, begin = tiny_model(model_type), torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    stream = torch.randint(VOCABULARY, (5 * BLOCK + 3,), generator=torch.Generator().manual_seed(1))
    losses = [
        -log_probabilities[token].item()
        for block in (torch.cat([begin, text]) for text in stream.split(BLOCK - len(begin)))
        for log_probabilities, token in zip(
            logits(model, block[None])[0].double().log_softmax(-1), block[1:], strict=False
        )
    ]
    assert len(losses) == len(stream) - (6 if bos is None else 0)
    blocks, sums = TokenBlocks(stream.int(), BLOCK, bos), []

    def add(own: Tensor) -> Tensor:
        sums.append(own)
        return torch.stack(sums).sum(0)

    for rank in range(world_size):
        batches = validation_batches(blocks, micro_batch_size=2, rank=rank, world_size=world_size)
        found = perplexity(lambda input_ids: logits(model, input_ids), batches, add)
    assert found == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)


@pytest.mark.parametrize(
    ("wrong_by", "expected"), [(0.0, 5.0), (2000.0, math.inf), (math.inf, math.inf), (math.nan, math.nan)]
)
def test_perplexity_beyond_a_floats_range(wrong_by: float, expected: float) -> None:
    labels = torch.zeros(1, 3, dtype=torch.int64)
    values = torch.zeros(1, 3, 5)
    values[..., 0] = -wrong_by
    assert perplexity(lambda _: values, [(labels, labels)]) == pytest.approx(expected, nan_ok=True)


def test_perplexity_needs_a_token_to_predict() -> None:
    labels = torch.full((1, 3), -100)
    with pytest.raises(ValueError, match="needs at least one block of 2 tokens"):
        perplexity(lambda input_ids: torch.zeros(1, 3, 5), [(labels.clamp(min=0), labels)])

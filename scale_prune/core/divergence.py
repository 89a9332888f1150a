"""How far a student's predictions are from its teacher's.

Shape legend: B blocks, T tokens in a block, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from scale_prune.core.likelihood import IGNORED

NUMBERS_AT_ONCE = 2**22  # of logits, in float32: 16 MiB, a few times


def token_divergence(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(teacher || student), a mean over the predicted tokens.

    Tokens are taken a few at a time, and with their part of the loss its gradient: nothing as large as the logits is
    made but that gradient.

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V).
        labels: (B, T) the input, not shifted; where a label is IGNORED, its prediction does not count.
        temperature: T, above 0.

    Returns:
        a float32 scalar, at least 0; 0 where no token is predicted. It can be differentiated once.
    """
    predicted = pad(labels[:, 1:] != IGNORED, (0, 1))
    divergence: Tensor = _Divergence.apply(student_logits, teacher_logits, predicted, temperature)
    return divergence


class _Divergence(torch.autograd.Function):
    """The mean, whose gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, predicted: Tensor, temperature: float) -> Tensor:
        """Return the mean over the tokens of (B, T, V) logits that are True in (B, T)."""
        # In fp16 it would vanish before the loss scale comes to it.
        exact = torch.float32 if student.dtype is torch.float16 else student.dtype
        ctx.gradient = torch.zeros_like(student, dtype=exact) if ctx.needs_input_grad[0] else None
        count, total = predicted.sum().clamp(min=1), torch.zeros((), device=student.device)
        at_once = max(NUMBERS_AT_ONCE // student.shape[-1], 1)
        for block, tokens in enumerate(predicted):
            for part in tokens.nonzero().flatten().split(at_once):
                found = log_softmax(student[block, part].float() / temperature, -1)
                wanted = log_softmax(teacher[block, part].float() / temperature, -1)
                chance = wanted.exp()
                total += (chance * (wanted - found)).sum() * temperature**2 / count
                if ctx.gradient is not None:
                    ctx.gradient[block, part] = ((found.exp() - chance) * (temperature / count)).to(exact)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the student's logits, which is used up."""
        own, ctx.gradient = ctx.gradient, None
        return own.mul_(gradient), None, None, None  # autograd brings it to the dtype of the logits

"""How far a student's predictions are from its teacher's.

Shape legend: B blocks, T tokens in a block, V vocabulary.
"""

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from scale_prune.core.likelihood import IGNORED


def token_divergence(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(teacher || student), a mean over the predicted tokens.

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V).
        labels: (B, T) the input, not shifted; where a label is IGNORED, its prediction does not count.
        temperature: T, above 0.

    Returns:
        a float32 scalar, at least 0; 0 where no token is predicted.
    """
    predicted = labels[:, 1:] != IGNORED
    student = log_softmax(student_logits[:, :-1][predicted].float() / temperature, -1)
    teacher = log_softmax(teacher_logits[:, :-1][predicted].float() / temperature, -1)
    total = kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / predicted.sum().clamp(min=1)

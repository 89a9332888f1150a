"""The divergence from a teacher, against the formula, and where it must vanish."""

import pytest
import torch
from memory_backend import steady_model, token_blocks
from models import VOCABULARY
from torch import Tensor

from scale_prune.core import divergence
from scale_prune.core.divergence import token_divergence
from scale_prune.core.likelihood import IGNORED

B, T, V = 3, 7, 11


def random_logits(seed: int) -> Tensor:
    return 3 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed))


def by_the_formula(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> float:
    total, count = 0.0, 0
    for block in range(B):
        for place in range(T - 1):
            if labels[block, place + 1] == IGNORED:
                continue
            p = (teacher[block, place].double() / temperature).softmax(-1)
            q = (student[block, place].double() / temperature).softmax(-1)
            total += float((p * (p / q).log()).sum())
            count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_it_is_the_mean_over_predicted_tokens(temperature: float) -> None:
    labels = torch.zeros(B, T, dtype=torch.int64)
    labels[0, 4:] = labels[2, :3] = IGNORED
    student, teacher = random_logits(0), random_logits(1)
    found = token_divergence(student, teacher, labels, temperature)
    assert float(found) == pytest.approx(by_the_formula(student, teacher, labels, temperature), rel=1e-5)


def test_tokens_that_are_not_predicted_do_not_matter() -> None:
    labels = torch.zeros(B, T, dtype=torch.int64)
    labels[0, 4:] = IGNORED
    student, teacher = random_logits(0), random_logits(1)
    before = token_divergence(student, teacher, labels, 2.0)
    student[0, 3:] = 7.0
    student[:, -1] = -7.0
    assert torch.equal(token_divergence(student, teacher, labels, 2.0), before)
    assert token_divergence(student, teacher, torch.full_like(labels, IGNORED), 2.0) == 0


def test_a_student_that_is_the_teacher_gets_no_gradient_from_it() -> None:
    model = steady_model("gpt_neo")
    input_ids = torch.stack([token_blocks(VOCABULARY).block(index) for index in range(B)])
    teacher = model(input_ids).logits.detach()
    loss = token_divergence(model(input_ids).logits, teacher, input_ids, 2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert all(float(p.grad.abs().max()) < 1e-7 for p in model.parameters() if p.grad is not None)


def test_the_gradient_pulls_towards_the_teacher() -> None:
    labels = torch.zeros(B, T, dtype=torch.int64)
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    before = token_divergence(student, teacher, labels, 2.0)
    before.backward()
    assert student.grad is not None
    after = token_divergence((student - 10 * student.grad).detach(), teacher, labels, 2.0)
    assert after < before.detach()
    assert not student.grad[:, -1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [divergence.NUMBERS_AT_ONCE, 2 * V, 1])
def test_its_gradient_is_that_of_the_formula_however_few_tokens_are_taken_at_once(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "NUMBERS_AT_ONCE", at_once)
    labels = torch.zeros(B, T, dtype=torch.int64)
    labels[0, 4:] = IGNORED
    student, teacher = random_logits(0).to(dtype).requires_grad_(), random_logits(1).to(dtype)
    found = token_divergence(student, teacher, labels, 2.0)
    (2**16 * found).backward()
    exact = student.detach().double().requires_grad_()
    predicted = labels[:, 1:] != IGNORED
    parts = (logits[:, :-1][predicted].double() / 2.0 for logits in (exact, teacher))
    log_q, log_p = (part.log_softmax(-1) for part in parts)
    expected = 4.0 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (2**16 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert student.grad is not None
    assert exact.grad is not None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=tolerance, atol=1e-2)


def test_a_gradient_is_given_once() -> None:
    student = random_logits(0).requires_grad_()
    loss = token_divergence(student, random_logits(1), torch.zeros(B, T, dtype=torch.int64), 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()

"""Distillation losses against their formulas in float64, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from obc.recovery import Distillation, hidden_distillation, logit_distillation


def kl_by_definition(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 times the mean over positions of sum_c p_c log(p_c / q_c), entry by entry."""
    total = 0.0
    for row, wanted in zip(student.double().flatten(0, -2), teacher.double().flatten(0, -2), strict=True):
        q, p = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (row, wanted))
        total += float((p * (p / q).log()).sum())
    return temperature**2 * total / (student.numel() // student.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5)])
def test_logits_follow_the_formula(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    value = logit_distillation(student, teacher, temperature)
    assert float(value) == pytest.approx(kl_by_definition(student, teacher, temperature), rel=1e-5)


def test_masked_positions_do_not_count() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.bool()
    expected = kl_by_definition(student[kept], teacher[kept], 2.0)
    assert float(logit_distillation(student, teacher, 2.0, mask)) == pytest.approx(expected, rel=1e-5)
    error = (student[kept].double() - teacher[kept].double()).square().sum() / teacher[kept].double().square().sum()
    assert float(hidden_distillation(student, teacher, mask)) == pytest.approx(float(error), rel=1e-5)


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    (logit_distillation(student, teacher) + hidden_distillation(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": 0.0}, "one must be positive"),
        ({"logits": -1.0}, "must not be negative"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
        ({"hidden": 1.0}, "need each other"),
        ({"modules": ["0"]}, "need each other"),
        ({"labels": 1.0}, "need each other"),
    ],
)
def test_bad_weights_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)  # type: ignore[arg-type]


def test_bad_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        logit_distillation(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="kept their width"):
        hidden_distillation(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="leaves no position"):
        logit_distillation(torch.ones(2, 3), torch.ones(2, 3), mask=torch.zeros(2))
    with pytest.raises(ValueError, match=r"must have the shape \(2,\)"):
        logit_distillation(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(3))


def test_hidden_states_of_named_modules_are_compared() -> None:
    student, teacher = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    x = torch.randn(5, 3)
    got, wanted = student[0](x), teacher[0](x)
    expected = (got - wanted).square().sum() / wanted.square().sum()
    value = Distillation(logits=0.0, hidden=2.0, modules=["0"]).loss(student, teacher, (x, torch.zeros(5)))
    torch.testing.assert_close(value, 2 * expected)
    with pytest.raises(ValueError, match="no module 'nine'"):
        Distillation(hidden=1.0, modules=["nine"]).loss(student, teacher, x)


def test_outputs_without_logits_are_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(values=x)

    with pytest.raises(ValueError, match="can't find logits in an output of type SimpleNamespace"):
        Distillation().loss(Odd(), Odd(), torch.ones(2, 3))


def test_outputs_of_a_model_without_a_head_are_compared_by_their_error() -> None:
    student, teacher, batch = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(6, 4)
    wanted = teacher(batch).double()
    expected = (student(batch).double() - wanted).square().sum() / wanted.square().sum()
    loss = Distillation(logits=0.0, outputs=2.0).loss(student, teacher, batch)
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-5)

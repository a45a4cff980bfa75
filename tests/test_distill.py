"""Soft targets: the value and the gradient against float64 formulas, and torch's own construction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_ema.recipes.distill import SoftTargetLoss

SHAPES = [((6, 5), -1), ((2, 5, 3, 4), 1), ((2, 3, 5), -1), ((5,), 0)]


def logits(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient(shape: tuple[int, ...], dim: int, temperature: float) -> None:
    """T^2 KL(p || q) per position; d/ds = T (q - p) / positions. Guards the square of the temperature."""
    student, teacher = logits(shape)
    student.requires_grad_()
    teacher.requires_grad_()
    positions = student.numel() // 5
    loss = SoftTargetLoss(temperature)(student, teacher)
    loss.backward()
    p, q = torch.softmax(teacher / temperature, dim), torch.softmax(student / temperature, dim)
    torch.testing.assert_close(loss, temperature**2 * (p * (p / q).log()).sum() / positions)
    torch.testing.assert_close(student.grad, (temperature * (q - p) / positions).detach())
    assert teacher.grad is None


def test_equals_torch() -> None:
    """nn.KLDivLoss(batchmean) over log-softmaxes, times T^2."""
    student, teacher = logits((7, 11))
    theirs = nn.KLDivLoss(reduction="batchmean", log_target=True)
    value = theirs(torch.log_softmax(student / 3, 1), torch.log_softmax(teacher / 3, 1)) * 9
    torch.testing.assert_close(SoftTargetLoss(3.0)(student, teacher), value)


def test_low_precision() -> None:
    """bf16 logits lose what bf16 lost, and nothing more: also for large logits, and under autocast."""
    student, teacher = (each.to(torch.bfloat16) for each in logits((64, 1000), scale=40.0))
    exact = SoftTargetLoss(2.0)(student.double(), teacher.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = SoftTargetLoss(2.0)(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_same_logits_are_zero_and_masks_are_no_nan() -> None:
    student, _ = logits((4, 5))
    student[:, 2] = -torch.inf  # a masked class
    student.requires_grad_()
    loss = SoftTargetLoss(2.0)(student, student)
    assert loss == 0
    other = torch.where(student.isinf(), student, student + torch.randn_like(student)).detach()
    assert SoftTargetLoss(2.0)(student, other).isfinite()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_refuses_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        SoftTargetLoss(temperature)


def test_refuses_shapes() -> None:
    loss = SoftTargetLoss(2.0)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        loss(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least one position"):
        loss(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="say which one holds the classes"):
        loss(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1))
    assert SoftTargetLoss(2.0, dim=1)(torch.zeros(1, 3, 1, 1, 1), torch.zeros(1, 3, 1, 1, 1)) == 0
    assert repr(loss) == "SoftTargetLoss(temperature=2.0)"

"""Soft targets: the value and the gradient against float64 formulas, and torch's own
construction.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ema import EMA, Debiased
from dist_ema.recipes.distill import SoftTargetLoss

from ._models import Core, batch
from ._ranks import run_ranks
from ._wrappers import wrap

SHAPES = [((6, 5), -1), ((2, 5, 3, 4), 1), ((2, 3, 5), -1), ((5,), 0)]


def logits(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient(shape: tuple[int, ...], dim: int, temperature: float) -> None:
    """T^2 KL(p || q) per position; d/ds = T (q - p) / positions.

    Guards the square of the temperature.
    """
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
    """bf16 logits lose what bf16 lost, and nothing more: also for large logits, and under
    autocast.
    """
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


# --- the mean teacher -----------------------------------------------------------------------------


def lessons(student: nn.Module, teacher: nn.Module, lanes: range, steps: int) -> EMA:
    """Labels, and the student's own average as a teacher, on the batches of these lanes
    together.
    """
    optimizer = torch.optim.SGD(
        [p for p in student.parameters() if p.requires_grad], lr=0.5, momentum=0.5
    )
    ema = EMA(student, Debiased(0.8), into=teacher)
    ema.attach(optimizer)
    soft = SoftTargetLoss(temperature=2.0)
    teacher.eval()
    for step in range(steps):
        x, y = (
            torch.cat(parts) for parts in zip(*(batch(step, lane) for lane in lanes), strict=True)
        )
        with torch.no_grad():
            targets = teacher(x)
        logits = student(x)
        (F.cross_entropy(logits.flatten(0, -2), y.flatten()) + 3 * soft(logits, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ema


def teach_on_ranks() -> None:
    """FSDP2 on all ranks is the run of one process that sees all batches: student, teacher, and
    what the teacher says.
    """
    torch.manual_seed(0)
    plain = Core()
    alone, shown = copy.deepcopy(plain), copy.deepcopy(plain)
    whole = lessons(alone, shown, range(dist.get_world_size()), 12).gather()
    student, teacher = wrap("fsdp2", copy.deepcopy(plain)), wrap("fsdp2", copy.deepcopy(plain))
    ema = lessons(student, teacher, range(dist.get_rank(), dist.get_rank() + 1), 12)
    parts = ema.gather()
    for name, weight in whole.items() if dist.get_rank() == 0 else ():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        probe = batch(99, 0)[0]
        torch.testing.assert_close(teacher(probe), shown(probe), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shown(probe), alone.eval()(probe), atol=1e-2), (
            "the teacher is not the student"
        )


@pytest.mark.multirank
def test_mean_teacher_on_ranks() -> None:
    run_ranks(2, teach_on_ranks)

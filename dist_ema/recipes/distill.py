"""Distillation with soft targets (Hinton et al. 2015), from a fixed teacher or from the average.

teacher = copy.deepcopy(student)
ema = EMA(student, decay=0.999, into=teacher)       # mean teacher (Tarvainen & Valpola 2017)
loss = SoftTargetLoss(temperature=2.0)
with torch.no_grad():
    targets = teacher(x)
loss(student(x), targets).backward()
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["SoftTargetLoss"]

_CLASSES = {1: -1, 2: -1, 3: -1, 4: 1}  # dimensions of the logits -> the one of the classes


class SoftTargetLoss(nn.Module):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over all positions.

    T^2 keeps the size of the gradient. Without it a higher temperature would weigh the soft targets
    less (Hinton et al. 2015, section 2). Both sides are cast to float32 before the softmax, so that
    bf16 logits lose nothing more. The teacher's logits carry no gradient.

    Args:
        temperature: T, positive.
        dim: The dimension of the classes. By default the last of [N, C] and [N, T, C], and the
            second of [N, C, H, W].
    """

    def __init__(self, temperature: float = 1.0, dim: int | None = None) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}.")
        self.temperature, self.dim = temperature, dim

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}" + ("" if self.dim is None else f", dim={self.dim}")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of logits of one shape: a scalar in float32, in float64 for float64 logits.

        Args:
            student: The logits that get a gradient.
            teacher: The logits of the soft targets.

        Raises:
            ValueError: The shapes differ, are empty, or do not tell which dimension is `dim`.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"logits must have one shape, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}."
            )
        if student.dim() < 1 or student.numel() == 0:
            raise ValueError(
                f"logits must hold at least one position, got shape {tuple(student.shape)}."
            )
        dim = _CLASSES.get(student.dim()) if self.dim is None else self.dim
        if dim is None:
            raise ValueError(
                f"logits of {student.dim()} dimensions: say which one holds the classes, "
                "SoftTargetLoss(dim=...)."
            )
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        log_q = torch.log_softmax(student.to(wide) / self.temperature, dim)
        log_p = torch.log_softmax(teacher.detach().to(wide) / self.temperature, dim)
        divergence = log_p.exp() * (log_p - log_q)
        # NOTE: a class that both exclude (-inf) counts 0, not NaN.
        divergence = torch.where(log_p == -math.inf, torch.zeros_like(divergence), divergence)
        positions = student.numel() // student.shape[dim]
        return divergence.sum() * (self.temperature**2 / positions)

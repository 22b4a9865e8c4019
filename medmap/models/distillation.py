"""How a network learns from another: answers where the other is right, and the place of a patient among patients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student: Float[Tensor, "B K X Y Z"],
    teacher: Float[Tensor, "B K X Y Z"],
    target: Int[Tensor, "B X Y Z"],
    temperature: float = 10.0,
) -> Float[Tensor, ""]:
    """Follow the teacher where it is right and the student is worse.

        L = T² Σ_v w_v KL( softmax(t_v/T) ‖ softmax(s_v/T) ) / Σ_v w_v,    0 where Σ_v w_v = 0
        w_v = [argmax t_v = y_v] · max(0, CE(s_v, y_v) − CE(t_v, y_v)),    without a gradient

    student, teacher: logits s, t; target: class indices y; temperature: T

    >>> good, bad = torch.zeros(2, 1, 2, 1, 1, 1)
    >>> good[0, 1], truth = 5.0, torch.ones(1, 1, 1, 1, dtype=torch.long)
    >>> bool(distillation_loss(bad, good, truth) > 0), float(distillation_loss(good, bad, truth))
    (True, 0.0)
    """
    student, teacher = student.float(), teacher.float()
    with torch.no_grad():
        behind = F.cross_entropy(student, target, reduction="none") - F.cross_entropy(teacher, target, reduction="none")
        weight = behind.relu() * (teacher.argmax(dim=1) == target)
    soft, theirs = (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)
    divergence = F.kl_div(soft, theirs, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (weight * divergence).sum() / weight.sum().clamp(min=1e-6)


def contrastive_loss(
    student: Float[Tensor, "B E"], teacher: Float[Tensor, "B E"], margin: float = 1.0
) -> Float[Tensor, ""]:
    """Embeddings of the same sample together, those of different samples at least a margin apart.

        L = 1/B² Σ_{b,c} { d_bc² if b = c, else max(0, m − d_bc)² },    d_bc = ‖student_b − teacher_c‖

    >>> e = torch.eye(3)
    >>> round(float(contrastive_loss(e, e)), 4), round(float(contrastive_loss(e, e[[1, 2, 0]])), 4)
    (0.0, 1.0)
    """
    squared = (student[:, None].float() - teacher[None].float()).square().sum(dim=2)
    # The root of exactly 0 would have an infinite gradient.
    apart = (margin - (squared + 1e-12).sqrt()).relu().square()
    same = torch.eye(len(squared), dtype=torch.bool, device=squared.device)
    return torch.where(same, squared, apart).mean()

"""The only place for what a student is compared to its teacher by."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


def kl(logits: Tensor, wanted: Tensor, real: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(wanted ‖ logits) in nats, of logits [… V] divided by the temperature; mean over all, or over those of the mask `real` [B T]."""
    each = F.kl_div(
        (logits.float() / temperature).log_softmax(-1), (wanted.float() / temperature).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    return each.mean() if real is None or real.shape != each.shape else each[real.bool()].mean()


def relative(h: Tensor, wanted: Tensor) -> Tensor:
    """Σ (h − wanted)² / Σ wanted²."""
    return (h.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-12)


def activation_matching(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens i of 1 − <A_i, A'_i>,  A_ij = cos(f_i, f_j), rows of length 1; features [B L D] and [B L D'] of any two widths.

    Exact, and no [L L] is formed where L exceeds the widths: with f of length 1, <A_i, A'_i> = f_i (Σ_j f_j f'_jᵀ) f'_iᵀ and |A_i|² =
    f_i (Σ_j f_j f_jᵀ) f_iᵀ, so that time and memory are linear in L. float32, since small angles are what is compared.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher must be [B L D] and [B L D'] of the same tokens; got {tuple(student.shape)}, {tuple(teacher.shape)}"
        )
    s, t = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    if student.shape[1] <= max(s.shape[-1], t.shape[-1]):
        return 1 - (F.normalize(s @ s.mT, dim=-1) * F.normalize(t @ t.mT, dim=-1)).sum(-1).mean()
    along = lambda x, y: ((x @ (x.mT @ y)) * y).sum(-1)  # <x_i xᵀ, y_i yᵀ> for each i
    return 1 - (along(s, t) / (along(s, s) * along(t, t)).sqrt()).mean()  # |A_i| is at least 1: f_i · f_i


def vit_linearizer(student: Sequence[Tensor], teacher: Sequence[Tensor], masked: Tensor) -> tuple[Tensor, Tensor]:
    """Activation matching and masked prediction, arXiv:2504.00037, from the patch tokens [B L D] after each stage of both.

        A = cos(f_i, f_j) over visible tokens, rows of length 1        activation matching: mean over stages and rows of 1 − <A_i, A'_i>
        masked prediction: SmoothL1 of the last stage's masked tokens

    masked [B L] bool, as many in each row; those patches the student has not seen, the teacher has. The two may differ in width D for the
    first, not for the second.
    """
    visible = (~masked).nonzero()[:, 1].view(masked.shape[0], -1)
    seen = lambda f: f.gather(1, visible[..., None].expand(-1, -1, f.shape[-1]))
    matching = [activation_matching(seen(s), seen(t)) for s, t in zip(student, teacher)]
    return torch.stack(matching).mean(), F.smooth_l1_loss(student[-1][masked].float(), teacher[-1][masked].float())


def four(after: Sequence[T]) -> list[T]:
    """What comes after each of the four stages that ViT-Linearizer splits a stack of blocks into, of what comes after each block."""
    return [after[round((i + 1) * len(after) / 4) - 1] for i in range(4)] if len(after) >= 4 else list(after)


def hide(pixels: Tensor, masked: Tensor, patch: int) -> Tensor:
    """pixels [B C Y X] with the masked ones [B L] of their patch × patch patches at 0."""
    seen = (~masked).view(masked.shape[0], 1, -1, pixels.shape[-1] // patch).to(pixels.dtype)
    return pixels * seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

"""The only place for what a student is compared to its teacher by."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(logits: Tensor, wanted: Tensor, real: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(wanted ‖ logits) in nats, of logits [… V] divided by the temperature; mean over all, or over those of the mask `real` [B T]."""
    each = F.kl_div(
        (logits.float() / temperature).log_softmax(-1), (wanted.float() / temperature).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    return each.mean() if real is None or real.shape != each.shape else each[real.bool()].mean()


def relative(h: Tensor, wanted: Tensor) -> Tensor:
    """Σ (h − wanted)² / Σ wanted²."""
    return (h.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-12)


def vit_linearizer(student: Sequence[Tensor], teacher: Sequence[Tensor], masked: Tensor) -> tuple[Tensor, Tensor]:
    """Activation matching and masked prediction, arXiv:2504.00037, from the patch tokens [B L D] after each stage of both.

        A = cos(f_i, f_j) over visible tokens, rows of length 1        activation matching: mean over stages and rows of 1 − <A_i, A'_i>
        masked prediction: SmoothL1 of the last stage's masked tokens

    masked [B L] bool, as many in each row; those patches the student has not seen, the teacher has. The two may differ in width D for the
    first, not for the second.
    """
    visible = (~masked).nonzero()[:, 1].view(masked.shape[0], -1)

    def dependencies(f: Tensor) -> Tensor:
        seen = F.normalize(f.float().gather(1, visible[..., None].expand(-1, -1, f.shape[-1])), dim=-1)
        return F.normalize(seen @ seen.mT, dim=-1)

    matching = [1 - (dependencies(s) * dependencies(t)).sum(-1).mean() for s, t in zip(student, teacher)]
    return torch.stack(matching).mean(), F.smooth_l1_loss(student[-1][masked].float(), teacher[-1][masked].float())

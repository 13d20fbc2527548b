"""The only place that mixes a softmax over the last tokens with linear attention to those before, in one sum: LoLCATs, arXiv:2410.10254."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(q: Tensor, k: Tensor, v: Tensor, real: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window` tokens: its mean of the values [B T HQ V], and log Σ e^s [B T HQ 1], s = scale · q·k.

    q [B T HQ K] against k, v [B window+T H ·], whose first `window` rows precede the first query; real [B window+T]. Query t sees its own
    row, window + t, and the window − 1 before it. In blocks of `window` queries: O(T · window) time and memory.
    """
    B, T, HQ, _ = q.shape
    H, dtype = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    block = min(T, window)
    blocks = -(-T // block)
    more = blocks * block - T
    pad = lambda x: F.pad(x, (0, 0, 0, 0, 0, more)) if more else x
    q = pad(q).unflatten(1, (blocks, block)).unflatten(3, (H, HQ // H))  # [B n c H G K]
    k, v = (pad(x).unfold(1, window + block, block) for x in (k, v))  # [B n H K c+w]
    real = (F.pad(real, (0, more)) if more else real).unfold(1, window + block, block)  # [B n c+w]
    ahead = torch.arange(window + block, device=q.device) - torch.arange(block, device=q.device)[:, None]
    visible = ((ahead >= 1) & (ahead <= window)) & real[:, :, None]  # [B n c c+w]
    s = torch.einsum("bnchgk,bnhkj->bnhgcj", q, k).to(dtype) * scale
    s = s.masked_fill(~visible[:, :, None, None], -torch.inf)
    m = s.detach().amax(-1, keepdim=True).clamp_min(-1e30)  # a query of padding may see nothing
    weights = (s - m).exp()
    o = torch.einsum("bnhgcj,bnhvj->bnchgv", weights, v.to(dtype))
    flat = lambda x: x.permute(0, 1, 4, 2, 3, 5).reshape(B, blocks * block, HQ, 1)[:, :T]  # [B n H G c 1] -> [B T HQ 1]
    total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return o.reshape(B, blocks * block, HQ, -1)[:, :T] / flat(total), flat(m + total.log())


def together(near: Tensor, near_log: Tensor, far: Tensor, far_sum: Tensor, mix: Tensor) -> Tensor:
    """(e^near_log · near + e^mix · far) / (e^near_log + e^mix · far_sum), for any size of near_log; far_sum >= 0, mix [HQ].

    Where far_sum is 0 that is `near`, however small its weight.
    """
    there = far_sum > 0
    far_sum = far_sum.clamp_min(1e-30)
    weight = (near_log - mix[:, None] - far_sum.log()).sigmoid().masked_fill(~there, 1.0)
    return weight * near + (1 - weight) * (far / far_sum).masked_fill(~there, 0.0)

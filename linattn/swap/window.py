"""The only place that mixes a softmax over the last tokens with linear attention to those before, in one sum: LoLCATs, arXiv:2410.10254."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(q: Tensor, k: Tensor, v: Tensor, real: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last `window` tokens, left in parts: (Σ e^(s−m) v, Σ e^(s−m), m), m = max(0, largest s), s = scale · q·k.

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
    m = s.detach().amax(-1, keepdim=True).clamp_min(0.0)
    weights = (s - m).exp()
    o = torch.einsum("bnhgcj,bnhvj->bnchgv", weights, v.to(dtype))
    flat = lambda x: x.permute(0, 1, 4, 2, 3, 5).reshape(B, blocks * block, HQ, 1)[:, :T]  # [B n H G c 1] -> [B T HQ 1]
    return o.reshape(B, blocks * block, HQ, -1)[:, :T], flat(weights.sum(-1, keepdim=True)), flat(m)

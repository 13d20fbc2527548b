"""ByteNet's residual block, arXiv:1610.10099: a dilated convolution over time with a ring of past inputs as its state. No attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ByteNetBlock(nn.Module):
    """x + W₂ relu(LN(conv(relu(LN(W₁ relu(LN(x))))))), W₁ [dim → dim/2], conv of `width` taps `dilation` apart.

        y, state = block(x)                   # x [B T dim]: training, prefill
        y, state = block(x1, state)           # any number of tokens more

    causal  False: the convolution is centred (the paper's encoder), and there is no state

    A stack sees 1 + (width − 1) · Σ dilation tokens back: the paper's set of five has dilations 1, 2, 4, 8, 16. Norms are per token, for
    one over time would show the future. mask [B T] bool, True for a real token: the convolution sees zeros in place of the others.
    """

    def __init__(self, dim: int, *, width: int = 3, dilation: int = 1, causal: bool = True):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even, at least 2; got {dim}")
        if width < 1 or dilation < 1 or (not causal and width % 2 == 0):
            raise ValueError(f"width and dilation must be at least 1, and width odd where causal=False; got {width} and {dilation}")
        half = dim // 2
        self.dim, self.causal, self.past = dim, causal, (width - 1) * dilation
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(half), nn.LayerNorm(half)
        self.down, self.up = nn.Linear(dim, half), nn.Linear(half, dim)
        self.conv = nn.Conv1d(half, half, width, dilation=dilation)

    def forward(self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B T dim] → y and the state [B dim/2 (width−1)·dilation], the convolution's last inputs; None where causal=False."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [B T dim] with dim={self.dim}; got {tuple(x.shape)}")
        if state is not None and (not self.causal or state.shape != (x.shape[0], self.dim // 2, self.past)):
            wanted = (x.shape[0], self.dim // 2, self.past) if self.causal else None
            raise ValueError(f"state must be {wanted}; got {tuple(state.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"mask must be bool [B T] = {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
        y = self.norm2(self.down(self.norm1(x).relu())).relu()
        y = (y if mask is None else y.masked_fill(~mask[..., None], 0.0)).mT
        if not self.causal:
            y, state = F.pad(y, (self.past // 2, self.past // 2)), None
        else:
            y = F.pad(y, (self.past, 0)) if state is None else torch.cat([state.to(y.dtype), y], -1)
            state = y[..., y.shape[-1] - self.past :].clone()
        y = self.conv(y) if x.shape[1] else y[..., :0]
        return x + self.up(self.norm3(y.mT).relu()), state

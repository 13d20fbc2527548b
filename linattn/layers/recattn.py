"""RecNeXt's attention, arXiv:2412.19628: linear attention at half the resolution between two depthwise convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_attention
from .features import elu1


def _depthwise(dim: int, width: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(dim, dim, width, stride, width // 2, groups=dim, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim))


class RecAttention(nn.Module):
    """x [B C H W] → conv(x + up(attention(down(x)))): half-resolution attention, up by the nearest neighbour, 5×5 depthwise around it.

    The attention, per head:  o = q (Σ k vᵀ / n) / (q · Σ k / n + 1e-6) + dw3×3(v),  [q; k] = elu(BN(W x)) + 1, v = x;  W is a 1×1
    convolution in two groups, so that q sees the first half of the channels and k the second. Nothing projects v or the output.
    Its cost is a quarter of that at full resolution. ValueError for heads that do not divide dim, and for an odd dim.
    """

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto"):
        super().__init__()
        if dim % 2 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be even and a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads, self.backend = num_heads, backend
        self.down, self.out = _depthwise(dim, 5, stride=2), _depthwise(dim, 5)
        self.qk = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1, groups=2, bias=False), nn.BatchNorm2d(2 * dim))
        self.local = _depthwise(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.local[0].in_channels:
            raise ValueError(f"x must be [B C H W] with C = {self.local[0].in_channels}; got {tuple(x.shape)}")
        half = self.down(x)
        return self.out(x + F.interpolate(self.attend(half), size=x.shape[2:], mode="nearest"))

    def attend(self, x: Tensor) -> Tensor:
        """The attention alone, at the resolution it is given."""
        heads = lambda t: t.flatten(2).mT.unflatten(-1, (self.num_heads, -1))  # [B n heads C/heads]
        q, k = elu1(self.qk(x)).chunk(2, 1)
        n = x.shape[2] * x.shape[3]
        o, _ = linear_attention(heads(q), heads(k), heads(x), causal=False, normalize=True, scale=1 / n, backend=self.backend)
        return o.flatten(2).mT.unflatten(-1, x.shape[2:]) + self.local(x)

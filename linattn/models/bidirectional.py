"""The block that sees both sides, of images and masked text: attention and MLP, pre-norm or post-norm, drop path, layer scale."""

import torch
from torch import Tensor, nn

from ..layers import MLP, LinearAttention, SoftmaxAttention
from ..layers.linear import without_weight_decay
from ..layers.packing import sequence_of
from ..layers.variants import Gating


class LayerScale(nn.Module):
    """x · gamma, one per channel, from `start` on: arXiv:2103.17239."""

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.gamma = without_weight_decay(nn.Parameter(torch.full((dim,), start)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """While training, a whole sequence's branch is dropped with `rate` and the others scaled to make up for it: arXiv:1603.09382."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        return f"{self.rate:g}"

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B T dim], or N sequences packed into [1 T dim]."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        kept = torch.empty(count, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep) / keep
        return x * (kept if cu_seqlens is None else kept[sequence_of(cu_seqlens, x.shape[1])].transpose(0, 1))


class BidirectionalBlock(nn.Module):
    """pre:  x + attention(norm1(x)), then x + mlp(norm2(x));  post:  norm1(x + attention(x)), then norm2(x + mlp(x)), as BERT.

    attention    a layer of `linattn.layers`, as a rule with causal=False
    layer_scale  start of a learnt scale per channel on both branches; None: none
    drop_path    see DropPath
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        dim: int,
        *,
        post_norm: bool = False,
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.norm1, self.attention = nn.LayerNorm(dim, eps=norm_eps), attention
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=norm_eps), mlp
        self.scale1, self.scale2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        curves: Tensor | None = None,
        segment: int | None = None,
    ) -> Tensor:
        """x [B T dim] → the same. What is given goes to the attention; with `segment` the MLP too sees so many tokens at a time."""
        options = {name: value for name, value in (("curves", curves), ("segment", segment)) if value is not None}
        mlp = self.mlp if segment is None else lambda y: torch.cat([self.mlp(part) for part in y.split(segment, 1)], 1)
        attend = lambda y: self.drop_path(self.scale1(self.attention(y, None, cu_seqlens, mask, **options)[0]), cu_seqlens)
        feed = lambda y: self.drop_path(self.scale2(mlp(y)), cu_seqlens)
        if self.post_norm:
            x = self.norm1(x + attend(x))
            return self.norm2(x + feed(x))
        x = x + attend(self.norm1(x))
        return x + feed(self.norm2(x))


def make_block(
    variant: str,
    dim: int,
    num_heads: int,
    hidden: int,
    *,
    causal: bool = False,
    curves: int = 1,
    gating: Gating = None,
    prefix: int = 0,
    theta: float | None = None,
    expand_k: float | None = None,
    expand_v: float | None = None,
    layer_idx: int,
    num_layers: int,
    norm_eps: float,
    post_norm: bool = False,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    backend: str = "auto",
) -> BidirectionalBlock:
    """Block `layer_idx` of an encoder with attention of that variant, or softmax with biases and rotary positions of base `theta`."""
    attention: nn.Module
    if variant == "softmax":
        if curves != 1:
            raise ValueError("curves=2 needs a variant with a decay; softmax attention has none")
        attention = SoftmaxAttention(dim, num_heads, causal=causal, theta=theta, bias=True, layer_idx=layer_idx, num_layers=num_layers)
    else:
        attention = LinearAttention(
            dim, num_heads, variant, causal=causal, gating=gating, curves=curves, prefix=prefix, expand_k=expand_k, expand_v=expand_v,
            layer_idx=layer_idx, num_layers=num_layers, backend=backend,
        )  # fmt: skip
    mlp = MLP(dim, hidden, num_layers=num_layers)
    return BidirectionalBlock(attention, mlp, dim, post_norm=post_norm, norm_eps=norm_eps, layer_scale=layer_scale, drop_path=drop_path)

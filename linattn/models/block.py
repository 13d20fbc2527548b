"""One pre-norm block of a stack: attention, then feed-forward, each added to the residual stream."""

from typing import Any

from torch import Tensor, nn

from ..layers import EXPANSIONS, LinearAttention, SoftmaxAttention, SparseStateExpansion, SwiGLU
from .config import DecoderConfig


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). `attention` is a layer of either kind, or has its signature and state protocol."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, dim: int, *, norm_eps: float = 1e-5):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(dim, eps=norm_eps), attention
        self.norm2, self.mlp = nn.RMSNorm(dim, eps=norm_eps), mlp

    def forward(self, x: Tensor, state=None, cu_seqlens: Tensor | None = None, mask: Tensor | None = None, *, return_state: bool = False):
        """x [B T dim] → the same, and the attention's state. mask [B T]: True for a real token."""
        y, state = self.attention(self.norm1(x), state, cu_seqlens, mask, return_state=return_state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state


def make_block(config: DecoderConfig, layer_idx: int, *, backend: str = "auto") -> Block:
    """Block `layer_idx` of a decoder: the attention its config names there, and SwiGLU."""
    name = config.attention(layer_idx)
    place: dict[str, Any] = dict(num_kv_heads=config.num_kv_heads, layer_idx=layer_idx, num_layers=config.num_layers)
    linear: dict[str, Any] = dict(expand_k=config.expand_k, expand_v=config.expand_v, norm_eps=config.norm_eps, backend=backend)
    attention: nn.Module
    if name == "softmax":
        attention = SoftmaxAttention(config.dim, config.num_heads, theta=config.rope_theta, **place)
    elif name in EXPANSIONS:
        sizes: dict[str, Any] = dict(partitions=config.partitions, active=config.active, conv=config.short_conv)
        attention = SparseStateExpansion(config.dim, config.num_heads, name, **sizes, **place, **linear)
    else:
        attention = LinearAttention(config.dim, config.num_heads, name, **place, **linear)
    return Block(attention, SwiGLU(config.dim, config.hidden, num_layers=config.num_layers), config.dim, norm_eps=config.norm_eps)

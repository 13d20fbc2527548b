"""Rotary position embedding (RoPE), arXiv:2104.09864: the only place that turns queries and keys by their position."""

import torch
from torch import Tensor


def check_pairs(width: int) -> None:
    """ValueError for an odd head width."""
    if width % 2:
        raise ValueError(f"rotary positions turn pairs of channels: the head width must be even; got {width}")


def rotation(positions: Tensor, width: int, *, theta: float = 10000.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of positions · theta^(-2i/width), i < width/2: [T] or [B T] → two of [… T 1 width/2]. ValueError for an odd width.

    Made anew at each call: it costs less than the projections beside it, no buffer can be lost or rounded, and no length is the longest.
    """
    check_pairs(width)
    frequency = theta ** (torch.arange(0, width, 2, device=positions.device, dtype=dtype) / -width)
    angle = (positions.to(dtype)[..., None] * frequency)[..., None, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [B T H K] with channels i and i + K/2 turned as a pair (Llama's order), computed in the table's dtype."""
    cos, sin = table
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

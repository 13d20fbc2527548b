"""The only layer file that reads `cu_seqlens`: checks it, and says which sequence a token is of and where in it."""

from itertools import pairwise

import torch
from torch import Tensor


def check_input(x: Tensor, dim: int, cu_seqlens: Tensor | None, mask: Tensor | None = None) -> None:
    """ValueError unless x is [B T dim] and floating, mask None or bool [B T], cu_seqlens None or [N+1], from 0 to T without decreasing.

    The values of cu_seqlens are read on the CPU only, and not under torch.compile.
    """
    if x.ndim != 3 or x.shape[-1] != dim or not x.is_floating_point():
        raise ValueError(f"x must be floating, [B T dim] with dim={dim}; got {x.dtype} {tuple(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2] or cu_seqlens is not None):
        also = " and no cu_seqlens, which have no padding" if cu_seqlens is not None else ""
        raise ValueError(f"mask must be bool [B T] = {tuple(x.shape[:2])}{also}; got {mask.dtype} {tuple(mask.shape)}")
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be [N+1] int32 or int64 with N >= 1; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs the sequences packed into one row, B = 1; got x {tuple(x.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on the device of x, {x.device}; got {cu_seqlens.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != x.shape[1]:
            raise ValueError(f"cu_seqlens must run from 0 to T = {x.shape[1]}; got {ends[0]} to {ends[-1]}")
        if any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens must not decrease; got {ends if len(ends) < 20 else '…'}")


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences x [B T ·] holds: B, or the N packed ones."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequence_of(cu_seqlens: Tensor, T: int) -> Tensor:
    """[T] int64: the packed sequence each token is of. Empty sequences are stepped over."""
    return torch.searchsorted(cu_seqlens[1:].long(), torch.arange(T, device=cu_seqlens.device), right=True)


def token_positions(T: int, seen: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Place of every token in its own sequence, after `seen` [B] or [N] earlier ones: [T], or [B T] where seen is given."""
    positions = torch.arange(T, device=device)
    if cu_seqlens is not None:
        n = sequence_of(cu_seqlens, T)
        positions = positions - cu_seqlens.long()[n]
        return positions if seen is None else (positions + seen[n])[None]
    return positions if seen is None else seen[:, None] + positions

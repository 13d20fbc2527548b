"""The norm and the gate between the operator and the output projection."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATES: dict[str | None, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
NORMS = ("head", "all", "layer")


class GatedRMSNorm(nn.Module):
    """o [B T H V], gate [B T H·V] or None → [B T H·V]:  RMSNorm(o) · activation(gate),  or RMSNorm(o · activation(gate)) with gate_first.

    across  "head": over the V channels of each head, with one weight [V];  "all": over all H·V together;
            "layer": LayerNorm, with a bias, over all H·V together;  None: no norm
    """

    def __init__(self, heads: int, width: int, *, across: str | None, gate: str | None, gate_first: bool = False, eps: float = 1e-5):
        super().__init__()
        self.across, self.gate, self.gate_first, self.eps = across, gate, gate_first, eps
        size = {"head": width, "all": heads * width, "layer": heads * width, None: 0}[across]
        self.weight = nn.Parameter(torch.ones(size)) if size else None
        self.bias = nn.Parameter(torch.zeros(size)) if across == "layer" else None

    def extra_repr(self) -> str:
        return f"across={self.across!r}, gate={self.gate!r}, gate_first={self.gate_first}, eps={self.eps}"

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return self._norm(o).flatten(-2)
        opened = GATES[self.gate](gate).unflatten(-1, o.shape[-2:])
        return self._norm(o * opened).flatten(-2) if self.gate_first else (self._norm(o) * opened).flatten(-2)

    def _norm(self, o: Tensor) -> Tensor:
        if self.weight is None:
            return o
        x = o if self.across == "head" else o.flatten(-2)
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).view(o.shape)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).view(o.shape)

"""The feed-forward half of a block."""

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear, residual_std


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with biases: the feed-forward of ViT and BERT. num_layers as in SwiGLU."""

    def __init__(self, dim: int, hidden: int, *, num_layers: int = 1):
        super().__init__()
        self.fc1 = Linear(dim, hidden, bias=True)
        self.fc2 = Linear(hidden, dim, bias=True, std=residual_std(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), arXiv:2002.05202. num_layers scales the start of `down`, which writes to the residual stream."""

    def __init__(self, dim: int, hidden: int, *, num_layers: int = 1):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(dim, hidden), Linear(dim, hidden)
        self.down_proj = Linear(hidden, dim, std=residual_std(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

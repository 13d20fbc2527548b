"""The decays: modules that map x [B T dim] to (log_decay <= 0, write).

The shape of log_decay is its kind; write, [B T H] or None, scales the values. Each is made by `Decay(place)`. Gates are computed in float32
(float64 for float64), and parameters that must not be pulled towards zero carry `_no_weight_decay = True`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear, without_weight_decay


class Place(NamedTuple):
    """Where a decay stands."""

    dim: int  # of x
    heads: int  # of k and v
    key_dim: int  # of one key
    layer_idx: int = 0
    num_layers: int = 1


def gate_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class NoDecay(nn.Module):
    """The state forgets nothing."""

    def __init__(self, place: Place):
        super().__init__()

    def forward(self, x: Tensor) -> tuple[None, None]:
        return None, None


def retnet(h: Tensor, place: Place) -> Tensor:
    """log(1 − 2^(−5−h)), arXiv:2307.08621: memories of 32, 64, 128, … tokens."""
    return torch.log1p(-torch.exp2(-5 - h))


def lightning(h: Tensor, place: Place) -> Tensor:
    """−(8/H)(1 − l/L)·h, arXiv:2401.04658: head 0 forgets nothing, and later layers forget less."""
    return -(8 / place.heads) * (1 - place.layer_idx / place.num_layers) * h


def lion(h: Tensor, place: Place) -> Tensor:
    """log sigmoid(a), a ~ N(0, 1), arXiv:2502.16249: where LION-D's learnt decays start. Each call draws anew."""
    return F.logsigmoid(torch.randn_like(h))


class HeadDecay(nn.Module):
    """[H]: one decay per head, constant in time, by `rule(h, place)` of h = 0 … H−1; trainable=True learns it from there.

    Learnt, it is logsigmoid(a), and a rule's 0 starts at −1e-4, where a gradient can move it. Constant, it is made anew at each call:
    `module.bfloat16()` would round a buffer.
    """

    def __init__(self, place: Place, *, rule: Callable[[Tensor, Place], Tensor] = retnet, trainable: bool = False):
        super().__init__()
        self.place, self.rule = place, rule
        self.a = without_weight_decay(nn.Parameter(torch.empty(place.heads))) if trainable else None
        self.reset_parameters()

    def reset_parameters(self):
        if self.a is not None:
            start = self._by_rule(self.a.device, torch.float64).clamp(max=-1e-4)
            with torch.no_grad():
                self.a.copy_(start - torch.log(-torch.expm1(start)))  # logsigmoid⁻¹

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.a is None:
            return self._by_rule(x.device, gate_dtype(x)), None
        return F.logsigmoid(self.a.to(gate_dtype(x))), None

    def _by_rule(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.rule(torch.arange(self.place.heads, device=device, dtype=dtype), self.place)


class _TimeStep(nn.Module):
    """The parameters of Mamba-2's gate: dt = softplus(logit + dt_bias), log_decay = −exp(A_log) · dt, arXiv:2405.21060.

    It starts with A ~ U(a_range), floored at 1e-4 so that its logarithm is finite, and with dt at logit 0 log-uniform in [1e-3, 1e-1],
    floored at 1e-4.
    """

    def __init__(self, heads: int, steps: int, a_range: tuple[float, float]):
        super().__init__()
        self.a_range = a_range
        self.A_log = without_weight_decay(nn.Parameter(torch.empty(heads)))
        self.dt_bias = without_weight_decay(nn.Parameter(torch.empty(steps)))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            self.A_log.uniform_(*self.a_range).clamp_(min=1e-4).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
            self.dt_bias.add_(torch.log(-torch.expm1(-dt)))  # softplus⁻¹

    def forward(self, logit: Tensor) -> tuple[Tensor, Tensor]:
        """logit [B T steps] → dt [B T steps], rate = −exp(A_log) [heads]."""
        dtype = gate_dtype(logit)
        return F.softplus(logit.to(dtype) + self.dt_bias.to(dtype)), -self.A_log.to(dtype).exp()


class SigmoidGate(nn.Module):
    """[B T H]: logsigmoid(x W + b): LION-S, arXiv:2502.16249. It starts near log(1/2), a memory of about one token."""

    def __init__(self, place: Place):
        super().__init__()
        self.proj = Linear(place.dim, place.heads, bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.logsigmoid(self.proj(x).to(gate_dtype(x))), None


class ScalarGate(nn.Module):
    """[B T H]: −exp(A_log) · dt, dt = softplus(x W + dt_bias): Mamba-2. With write=True dt scales the values too: its discretisation."""

    def __init__(self, place: Place, *, a_range: tuple[float, float] = (1.0, 16.0), write: bool = False):
        super().__init__()
        self.write = write
        self.proj = Linear(place.dim, place.heads)
        self.step = _TimeStep(place.heads, place.heads, a_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        dt, rate = self.step(self.proj(x))
        return rate * dt, dt if self.write else None


class ChannelGate(nn.Module):
    """[B T H K]: logsigmoid(x A B + b) / divisor, A of width `rank`: GLA, arXiv:2312.06635. It starts near log(1/2)/16."""

    def __init__(self, place: Place, *, rank: int = 16, divisor: float = 16.0):
        super().__init__()
        self.heads, self.divisor = place.heads, divisor
        self.down, self.up = Linear(place.dim, rank), Linear(rank, place.heads * place.key_dim, bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        logit = self.up(self.down(x))
        return (F.logsigmoid(logit.to(gate_dtype(x))) / self.divisor).unflatten(-1, (self.heads, -1)), None


class ChannelStepGate(nn.Module):
    """[B T H K]: −exp(A_log) · softplus(x A B + dt_bias), A_log per head, dt_bias per channel, A of width K: KDA, arXiv:2510.26692."""

    def __init__(self, place: Place, *, a_range: tuple[float, float] = (1.0, 16.0)):
        super().__init__()
        self.heads = place.heads
        self.down, self.up = Linear(place.dim, place.key_dim), Linear(place.key_dim, place.heads * place.key_dim)
        self.step = _TimeStep(place.heads, place.heads * place.key_dim, a_range)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        dt, rate = self.step(self.up(self.down(x)))
        return rate[:, None] * dt.unflatten(-1, (self.heads, -1)), None

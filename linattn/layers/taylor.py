"""TaylorShift, arXiv:2403.02920: the exponential of softmax replaced by 1 + x + x²/2, summed in quadratic or in linear form.

    w(x) = 1 + x + x²/2 = φ(q)·φ(k) for x = q·k        φ(x) = (x_i x_j for i < j,  x_i²/√2,  x_i,  1),  (d+1)(d+2)/2 numbers

Each pair's product counts once: half the d² features, and half the state, of the paper's x ⊠ x. The linear form sums over blocks
of features, each made for one call of the operator and made again in the backward pass: what lives at one time is [T 4d], never [T d²].
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import State, linear_attention
from .decays import Place, gate_dtype
from .packing import sequence_of, token_positions

FORMS = ("auto", "direct", "linear")
EPS = 1e-6  # the operator's: a step of it goes on where `attend` left off


def crossover(d: int, *, symmetric: bool = True) -> float:
    """Tokens from which the linear form needs fewer operations than the direct one, 4N²d + 6N², for heads of width d.

    symmetric=False: the paper's N0 = (4d³ + 10d² + 9d + 4)/(4d + 6), with all d² products. Ours has K = (d+1)(d+2)/2 features, each made
    twice, multiplied into d + 1 columns and out of them again: 4K(d + 2)/(4d + 6), about half of that.
    """
    _check_width(d)
    K = (d + 1) * (d + 2) // 2
    return (4 * K * (d + 2) if symmetric else 4 * d**3 + 10 * d**2 + 9 * d + 4) / (4 * d + 6)


def memory_crossover(d: int) -> float:
    """The paper's N1: tokens from which its linear form, d²(d+1) + 2dN + (d+1)N + d²N, stores fewer numbers than its direct, dN + 2N²."""
    _check_width(d)
    return (d**2 + 2 * d + 1 + math.sqrt(d**4 + 12 * d**3 + 14 * d**2 + 4 * d + 1)) / 4


def measured_crossover(d: int, heads: int = 1, *, causal: bool = False, device: str = "cpu", longest: int = 65536) -> int:
    """The first of 64, 96, 128, 192, … tokens at which the linear form is the faster one here, forward and backward; `longest` if none is.

    What it returns is what `crossover=` of `TaylorShift` and `taylor_attention` takes: the formula counts operations, not time.
    """
    _check_width(d)
    lengths = [n for power in range(6, longest.bit_length()) for n in (2**power, 3 * 2 ** (power - 1)) if n < longest]
    for N in lengths:
        q, k, v = (torch.randn(1, N, heads, d, device=device, requires_grad=True) for _ in range(3))
        seconds = {}
        for form in ("direct", "linear"):
            taken = []
            for _ in range(4):  # the first warms up
                start = time.perf_counter()
                taylor_attention(q, k, v, causal=causal, form=form).sum().backward()
                if q.is_cuda:
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
            seconds[form] = min(taken[1:])
        if seconds["linear"] < seconds["direct"]:
            return N
    return longest


def taylor_features(x: Tensor) -> Tensor:
    """φ(x) [… (d+1)(d+2)/2] of x [… d]: φ(q)·φ(k) = 1 + q·k + (q·k)²/2. The last number is the constant 1."""
    one = F.pad(x, (0, 1), value=1.0)
    return _features(one, range(one.shape[-1]))


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | float = 1.0,
    *,
    causal: bool = False,
    form: str = "auto",
    crossover: float | None = None,
    output_norm: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """o_i = √(N/d) · Σ_j w(x_ij) v_j / Σ_j w(x_ij),   x_ij = τ · q_i·k_j / (|q_i| |k_j|),   w(x) = 1 + x + x²/2.

    q            [B T HQ d]   HQ a multiple of H; k [B T H d], v [B T H V]
    temperature  τ: a number, or [HQ]
    causal       j ≤ i only, and N is what a token has seen
    form         "direct": O(T²d), in blocks of rows; "linear": O(T d³), on the operator; "auto": linear where T exceeds `crossover`, and
                 for packed sequences. The forms are one map
    crossover    tokens; None: `crossover(d)` of this module, an operation count; `measured_crossover` gives this machine's
    output_norm  the factor √(N/d), with N the real tokens of the sequence
    mask         [B T] bool, True for a real token, or cu_seqlens [M+1] of packed sequences (B = 1); not both

    Returns o [B T HQ V] in q's dtype. ValueError for a form that is not known, both mask and cu_seqlens, and what the operator refuses.
    """
    check_heads(q, k, v, mask, cu_seqlens)
    tau = temperature if isinstance(temperature, float | int) else temperature.to(gate_dtype(q))[:, None]
    q_unit, k_unit = tau * F.normalize(q.to(gate_dtype(q)), dim=-1), F.normalize(k.to(gate_dtype(k)), dim=-1)
    if _form(form, q, crossover, cu_seqlens) == "direct":
        if cu_seqlens is not None:
            raise ValueError("form must be 'linear' or 'auto' for packed sequences; got 'direct'")
        o = _direct(q_unit.to(q.dtype), k_unit.to(q.dtype), v, mask, causal)
    else:
        o, _ = _linear(q_unit.to(q.dtype), k_unit.to(q.dtype), v, None, mask, causal=causal, cu_seqlens=cu_seqlens, backend=backend)
    if output_norm:
        o = o * (_tokens_seen(q, causal, mask, cu_seqlens) / q.shape[-1]).sqrt()[..., None, None].to(o.dtype)
    return o


class TaylorShift(nn.Module):
    """The feature map of the variant `taylorshift`: φ of unit queries times a learnt temperature per head (start 1), and of unit keys.

    form, crossover  as in `taylor_attention`, which it takes the shorter way by where no state is asked for
    """

    def __init__(self, place: Place, *, form: str = "auto", crossover: float | None = None):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {list(FORMS)}; got {form!r}")
        self.form, self.crossover = form, crossover
        self.key_dim = (place.key_dim + 1) * (place.key_dim + 2) // 2
        self.temperature = nn.Parameter(torch.ones(place.heads))

    def extra_repr(self) -> str:
        return f"key_dim={self.key_dim}, form={self.form!r}, crossover={self.crossover}"

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B T HQ d], k [B T H d] → φ of both, [B T · key_dim]."""
        q, k = self._units(q, k)
        return taylor_features(q), taylor_features(k)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None,
        *, causal: bool, cu_seqlens: Tensor | None, return_state: bool, backend: str,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """What the operator gives for `forward`'s features, normalised, without ever holding them all."""
        check_heads(q, k, v, mask, None)
        direct = state is None and not return_state and _form(self.form, q, self.crossover, cu_seqlens) == "direct"
        q, k = self._units(q, k)
        if direct:
            return _direct(q, k, v, mask, causal, EPS), None
        how: dict[str, Any] = dict(causal=causal, cu_seqlens=cu_seqlens, backend=backend, return_state=return_state)
        return _linear(q, k, v, state, mask, eps=EPS, **how)

    def _units(self, q, k):
        wide = gate_dtype(q)
        tau = self.temperature.to(wide).repeat_interleave(q.shape[2] // k.shape[2])
        return (tau[:, None] * F.normalize(q.to(wide), dim=-1)).to(q.dtype), F.normalize(k.to(wide), dim=-1).to(k.dtype)


# -- the two forms: unit q and k in, o [B T HQ V] out -------------------------------------------------------------------------------------

ROWS = 256  # of the direct form's weights that live at one time


def _direct(q, k, v, mask, causal, eps=0.0):
    """The weights of ROWS queries at a time, made again in the backward pass: [B H ROWS T] and never [T T]."""
    if mask is not None:
        k, v = _without(mask, k), _without(mask, v)
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.repeat_interleave(groups, 2).transpose(1, 2), v.repeat_interleave(groups, 2).transpose(1, 2)
    blocks = [
        checkpoint(_rows, q[:, :, first : first + ROWS], k, v, mask, first if causal else None, eps, use_reentrant=False)
        for first in range(0, q.shape[2], ROWS)
    ]
    return torch.cat(blocks, 2).transpose(1, 2) if blocks else torch.zeros_like(v.transpose(1, 2))


def _rows(q, k, v, mask, first, eps):
    x = q @ k.mT
    w = 1 + x * (1 + x / 2)  # at least 1/2
    w = w if first is None else w.tril(first)
    w = w if mask is None else w.masked_fill(~mask[:, None, None], 0.0)
    return ((w @ v) / _nonzero(w.sum(-1, keepdim=True, dtype=gate_dtype(w)) + eps)).to(v.dtype)


def _linear(q, k, v, state, mask, *, causal, cu_seqlens, backend, return_state=False, eps=0.0):
    """Σ over blocks of features of the operator on that block; the row sum is one more column of v, since blocks divide only at the end."""
    q, k, v = (F.pad(x, (0, 1), value=1.0) for x in (q, k, v))
    if mask is not None:
        k, v = _without(mask, k), _without(mask, v)
    before = None if state is None else torch.cat([state.kv, state.z[..., None]], -1)
    how: dict[str, Any] = dict(causal=causal, cu_seqlens=cu_seqlens, backend=backend, return_state=return_state)
    total, parts, at = 0.0, [], 0
    for rows in _blocks(q.shape[-1]):
        width = sum(q.shape[-1] - i for i in rows)
        part = None if before is None else before.narrow(-2, at, width)
        o, after = checkpoint(_block, q, k, v, part, rows, how, use_reentrant=False)
        total, at = total + o, at + width
        parts.append(after)
    n, d = total[..., :-1], total[..., -1:]
    after = torch.cat(parts, -2) if return_state else None
    o = n / _nonzero(d + eps / max(q.shape[1], 1))
    return o.to(q.dtype), None if after is None else State(after[..., :-1].contiguous(), after[..., -1].contiguous())


def _block(q, k, v, part, rows, how):
    initial = None if part is None else State(part)
    scale = 1 / max(q.shape[1], 1)  # it divides out again, and keeps half precision in range
    o, after = linear_attention(_features(q, rows), _features(k, rows), v, scale=scale, initial_state=initial, **how)
    return o.to(gate_dtype(o)), None if after is None else after.kv


def _without(mask, x):
    return x.masked_fill(~mask[..., None, None], 0.0)


def _nonzero(d):
    """A row sum: at least half the number of tokens seen, and 0 only where all of them are padding."""
    return d.clamp(min=torch.finfo(torch.float32).tiny)


def _features(x, rows):
    """Products x_i x_j, i in `rows`, j ≥ i, of x [… d+1] with its 1 at the end; a square of any other number is divided by √2."""
    last = x.shape[-1] - 1
    half = lambda i: torch.cat([x[..., i : i + 1] * math.sqrt(0.5), x[..., i + 1 :]], -1) if i < last else x[..., i:]
    return torch.cat([x[..., i : i + 1] * half(i) for i in rows], -1)


def _blocks(n: int) -> list[range]:
    """Rows 0 … n−1 of the triangle of pairs in runs of at most 4n products."""
    runs: list[range] = []
    first = width = 0
    for i in range(n):
        if width + n - i > 4 * n:
            runs, first, width = [*runs, range(first, i)], i, 0
        width += n - i
    return [*runs, range(first, n)]


# -- arguments ----------------------------------------------------------------------------------------------------------------------------


def check_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """ValueError unless q [B T HQ d], k [B T H d], v [B T H V] and a bool mask [B T] go together, and mask or cu_seqlens is None."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k, v must be [B T HQ d], [B T H d], [B T H V]; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the {k.shape[2]} heads of k and v; got {q.shape[2]} heads")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise ValueError(f"mask must be bool [B T] = {tuple(k.shape[:2])}, True for a real token; got {mask.dtype} {tuple(mask.shape)}")
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens must not both be given: packed sequences hold no padding")


def _check_width(d):
    if not isinstance(d, int) or d < 1:
        raise ValueError(f"d must be a whole number, the width of a head, at least 1; got {d!r}")


def _form(form, q, tokens, cu_seqlens):
    if form not in FORMS:
        raise ValueError(f"form must be one of {list(FORMS)}; got {form!r}")
    if form != "auto":
        return form
    return "direct" if cu_seqlens is None and q.shape[1] <= (crossover(q.shape[3]) if tokens is None else tokens) else "linear"


def _tokens_seen(q, causal, mask, cu_seqlens):
    """How many tokens each token sees: [1 T], or [B T] with a mask."""
    T, device, wide = q.shape[1], q.device, gate_dtype(q)
    if cu_seqlens is not None:
        seen = token_positions(T, None, cu_seqlens, device) + 1 if causal else cu_seqlens.diff()[sequence_of(cu_seqlens, T)]
        return seen[None].to(wide)
    real = q.new_ones(1, T, dtype=wide) if mask is None else mask.to(wide)
    return real.cumsum(1) if causal else real.sum(1, keepdim=True).expand_as(real)

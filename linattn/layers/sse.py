"""Sparse State Expansion, arXiv:2507.16577: N states more than one, of which a router opens k to each token; the others rest."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import State
from .convolution import ShortConvolution
from .decays import ChannelGate, Place, ScalarGate, gate_dtype
from .features import FEATURES, softmax
from .linear import Linear, residual_std
from .linear_attention import head_width, kv_heads
from .mixer import Mixer
from .norm import GatedRMSNorm
from .packing import check_input, sequence_of, sequences
from .variants import Variant


class SiluSoftmax(nn.Module):
    """silu of queries, softmax over the channels of a key: a key is a soft choice of rows of the state."""

    def __init__(self, place: Place):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(q), softmax(k)


# What each of the states does; names as in the paper, SSE-GLA and SSE-GDN
EXPANSIONS = {
    "sse_gla": Variant(source="arXiv:2507.16577", feature=SiluSoftmax, decay=ChannelGate, gate="silu", gate_low_rank=True),
    "sse_gdn": Variant(source="arXiv:2507.16577", activation="silu", feature="l2norm", decay=partial(ScalarGate, a_range=(0.0, 16.0)),
                       delta=True, gate="silu", gate_low_rank=True),
}  # fmt: skip


class Route(NamedTuple):
    """The router's answer for L tokens."""

    weights: Tensor  # e [L N]: softmax over all partitions, not normalised again over the chosen ones
    chosen: Tensor  # [L k] int64, the partitions that a token opens, the largest e first


def route(logits: Tensor, active: int) -> Route:
    """The `active` largest of e = softmax(logits [L N]) in float32; of equals the first."""
    e = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return Route(e, e.argsort(dim=-1, descending=True, stable=True)[:, :active])


def balance(way: Route, real: Tensor | None = None) -> Tensor:
    """(N / k) Σ_i mean e_i · share of tokens that open i: 1 where all are used alike, N / k at most; the gradient is of e.

    real [L] bool: the tokens that count; None: all.
    """
    opened = torch.zeros_like(way.weights).scatter(1, way.chosen, 1.0)
    count = lambda t: t.mean(0) if real is None else (t * real[:, None]).sum(0) / real.sum().clamp(min=1)
    return way.weights.shape[1] / way.chosen.shape[1] * (count(way.weights) * count(opened)).sum()


class ExpandedState(NamedTuple):
    """What one layer remembers of B (or N packed) sequences."""

    kv: Tensor  # [B partitions+1 H K V] float32, the shared state first
    conv: Tensor | None  # [B channels width-1], where the layer has a short convolution


class SparseStateExpansion(nn.Module):
    """The layer, with the signature and the state protocol of `LinearAttention`; causal. Of the variant "sse_gla":

        shared state   S⁰_t = e^{g⁰_t} S⁰_{t−1} + k⁰_t v_tᵀ                            always
        partition i    Sⁱ_t = e^{gˢ_t} Sⁱ_{t−1} + e_tⁱ kˢ_t v_tᵀ   where chosen;  Sⁱ_t = Sⁱ_{t−1}, neither written nor faded, elsewhere
        o_t = K^{−1/2} (S⁰_tᵀ q⁰_t + Σ_{i chosen} e_tⁱ · Sⁱ_tᵀ qˢ_t)

    with q = silu, k = softmax over a head's channels, v = silu of projections that all share; qˢ and kˢ add a low-rank one of their own.
    "sse_gdn" writes by the gated delta rule, q and k = silu and then of length 1, and e scales beta, so that a token of small e erases
    as little as it writes. (The released code scales keys before they get length 1, which undoes it and leaves the router untaught.)

    num_kv_heads, expand_k, expand_v, layer_idx, num_layers, backend  as in `LinearAttention`
    partitions, active  N and k: the paper's n4k1 is 4 and 1. ValueError unless 1 <= active < partitions
    conv                width of a short convolution over q⁰ and k⁰, without activation; 0: none. qˢ and kˢ are made of what precedes it
    gated               False: e chooses, but scales neither writes nor reads, and learns from the balance loss alone

    Tokens are sorted by sequence and partition, and one packed call of the operator serves all partitions: work grows with `active`, not
    with `partitions`. `balance_loss` is that of the last forward in training, else None; 0.01 times its sum over layers belongs to the
    loss, or partitions collapse (`Decoder.balance_loss`).
    """

    whole_sequence = "its tokens are sorted by partition"  # see `context_parallel.shard_sequence`

    def __init__(
        self,
        dim: int,
        num_heads: int,
        variant: str = "sse_gla",
        *,
        num_kv_heads: int | None = None,
        expand_k: float | None = None,
        expand_v: float | None = None,
        partitions: int = 4,
        active: int = 1,
        conv: int = 0,
        gated: bool = True,
        layer_idx: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        if variant not in EXPANSIONS:
            raise ValueError(f"variant must be one of {list(EXPANSIONS)}; got {variant!r}")
        if not 1 <= active < partitions:
            raise ValueError(f"active must be at least 1 and less than partitions; got {active} of {partitions}")
        self.variant = v = EXPANSIONS[variant]
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, kv_heads(num_heads, num_kv_heads)
        self.partitions, self.active, self.gated = partitions, active, gated
        self.key_dim = K = head_width(dim, v.expand_k if expand_k is None else expand_k, num_heads, "expand_k")
        self.value_dim = V = head_width(dim, v.expand_v if expand_v is None else expand_v, num_heads, "expand_v")
        queries, H = num_heads * K, self.num_kv_heads
        low_rank = lambda width, bias=False: nn.Sequential(Linear(dim, V), Linear(V, width, bias=bias))
        self.q_proj, self.k_proj, self.v_proj = Linear(dim, queries), Linear(dim, H * K), Linear(dim, H * V)
        self.q_routed, self.k_routed, self.router = low_rank(queries), low_rank(H * K), Linear(dim, partitions)
        self.conv = ShortConvolution(queries + H * K, conv) if conv else None
        place = Place(dim, H, K, layer_idx, num_layers)
        self.shared, self.routed = Mixer(v, place, backend=backend), Mixer(v, place, backend=backend)
        self.g_proj = low_rank(num_heads * V, bias=True)
        self.norm = GatedRMSNorm(num_heads, V, across=v.norm, gate=v.gate, eps=norm_eps)
        self.o_proj = Linear(num_heads * V, dim, std=residual_std(num_layers))
        self.balance_loss: Tensor | None = None

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"
        return f"{self.dim}, {heads}, partitions={self.partitions}, active={self.active}, gated={self.gated}"

    def flops_per_token(self, T: int) -> float:
        """Of writing and reading 1 + active states, forward and backward; the projections come on top."""
        return 12.0 * (1 + self.active) * self.num_heads * self.key_dim * self.value_dim

    def forward(
        self,
        x: Tensor,
        state: ExpandedState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_state: bool = False,
    ) -> tuple[Tensor, ExpandedState | None]:
        """x [B T dim] → y [B T dim] and the state after it, which is None unless a state was given or return_state asks for one.

        cu_seqlens [N+1] packs N sequences into x [1 T dim]; states are then those of N. mask [B T] bool, True for a real token: the others
        write nothing, fade nothing and count for no balance; with a state or a short convolution they must come first.
        """
        check_input(x, self.dim, cu_seqlens, mask)
        self._check_state(x, state, cu_seqlens)
        keep, count = return_state or state is not None, sequences(x, cu_seqlens)
        if count == 0:  # no sequence is none that could be packed
            return x.clone(), (state or self._empty(x)) if keep else None
        q, k = self.q_proj(x), self.k_proj(x)
        qs, ks, conv = q + self.q_routed(x), k + self.k_routed(x), None
        if self.conv is not None:
            qk = torch.cat([q, k], -1)
            qk = qk if mask is None else qk.masked_fill(~mask[..., None], 0.0)
            qk, conv = self.conv(qk, None if state is None else state.conv, cu_seqlens, return_state=keep)
            q, k = qk.split([q.shape[-1], k.shape[-1]], -1)
        activation = FEATURES[self.variant.activation]
        heads = lambda t: activation(t).unflatten(-1, (-1, self.key_dim))
        v = F.silu(self.v_proj(x)).unflatten(-1, (-1, self.value_dim))

        way = route(self.router(x).flatten(0, 1), self.active)
        self.balance_loss = balance(way, None if mask is None else mask.flatten()) if self.training else None
        before = (None, None) if state is None else (State(state.kv[:, 0]), State(state.kv[:, 1:].flatten(0, 1)))
        o, first = self.shared(x, heads(q), heads(k), v, before[0], cu_seqlens, mask, return_state=keep)
        routed, rest = self._routed(x, heads(qs), heads(ks), v, way, before[1], cu_seqlens, mask, keep)
        y = self.o_proj(self.norm(o + routed, self.g_proj(x)))
        if first is None or rest is None:
            return y, None
        return y, ExpandedState(torch.cat([first.kv[:, None], rest.kv.unflatten(0, (count, self.partitions))], 1), conv)

    def _routed(self, x, q, k, v, way, state, cu_seqlens, mask, keep):
        """All partitions as packed sequences, (sequence, partition) by (sequence, partition), each in order of time."""
        (B, T, _), N, active = x.shape, self.partitions, self.active
        ends = torch.arange(B + 1, device=x.device) * T if cu_seqlens is None else cu_seqlens.long()
        place = (sequence_of(ends, B * T)[:, None] * N + way.chosen).flatten()
        order = place.argsort(stable=True)
        lengths = place.new_zeros((ends.shape[0] - 1) * N).scatter_add(0, place, torch.ones_like(place))
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        # a permutation of `active` copies of each token, there and back: no sum whose order could change, forwards or backwards
        sort = lambda t: t.flatten(0, 1)[:, None].expand(-1, active, *t.shape[2:]).flatten(0, 1)[order][None]
        weight = way.weights.gather(1, way.chosen).flatten()[order][None, :, None] if self.gated else None
        hidden = None if mask is None else sort(mask)
        o, after = self.routed(sort(x), sort(q), sort(k), sort(v), state, offsets, hidden, write=weight, return_state=keep)
        o = o if weight is None else o * weight[..., None].to(o.dtype)
        return o[0, order.argsort()].unflatten(0, (B, T, active)).sum(2), after

    def _empty(self, x):
        kv = x.new_zeros(0, self.partitions + 1, self.num_kv_heads, self.key_dim, self.value_dim, dtype=gate_dtype(x))
        return ExpandedState(kv, None if self.conv is None else x.new_zeros(0, self.conv.dim, self.conv.width - 1))

    def _check_state(self, x, state, cu_seqlens):
        if state is None:
            return
        if not isinstance(state, ExpandedState) or (state.conv is None) != (self.conv is None):
            has = "with" if self.conv is not None else "without"
            raise ValueError(f"state must be the ExpandedState this layer returned, {has} conv; got {type(state).__name__}")
        wanted = (sequences(x, cu_seqlens), self.partitions + 1, self.num_kv_heads, self.key_dim, self.value_dim)
        if state.kv.shape != wanted:
            raise ValueError(f"state.kv must be [B partitions+1 H K V] = {wanted}; got {tuple(state.kv.shape)}")

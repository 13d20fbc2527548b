"""Sparse State Expansion, arXiv:2507.16577: N states more than one, of which a router opens k to each token; the others rest."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import State, linear_attention
from .decays import ChannelGate, Place
from .features import softmax
from .linear import Linear, residual_std
from .linear_attention import head_width
from .norm import GatedRMSNorm
from .packing import check_input, sequence_of, sequences


class Route(NamedTuple):
    """The router's answer for L tokens."""

    weights: Tensor  # e [L N]: softmax over all partitions, not normalised again over the chosen ones
    chosen: Tensor  # [L N] bool, `active` in each row


def route(logits: Tensor, active: int) -> Route:
    """The `active` largest of e = softmax(logits [L N]) in float32; of equals the first."""
    e = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    first = e.argsort(dim=-1, descending=True, stable=True)[:, :active]
    return Route(e, torch.zeros_like(e, dtype=torch.bool).scatter(-1, first, True))


def balance(way: Route) -> Tensor:
    """(N / k) Σ_i mean e_i · mean chosen_i: 1 where all partitions are used alike, N / k at most; the gradient is of e."""
    k = way.chosen.sum() / max(way.chosen.shape[0], 1)
    return way.weights.shape[1] / k * (way.weights.mean(0) * way.chosen.to(way.weights.dtype).mean(0)).sum()


class SparseStateExpansion(nn.Module):
    """The layer with channel decays (the paper's SSE-GLA), with the signature and the state protocol of `LinearAttention`; causal.

        shared state   S⁰_t = e^{g⁰_t} S⁰_{t−1} + k⁰_t v_tᵀ                            always
        partition i    Sⁱ_t = e^{gˢ_t} Sⁱ_{t−1} + e_tⁱ kˢ_t v_tᵀ   where chosen;  Sⁱ_t = Sⁱ_{t−1}, neither written nor faded, elsewhere
        o_t = K^{−1/2} (S⁰_tᵀ q⁰_t + Σ_{i chosen} e_tⁱ · Sⁱ_tᵀ qˢ_t)

    q = silu, k = softmax over a head's channels, v = silu of projections that all share; qˢ and kˢ add a low-rank one of their own. Tokens
    are sorted by sequence and partition, and one packed call of the operator serves all partitions: work grows with `active`, not with
    `partitions`. The state is kv [B partitions+1 H K V], the shared one first.

    `balance_loss` holds the last training pass' balance; 0.01 times its sum over layers belongs to the loss, or partitions collapse.
    ValueError unless 1 <= active < partitions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        partitions: int = 4,
        active: int = 1,
        layer_idx: int = 0,
        num_layers: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        if not 1 <= active < partitions:
            raise ValueError(f"active must be at least 1 and less than partitions; got {active} of {partitions}")
        self.dim, self.num_heads, self.partitions, self.active, self.backend = dim, num_heads, partitions, active, backend
        self.width = W = head_width(dim, 1, num_heads, "1")
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in range(3))
        low_rank = lambda bias=False: nn.Sequential(Linear(dim, W), Linear(W, dim, bias=bias))
        self.q_routed, self.k_routed, self.g_proj = low_rank(), low_rank(), low_rank(bias=True)
        self.router = Linear(dim, partitions)
        place = Place(dim, num_heads, W, layer_idx, num_layers)
        self.decay, self.decay_routed = ChannelGate(place), ChannelGate(place)
        self.norm = GatedRMSNorm(num_heads, W, across="head", gate="silu")
        self.o_proj = Linear(dim, dim, std=residual_std(num_layers))
        self.balance_loss: Tensor | None = None

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, partitions={self.partitions}, active={self.active}"

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B T dim] → y and the state [B partitions+1 H K V], with cu_seqlens of N sequences; None unless given or asked for."""
        check_input(x, self.dim, cu_seqlens)
        count, (B, T, _) = sequences(x, cu_seqlens), x.shape
        wanted = (count, self.partitions + 1, self.num_heads, self.width, self.width)
        if state is not None and state.shape != wanted:
            raise ValueError(f"state must be [B partitions+1 H K V] = {wanted}; got {tuple(state.shape)}")
        keep = return_state or state is not None
        if count == 0 or x.numel() == 0:
            return x.clone(), (x.new_zeros(wanted, dtype=torch.float32) if state is None else state) if keep else None
        ends = torch.arange(count + 1, device=x.device) * T if cu_seqlens is None else cu_seqlens.long()
        row = x.reshape(1, B * T, self.dim)
        heads = lambda t: t.unflatten(-1, (self.num_heads, -1))
        q, k, v = self.q_proj(row), self.k_proj(row), heads(F.silu(self.v_proj(row)))
        shared = heads(F.silu(q)), softmax(heads(k)), v, self.decay(row)[0]
        routed = heads(F.silu(q + self.q_routed(row))), softmax(heads(k + self.k_routed(row))), v, self.decay_routed(row)[0]
        way = route(self.router(row)[0], self.active)
        self.balance_loss = balance(way) if self.training else None
        one, first = self._attend(*shared, ends, None if state is None else state[:, 0], keep)
        other, rest = self._routed(routed, way, ends, None if state is None else state[:, 1:].flatten(0, 1), keep)
        y = self.o_proj(self.norm((one + other).view(B, T, self.num_heads, self.width), self.g_proj(x)))
        if first is None or rest is None:
            return y, None
        return y, torch.cat([first[:, None], rest.unflatten(0, (count, self.partitions))], 1)

    def _routed(self, heads, way, ends, initial, keep):
        """All partitions as packed sequences, (sequence, partition) by (sequence, partition), each in order of time."""
        token, part = way.chosen.nonzero(as_tuple=True)
        place = sequence_of(ends, way.chosen.shape[0])[token] * self.partitions + part
        order = place.argsort(stable=True)
        token, part = token[order], part[order]
        counts = torch.zeros((ends.shape[0] - 1) * self.partitions, dtype=torch.int64, device=place.device)
        offsets = F.pad(counts.scatter_add(0, place, torch.ones_like(place)).cumsum(0), (1, 0))
        q, k, v, g = (t[:, token] for t in heads)
        e = way.weights[token, part][:, None, None].to(q.dtype)
        o, after = self._attend(q * e, k * e, v, g, offsets, initial, keep)
        slots = token.argsort(stable=True)  # each token has `active` of them: gathered and summed, in an order that never changes
        return o[:, slots].unflatten(1, (-1, self.active)).sum(2), after

    def _attend(self, q, k, v, g, ends, initial, keep):
        before = None if initial is None else State(initial)
        o, after = linear_attention(q, k, v, g, initial_state=before, return_state=keep, cu_seqlens=ends, backend=self.backend)
        return o, None if after is None else after.kv

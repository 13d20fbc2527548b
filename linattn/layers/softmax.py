"""Softmax attention with the signature and the state protocol of `LinearAttention`: the baseline, and the other half of hybrid stacks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context_parallel import Heads
from .decays import gate_dtype
from .linear import Linear, residual_std
from .linear_attention import head_width, kv_heads
from .packing import check_input, sequence_of, sequences, token_positions
from .position import check_pairs, rotate, rotation


class KeyValues:
    """Keys and values [B capacity H K], of which `used` rows are taken. Appending to them is O(T), and never seen by an older state."""

    def __init__(self, k: Tensor, v: Tensor, used: int):
        self.k, self.v, self.used = k, v, used

    def append(self, k: Tensor, v: Tensor, length: int, seen: Tensor | None) -> "KeyValues":
        """The same, or longer, KeyValues with k, v [B T H K] behind the first `length` rows, or behind each sequence's own `seen` [B]."""
        T = k.shape[1]
        if torch.is_grad_enabled():  # autograd saves what it attends to: nothing may be written over
            here = KeyValues(F.pad(self.k[:, :length], (0, 0, 0, 0, 0, T)), F.pad(self.v[:, :length], (0, 0, 0, 0, 0, T)), length)
        elif self.used == length and length + T <= self.k.shape[1]:
            here = self
        else:  # full, or another state has gone on from here: a copy, twice as long
            more = max(64, length + T)
            grow = lambda x: torch.cat([x[:, :length], x.new_zeros(x.shape[0], more, *x.shape[2:])], 1)
            here = KeyValues(grow(self.k), grow(self.v), length)
        if seen is None:
            here.k[:, length : length + T], here.v[:, length : length + T] = k, v
        else:
            where = torch.arange(k.shape[0], device=k.device)[:, None], seen[:, None] + torch.arange(T, device=k.device)
            here.k[where], here.v[where] = k, v
        here.used = length + T
        return here


class SoftmaxState(NamedTuple):
    """The keys and values of B sequences: `length` rows in all, or, where packing made the sequences uneven, seen [B] of them each."""

    past: KeyValues
    length: int
    seen: Tensor | None


class SoftmaxAttention(nn.Module):
    """softmax(q kᵀ / √K) v by `torch.nn.functional.scaled_dot_product_attention`, with rotary positions of base `theta`, or none (None).

    num_kv_heads  heads of k and v; each serves num_heads / num_kv_heads query heads. None: num_heads
    causal        False: every token sees every other; there is then no state
    bias          of the four projections

    Packed sequences are attended to through a [T T] mask. With a state, which holds every key and value so far, they are unpacked into it:
    that reads the longest of them from the device.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        causal: bool = True,
        theta: float | None = 10000.0,
        bias: bool = False,
        layer_idx: int = 0,
        num_layers: int = 1,
    ):
        super().__init__()
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, kv_heads(num_heads, num_kv_heads)
        self.causal, self.theta = causal, theta
        self.head_dim = K = head_width(dim, 1, num_heads, "1")
        if theta is not None:
            check_pairs(K)
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, H * K, bias=bias) for H in (num_heads, self.num_kv_heads, self.num_kv_heads))
        self.o_proj = Linear(num_heads * K, dim, bias=bias, std=residual_std(num_layers))
        self.shard: Heads | None = None  # where a sequence lies on several processes: see `context_parallel.shard_sequence`

    def flops_per_token(self, T: int) -> float:
        """Of the products with keys and values, forward and backward; the projections come on top."""
        return (6.0 if self.causal else 12.0) * T * self.num_heads * self.head_dim

    def whole_sequence(self, by: str) -> str | None:
        """Why this layer cannot be given part of a sequence, if it cannot: see `context_parallel.shard_sequence`."""
        return "softmax attends to the keys of all parts: by heads it can be" if by == "state" else None

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, theta={self.theta}, causal={self.causal}"

    def forward(
        self,
        x: Tensor,
        state: SoftmaxState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_state: bool = False,
    ) -> tuple[Tensor, SoftmaxState | None]:
        """x [B T dim] → y [B T dim] and the state after it, which is None unless a state was given or return_state asks for one.

        mask [B T] bool, True for a real token: the others are seen by none but themselves. Not with a state.
        """
        check_input(x, self.dim, cu_seqlens, mask)
        if mask is not None and (state is not None or return_state):
            raise ValueError("mask cannot go with a state of softmax attention, whose sequences are uneven by cu_seqlens alone")
        self._check_state(x, state, cu_seqlens, return_state)
        if self.shard is not None and (return_state or any(given is not None for given in (state, cu_seqlens, mask))):
            raise ValueError("part of a sequence takes x alone: no state, cu_seqlens, mask or return_state")
        T = x.shape[1]
        seen = None if state is None else _seen(state, x.device)
        positions = token_positions(T, seen, cu_seqlens, x.device)  # [T] or [B T]
        if self.shard is not None:
            positions = positions + self.shard.rank * T
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B T H K]
        if self.theta is not None:
            table = rotation(positions, self.head_dim, theta=self.theta, dtype=gate_dtype(x))
            q, k = rotate(q, table), rotate(k, table)
        if return_state and state is None:
            empty = k.new_zeros(sequences(x, cu_seqlens), 0, *k.shape[2:])
            state = SoftmaxState(KeyValues(empty, empty, 0), 0, None)
        if state is None:
            return self._out(q, k, v, self._mask(T, cu_seqlens, mask, x.device)), None
        if cu_seqlens is not None:
            return self._packed(q, k, v, positions, state, cu_seqlens)
        past, after = state.past.append(k, v, state.length, state.seen), None if state.seen is None else state.seen + T
        state = SoftmaxState(past, state.length + T, after)
        k, v = state.past.k[:, : state.length], state.past.v[:, : state.length]
        if T == 1 and state.seen is None:
            return self._out(q, k, v, None, causal=False), state
        if T == state.length:
            return self._out(q, k, v, None), state
        visible = torch.arange(state.length, device=x.device) <= positions[..., None]  # [B T S]
        return self._out(q, k, v, visible[:, None]), state

    def _packed(self, q, k, v, positions, state, cu_seqlens):
        """Queries packed into one row against the unpacked keys of all sequences."""
        T, N, lengths = q.shape[1], cu_seqlens.shape[0] - 1, cu_seqlens.diff().long()
        own, before = sequence_of(cu_seqlens, T), _seen(state, q.device)
        added = int(lengths.max())
        unpacked = lambda x: x.new_zeros(N, added, *x.shape[2:]).index_put((own, positions.flatten() - before[own]), x[0])
        past = state.past.append(unpacked(k), unpacked(v), state.length, before)
        state = SoftmaxState(past, state.length + added, before + lengths)
        k, v = (x[:, : state.length].flatten(0, 1)[None] for x in (past.k, past.v))  # [1 N·S H K]
        row = torch.arange(N * state.length, device=q.device)
        visible = (row // max(state.length, 1) == own[:, None]) & (row % max(state.length, 1) <= positions.flatten()[:, None])
        return self._out(q, k, v, visible), state

    def _mask(self, T, cu_seqlens, mask, device):
        """[T T] of what a packed token sees, [B 1 T T] of a padded one; None where there is nothing to hide but the future."""
        if mask is not None:
            visible = mask[:, None, None] | torch.eye(T, dtype=torch.bool, device=device)
            return visible.tril() if self.causal else visible
        if cu_seqlens is None:
            return None
        own = sequence_of(cu_seqlens, T)
        mask = own[:, None] == own
        return mask.tril() if self.causal else mask

    def _out(self, q, k, v, mask, causal=None):
        causal = (self.causal if causal is None else causal) and mask is None
        if self.shard is not None:
            q, k, v = self.shard.whole(q, k, v)
        grouped = self.num_kv_heads != self.num_heads
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        o = o.transpose(1, 2)
        return self.o_proj((o if self.shard is None else self.shard.part(o)).flatten(-2))

    def _check_state(self, x, state, cu_seqlens, return_state):
        if not self.causal and (return_state or state is not None):
            raise ValueError("a state needs causal=True: nothing comes before or after a sequence that is seen from both sides")
        if state is None:
            return
        if not isinstance(state, SoftmaxState):
            raise ValueError(f"state must be the SoftmaxState this layer returned; got {type(state).__name__}")
        wanted = (sequences(x, cu_seqlens), self.num_kv_heads, self.head_dim)
        if (got := (state.past.k.shape[0], *state.past.k.shape[2:])) != wanted:
            raise ValueError(f"state must be of [B · H K] = {wanted}, sequences, heads and head width; got {got}")


def _seen(state: SoftmaxState, device: torch.device) -> Tensor:
    if state.seen is not None:
        return state.seen
    return torch.full((state.past.k.shape[0],), state.length, dtype=torch.int64, device=device)

"""The layer: x → q, k, v → short convolution → mixer → gated norm → out, for every linear variant."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import State
from .context_parallel import Shard
from .convolution import ShortConvolution
from .decays import Place, gate_dtype
from .features import FEATURES
from .linear import Linear, residual_std, without_weight_decay
from .mixer import Mixer, two_curves
from .norm import GatedRMSNorm
from .packing import check_input, sequences, token_positions
from .position import check_pairs, rotate, rotation
from .variants import Gating, Variant, variant_of


class LayerState(NamedTuple):
    """What one layer remembers of B (or N packed) sequences. Its size does not grow with their length."""

    recurrent: State  # kv [B H K V], z [B H K]
    conv: Tensor | None  # [B channels width-1], where the variant has a short convolution
    seen: Tensor | None  # [B] int64 tokens so far, where it has rotary positions


class LinearAttention(nn.Module):
    """Linear attention as `variant` says: a name in `linattn.VARIANTS`, or a `Variant` of your own.

    num_kv_heads  heads of k, v, decay, beta and state; each serves num_heads / num_kv_heads query heads. None: num_heads
    expand_k      K = dim · expand_k / num_heads, the width of one key head; V likewise by expand_v. None: the variant's
    causal        False: every token sees every other, with the operator's `gating` (None: the variant's), and there is no state. A short
                  convolution stays causal
    curves        2: along two curves, with `prefix` as in `Mixer`; a short convolution and rotary positions stay in the tokens' own order
    layer_idx     of num_layers: the place in the stack, which sets lightning's decays and the start of o_proj
    backend       as in `linattn.linear_attention`

        y, state = layer(x, return_state=True)        # prefill        x [B T dim]
        y, state = layer(x, state)                    # any number of tokens more

    Raises ValueError for a head width that is not whole, heads that do not divide, and an unknown variant.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        variant: str | Variant = "gla",
        *,
        num_kv_heads: int | None = None,
        expand_k: float | None = None,
        expand_v: float | None = None,
        causal: bool = True,
        gating: Gating = None,
        curves: int = 1,
        prefix: int = 0,
        layer_idx: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        self.variant = v = variant_of(variant)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, kv_heads(num_heads, num_kv_heads)
        if (v.multi_value or v.tied) and self.num_kv_heads != num_heads:
            raise ValueError(
                f"num_kv_heads must be None where one key serves all values (multi_value) or is the query (tied); got {num_kv_heads}"
            )
        if not 0 <= layer_idx < num_layers:
            raise ValueError(f"layer_idx must lie in [0, num_layers={num_layers}); got {layer_idx}")
        self.key_dim = K = head_width(dim, v.expand_k if expand_k is None else expand_k, num_heads, "expand_k")
        self.value_dim = V = head_width(dim, v.expand_v if expand_v is None else expand_v, num_heads, "expand_v")
        if v.rope:
            check_pairs(K)
        H = self.num_kv_heads

        self.widths = [K if v.multi_value else num_heads * K, K if v.multi_value else H * K, H * V]
        project = [Linear(dim, width, bias=v.bias) for width in (self.widths[:1] if v.tied else self.widths[:2])]
        self.q_proj, self.k_proj = project[0], None if v.tied else project[1]
        self.v_proj = Linear(dim, self.widths[2], bias=v.bias)
        self.conv = ShortConvolution(sum(self.widths), v.conv, bias=v.conv_bias) if v.conv else None
        self.mixer = Mixer(
            v, Place(dim, H, K, layer_idx, num_layers), causal=causal, gating=gating, curves=curves, prefix=prefix, backend=backend
        )
        self.D = without_weight_decay(nn.Parameter(torch.ones(num_heads))) if v.skip else None
        self.g_proj: nn.Module | None = Linear(dim, num_heads * V) if v.gate else None
        if v.gate and v.gate_low_rank:
            self.g_proj = nn.Sequential(Linear(dim, V), Linear(V, num_heads * V, bias=True))
        self.norm = GatedRMSNorm(num_heads, V, across=v.norm, gate=v.gate, gate_first=v.gate_first, eps=norm_eps)
        self.o_proj = Linear(num_heads * V, dim, bias=v.bias, std=residual_std(num_layers))
        self.shard: Shard | None = None  # where a sequence lies on several processes: see `context_parallel.shard_sequence`

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"
        return f"{self.dim}, {heads}"

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        curves: Tensor | None = None,
        *,
        segment: int | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """x [B T dim] → y [B T dim] and the state after it, which is None unless a state was given or return_state asks for one.

        cu_seqlens [N+1] packs N sequences into x [1 T dim]; states are then those of N. mask [B T] bool, True for a real token: the others
        are as if they were not there, but that positions count them; with a state or a short convolution they must come first.
        curves [2 T] int64 where the layer has two. segment: the same y in less memory, where causal=False, from segments of so many tokens
        at a time (1: the recurrent form): the states from the right are kept at their ends, and no q, k or v is longer than one. Of two
        curves the sums [B T HQ V+1] are kept as well.
        """
        check_input(x, self.dim, cu_seqlens, mask)
        self._check_state(x, state, cu_seqlens, return_state)
        if self.shard is not None:
            if any(given is not None for given in (state, cu_seqlens, mask, curves, segment)) or return_state:
                raise ValueError("part of a sequence takes x alone: no state, cu_seqlens, mask, curves, segment or return_state")
            return self._of_a_part(x, self.shard), None
        if segment is not None:
            return self._by_segments(x, segment, cu_seqlens, mask, curves), None
        keep = return_state or state is not None
        recurrent, conv, seen = (None, None, None) if state is None else state
        q, k, v, conv = self._heads(x, conv, seen, cu_seqlens, mask, keep)
        o, recurrent = self.mixer(x, q, k, v, recurrent, cu_seqlens, mask, curves, return_state=keep)
        return self._out(x, v, o), LayerState(recurrent, conv, self._seen(x, seen, cu_seqlens)) if keep else None

    def _heads(self, x, conv, seen, cu_seqlens, mask, keep, positions=None):
        """q [B T HQ K], k [B T H K], v [B T H V] as the mixer takes them, and the convolution's state.

        positions [T] of the tokens; None: as they come, after `seen` others.
        """
        variant = self.variant
        q, k, v = self._project(x)
        if self.conv is not None:
            qkv = torch.cat([q, k, v], -1)
            qkv = qkv if mask is None else qkv.masked_fill(~mask[..., None], 0.0)
            qkv, conv = self.conv(qkv, conv, cu_seqlens, return_state=keep)
            q, k, v = qkv.split(self.widths, -1)
        activation = FEATURES[variant.activation]
        heads = lambda t: activation(t).unflatten(-1, (-1, self.key_dim))
        q, k = (heads(q), heads(k)) if k is not q else (heads(q),) * 2  # [B T H K]
        v = activation(v).unflatten(-1, (-1, self.value_dim))  # [B T H V]
        if variant.rope:
            positions = token_positions(x.shape[1], seen, cu_seqlens, x.device) if positions is None else positions
            table = rotation(positions, self.key_dim, dtype=gate_dtype(x))
            q, k = rotate(q, table), rotate(k, table)
        return q, k, v, conv

    def _project(self, x):
        q, v = self.q_proj(x), self.v_proj(x)
        return q, q if self.k_proj is None else self.k_proj(x), v

    def flops_per_token(self, T: int) -> float:
        """Of writing and reading the state, forward and backward; the projections come on top."""
        return 12.0 * self.num_heads * self.mixer.key_dim * self.value_dim

    def whole_sequence(self, by: str) -> str | None:
        """Why this layer cannot be given part of a sequence, if it cannot: see `context_parallel.shard_sequence`."""
        if self.mixer.curves == 2:
            return "its second curve crosses all parts"
        return "its feature map has a way of its own" if hasattr(self.mixer.feature, "attend") else None

    def _of_a_part(self, x, shard):
        """y of a part of every sequence: the convolution goes on from the inputs before it, positions and states from what came before."""
        conv, begin = None, shard.rank * x.shape[1]
        if self.conv is not None:
            past = self.conv.width - 1
            if x.shape[1] < past:
                raise ValueError(f"part of a sequence must have at least the {past} tokens that a convolution looks back; got {x.shape[1]}")
            conv = torch.cat(self._project(shard.before(x[:, -past:])), -1).mT * float(shard.rank > 0)
        q, k, v, _ = self._heads(x, conv, torch.full(x.shape[:1], begin, device=x.device), None, None, False)
        return self._out(x, v, self.mixer(x, q, k, v, start=begin, shard=shard)[0])

    def _out(self, x, v, o):
        if self.D is not None:
            o = o + self.D[:, None].to(v.dtype) * v
        return self.o_proj(self.norm(o, None if self.g_proj is None else self.g_proj(x)))

    def _by_segments(self, x, segment, cu_seqlens, mask, curves):
        """Right to left for the state that each segment meets from its right, then left to right with both."""
        if not isinstance(segment, int) or segment < 1:
            raise ValueError(f"segment must be a whole number of tokens, at least 1; got {segment!r}")
        if self.mixer.causal or self.conv is not None or cu_seqlens is not None:
            raise ValueError("segment needs causal=False, no short convolution and no cu_seqlens")
        both = self.mixer.second_decay is not None
        curves = two_curves(curves, x.shape[1]) if both else None

        def attend(start, left, right):
            """v (of one curve), o and the state of the tokens from `start` on."""
            stop, facing = start + segment, _facing(left, right)
            if not both:
                part, real = x[:, start:stop], None if mask is None else mask[:, start:stop]
                seen = torch.full(x.shape[:1], start, device=x.device)
                q, k, v, _ = self._heads(part, None, seen, None, real, False)
                return v, *self.mixer(part, q, k, v, facing, None, real, start=start, return_state=True)
            sides = []
            for at in curves[:, start:stop]:
                part, real = x[:, at], None if mask is None else mask[:, at]
                sides.append((part, *self._heads(part, None, None, None, real, False, positions=at)[:3], real))
            return None, *self.mixer.pair(sides, facing, start=start, return_state=True)

        starts, rights, left, y = range(0, x.shape[1], segment), [None], None, torch.empty_like(x)
        for start in reversed(starts[1:]):
            rights.append(_side(attend(start, None, rights[-1])[2], 1))
        total = None
        for start in starts:
            v, o, state = attend(start, left, rights.pop())
            left, stop = _side(state, 0), start + segment
            if not both:
                y[:, start:stop] = self._out(x[:, start:stop], v, o)
                continue
            total = o.new_zeros(*x.shape[:2], o.shape[2] // 2, o.shape[3]) if total is None else total
            for half, order in zip(o.chunk(2, 2), curves, strict=True):
                total[:, order[start:stop]] += half  # each curve meets a token once
        if both:
            for start in starts:
                part = slice(start, start + segment)
                y[:, part] = self._out(x[:, part], None, self.mixer.mean(total[:, part]))
        return y

    def _seen(self, x, seen, cu_seqlens):
        if not self.variant.rope:
            return None
        seen = torch.zeros(sequences(x, cu_seqlens), dtype=torch.int64, device=x.device) if seen is None else seen
        return seen + (x.shape[1] if cu_seqlens is None else cu_seqlens.diff())

    def _check_state(self, x, state, cu_seqlens, return_state):
        if not self.mixer.causal and (return_state or state is not None):
            raise ValueError("a state needs causal=True: nothing comes before or after a sequence that is seen from both sides")
        if state is None:
            return
        if not isinstance(state, LayerState):
            raise ValueError(f"state must be the LayerState this layer returned; got {type(state).__name__}")
        for name, part, has in (("conv", state.conv, self.conv is not None), ("seen", state.seen, self.variant.rope)):
            if (part is not None) != has:
                raise ValueError(f"state is of another variant: its {name} must be {'given' if has else 'None'}; got the opposite")
        if state.seen is not None and state.seen.shape != (sequences(x, cu_seqlens),):
            raise ValueError(f"state must be of {sequences(x, cu_seqlens)} sequences; got {tuple(state.seen.shape)}")


def _facing(left: State | None, right: State | None) -> State | None:
    """The two-sided state of what came from the left and what comes from the right; None is nothing."""
    some = left or right
    if some is None:
        return None
    nothing = State(torch.zeros_like(some.kv), None if some.z is None else torch.zeros_like(some.z))
    left, right = left or nothing, right or nothing
    return State(torch.stack([left.kv, right.kv]), None if left.z is None or right.z is None else torch.stack([left.z, right.z]))


def _side(state: State, i: int) -> State:
    return State(state.kv[i].clone(), None if state.z is None else state.z[i].clone())


def kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """num_kv_heads, or num_heads where it is None. ValueError unless both are at least 1 and the one divides the other."""
    count = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or count < 1 or num_heads % count:
        raise ValueError(f"num_heads must be a positive multiple of num_kv_heads; got num_heads={num_heads}, num_kv_heads={num_kv_heads}")
    return count


def head_width(dim: int, expand: float, num_heads: int, name: str) -> int:
    """dim · expand / num_heads. ValueError unless that is a whole number, at least 1."""
    width = dim * expand / num_heads
    if width < 1 or width != int(width):
        raise ValueError(f"dim · {name} / num_heads must be whole, the width of a head; got {dim} · {expand} / {num_heads} = {width:g}")
    return int(width)

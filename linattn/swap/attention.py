"""The only place that computes swapped attention: the host's own projections, under their own names, around a `Mixer`."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.decays import Place
from ..layers.mixer import Mixer
from ..layers.norm import GatedRMSNorm
from ..layers.packing import sequence_of
from ..layers.variants import Gating, Variant
from ..ops import State
from . import masks, window
from .adapters import Adapter, Heads, adapter_of, turned
from .maps import Hedgehog, like_softmax, open_gates

MODES = ("linear", "softmax", "transfer")


class SwappedState(NamedTuple):
    """What swapped attention remembers of B sequences."""

    recurrent: State
    past: tuple[Tensor, Tensor, Tensor, Tensor] | None  # with a window: gate input, k, v and mask of its last tokens, not yet in the state


@dataclass(frozen=True, kw_only=True)
class How:
    """The choices of a swap, the same for all of its modules."""

    variant: Variant
    init: str = "from_softmax"
    window: int = 0
    gating: Gating = None
    backend: str = "auto"


class SwappedAttention(nn.Module):
    """Linear attention with a host's own projections.

    Its parameters are the host's under the host's names, the mixer's under `mixer.`, with a window `mix` [HQ], the logarithm of what the
    linear part counts beside the softmax, and for a variant that is not normalised `norm_out.` over each head's output.

    mode     "linear"; "softmax": the host itself answers; "transfer": the host answers y', and `self.error` becomes Σ (y − y')² / Σ y'²
             of what this module would have said, with its gradient
    """

    def __init__(self, host: nn.Module, adapter: Adapter, how: How, place: tuple[int, int] = (0, 1)):
        super().__init__()
        self.how, self.mode = how, "linear"
        self.error: Tensor | None = None
        self._host = (host,)  # in a tuple, so that its parameters, which are these, are not counted twice
        self.heads: Heads = adapter.heads(host)
        self.causal, self.layer_idx = adapter.causal(host), adapter.layer(host)
        for name in adapter.parts:
            part = getattr(host, name)
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                setattr(self, name, part)
        softmax_like, h = how.init == "from_softmax", self.heads
        variant = like_softmax(how.variant) if softmax_like else how.variant
        self.reads_keys = bool(getattr(_unwrapped(variant.decay), "reads_keys", False))
        dim = h.keys * h.width if self.reads_keys else h.dim
        normalized = bool(variant.normalize)
        inner = replace(variant, multi_value=False)
        if how.window and variant.offset:
            raise ValueError(f"window={how.window} needs a variant without offset, which has no place in a sum with a softmax")
        if how.window:  # numerator and denominator apart: one sum of both parts is divided at the end
            inner = replace(inner, normalize=False, scale=1.0)
        reference = next(p for p in host.parameters() if p.is_floating_point())
        with torch.device(reference.device):
            self.mixer = Mixer(
                inner,
                Place(dim, h.keys, h.width, *place),
                causal=self.causal,
                gating=None if self.causal else how.gating,
                backend=how.backend,
            )
            # exp(q·k) is about 1 where logits are small, and softmaxed maps give about 1 / their number of channels
            like = math.log(self.mixer.key_dim / 2) if isinstance(self.mixer.feature, Hedgehog) else 0.0
            self.mix = nn.Parameter(torch.full((h.queries,), like)) if how.window else None
            across = None if normalized else variant.norm
            self.norm_out = GatedRMSNorm(h.queries, h.width, across=across, gate=None) if across else None
        if softmax_like:
            open_gates(self.mixer.decay)
        for part in (self.mixer, self.norm_out):
            if part is not None:
                _cast(part, reference.dtype)
        self.train(host.training)

    @property
    def host(self) -> nn.Module:
        """The module whose place this is. Its projections are the same objects as this one's."""
        return self._host[0]

    @property
    def adapter(self) -> Adapter:
        """Looked up and not kept, as its functions cannot be pickled."""
        return adapter_of(self.host)

    def added(self) -> dict[str, nn.Parameter]:
        """The parameters that the host has not: what attention transfer trains."""
        own = {id(p) for p in self.host.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in own}

    def extra_repr(self) -> str:
        h = self.heads
        return (
            f"for {type(self.host).__name__}, heads={h.queries}/{h.keys}, width={h.width}, causal={self.causal}, window={self.how.window}"
        )

    def attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        seen: masks.Seen = masks.ALL,
        state: SwappedState | None = None,
        *,
        return_state: bool = False,
    ) -> tuple[Tensor, SwappedState | None]:
        """x [B T dim] → y [B T dim] and the state after it. `seen` says what is padding and where packed sequences end."""
        h = self.heads
        q, k, v = self.adapter.project(self, x)
        fed = k.flatten(-2) if self.reads_keys else x
        if rotary is not None:
            q, k = turned(self.host, q, k, rotary)
        if (factor := h.scale * math.sqrt(h.width)) != 1:  # the maps expect the usual scale
            q = q * factor
        q, k = q.to(v.dtype), k.to(v.dtype)
        mix = self._windowed if self.how.window else self._linear
        o, state = mix(fed, q, k, v, seen, state, return_state)
        o = o.flatten(-2) if self.norm_out is None else self.norm_out(o)
        return self.adapter.output(self, o.to(x.dtype), x), state

    def _linear(self, fed, q, k, v, seen, state, keep):
        B, T = q.shape[:2]
        packed = seen.cu_seqlens is not None
        row = (lambda t: None if t is None else t.flatten(0, 1)[None]) if packed else (lambda t: t)
        o, recurrent = self.mixer(
            row(fed), row(q), row(k), row(v), state and state.recurrent, seen.cu_seqlens, row(seen.real), return_state=keep
        )
        return (o[0].unflatten(0, (B, T)) if packed else o), SwappedState(recurrent, None) if keep else None

    def _windowed(self, fed, q, k, v, seen, state, keep):
        if seen.cu_seqlens is not None:
            return self._unpacked(fed, q, k, v, seen), None
        w, (B, T) = self.how.window, q.shape[:2]
        real = torch.ones(B, T, dtype=torch.bool, device=q.device) if seen.real is None else seen.real
        now = (fed, k, v, real)
        past = tuple(t.new_zeros(B, w, *t.shape[2:]) for t in now) if state is None or state.past is None else state.past
        fed, k, v, real = (torch.cat([before, t.to(before.dtype)], 1) for before, t in zip(past, now))
        hide = lambda t: t.masked_fill(~real[..., None, None], 0.0)  # 0 · NaN is NaN, and padding may hold anything
        k, v = hide(k), hide(v)
        near, near_log = window.scores(q, k, v, real, w, self.heads.width**-0.5)
        ones = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
        far, recurrent = self.mixer(  # a token enters the state when it leaves the window
            fed[:, :T], q, k[:, :T], ones[:, :T], state and state.recurrent, None, real[:, :T].contiguous(), return_state=keep
        )
        far = far.to(near.dtype)
        o = window.together(near, near_log, far[..., :-1], far[..., -1:], self.mix.to(near.dtype))
        after = tuple(t[:, T:].clone() for t in (fed, k, v, real)) if keep else None
        return o.to(v.dtype), SwappedState(recurrent, after) if keep else None

    def _unpacked(self, fed, q, k, v, seen):
        """Packed sequences laid out as rows of a padded batch, attended to, and packed again."""
        cu, (B, T) = seen.cu_seqlens.long(), q.shape[:2]
        N, own = cu.shape[0] - 1, sequence_of(cu, B * T)
        place = own, torch.arange(B * T, device=q.device) - cu[own]
        longest = int(cu.diff().max())
        spread = lambda t: t.new_zeros(N, longest, *t.shape[2:]).index_put(place, t.flatten(0, 1))
        real = torch.ones(B, T, dtype=torch.bool, device=q.device) if seen.real is None else seen.real
        o, _ = self._windowed(*map(spread, (fed, q, k, v)), masks.Seen(spread(real), None), None, False)
        return o[place].unflatten(0, (B, T))

    def _compare(self, y: Tensor, x: Tensor, **how: Any) -> None:
        """Leave in `self.error` how far this module's answer to x is from the host's y."""
        mine, _ = self.attend(x.detach(), **how)
        error, size = (mine.float() - y.detach().float()).square(), y.detach().float().square()
        if (seen := how.get("seen", masks.ALL)).real is not None:
            error, size = error[seen.real], size[seen.real]
        self.error = error.sum() / size.sum().clamp_min(1e-12)


def _unwrapped(factory: Any) -> Any:
    """The class behind functools.partial."""
    return getattr(factory, "func", factory)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights in the host's dtype; what no optimizer may pull towards zero (A_log, dt_bias, …) stays in float32 at least."""
    for p in module.parameters():
        p.data = p.data.to(torch.promote_types(dtype, torch.float32) if getattr(p, "_no_weight_decay", False) else dtype)

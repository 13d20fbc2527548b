"""What a variant does between the projections and the output norm: heads of q, k and v → o, whoever made the heads."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import State, linear_attention, step
from .context_parallel import Shard
from .decays import NoDecay, Place, gate_dtype
from .features import FEATURES
from .linear import Linear
from .packing import token_positions
from .variants import Gating, Variant, variant_of

EPS = 1e-6  # of the operator's normaliser


class Elementwise(nn.Module):
    """One map of FEATURES, for q and k alike."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def extra_repr(self) -> str:
        return self.name

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        feature = FEATURES[self.name]
        return feature(q), feature(k)


class Mixer(nn.Module):
    """What `variant` does between the projections and the output norm: feature map, decay, write and operator.

        o, state = mixer(x, q, k, v)        x [B T dim] feeds decay and beta

    place    of dim, heads (of k and v), key_dim (before the feature map), layer_idx and num_layers
    causal   False: every token sees every other, with `gating` as in `linattn.linear_attention`; None: the variant's
    curves   2: the decay reads the tokens along two curves, such as `snakes`, with parameters for each; both share one normaliser, and of
             unnormalised variants the mean is taken. LION's ♮, arXiv:2502.16249. Needs causal=False and a variant that decays
    prefix   tokens at the front of every sequence (CLS, registers) at which gates that vary in time forget nothing. Needs causal=False
    backend  as in `linattn.linear_attention`

    Raises ValueError for arguments that do not go together.
    """

    def __init__(
        self,
        variant: str | Variant,
        place: Place,
        *,
        causal: bool = True,
        gating: Gating = None,
        curves: int = 1,
        prefix: int = 0,
        backend: str = "auto",
    ):
        super().__init__()
        self.variant = v = variant_of(variant)
        if causal and (gating is not None or curves != 1 or prefix):
            raise ValueError(f"gating, curves and prefix need causal=False; got gating={gating!r}, curves={curves}, prefix={prefix}")
        if curves not in (1, 2):
            raise ValueError(f"curves must be 1 or 2; got {curves!r}")
        if curves == 2 and v.decay is NoDecay:
            raise ValueError("curves=2 needs a variant with a decay: without one no order of the tokens makes a difference")
        if prefix < 0:
            raise ValueError(f"prefix must be at least 0; got {prefix}")
        self.place, self.causal, self.curves, self.prefix, self.backend = place, causal, curves, prefix, backend
        self.gating: Gating = None if causal else gating or v.gating
        self.feature = Elementwise(v.feature) if isinstance(v.feature, str) else v.feature(place)
        self.key_dim: int = getattr(self.feature, "key_dim", place.key_dim)  # as the operator sees it
        self.decay = v.decay(place._replace(key_dim=self.key_dim))
        self.second_decay = v.decay(place._replace(key_dim=self.key_dim)) if curves == 2 else None
        self.b_proj = Linear(place.dim, place.heads) if v.delta else None
        self.probe: Callable | None = None  # stands in for `operate`, which it is given first; set by `linattn.probe`
        self.second_probe: Callable | None = None  # the same, along the second curve

    def extra_repr(self) -> str:
        both = f", causal=False, gating={self.gating!r}, curves={self.curves}, prefix={self.prefix}"
        return self.variant.source + ("" if self.causal else both)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        curves: Tensor | None = None,
        *,
        write: Tensor | None = None,
        start: int = 0,
        shard: Shard | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """x [B T dim], q [B T HQ K], k [B T H K], v [B T H V], after RoPE and before the feature map → o [B T HQ V] and the state.

        mask [B T] bool, True for a real token: the others write nothing and nothing is forgotten at them; their own o means nothing.
        curves [2 T] int64, two permutations of the tokens, where the mixer has two. start: tokens before the first one here, for `prefix`.
        write [B T H or 1]: how much of itself a token writes; it scales beta of the delta rule, else the value.
        shard: which part of every sequence this is, of several processes.
        With multi_value q and k have one head, which serves all those of v. A single token with a state and without gradients takes the
        operator's `step`. A feature map with `attend`, a shorter way to what the operator would give for its features, is asked for that.
        """
        probe = self.probe  # the one thing that a layer does for a probe that is not there
        alone = self.causal and q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
        attend = getattr(self.feature, "attend", None)
        if attend is not None and probe is None and not (alone and state is not None):
            how: dict[str, Any] = dict(causal=self.causal, cu_seqlens=cu_seqlens, return_state=return_state, backend=self.backend)
            return attend(q, k, v, state, mask, **how)
        if self.second_decay is not None:
            return self._along_both(x, q, k, v, cu_seqlens, mask, two_curves(curves, x.shape[1])), None
        q, k, beta = self._queries_and_keys(x, q, k, v)
        if write is not None:
            v, beta = (v * write[..., None].to(v.dtype), None) if beta is None else (v, beta * write)
        how = dict(normalize=self.variant.normalize, scale=self.variant.scale, offset=self.variant.offset, backend=self.backend)
        if mask is not None and how["offset"]:  # the constant key is one more channel, which padding must not have either
            scale = self.key_dim**-0.5 if how["scale"] is None else how["scale"]
            q, k = F.pad(q, (0, 1), value=how["offset"] / scale), F.pad(k, (0, 1), value=1.0)
            how |= dict(scale=scale, offset=0.0)
        k, v, log_decay = self._write(self.decay, x, k, v, cu_seqlens, mask, start)
        how |= dict(causal=self.causal, gating=self.gating)
        if shard is not None:
            return shard.attend(q, k, v, log_decay, beta, how), None
        tensors = q, k, v, log_decay, beta, state, cu_seqlens
        if probe is not None:
            return probe(operate, x, *tensors, mask, return_state=return_state, how=how)
        return operate(*tensors, return_state=return_state, **how)

    def _write(self, decay, x, k, v, cu_seqlens, mask, start=0):
        """k, v and log_decay as the operator takes them."""
        log_decay, write = decay(x)
        if write is not None:
            v = v * write[..., None].to(v.dtype)
        if self.prefix and log_decay is not None and log_decay.ndim > 1:
            front = token_positions(x.shape[1], None, cu_seqlens, x.device) + start < self.prefix
            log_decay = log_decay.masked_fill(front.view(-1, *[1] * (log_decay.ndim - 2)), 0.0)
        return (k, v, log_decay) if mask is None else silence(mask, k, v, log_decay)

    def _along_both(self, x, q, k, v, cu_seqlens, mask, curves):
        """o [B T HQ V], where both curves are at hand as a whole."""
        along = lambda order: [None if t is None else t[:, order] for t in (x, q, k, v, mask)]
        o, _ = self.pair([along(order) for order in curves], orders=curves, cu_seqlens=cu_seqlens)
        first, second = (half[:, order.argsort()] for half, order in zip(o.chunk(2, 2), curves, strict=True))
        return self.mean(first + second)

    def pair(self, sides, state=None, *, orders=None, start=0, cu_seqlens=None, return_state=False):
        """Tokens x, q, k, v and mask of each of two curves, in its order → o [B T 2·HQ V], and the row sum where the variant is normalised:
        the heads twice. What is said of one token by both curves goes through `mean`."""
        heads = []
        for decay, (x, q, k, v, mask) in zip((self.decay, self.second_decay), sides, strict=True):
            q, k, beta = self._queries_and_keys(x, q, k, v)
            k, v, log_decay = self._write(decay, x, k, v, cu_seqlens, mask, start)
            v = F.pad(v, (0, 1), value=1.0) if self.variant.normalize else v  # a value of 1 sums up to the denominator
            heads.append((q, k, v, log_decay, beta))
        how: dict[str, Any] = dict(
            causal=False, gating=self.gating, normalize=False, scale=self.variant.scale, offset=self.variant.offset, backend=self.backend
        )
        if self.probe is None and self.second_probe is None:
            lay = lambda pair: None if pair[0] is None else torch.cat(pair, min(pair[0].ndim - 1, 2))
            return operate(*map(lay, zip(*heads, strict=True)), state, cu_seqlens, return_state=return_state, **how)
        if orders is None:
            raise ValueError("segments of two curves cannot be probed: give segment=None")
        halves = []  # each curve is a walk of its own, which can be seen and edited
        for probe, order, tensors, (x, *_, mask) in zip((self.probe, self.second_probe), orders, heads, sides, strict=True):
            if probe is None:
                o, _ = operate(*tensors, None, cu_seqlens, **how)
            else:
                o, _ = probe(operate, x, *tensors, None, cu_seqlens, mask, return_state=False, how=how, order=order)
            halves.append(o)
        return torch.cat(halves, 2), None

    def mean(self, total: Tensor) -> Tensor:
        """Of the sum of both curves: the mean, or numerators over denominators, which are divided here and only here."""
        normal = self.variant.normalize
        if not normal:
            return total / 2
        o, row = total[..., :-1], total[..., -1:]
        return o / (row.clamp(min=2 * EPS) if normal == "clamp" else row + 2 * EPS)

    def _queries_and_keys(self, x, q, k, v):
        """q and k after the feature map, with a head for each of v, and beta of the delta rule."""
        q, k = self.feature(q, k)
        if self.variant.multi_value:
            q, k = (t.expand(-1, -1, v.shape[2], -1) for t in (q, k))
        return q, k, None if self.b_proj is None else self.b_proj(x).to(gate_dtype(x)).sigmoid()


def operate(q, k, v, log_decay, beta, state, cu_seqlens, *, causal, gating, **how):
    """`linear_attention`, or its `step` where it is a single token with a state and without gradients."""
    plain = causal and q.shape[1] == 1 and state is not None and cu_seqlens is None and not torch.is_grad_enabled()
    if plain and not how.get("record"):
        now = lambda t: t if t is None or t.ndim == 1 else t[:, 0]
        how.pop("return_state")
        o, state = step(now(q), now(k), now(v), now(log_decay), now(beta), state=state, **how)
        return o[:, None], state
    return linear_attention(q, k, v, log_decay, beta, causal=causal, gating=gating, initial_state=state, cu_seqlens=cu_seqlens, **how)


def two_curves(curves: Tensor | None, T: int) -> Tensor:
    """`curves`, if they are two permutations of T tokens by their shape."""
    if curves is None or curves.shape != (2, T) or curves.dtype != torch.int64:
        got = None if curves is None else f"{curves.dtype} {tuple(curves.shape)}"
        raise ValueError(f"curves must be int64 [2 T] = (2, {T}), as `linattn.layers.snakes` makes them of a grid; got {got}")
    return curves


def silence(mask: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v and log_decay with 0 where mask [B T] is False: no write, no forgetting. ValueError unless it is bool and of their B and T.

    v too, because 0 · NaN is NaN, and padding may hold anything.
    """
    if mask.dtype != torch.bool or mask.shape != k.shape[:2]:
        raise ValueError(f"mask must be bool [B T] = {tuple(k.shape[:2])}, True for a real token; got {mask.dtype} {tuple(mask.shape)}")
    absent = ~mask[..., None]
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(*mask.shape, -1)
        log_decay = log_decay.masked_fill(absent if log_decay.ndim == 3 else absent[..., None], 0.0)
    return k.masked_fill(absent[..., None], 0.0), v.masked_fill(absent[..., None], 0.0), log_decay

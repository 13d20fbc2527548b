"""The only module that calls the operator: heads of q, k and v, features, decay and beta → o, whoever made the heads."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import State, linear_attention, step
from .decays import Place, gate_dtype
from .features import FEATURES
from .linear import Linear
from .variants import Gating, Variant, variant_of


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
    backend  as in `linattn.linear_attention`
    """

    def __init__(self, variant: str | Variant, place: Place, *, causal: bool = True, gating: Gating = None, backend: str = "auto"):
        super().__init__()
        self.variant = v = variant_of(variant)
        self.causal, self.backend = causal, backend
        self.gating = v.gating if gating is None else gating
        self.feature = Elementwise(v.feature) if isinstance(v.feature, str) else v.feature(place)
        self.key_dim: int = getattr(self.feature, "key_dim", place.key_dim)  # as the operator sees it
        self.decay = v.decay(place._replace(key_dim=self.key_dim))
        self.b_proj = Linear(place.dim, place.heads) if v.delta else None

    def extra_repr(self) -> str:
        return self.variant.source + ("" if self.causal else f", causal=False, gating={self.gating!r}")

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """x [B T dim], q [B T HQ K], k [B T H K], v [B T H V], after RoPE and before the feature map → o [B T HQ V] and the state.

        mask [B T] bool, True for a real token: the others write nothing and nothing is forgotten at them; their own o means nothing.
        With multi_value q and k have one head, which serves all those of v. A single token with a state and without gradients takes the
        operator's `step`.
        """
        q, k = self.feature(q, k)
        if self.variant.multi_value:
            q, k = (t.expand(-1, -1, v.shape[2], -1) for t in (q, k))
        log_decay, write = self.decay(x)
        beta = None if self.b_proj is None else self.b_proj(x).to(gate_dtype(x)).sigmoid()
        if write is not None:
            v = v * write[..., None].to(v.dtype)
        if mask is not None:
            k, v, log_decay = silence(mask, k, v, log_decay)
        how: dict[str, Any] = dict(
            normalize=self.variant.normalize, scale=self.variant.scale, offset=self.variant.offset, backend=self.backend
        )
        if q.shape[1] == 1 and state is not None and cu_seqlens is None and not torch.is_grad_enabled():
            now = lambda t: t if t is None or t.ndim == 1 else t[:, 0]
            o, state = step(now(q), now(k), now(v), now(log_decay), now(beta), state=state, **how)
            return o[:, None], state
        return linear_attention(
            q, k, v, log_decay, beta, causal=self.causal, gating=self.gating,
            initial_state=state, return_state=return_state, cu_seqlens=cu_seqlens, **how,
        )  # fmt: skip


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

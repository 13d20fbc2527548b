"""The only place that enters transformers' AttentionInterface: linear attention without parameters, on models whose modules stay theirs."""

from typing import Any

import torch
from torch import Tensor

from ..layers.features import FEATURES
from ..layers.mixer import silence
from ..ops import linear_attention
from . import masks
from .maps import POSITIVE


def register_hf(feature: str = "elu1", *, name: str | None = None, backend: str = "auto") -> str:
    """Register attention o_t = Σ φ(q_t)·φ(k_i) v_i / Σ φ(q_t)·φ(k_i) with transformers, and the mask function it needs; return its name.

        model.set_attn_implementation(linattn.register_hf("elu1"))          the name is "linattn-elu1"

    feature  one of "relu", "elu1", "softmax", "silu_norm" of `linattn.layers.FEATURES`

    Nothing is added to the model, which saves and loads as before, and generates from transformers' own cache, which grows: for a state of
    constant size, or maps that learn, `swap_attention`. ValueError for another feature, and in use for sliding windows and masks that are
    not causal + padding + packing.
    """
    if feature not in POSITIVE:
        raise ValueError(f"feature must be one of {list(POSITIVE)}, which are positive; got {feature!r}")
    from transformers import AttentionInterface, AttentionMaskInterface

    name = name or f"linattn-{feature}"

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
        dropout: float = 0.0, is_causal: bool | None = None, sliding_window: int | None = None, position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None, output_attentions: bool | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """q [B HQ T K], k and v [B H S ·], the cache's keys included → o [B T HQ V]."""
        T, S = query.shape[2], key.shape[2]
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if sliding_window is not None and S > sliding_window:
            raise ValueError(f"{name} sees all tokens before, and {type(module).__name__} {sliding_window} back only: leave it as it is")
        if output_attentions:
            raise ValueError("output_attentions=True: linear attention has no attention weights to return")
        if S > T and attention_mask is None and module.is_causal is False:
            raise ValueError(f"{name}: {type(module).__name__} has {S} keys for {T} queries; cross-attention is not supported")
        factor = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
        q, k, v = FEATURES[feature](query * factor), FEATURES[feature](key), value
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        seen = masks.read(_columns(attention_mask, S), k, 0, causal, position_ids if S == T else None, cu_seq_lens_q)
        if seen.real is not None:
            k, v, _ = silence(seen.real, k, v, None)
        if S > T:  # queries of tokens that are answered already
            q = torch.nn.functional.pad(q, (0, 0, 0, 0, S - T, 0))
        B, cu = q.shape[0], seen.cu_seqlens
        if cu is not None:
            q, k, v = (t.flatten(0, 1)[None] for t in (q, k, v))
        o, _ = linear_attention(q, k, v.to(q.dtype), causal=causal, normalize=True, cu_seqlens=cu, backend=backend)
        return (o if cu is None else o[0].unflatten(0, (B, S)))[:, -T:], None

    def mask(*, attention_mask: Tensor | None = None, **rest: Any) -> Tensor | None:
        """The mask of padding as it is: no [T T] mask is built."""
        return attention_mask

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    return name


def _columns(mask: Tensor | None, S: int) -> Tensor | None:
    """A mask of padding for S keys: those that a mask made earlier does not know of are real."""
    if mask is None or mask.ndim != 2 or mask.shape[1] >= S:
        return mask
    return torch.nn.functional.pad(mask, (0, S - mask.shape[1]), value=1)

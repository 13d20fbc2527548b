"""The only place that knows how each library calls its attention: one class of swapped attention for each way."""

from typing import Any

import torch
from torch import Tensor, nn

from . import masks
from .adapters import Adapter
from .attention import How, SwappedAttention


class TransformersAttention(SwappedAttention):
    """Called as attention of transformers is; answers (y, None)."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any) -> tuple[Tensor, None]:
        """`given` is whatever the host's owner passes on: position_embeddings, position_ids, the cache, cu_seq_lens_q, …"""
        given = {name: value for name, value in given.items() if value is not None}
        if "encoder_hidden_states" in given:
            raise ValueError("encoder_hidden_states: swapped attention cannot be cross-attention; keep these layers")
        if self.mode == "softmax":
            return self.host(hidden_states, attention_mask=attention_mask, **given)
        cache = _cache_of(given)
        if self.mode == "transfer":
            if cache is not None:
                raise ValueError("attention transfer takes whole sequences: call the model with use_cache=False")
            with torch.no_grad():
                y, _ = self.host(hidden_states, attention_mask=attention_mask, **given)
        if given.get("output_attentions") or getattr(getattr(self.host, "config", None), "output_attentions", False):
            raise ValueError("output_attentions=True: linear attention has no attention weights to return; keep the layers you look at")
        rotary = given["position_embeddings"] if self.adapter.rotary else None
        layer = None if cache is None else _state_layer(cache, self.layer_idx)
        past = 0 if layer is None else layer.get_seq_length()
        seen = masks.read(attention_mask, hidden_states, past, self.causal, given.get("position_ids"), given.get("cu_seq_lens_q"))
        if self.mode == "transfer":
            self._compare(y, hidden_states, rotary=rotary, seen=seen)
            return y, None
        if layer is None:
            return self.attend(hidden_states, rotary, seen)[0], None
        if seen.cu_seqlens is not None:
            raise ValueError("packed sequences cannot be generated from: call the model with use_cache=False")
        y, state = self.attend(hidden_states, rotary, seen, layer.state_for(hidden_states), return_state=True)
        layer.keep(state, hidden_states.shape[1])
        return y, None


class TimmAttention(SwappedAttention):
    """Called as timm's `Attention` is: x [B T dim] → y."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.mode == "softmax":
            return self.host(x, attn_mask, is_causal)
        if is_causal:
            raise ValueError("is_causal=True: this attention was swapped as one that sees both sides")
        seen = masks.read(None if attn_mask is None else attn_mask.expand(x.shape[0], 1, x.shape[1], -1), x, 0, False, None, None)
        if self.mode == "transfer":
            with torch.no_grad():
                y = self.host(x, attn_mask)
            self._compare(y, x, seen=seen)
            return y
        return self.attend(x, None, seen)[0]


class TorchAttention(SwappedAttention):
    """Called as `torch.nn.MultiheadAttention` is, by `TransformerEncoderLayer`: self-attention without weights.

    It is no subclass of MultiheadAttention and says that its widths differ: torch's fused path, which would pass it by, stays closed.
    """

    _qkv_same_embed_dim = False

    def __init__(self, host: nn.Module, adapter: Adapter, how: How, place: tuple[int, int] = (0, 1)):
        super().__init__(host, adapter, how, place)
        self.num_heads, self.embed_dim, self.batch_first = host.num_heads, host.embed_dim, host.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if self.mode == "softmax":
            return self.host(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if query is not key or key is not value:
            raise ValueError("query, key and value must be one tensor: swapped attention cannot be cross-attention")
        if need_weights:
            raise ValueError("need_weights=True: linear attention has no attention weights to return")
        if is_causal or attn_mask is not None:
            raise ValueError("attn_mask, is_causal: swapped as attention that sees both sides; only key_padding_mask is understood")
        x = query if self.batch_first else query.transpose(0, 1)
        seen = masks.ALL if key_padding_mask is None else masks.Seen(_real(key_padding_mask), None)
        if self.mode == "transfer":
            with torch.no_grad():
                y, _ = self.host(query, query, query, key_padding_mask, need_weights=False)
            self._compare(y if self.batch_first else y.transpose(0, 1), x, seen=seen)
            return y, None
        y, _ = self.attend(x, None, seen)
        return y if self.batch_first else y.transpose(0, 1), None


CACHES = ("cache", "past_key_values", "layer_past")  # what transformers calls it: since 5.24, before, and in GPT-NeoX


def _cache_of(given: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, by any name: one that was overlooked would leave the past out silently."""
    return next((value for name, value in given.items() if name in CACHES or hasattr(value, "get_seq_length")), None)


def _state_layer(cache: Any, index: int | None) -> Any:
    from .cache import layer_of  # needs transformers, which is here if it calls

    return layer_of(cache, index)


CALLS: dict[str, type[SwappedAttention]] = {"transformers": TransformersAttention, "timm": TimmAttention, "torch": TorchAttention}


def _real(padding: Tensor) -> Tensor:
    return ~padding if padding.dtype == torch.bool else padding == 0

"""The only place that knows transformers' caches: one layer of them that holds a state of constant size instead of keys and values."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

from ..ops import State
from .attention import SwappedState

NO_WAY_BACK = "the state of linear attention cannot be taken back by tokens: no crop, and no assisted or speculative decoding"


class StateLayer(CacheLayerMixin):
    """A `SwappedState` and the number of tokens that made it. Beams and copies of rows are supported; crop is not.

    room  of the static layer whose place it takes, or -1: softmax layers beside it share the mask, which has that many columns
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, room: int = -1):
        super().__init__()
        self.room = room
        self.is_compileable = room >= 0  # as the static layers beside it, which else get no mask of the rows they have not filled
        self.state: SwappedState | None = None
        self.tokens = 0

    def state_for(self, x: Tensor) -> SwappedState | None:
        """The state, for tokens x [B T ·] to follow. ValueError if it is of another batch size."""
        if self.state is not None and self.state.recurrent.kv.shape[0] != x.shape[0]:
            raise ValueError(f"the cache holds {self.state.recurrent.kv.shape[0]} sequences; got {x.shape[0]} to go on with")
        return self.state

    def keep(self, state: SwappedState, tokens: int) -> None:
        self.state, self.tokens = state, self.tokens + tokens

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.tokens + query_length if self.room < 0 else self.room), 0

    def get_max_length(self) -> int:
        return self.room

    def get_max_cache_shape(self) -> int:
        """Its name in older versions."""
        return self.get_max_length()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("this layer of the cache holds the state of linear attention; softmax attention needs a cache of its own")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("this layer of the cache holds the state of linear attention; softmax attention needs a cache of its own")

    def offload(self) -> None:
        """Nothing: a state is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing, as for `offload`."""

    def reset(self) -> None:
        self.state, self.tokens = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(NO_WAY_BACK)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices])

    def _rows(self, pick) -> None:
        if self.state is None:
            return
        (kv, z), past = self.state
        of = lambda parts: None if parts is None else tuple(pick(t) for t in parts)
        self.state = SwappedState(State(pick(kv), None if z is None else pick(z)), of(past))


def layer_of(cache: Any, index: int | None) -> StateLayer:
    """The layer of `cache` for attention number `index`, put there at the first call. ValueError if keys and values are there already."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache) or index is None:
        raise ValueError(
            f"past_key_values must be a transformers Cache, and attention have a layer_idx; got {type(cache).__name__}, {index}"
        )
    while len(cache.layers) <= index:  # those before it, which a growing cache may not have made yet
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer: Any = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if getattr(layer, "is_initialized", False) and layer.get_seq_length() > 0:
        raise ValueError(f"layer {index} of the cache holds keys and values of softmax attention: start generation with a new cache")
    cache.layers[index] = state = StateLayer(layer.max_cache_len if type(layer) is StaticLayer else -1)
    return state

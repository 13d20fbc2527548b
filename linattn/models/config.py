"""The only place that knows what a decoder can be told: one frozen dataclass, checked when made."""

from dataclasses import dataclass, fields
from typing import ClassVar

from ..layers import EXPANSIONS, VARIANTS

MIXERS = (*VARIANTS, *EXPANSIONS, "softmax")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder. ValueError for sizes below 1 and for names that are not known."""

    MODEL_TYPE: ClassVar[str] = "linattn_decoder"

    vocab_size: int
    variant: str = "gla"  # a name in linattn.VARIANTS or linattn.layers.EXPANSIONS, or "softmax"
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 2
    num_kv_heads: int | None = None  # None: num_heads
    expand_k: float | None = None  # None: the variant's
    expand_v: float | None = None
    softmax_every: int = 0  # every n-th layer is softmax attention; 0: none
    mlp_dim: int | None = None  # None: 8/3 dim, rounded up to a multiple of 64
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # of the softmax layers
    partitions: int = 4  # of Sparse State Expansion, sse_…: states beside the shared one,
    active: int = 1  # and those of them that are open to a token
    short_conv: int = 0  # width of its short convolution; 0: none

    def __post_init__(self):
        if self.variant not in MIXERS:
            raise ValueError(f"variant must be one of {list(MIXERS)}; got {self.variant!r}")
        least_of = dict(vocab_size=1, dim=1, num_layers=1, num_heads=1, softmax_every=0, partitions=2, active=1, short_conv=0)
        for name, least in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, at least {least}; got {value!r}")
        for name in ("num_kv_heads", "mlp_dim", "expand_k", "expand_v", "norm_eps", "rope_theta"):
            value = getattr(self, name)
            whole = name in ("num_kv_heads", "mlp_dim")
            if value is not None and not (isinstance(value, int if whole else (int, float)) and value > 0):
                raise ValueError(f"{name} must be {'a whole number ' if whole else ''}above 0; got {value!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_embeddings must be true or false; got {self.tie_embeddings!r}")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp_dim or -(-8 * self.dim // (3 * 64)) * 64

    def attention(self, layer_idx: int) -> str:
        """Name of the attention of that layer."""
        return "softmax" if self.softmax_every and (layer_idx + 1) % self.softmax_every == 0 else self.variant


def check_fields(values: dict, what: str, kind: type = DecoderConfig) -> None:
    """ValueError that lists the known fields of a config of that kind, if `values` has others."""
    known = [field.name for field in fields(kind)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{what} has no field {', '.join(map(repr, unknown))}; there are {known}")

"""The encoder: tokens that see both sides → features, and the logits of masked ones, for text, molecules or any other alphabet."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import VARIANTS
from ..layers.context_parallel import shard_sequence
from ..layers.linear import Embedding, Linear
from ..layers.packing import token_positions
from ..layers.variants import Gating
from .bidirectional import make_block
from .config import check_fields
from .decoder import IGNORE, check_tokens
from .storage import Storable

VARIANTS_OF_ENCODERS = (*VARIANTS, "softmax")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The sizes of an encoder. ValueError for sizes below 1 and for names that are not known."""

    MODEL_TYPE: ClassVar[str] = "linattn_encoder"

    vocab_size: int
    variant: str = "lion_s_mlm"  # a name in linattn.VARIANTS, or "softmax"
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 2
    mlp_ratio: float = 4.0
    gating: Gating = None  # None: the variant's
    expand_k: float | None = None  # None: the variant's
    expand_v: float | None = None
    max_positions: int = 0  # learnt absolute positions, of sequences up to this length; 0: none
    rope_theta: float | None = 10000.0  # rotary positions of softmax attention; None: none. Linear variants have theirs by name
    post_norm: bool = True  # as BERT; False: pre-norm
    embedding_norm: bool = True  # a LayerNorm before the first block, as BERT
    final_norm: bool = False  # and one after the last; pre-norm blocks have it anyhow
    tie_embeddings: bool = True  # the head ends in the embedding and a bias; False: in a matrix of its own
    layer_scale: float | None = None
    drop_path: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.variant not in VARIANTS_OF_ENCODERS:
            raise ValueError(f"variant must be one of {list(VARIANTS_OF_ENCODERS)}; got {self.variant!r}")
        for name, least in dict(vocab_size=1, dim=1, num_layers=1, num_heads=1, max_positions=0).items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, at least {least}; got {value!r}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0; got {self.mlp_ratio}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1); got {self.drop_path}")


ENCODERS: dict[str, dict[str, Any]] = {
    "tiny": dict(dim=128, num_layers=4, num_heads=2),
    "small": dict(dim=384, num_layers=8, num_heads=6),
    "base": dict(dim=768, num_layers=12, num_heads=12),  # BERT base, arXiv:1810.04805
    "molformer": dict(  # arXiv:2106.09553, with variant="molformer"
        dim=768, num_layers=12, num_heads=12, mlp_ratio=1.0, norm_eps=1e-12, embedding_norm=False, final_norm=True, tie_embeddings=False
    ),
    "large": dict(dim=1024, num_layers=24, num_heads=16),
}


class Encoder(Storable):
    """Embedding, LayerNorm, blocks, and BERT's head of masked tokens: Linear, GELU, LayerNorm, the embedding again with a bias.

        model = Encoder.create("tiny", vocab_size=260, variant="lion_s_mlm")
        logits = model(tokens, mask)         # tokens [B T]; mask [B T] bool, True for a real token: padding may stand anywhere

    Padding writes nothing and nothing is forgotten at it, so that the real tokens are as if it were not there; but that learnt and rotary
    positions count it and short convolutions see zeros in its place. backend as in `linattn.linear_attention`.
    """

    CONFIG_KIND = EncoderConfig

    def __init__(self, config: EncoderConfig, *, backend: str = "auto"):
        super().__init__()
        self.config = c = config
        self.grad_checkpointing = False
        self.parts_before = 0  # of every sequence, in other processes
        self.embedding = Embedding(c.vocab_size, c.dim)
        self.positions = Embedding(c.max_positions, c.dim) if c.max_positions else None
        self.embedding_norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            make_block(
                c.variant, c.dim, c.num_heads, int(c.dim * c.mlp_ratio), gating=c.gating, theta=c.rope_theta, expand_k=c.expand_k,
                expand_v=c.expand_v, layer_idx=i, num_layers=c.num_layers, norm_eps=c.norm_eps, post_norm=c.post_norm,
                layer_scale=c.layer_scale, drop_path=c.drop_path * i / max(1, c.num_layers - 1), backend=backend,
            )
            for i in range(c.num_layers)
        )  # fmt: skip
        self.norm = nn.Identity() if c.post_norm and not c.final_norm else nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.head = nn.Sequential(Linear(c.dim, c.dim, bias=True), nn.GELU(), nn.LayerNorm(c.dim, eps=c.norm_eps))
        self.head_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.tie_embeddings else None
        self.output = None if c.tie_embeddings else Linear(c.dim, c.vocab_size)

    @classmethod
    def create(cls, preset: str, *, vocab_size: int, variant: str = "lion_s_mlm", backend: str = "auto", **overrides) -> "Encoder":
        """A preset's encoder, fields of its config replaced by `overrides`. ValueError lists the known presets, fields and variants."""
        if preset not in ENCODERS:
            raise ValueError(f"preset must be one of {list(ENCODERS)}; got {preset!r}")
        check_fields(overrides, "the config of an encoder", EncoderConfig)
        fields: dict[str, Any] = dict(vocab_size=vocab_size, variant=variant) | ENCODERS[preset] | overrides
        return cls(EncoderConfig(**fields), backend=backend)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens [B T], mask [B T], or N sequences packed into tokens [1 T] by cu_seqlens [N+1] → logits [B T vocab]."""
        return self.logits(self.features(tokens, mask, cu_seqlens))

    def features(self, tokens: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """As forward, short of the head: [B T dim]."""
        check_tokens(tokens, self.config.vocab_size, "tokens")
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self._positions(tokens.shape[1], cu_seqlens, tokens.device)
        x = self.embedding_norm(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cu_seqlens, mask, use_reentrant=False)
            else:
                x = block(x, cu_seqlens, mask)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return F.linear(x, self.embedding.weight, self.head_bias) if self.output is None else self.output(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def shard_sequence(self, group, by: str = "state") -> None:
        """Be given, from now on, one part of every sequence: see `linattn.layers.context_parallel`. group: a process group of torch."""
        shard_sequence(self, group, by)
        self.parts_before = dist.get_rank(group)

    def _positions(self, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        begin = self.parts_before * T
        longest = begin + T if cu_seqlens is None else int(cu_seqlens.diff().max())
        if longest > self.config.max_positions:
            raise ValueError(f"tokens must be no longer than max_positions={self.config.max_positions}; got {longest}")
        return self.positions(token_positions(T, None, cu_seqlens, device) + begin)  # type: ignore[misc]


def masked_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats and float32 of logits [B T vocab] where targets [B T] int64 are not IGNORE = -100."""
    if logits.shape[:2] != targets.shape or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [B T] = {tuple(logits.shape[:2])}; got {targets.dtype} {tuple(targets.shape)}")
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)

"""The decoder: tokens → logits, for training, prefill and decoding, over any of the attention layers."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.context_parallel import shard_sequence
from ..layers.linear import Embedding, Linear
from . import generation
from .block import make_block
from .config import DecoderConfig, check_fields
from .presets import PRESETS
from .storage import Storable

IGNORE = -100  # a target that takes no part in the loss


class Decoder(Storable):
    """Embedding, `num_layers` blocks, RMSNorm, and the embedding again (or a head of its own) as output.

        model = Decoder.create("tiny", variant="gla", vocab_size=256)
        logits, _ = model(tokens)                             # training    tokens [B T] → [B T vocab]
        logits, state = model(tokens, return_state=True)      # prefill
        logits, state = model(next_tokens, state)             # decoding, the state as large as before
        tokens = model.generate(prompt, 100, top_p=0.9)       # both; model.stream(…) yields them one by one

    The state is a tuple with one entry per layer, constant in size but for those of softmax layers.
    backend as in `linattn.linear_attention`.
    """

    CONFIG_KIND = DecoderConfig

    def __init__(self, config: DecoderConfig, *, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(make_block(config, i, backend=backend) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)

    @classmethod
    def create(cls, preset: str, *, vocab_size: int, variant: str = "gla", backend: str = "auto", **overrides) -> "Decoder":
        """A preset's decoder, fields of its config replaced by `overrides`. ValueError lists the known presets, fields and variants."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {list(PRESETS)}; got {preset!r}")
        check_fields(overrides, "the config of a decoder")
        return cls(replace(PRESETS[preset](vocab_size, variant), **overrides), backend=backend)

    def forward(
        self,
        tokens: Tensor,
        state: tuple | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = False,
        checkpoint_activations: bool | None = None,
    ) -> tuple[Tensor, tuple | None]:
        """tokens [B T] → logits [B T vocab] and the state after them, which is None unless a state was given or return_state asks for one.

        cu_seqlens [N+1] packs N sequences into tokens [1 T]. checkpoint_activations keeps only the blocks' inputs for the backward pass;
        None: as `set_grad_checkpointing` has said.
        """
        x, state = self.features(tokens, state, cu_seqlens, return_state=return_state, checkpoint_activations=checkpoint_activations)
        return self.logits(x), state

    def features(
        self,
        tokens: Tensor,
        state: tuple | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = False,
        checkpoint_activations: bool | None = None,
    ) -> tuple[Tensor, tuple | None]:
        """As forward, short of the output projection: [B T dim]. A prefill needs the logits of its last token alone."""
        check_tokens(tokens, self.config.vocab_size, "tokens")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state must have one entry for each of {len(self.blocks)} layers; got {len(state)}")
        again = self.grad_checkpointing if checkpoint_activations is None else checkpoint_activations
        x, states = self.embedding(tokens), []
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            if again and torch.is_grad_enabled():
                x, after = checkpoint(block, x, before, cu_seqlens, return_state=return_state, use_reentrant=False)
            else:
                x, after = block(x, before, cu_seqlens, return_state=return_state)
            states.append(after)
        return self.norm(x), tuple(states) if return_state or state is not None else None

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    @property
    def balance_loss(self) -> Tensor | None:
        """How unevenly the last forward in training used the partitions of its Sparse State Expansions, summed over layers; else None.

        0.01 of it belongs to the loss, as the paper has it; `linattn train` adds it.
        """
        losses = [loss for block in self.blocks if (loss := getattr(block.attention, "balance_loss", None)) is not None]
        return torch.stack(losses).sum() if losses else None

    def flops_per_token(self, T: int) -> float:
        """FLOPs of forward and backward for one of T tokens, a product and a sum counted as two.

        6 for each weight of a matrix (the embedding as output only); in each layer 12 · H · K · V to write and read the state of linear
        attention, or 6 · T · dim for the T / 2 keys that softmax attends to on average. Chunks, convolutions, norms and gates' own
        arithmetic are not counted, nor is what activation checkpointing computes again.
        """
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        weights -= 0 if self.head is None else self.embedding.weight.numel()
        return 6.0 * weights + sum(block.attention.flops_per_token(T) for block in self.blocks)  # type: ignore[union-attr, operator]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def shard_sequence(self, group, by: str = "state") -> None:
        """Be given, from now on, one part of every sequence: see `linattn.layers.context_parallel`. group: a process group of torch."""
        shard_sequence(self, group, by)

    stream = generation.stream  # tokens [B], one after the other
    generate = generation.generate  # all of them


def check_tokens(tokens: Tensor, vocab_size: int, name: str) -> None:
    """ValueError unless tokens are [B T] int32 or int64 and, looked at on the CPU only and not under torch.compile, below vocab_size."""
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be [B T] int64 or int32; got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must lie in [0, vocab_size={vocab_size}); got values from {low} to {high}")


def next_token_loss(logits: Tensor, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats and float32, of each token of `tokens` [B T] but the first of a sequence, given those before it.

    logits [B T vocab] are those of `tokens` themselves; packed sequences do not predict each other. ValueError unless T >= 2.
    """
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits must be [B T vocab] to go with tokens {tuple(tokens.shape)}; got {tuple(logits.shape)}")
    if tokens.numel() == 0 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must have T >= 2, a token and one that follows it; got {tuple(tokens.shape)}")
    targets = F.pad(tokens[:, 1:].long(), (0, 1), value=IGNORE)
    if cu_seqlens is not None:
        targets[:, cu_seqlens[1:].long() - 1] = IGNORE  # an empty sequence marks the end of the one before it again
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)

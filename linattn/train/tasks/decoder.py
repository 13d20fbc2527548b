"""The only place that knows how a decoder is trained: to predict the next token of text, judged in bits per byte."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import Decoder
from .. import data, tokens
from ..config import Config
from . import options
from .task import Batch, Task, cut


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """What the task can be told besides the config. ValueError for what is out of range."""

    balance: float = 0.01  # weight of the balance loss of Sparse State Expansion, whose paper has 0.01; others have none

    def __post_init__(self):
        if self.balance < 0:
            raise ValueError(f"balance must be at least 0; got {self.balance}")


class DecoderTask(Task):
    """Windows [B T+1] of a token stream; a target is a token, its loss −log p in nats."""

    metric = "bits_per_byte"
    options_kind: type = DecoderOptions

    def __init__(self, config: Config, saved: Path | None):
        super().__init__(config, saved)
        self.options: Any = options.read(self.options_kind, config.options, config.task)
        self.corpus = self._corpus(config, saved)
        if config.packing and config.context_parallel > 1:
            raise ValueError("packing needs context_parallel = 1: a document that lies on two processes has no place in cu_seqlens")
        self.fingerprint, self.tokens_per_row = self.corpus.fingerprint, config.context
        sizes = f"{len(self.corpus.train):,} tokens to train on, {len(self.corpus.held_out):,} held out"
        self.source = f"{self.corpus.source}: {sizes}"

    def _corpus(self, config: Config, saved: Path | None) -> data.Corpus:
        return tokens.corpus(config, saved)

    def create(self) -> nn.Module:
        sizes: dict[str, Any] = dict(variant=self.config.variant, vocab_size=self.corpus.tokenizer.end + 1, **self.config.overrides)
        return Decoder.create(self.config.preset, backend=self.config.backend, **sizes)

    def load(self, folder: Path) -> nn.Module:
        return Decoder.from_pretrained(folder, backend=self.config.backend)

    def save(self, folder: Path) -> None:
        self.corpus.tokenizer.save(folder / tokens.TOKENIZER)

    def batch(self, step: int, rows: range) -> Batch:
        config = self.config
        return self._packed(data.batch(self.corpus.train, context=config.context, of=config.batch, rows=rows, seed=config.seed, step=step))

    def _packed(self, windows: Tensor) -> Batch:
        """Windows [B T+1], and with packing where documents begin: with the end token of the one before, as when generating."""
        if not self.config.packing:
            return {"tokens": windows}
        starts = windows[:, :-1] == self.corpus.tokenizer.end
        starts[:, 0] = True
        ends = starts.flatten().nonzero().flatten()
        return {"tokens": windows, "cu_seqlens": torch.cat([ends, torch.tensor([starts.numel()])])}

    def part(self, batch: Batch, index: int, of: int) -> Batch:
        x, y = (cut(batch["tokens"][:, side], index, of) for side in (slice(0, -1), slice(1, None)))
        tokens = torch.cat([x, y[:, -1:]], 1)
        return {"tokens": tokens} | ({"bytes": self._bytes(tokens)} if "bytes" in batch else {})

    def _bytes(self, windows: Tensor) -> Tensor:
        return torch.tensor(self.corpus.tokenizer.count(windows[:, 1:]))

    def losses(self, model: Any, batch: Batch) -> Tensor:
        x, y = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        packed: dict[str, Any] = {}
        if "cu_seqlens" in batch:
            x, packed = x.reshape(1, -1), {"cu_seqlens": batch["cu_seqlens"]}
        logits, _ = model(x, **packed)
        losses, balance = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none"), model.balance_loss
        return losses if balance is None else losses + self.options.balance * balance  # to their mean it is added once

    def evaluation(self) -> Iterator[Batch]:
        windows = data.held_out_windows(self.corpus.held_out, context=self.config.context, count=self.config.eval_windows)
        for rows in windows.split(self.config.batch):
            yield {**self._packed(rows), "bytes": self._bytes(rows)}

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bits, and the bytes that the tokens stand for: −Σ log2 p / bytes."""
        return self.losses(model, batch).double().sum() / math.log(2), batch["bytes"]

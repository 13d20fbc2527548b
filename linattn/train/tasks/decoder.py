"""The only place that knows how a decoder is trained: to predict the next token of text, judged in bits per byte."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import Decoder
from .. import data, tokenizer
from ..config import Config
from .task import Batch, Task

TOKENIZER = "tokenizer.json"


class DecoderTask(Task):
    """Windows [B T+1] of a token stream; a target is a token, its loss −log p in nats."""

    metric = "bits_per_byte"

    def __init__(self, config: Config, saved: Path | None):
        super().__init__(config, saved)
        if config.options:
            raise ValueError(f"the task decoder has no options of its own; got {config.options}")
        self.corpus = data.load(
            config.data, tokenizer=tokenizer.load(saved / TOKENIZER) if saved else config.tokenizer,
            vocab_size=config.vocab_size, held_out=config.held_out, context=config.context,
        )  # fmt: skip
        self.fingerprint, self.tokens_per_row = self.corpus.fingerprint, config.context
        sizes = f"{len(self.corpus.train):,} tokens to train on, {len(self.corpus.held_out):,} held out"
        self.source = f"{self.corpus.source}: {sizes}"

    def create(self) -> Decoder:
        sizes: dict[str, Any] = dict(variant=self.config.variant, vocab_size=len(self.corpus.tokenizer.pieces), **self.config.overrides)
        return Decoder.create(self.config.preset, backend=self.config.backend, **sizes)

    def load(self, folder: Path) -> Decoder:
        return Decoder.from_pretrained(folder, backend=self.config.backend)

    def save(self, folder: Path) -> None:
        self.corpus.tokenizer.save(folder / TOKENIZER)

    def batch(self, step: int, rows: range) -> Batch:
        config = self.config
        return {"tokens": data.batch(self.corpus.train, context=config.context, of=config.batch, rows=rows, seed=config.seed, step=step)}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = batch["tokens"]
        logits, _ = model(tokens[:, :-1], checkpoint_activations=self.config.checkpoint_activations)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")

    def evaluation(self) -> Iterator[Batch]:
        windows = data.held_out_windows(self.corpus.held_out, context=self.config.context, count=self.config.eval_windows)
        lengths = torch.tensor([len(piece) for piece in self.corpus.tokenizer.pieces])
        for rows in windows.split(self.config.batch):
            yield {"tokens": rows, "bytes": lengths[rows[:, 1:]].sum()}

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bits, and the bytes that the tokens stand for: −Σ log2 p / bytes."""
        return self.losses(model, batch).double().sum() / math.log(2), batch["bytes"]

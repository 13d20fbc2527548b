"""The only place that knows how an encoder is trained: to name the masked tokens of text, judged by the share it gets right."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import Encoder
from .. import data, tokens
from ..config import Config
from . import options
from .task import Batch, Task, cut

OTHER, SAME = 0.1, 0.1  # of the chosen tokens: another at random, left as it is; the rest become the mask: arXiv:1810.04805


@dataclass(frozen=True, kw_only=True)
class MaskedOptions:
    """Shares of the tokens that are to be named: LION's, arXiv:2502.16249. ValueError outside (0, 1)."""

    rate: float = 0.3
    eval_rate: float = 0.15

    def __post_init__(self):
        if not (0 < self.rate < 1 and 0 < self.eval_rate < 1):
            raise ValueError(f"rate and eval_rate must lie between 0 and 1; got {self.rate} and {self.eval_rate}")


class MaskedTask(Task):
    """Rows are windows [B context] of a token stream; the encoder's vocabulary has one token more, the mask."""

    metric = "accuracy"

    def __init__(self, config: Config, saved: Path | None):
        super().__init__(config, saved)
        self.options = options.read(MaskedOptions, config.options, config.task)
        self.corpus = tokens.corpus(config, saved)
        self.mask = self.corpus.tokenizer.end + 1
        self.fingerprint, self.tokens_per_row = self.corpus.fingerprint, config.context
        sizes = f"{len(self.corpus.train):,} tokens to train on, {len(self.corpus.held_out):,} held out"
        self.source = f"{self.corpus.source}: {sizes}"

    def create(self) -> Encoder:
        sizes: dict[str, Any] = dict(variant=self.config.variant, vocab_size=self.mask + 1) | self.config.overrides
        return Encoder.create(self.config.preset, backend=self.config.backend, **sizes)

    def load(self, folder: Path) -> Encoder:
        return Encoder.from_pretrained(folder, backend=self.config.backend)

    def save(self, folder: Path) -> None:
        self.corpus.tokenizer.save(folder / tokens.TOKENIZER)

    def batch(self, step: int, rows: range) -> Batch:
        config = self.config
        windows = data.batch(self.corpus.train, context=config.context, of=config.batch, rows=rows, seed=config.seed, step=step)
        seeds = [data.derive("mask", config.seed, step, row) for row in rows]
        return self._masked(windows[:, :-1], self.options.rate, seeds)

    def part(self, batch: Batch, index: int, of: int) -> Batch:
        return {name: cut(tensor, index, of) for name, tensor in batch.items()}

    def targets(self, batch: Batch) -> int | None:
        return int(batch["chosen"].sum()) if self.config.context_parallel > 1 else None

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        chosen = batch["chosen"]
        return F.cross_entropy(model(batch["inputs"])[chosen].float(), batch["tokens"][chosen], reduction="none")

    def evaluation(self) -> Iterator[Batch]:
        windows = data.held_out_windows(self.corpus.held_out, context=self.config.context, count=self.config.eval_windows)
        for start in range(0, len(windows), self.config.batch):
            rows = windows[start : start + self.config.batch, :-1]
            yield self._masked(rows, self.options.eval_rate, [data.derive("mask", "held out", start + i) for i in range(len(rows))])

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Masked tokens named rightly, and masked tokens."""
        chosen = batch["chosen"]
        return (model(batch["inputs"])[chosen].argmax(-1) == batch["tokens"][chosen]).sum(), chosen.sum()

    def _masked(self, tokens: Tensor, rate: float, seeds: list[int]) -> Batch:
        """Inputs with `rate` of the tokens of each row chosen, at least one, by the row's own seed."""
        T = tokens.shape[1]
        count = max(1, round(rate * T))
        inputs, chosen = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
        for row, seed in enumerate(seeds):
            random = torch.Generator().manual_seed(seed)
            where = torch.randperm(T, generator=random)[:count]
            other, same = (round(share * count) for share in (OTHER, SAME))
            chosen[row, where] = True
            inputs[row, where[other + same :]] = self.mask
            inputs[row, where[:other]] = torch.randint(self.mask, (other,), generator=random)
        return {"tokens": tokens, "inputs": inputs, "chosen": chosen}

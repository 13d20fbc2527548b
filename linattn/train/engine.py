"""The only place that computes: one model on one device, an optimisation step at a time. The loop around it knows neither."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Decoder
from . import optimizer
from .config import Config

OPTIMIZER = "optimizer.safetensors"


class Outcome(NamedTuple):
    loss: float  # nats per token
    grad_norm: float  # before clipping
    skipped: bool  # the loss or a gradient was not finite, so the weights are as they were


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


class Engine:
    """Steps, evaluates, saves and restores. The model is tokens [B T] -> (logits [B T V], …), parameters, and a way to save them."""

    def __init__(self, model: Decoder, config: Config, device: torch.device):
        self.model, self.config, self.device = model.to(device), config, device
        self.optimizer = optimizer.make(model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def step(self, tokens: Tensor, lr: float) -> Outcome:
        """One step on windows [B T+1] at rate `lr`."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._nats(tokens).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss.item(), norm.item(), not finite)

    @torch.no_grad()
    def nats(self, tokens: Tensor) -> Tensor:
        """-log p of each next token of windows [B T+1]: float32 [B T]."""
        self.model.eval()
        return self._nats(tokens)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        optimizer.save(self.optimizer, self.model, folder / OPTIMIZER)

    def restore(self, folder: Path) -> None:
        """Put the optimizer back where `save` left it; the model came from the same folder."""
        optimizer.load(self.optimizer, self.model, folder / OPTIMIZER)

    def _nats(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            logits, _ = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens.shape[0], -1)

"""The only place that computes: one model on one device, an optimisation step at a time. The loop around it knows neither."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import optimizer
from .config import Config
from .tasks import Batch, Task

OPTIMIZER = "optimizer.safetensors"


class Outcome(NamedTuple):
    loss: float  # mean over the targets
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
    """Steps, evaluates, saves and restores. What the model takes and owes, the task knows."""

    def __init__(self, model: nn.Module, task: Task, config: Config, device: torch.device):
        self.model, self.task, self.config, self.device = model.to(device), task, config, device
        self.optimizer = optimizer.make(model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def step(self, batch: Batch, lr: float) -> Outcome:
        """One step on `batch` at rate `lr`."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._on_device(self.task.losses, batch).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss.item(), norm.item(), not finite)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The task's metric on its held-out data."""
        self.model.eval()
        scores = [self._on_device(self.task.score, batch) for batch in self.task.evaluation()]
        return sum(float(score) for score, _ in scores) / sum(float(weight) for _, weight in scores)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
        optimizer.save(self.optimizer, self.model, folder / OPTIMIZER)

    def restore(self, folder: Path) -> None:
        """Put the optimizer back where `save` left it; the model came from the same folder."""
        optimizer.load(self.optimizer, self.model, folder / OPTIMIZER)

    def _on_device(self, ask: Callable[[nn.Module, Batch], Any], batch: Batch) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return ask(self.model, {name: tensor.to(self.device) for name, tensor in batch.items()})

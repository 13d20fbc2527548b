"""The only place that computes in one process: a model on a device, an optimisation step at a time. The loop around it knows neither."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import estimate, optimizer
from .config import Config
from .tasks import Batch, Task
from .world import World

OPTIMIZER = "optimizer.safetensors"


class Outcome(NamedTuple):
    loss: float  # mean over the targets
    grad_norm: float  # before clipping
    skipped: bool  # the loss or a gradient was not finite, so the weights are as they were


def pick_device(name: str, local: int = 0) -> torch.device:
    """The device of that name; "auto" and "cuda" are the `local`-th GPU of the machine where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda", local) if name == "cuda" and local else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


class Engine:
    """Steps, evaluates, saves and restores. What the model takes and owes, the task knows."""

    def __init__(self, model: nn.Module, task: Task, config: Config, device: torch.device, world: World):
        self.model, self.task, self.config, self.device, self.world = model.to(device), task, config, device, world
        self.parameters = sum(p.numel() for p in model.parameters())
        self.flops_per_token = estimate.flops_per_token(model, task.tokens_per_row)
        if config.checkpoint_activations:
            checkpoint_activations(model)
        if config.compile:
            self.model.compile()
        self.called: nn.Module = self.model  # what `losses` and `score` are given: the model, or something around it
        self.optimizer = optimizer.make(model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def step(self, step: int, lr: float) -> Outcome:
        """Step number `step` at rate `lr`, on this process's rows of it."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        micro = self._micro_batches(step)
        shares, loss = self._shares(micro), torch.zeros((), device=self.device)
        for batch, share in zip(micro, shares, strict=True):
            part = mean(self._on_device(self.task.losses, batch), share) / len(micro)
            part.backward()
            loss = loss + part.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss.item(), norm.item(), not finite)

    @torch.no_grad()
    def prepare(self) -> None:
        """Show a model that fits part of itself to the first data it is trained on, EcoFormer's hash, the first step's rows: before that it
        cannot be evaluated."""
        if any(hasattr(module, "fitted") and not module.fitted for module in self.model.modules()):
            self.model.train()
            self._on_device(self.task.losses, self._micro_batches(0)[0])

    @torch.no_grad()
    def evaluate(self) -> float:
        """The task's metric on its held-out data, which the processes share out."""
        self.model.eval()
        batches, score, weight = list(self.task.evaluation()), 0.0, 0.0
        ways, way = self.world.size // self.config.context_parallel, self.world.rank // self.config.context_parallel
        for i in range(way, len(batches) + (-len(batches)) % ways, ways):  # all do as many: under ZeRO-3 a forward pass needs them all
            gained, counted = self._on_device(self.task.score, self._part(batches[min(i, len(batches) - 1)]))
            if i < len(batches):
                score, weight = score + float(gained), weight + float(counted)
        score, weight = self.world.sum(score, weight)
        return score / weight

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
        optimizer.save(self.optimizer, self.model, folder / OPTIMIZER)

    def restore(self, folder: Path, *, processes: int = 1) -> None:
        """Put the optimizer back where `save` left it, in `processes` processes; the model came from the same folder."""
        optimizer.load(self.optimizer, self.model, folder / OPTIMIZER)

    def _micro_batches(self, step: int) -> list[Batch]:
        """This process's rows of a step: micro-batch by micro-batch, the processes one after the other."""
        config, world = self.config, self.world
        ways, way = world.size // config.context_parallel, world.rank // config.context_parallel
        size = config.batch // (ways * config.accumulate)
        starts = [(i * ways + way) * size for i in range(config.accumulate)]
        return [self._part(self.task.batch(step, range(start, start + size))) for start in starts]

    def _part(self, batch: Batch) -> Batch:
        of = self.config.context_parallel
        return batch if of == 1 else self.task.part(batch, self.world.rank % of, of)

    def _shares(self, micro: list[Batch]) -> list[float | None]:
        """What to divide the sum of each micro-batch's losses by, so that their mean, over the processes too, is that over all targets."""
        counts = [self.task.targets(batch) for batch in micro]
        if any(count is None for count in counts):
            return [None] * len(micro)
        share = self.world.sum(float(sum(filter(None, counts))))[0] / (len(micro) * self.world.size)
        return [share] * len(micro)

    def _on_device(self, ask: Callable[[nn.Module, Batch], Any], batch: Batch) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return ask(self.called, {name: tensor.to(self.device) for name, tensor in batch.items()})


def checkpoint_activations(model: nn.Module) -> None:
    """Have `model` keep only what enters a block for the backward pass: ours and timm's, or one of transformers."""
    names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    found = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if found is None:
        raise ValueError(f"checkpoint_activations needs a model with set_grad_checkpointing; {type(model).__name__} has none")
    found()


def mean(losses: Tensor, share: float | None) -> Tensor:
    return losses.mean() if share is None else losses.sum() / share

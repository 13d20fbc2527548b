"""The loop that all stages of linearising share: AdamW, a cosine, checkpoints; and what they hold still meanwhile."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

Told = Callable[[int, float], None]


def train(groups, loss_of, steps: int, *, checkpoint: Path | None, told: Told | None, clip: float = 1.0) -> None:
    """`steps` steps of AdamW without weight decay, the rate falling along a cosine to a tenth; with `checkpoint`, from where it stood."""
    if steps < 0:
        raise ValueError(f"steps must be at least 0; got {steps}")
    parameters = [p for group, _ in groups for p in group]
    for _, lr in groups:
        if not lr > 0:
            raise ValueError(f"lr must be above 0; got {lr}")
    optimizer = torch.optim.AdamW([{"params": group, "lr": lr, "peak": lr} for group, lr in groups], weight_decay=0.0)
    first = _resume(checkpoint, parameters, optimizer) if checkpoint and checkpoint.exists() else 0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        with torch.random.fork_rng():  # dropout too is a function of the step
            torch.manual_seed(step)
            loss = loss_of(step)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss of step {step + 1} is not finite; try a lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if told:
            told(step + 1, float(loss.detach()))
        if checkpoint and ((step + 1) % 50 == 0 or step + 1 == steps):
            _save(checkpoint, step + 1, parameters, optimizer)
    optimizer.zero_grad(set_to_none=True)


def _save(path: Path, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    beside = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}, beside)
    os.replace(beside, path)


def _resume(path: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    saved = torch.load(path, weights_only=True)
    if [p.shape for p in saved["parameters"]] != [p.shape for p in parameters]:
        raise ValueError(f"{path} is of another model or stage: its parameters have other shapes")
    with torch.no_grad():
        for p, value in zip(parameters, saved["parameters"]):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


@contextmanager
def frozen_but(model: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    ids, before = {id(p) for p in trained}, [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(id(p) in ids)
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextmanager
def switched(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag

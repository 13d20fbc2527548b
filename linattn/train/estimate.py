"""The only place that says beforehand what a run takes, and what share of a machine's arithmetic it uses."""

import time

import torch
from torch import nn

from . import ds_config
from .config import Config
from .tasks import TASKS

PEAKS = {  # FLOP/s of dense bfloat16 products, from the makers' data sheets; the first name that is part of the device's
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
    "MI300X": 1307e12,
}  # fmt: skip
USUAL = 0.4  # of the peak, where a time is guessed


def peak(device: torch.device) -> float | None:
    """FLOP/s that the device could do at best; None where that is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def flops_per_token(model: nn.Module, T: int) -> float:
    """What the model says of itself, or else 6 for each parameter: forward and backward, a product and a sum counted as two."""
    count = getattr(model, "flops_per_token", None)
    return count(T) if count else 6.0 * sum(p.numel() for p in model.parameters())


def bytes_per_process(parameters: int, config: Config, processes: int) -> dict[str, float]:
    """Weights, gradients and what the optimizer keeps, under ZeRO (arXiv:1910.02054, §3); activations come on top."""
    stage = ds_config.stage_of(config) or 0
    half = config.precision == "bfloat16" and stage > 0
    weight, kept = (2, 12) if half else (4, 8)  # AdamW's two moments, and float32 originals of bfloat16 weights
    shared = lambda since: processes if stage >= since else 1
    return {
        "weights": weight * parameters / shared(3), "gradients": weight * parameters / shared(2),
        "optimizer": kept * parameters / shared(1),
    }  # fmt: skip


def dry_run(config: Config, device: torch.device, processes: int) -> list[str]:
    """Lines that say what `config` would take on `processes` of `device`. Reads the data, as the run would, and trains nothing."""
    if ds_config.stage_of(config) is None and processes > 1:
        raise ValueError(f"{processes} processes need zero 0, 1, 2 or 3, or a DeepSpeed config")
    task = TASKS[config.task](config, None)
    with torch.device("meta"):
        model = task.create()
    parameters, tokens = sum(p.numel() for p in model.parameters()), config.batch * task.tokens_per_row
    if ds_config.stage_of(config) is not None:
        ds_config.resolve(config, processes=processes, parameters=parameters)
    needs, flops = bytes_per_process(parameters, config, processes), flops_per_token(model, task.tokens_per_row) * tokens
    lines = [
        f"model      {task.title}, {parameters:,} parameters",
        f"data       {task.source}",
        f"steps      {config.steps:,} of {tokens:,} tokens, {config.steps * tokens:,} in all",
        f"memory     {sum(needs.values()) / 1e9:.2f} GB in each of {processes} ("
        + ", ".join(f"{what} {size / 1e9:.2f}" for what, size in needs.items())
        + "); activations come on top",
        f"arithmetic {flops:.3g} FLOPs a step, {flops * config.steps:.3g} in all",
    ]
    best, of = peak(device), "the peak"
    if best is None:
        best, of = _product(device), "a product of matrices, in one process and timed just now,"
    hours = flops * config.steps / (best * USUAL * processes) / 3600
    return [*lines, f"time       {hours:,.1f} hours, if each process reaches {USUAL:.0%} of {of} of {best:.3g} FLOP/s"]


def _product(device: torch.device, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of float32 products of square matrices, for about `seconds`."""
    a = torch.randn(size, size, device=device)
    began, done = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not done:
        a @ a
        done += 1
    return 2.0 * size**3 * done / took

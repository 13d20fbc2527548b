"""The only place that decides which parameters decay and how the optimizer is made, saved and loaded."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def make(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay; vectors (norms, biases) and what carries `_no_weight_decay` do not.

    A parameter that ZeRO-3 has shared out is an empty vector here, its own shape being `ds_shape`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    spared = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2 or getattr(p, "_no_weight_decay", False)]
    ids = {id(p) for p in spared}
    groups = [
        {"params": [p for p in trained if id(p) not in ids], "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


def save(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Every state tensor as `parameter name/state name`."""
    names = {id(p): name for name, p in model.named_parameters()}
    save_file({f"{names[id(p)]}/{key}": t.contiguous() for p, state in optimizer.state.items() for key, t in state.items()}, path)


def load(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Put back what `save` wrote. ValueError naming the parameters if the file belongs to another model."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        parameter, key = name.rsplit("/", 1)
        saved.setdefault(parameter, {})[key] = tensor
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for name in saved if name not in parameters]
    wrong += [name for name, p in parameters.items() if name in saved and saved[name]["exp_avg"].shape != p.shape]
    if wrong:
        raise ValueError(f"{path} is the optimizer of another model: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}")
    for name, state in saved.items():  # a parameter no gradient has reached yet has no state
        p = parameters[name]
        optimizer.state[p] = {key: t.to(p.device if t.ndim else t.device).clone() for key, t in state.items()}

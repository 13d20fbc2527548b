"""The only place that knows how the learning rate moves: pure functions of the step, so a resumed run needs no scheduler state."""

import math

SCHEDULES = {  # p in [0, 1): the share of the steps after the warm-up that is done; c: the share in which wsd falls -> height in [0, 1]
    "cosine": lambda p, c: 0.5 * (1 + math.cos(math.pi * p)),
    "wsd": lambda p, c: min(1.0, (1 - p) / c),  # warm-up, stable, decay: arXiv:2404.06395
    "linear": lambda p, c: 1 - p,
    "constant": lambda p, c: 1.0,
}


def learning_rate(step: int, *, steps: int, lr: float, min_lr: float, warmup: int, schedule: str, cooldown: float) -> float:
    """Rate of step `step` in [0, steps): rises linearly to `lr` over `warmup` steps, then falls from `lr` towards `min_lr · lr`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    height = SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup), cooldown)
    return lr * (min_lr + (1 - min_lr) * height)

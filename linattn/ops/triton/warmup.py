"""`warmup`: compile, on the GPU at hand, the kernels of the usual calls, so that no training step or request waits for a compiler.

Lengths, batch sizes and numbers of heads are in no cache key: a call on a few tokens compiles what a call on a million runs.
"""

from collections.abc import Callable, Iterable

import torch

from ..form import Call, Form
from . import backward, forward, step, why_not

USUAL = (  # decay, delta, gating (None: causal), normalize
    ("none", False, None, "none"), ("none", False, None, "sum"), ("head", False, None, "none"), ("scalar", False, None, "none"),
    ("channel", False, None, "none"), ("none", True, None, "none"), ("scalar", True, None, "none"),
    ("none", False, "source", "sum"), ("head", False, "source", "sum"), ("scalar", False, "source", "sum"),
)  # fmt: skip
SHAPES = ((1, 8192, 1), (640, 64, 1))  # B T H: one long sequence cut into segments, and many that are not


def warmup(
    *, widths: Iterable[int] = (64, 128), dtype: torch.dtype = torch.bfloat16, calls: Iterable[tuple] = USUAL,
    told: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Forward, backward and (causal calls) step of every one of `calls` at every K = V in `widths`. ValueError where Triton cannot run."""
    for width in widths:
        for decay, delta, gating, normalize in calls:
            if reason := why_not(Call("cuda", dtype, decay, delta, gating is None, width, width)):
                raise ValueError(f"warmup needs calls that the triton backend takes: {reason}")
            for B, T, H in SHAPES:
                _run(B, T, H, width, dtype, decay, delta, gating, normalize)
            told(f"{width} {decay}{' delta' if delta else ''} {gating or 'causal'} {normalize}")


def _run(B, T, H, width, dtype, decay, delta, gating, normalize) -> None:
    new = lambda *shape, kind=torch.float32: torch.zeros(shape, dtype=kind, device="cuda")
    q, k, v, do = (new(B, T, H, width, kind=dtype) for _ in range(4))
    log_decay = {"none": None, "head": new(H), "scalar": new(B, T, H), "channel": new(B, T, H, width)}[decay]
    beta, sides = new(B, T, H) if delta else None, 1 if gating is None else 2
    kv, z = new(sides, B, H, width, width), new(sides, B, H, width)
    form = Form(1.0, gating is None, gating or "target", normalize, 1e-6, 0, False)
    inputs = (q, k, v, log_decay, beta, kv, z, None)
    o, _, _, d, *_ = forward(*inputs, form)
    backward(do, kv, z, None, None, None, *inputs, o, d, form)
    if gating is None:
        now = lambda x: x if x is None or x.ndim == 1 else x[:, 0]
        step(*map(now, inputs[:5]), kv[0], z[0] if normalize != "none" else None, form)

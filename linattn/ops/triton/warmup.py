"""`warmup`: compile, on the GPU at hand, the kernels of the usual calls, so that no training step or request waits for a compiler.

Lengths, batch sizes and numbers of heads are in no cache key: a call on a few tokens compiles what a call on a million runs.
"""

from collections.abc import Callable, Iterable

import torch

from ..form import Call, Form
from . import backward, forward, interpreted, step, why_not

USUAL = (  # decay, delta, gating (None: causal), normalize
    ("none", False, None, "none"), ("none", False, None, "sum"), ("head", False, None, "none"), ("scalar", False, None, "none"),
    ("channel", False, None, "none"), ("none", True, None, "none"), ("scalar", True, None, "none"),
    ("none", False, "source", "sum"), ("head", False, "source", "sum"), ("scalar", False, "source", "sum"),
)  # fmt: skip
SHAPES = ((1, 8192, 1), (640, 320, 1), (2, 64, 1))  # B T H: a long sequence cut into segments, many that are not, and short ones


def warmup(
    *, widths: Iterable[int] = (64, 128), dtype: torch.dtype = torch.bfloat16, calls: Iterable[tuple] = USUAL,
    told: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Forward and backward of every one of `calls` at every K = V in `widths`; of causal ones prefill, going on from a state, and step too.

    ValueError where Triton cannot run.
    """
    for width in widths:
        for decay, delta, gating, normalize in calls:
            if reason := why_not(Call("cuda", dtype, decay, delta, gating is None, width, width)):
                raise ValueError(f"warmup needs calls that the triton backend takes: {reason}")
            for shape in SHAPES:
                _run(*shape, width, dtype, decay, delta, gating, normalize)
            told(f"{width} {decay}{' delta' if delta else ''} {gating or 'causal'} {normalize}")


def _run(B, T, H, width, dtype, decay, delta, gating, normalize) -> None:
    new = lambda *shape, kind=torch.float32: torch.zeros(shape, dtype=kind, device="cpu" if interpreted() else "cuda")
    q, k, v, do = (new(B, T, H, width, kind=dtype) for _ in range(4))
    log_decay = {"none": None, "head": new(H), "scalar": new(B, T, H), "channel": new(B, T, H, width)}[decay]
    inputs = (q, k, v, log_decay, new(B, T, H) if delta else None)
    form = Form(1.0, gating is None, gating or "target", normalize, 1e-6, 0, False, False)
    o, _, _, d, *_ = forward(*inputs, None, None, None, form)
    backward(do, None, None, None, None, None, *inputs, None, None, None, o, d, form)
    if gating is None:
        _, kv, z, *_ = forward(*inputs, None, None, None, form._replace(final=True))
        forward(*inputs, kv, kv[..., 0] if normalize == "none" else z, None, form._replace(final=True))
        now = lambda x: x if x is None or x.ndim == 1 else x[:, 0]
        step(*map(now, inputs), kv[0], None if normalize == "none" else z[0], form)

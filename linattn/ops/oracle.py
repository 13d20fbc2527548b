"""Backend `reference`: the token-by-token oracle in float64 behind the operator's signature, for checking; slow, takes every call."""

import torch

from ..reference import scan
from .form import Call, Form, accumulator, boundary_rows

NAME = "reference"


def why_not(call: Call) -> str | None:
    return None


def run(q, k, v, log_decay, beta, kv, z, cu_seqlens, form: Form):
    """Same results as `eager.forward`, differentiable by autograd, never behind torch.library."""
    double = [None if x is None else x.double() for x in (q, k, v, log_decay, beta, kv, z)]
    *tensors, kv, z = double
    options = {"causal": form.causal, "gating": form.gating, "normalize": form.normalize, "eps": form.eps, "scale": form.scale}
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outs = []
    for n, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        cut = [x if x is None or x.ndim == 1 else x[:, a:b] for x in tensors]
        state = (kv, z) if cu_seqlens is None else (kv[:, n : n + 1], z[:, n : n + 1])
        outs.append(scan(*cut, kv=state[0], z=state[1], stride=form.stride, **options))
    directions = 1 if form.causal else 2
    wide = lambda x, axes: x.reshape(directions, *x.shape[-axes:])
    H, K, V = *k.shape[2:], v.shape[-1]
    o = torch.cat([x[0] for x in outs], 1)
    kv = torch.cat([wide(x[1], 4) for x in outs], 1)
    z = torch.cat([wide(x[2], 3) for x in outs], 1)
    u = torch.cat([wide(x[4], 4) for x in outs], 2)
    bkv, bz = (_rows([wide(x[3][j], 5 - j) for x in outs], ends, form.stride) for j in range(2))
    acc = accumulator(q.dtype)
    normal, rows = form.normalize != "none", kv.shape[1] if cu_seqlens is None else 1
    return (
        o.to(q.dtype), kv.to(acc), z.to(acc) if normal else None,
        bkv.to(acc) if form.stride else o.new_zeros(directions, rows, 0, H, K, V),
        bz.to(acc) if form.stride and normal else None,
        u.to(acc) if form.writes else None,
    )  # fmt: skip


def _rows(parts, ends, stride):
    """Boundaries of each sequence laid into the static rows of `boundary_rows`."""
    if len(parts) == 1 or not stride:
        return parts[0]
    out = parts[0].new_zeros(*parts[0].shape[:2], boundary_rows(ends[-1], len(parts), stride), *parts[0].shape[3:])
    pieces = list(out.unbind(2))
    for n, part in enumerate(parts):
        for i, piece in enumerate(part.unbind(2)):
            pieces[ends[n] // stride + n + i] = piece
    return torch.stack(pieces, 2)

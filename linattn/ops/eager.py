"""Backend `eager`: the chunk skeleton of `reference/chunked.py` in plain torch, on any device and in any dtype."""

import functools

import torch
from torch import Tensor

from ..reference import chunked
from .form import Call, Form, accumulator, boundary_rows

NAME = "eager"
STATELESS = False  # it is handed zeros for a state that is not there
CHUNK, CHANNEL_CHUNK = 64, 16  # a channel decay forms [C C K] per chunk: 16 keeps that as small as one state


def why_not(call: Call) -> str | None:
    return None


def _exact(function):
    """Autocast off: it would turn the float32 sums inside into bfloat16."""

    @functools.wraps(function)
    def inner(x, *rest):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    return inner


@_exact
def forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form: Form):
    """→ o, kv [D N H K V], z [D N H K], row sums [B T HQ], boundaries kv and z [D N rows H ·], writes [D B T H V]; D directions."""
    if cu_seqlens is not None:
        return _packed_forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form)
    run = _Directions(q, k, v, log_decay, beta, form)
    n, d, states, records = 0, 0, [], []
    for i in range(run.count):
        n_i, d_i, S, Z, starts, u = chunked.forward(*run.inputs(i), kv[i], z[i], **run.options(i))
        n, d = n + run.turn(i, n_i), d + run.turn(i, d_i)
        states.append((S, Z))
        records.append((*run.record(starts), run.turn(i, u)))
    n, d = form.scale * n, form.scale * d
    o = n if form.normalize == "none" else n / _denominator(d, form)[..., None]
    stack = lambda pairs, j: torch.stack([pair[j] for pair in pairs])
    rows, cols = k.shape[2:], v.shape[-1]
    empty = lambda *shape: n.new_zeros(run.count, k.shape[0], 0, *shape)
    return (
        o.to(q.dtype),
        stack(states, 0),
        stack(states, 1) if form.normalize != "none" else n.new_zeros(0),
        d if form.normalize != "none" else n.new_zeros(0),
        stack(records, 0) if form.stride else empty(*rows, cols),
        stack(records, 1) if form.stride and form.normalize != "none" else empty(*rows),
        stack(records, 2) if form.writes else empty(rows[0], cols),
    )


@_exact
def backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form: Form):
    """Gradients (dq, dk, dv, dlog_decay, dbeta, dkv, dz) in the inputs' dtypes; a missing input's gradient is None."""
    if cu_seqlens is not None:
        return _packed_backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form)
    run = _Directions(q, k, v, log_decay, beta, form)
    dn = do.to(run.dtype)
    if form.normalize == "none":
        dd = dn.new_zeros(dn.shape[:3])
    else:
        dn = dn / _denominator(d, form)[..., None]
        dd = -(dn * o.to(run.dtype)).sum(-1)
        dd = torch.where(d > form.eps, dd, 0) if form.normalize == "clamp" else dd
    dn, dd = form.scale * dn, form.scale * dd
    total: list = [0] * 5
    dstates = []
    for i in range(run.count):
        inputs, options = run.inputs(i), run.options(i)
        starts = chunked.forward(*inputs, kv[i], z[i], **options)[4]
        if dbkv is None or not starts:
            dstarts = None
        else:  # a recorded boundary is the start of every (stride / C)-th chunk
            every = form.stride // options["C"]
            S0, Z0 = starts[0]
            dstarts = _spread(dbkv[i], len(starts), every, S0), _spread(None if dbz is None else dbz[i], len(starts), every, Z0)
        *grads, dS, dZ = chunked.backward(
            run.turn(i, dn), run.turn(i, dd), dkv[i], dz[i], *inputs, starts, **options,
            dstarts=dstarts, du_all=None if dwrites is None else run.turn(i, dwrites[i]),
        )  # fmt: skip
        total = [a if g is None else a + run.turn(i, g) for a, g in zip(total, grads, strict=True)]
        dstates.append((dS, dZ))
    dq, dk, dv, dg, dbeta = total
    if log_decay is None:
        dg = None
    elif log_decay.ndim < 4:
        dg = dg[..., 0] if log_decay.ndim == 3 else dg.sum((0, 1, 3))
    stack = lambda j: torch.stack([pair[j] for pair in dstates])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, None if beta is None else dbeta, stack(0), stack(1)


@_exact
def step(q, k, v, log_decay, beta, kv, z, form: Form):
    """One token: q [B HQ K], k [B H K], v [B H V], kv [B H K V], z [B H K] or None → o, kv, z."""
    x, y, w = (t.to(kv.dtype) for t in (q, k, v))
    if log_decay is not None:
        a = log_decay.exp()
        a = a if log_decay.shape == k.shape else a.expand(k.shape[:2])[..., None]
        kv, z = a[..., None] * kv, None if z is None else a * z
    if beta is not None:
        w = beta[..., None] * (w - (kv.mT @ y[..., None])[..., 0])
    kv = kv + y[..., None] * w[..., None, :]
    x = x.unflatten(1, (k.shape[1], -1))
    o = form.scale * (x @ kv)
    if z is not None:
        z = z + y
        o = o / _denominator(form.scale * (x @ z[..., None]), form)
    return o.flatten(1, 2).to(q.dtype), kv, z


def _denominator(d: Tensor, form: Form) -> Tensor:
    return d.clamp(min=form.eps) if form.normalize == "clamp" else d + form.eps


class _Directions:
    """A call seen as one or two directional passes over the same tensors; the second reads time backwards."""

    def __init__(self, q, k, v, log_decay, beta, form):
        self.dtype, self.form, self.count = accumulator(q.dtype), form, 1 if form.causal else 2
        if log_decay is None:
            g = k.new_zeros(*k.shape[:3], 1, dtype=self.dtype)
        else:
            g = log_decay.expand(k.shape[:3]) if log_decay.ndim == 1 else log_decay
            g = g if g.ndim == 4 else g[..., None]
        self.tensors = [None if x is None else x.to(self.dtype) for x in (q, k, v, g, beta)]
        chunk = CHUNK if g.shape[-1] == 1 else CHANNEL_CHUNK
        self.C = CHANNEL_CHUNK if form.stride % chunk else chunk

    def turn(self, i, x):
        return x.flip(1) if i else x

    def inputs(self, i):
        return [None if x is None else self.turn(i, x) for x in self.tensors]

    def options(self, i):
        leaving = not self.form.causal and self.form.gating in (("source", "symmetric") if i else ("source",))
        return {"leaving": leaving, "own": 1.0 if self.form.causal else 0.5, "C": self.C}

    def record(self, starts):
        if not self.form.stride or not starts:
            shape = self.tensors[1].shape[2:]
            zero = self.tensors[1].new_zeros
            return zero(self.tensors[1].shape[0], 0, *shape, self.tensors[2].shape[-1]), zero(self.tensors[1].shape[0], 0, *shape)
        kept = starts[:: self.form.stride // self.C]
        return torch.stack([S for S, _ in kept], 1), torch.stack([Z for _, Z in kept], 1)


def _spread(x, chunks, every, like):
    """Gradients of the recorded starts [B rows …] laid over all starts [B chunks …], zero where none was recorded."""
    full = like.new_zeros(like.shape[0], chunks, *like.shape[1:])
    if x is not None and x.numel():
        full[:, ::every] = x
    return full


# -- packed sequences: each alone, one after the other -----------------------------------------------------------------------------------


def _spans(cu_seqlens):
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def _cut(x, a, b):
    return x if x is None or x.ndim == 1 else x[:, a:b]


def _rows(a, b, n, stride):
    first = a // stride + n
    return slice(first, first + -(-(b - a) // stride))


def _packed_forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form):
    one = lambda n: (kv[:, n : n + 1], z[:, n : n + 1])
    spans = _spans(cu_seqlens)
    parts = [forward(*(_cut(x, a, b) for x in (q, k, v, log_decay, beta)), *one(n), None, form) for n, (a, b) in enumerate(spans)]
    o, kvs, zs, d, bkvs, bzs, u = zip(*parts, strict=True)
    rows = boundary_rows(q.shape[1], len(spans), form.stride) if form.stride else 0
    bkv = bkvs[0].new_zeros(*bkvs[0].shape[:2], rows, *bkvs[0].shape[3:])
    bz = bzs[0].new_zeros(*bzs[0].shape[:2], rows if form.normalize != "none" else 0, *bzs[0].shape[3:])
    for n, (a, b) in enumerate(spans if form.stride else ()):
        at = slice(0, rows) if len(spans) == 1 else _rows(a, b, n, form.stride)
        bkv[:, :, at] = bkvs[n]
        if form.normalize != "none":
            bz[:, :, at] = bzs[n]
    normal = form.normalize != "none"
    return (
        torch.cat(o, 1), torch.cat(kvs, 1), torch.cat(zs, 1) if normal else zs[0], torch.cat(d, 1) if normal else d[0],
        bkv, bz, torch.cat(u, 2),
    )  # fmt: skip


def _packed_backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form):
    spans = _spans(cu_seqlens)
    parts = []
    for n, (a, b) in enumerate(spans):
        one, at = slice(n, n + 1), slice(None)
        if form.stride and len(spans) > 1:
            at = _rows(a, b, n, form.stride)
        row = lambda x, at=at: None if x is None or not x.numel() else x[:, :, at]
        parts.append(
            backward(
                do[:, a:b], dkv[:, one], dz[:, one], row(dbkv), row(dbz), None if dwrites is None else dwrites[:, :, a:b],
                *(_cut(x, a, b) for x in (q, k, v, log_decay, beta)), kv[:, one], z[:, one], None,
                o[:, a:b], d[:, a:b] if form.normalize != "none" else d, form,
            )
        )  # fmt: skip
    dq, dk, dv, dg, dbeta, dkvs, dzs = zip(*parts, strict=True)
    if log_decay is None:
        dlog = None
    else:
        dlog = sum(dg[1:], dg[0]) if log_decay.ndim == 1 else torch.cat(dg, 1)
    db = None if beta is None else torch.cat(dbeta, 1)
    return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1), dlog, db, torch.cat(dkvs, 1), torch.cat(dzs, 1)

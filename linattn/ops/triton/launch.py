"""From tensors to results: which passes a call takes, and how their results become the operator's."""

import torch

from ..form import Form, boundary_rows
from ..tiles import power_of_two
from .decoding import step as one_token
from .passes import SAID, NoDecay, Pass, Short


def _passes(q, k, v, log_decay, beta, kv, cu_seqlens, form: Form) -> list[tuple[slice, Pass]]:
    """The passes a call takes, and which directions each one owns."""
    inputs = (q, k, v, log_decay, beta, cu_seqlens, form)
    if Short.takes(k, v, log_decay, beta, kv, cu_seqlens, form, form.final):
        return [(slice(None), Short(q, k, v, log_decay, form))]
    if not form.causal and log_decay is None and beta is None and not form.stride:
        return [(slice(None), NoDecay(q, k, v, cu_seqlens, form))]
    if not form.causal and beta is None and not form.stride:
        return [(slice(None), Pass(*inputs, None))]
    return [(slice(side, side + 1), Pass(*inputs, side)) for side in range(1 if form.causal else 2)]


def forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form: Form):
    """As eager.forward: → o, kv, z, row sums, boundaries kv and z, writes."""
    kv, z, normal = _whole(kv), _whole(z), form.normalize != "none"
    if k.shape[1] == 0:
        return _nothing(q, k, v, kv, z, cu_seqlens, form)
    passes = _passes(q, k, v, log_decay, beta, kv, cu_seqlens, form)
    how = (form.normalize, q.dtype) if len(passes) == 1 else ("none", torch.float32)
    outs = [run.forward(_of(kv, owned), _of(z, owned), *how) for owned, run in passes]
    o, d, last, last_z, bkv, bz, u = zip(*outs, strict=True)
    o, d = sum(o[1:], o[0]), sum(d[1:], d[0])
    if len(passes) == 2 and normal:
        o = o / (d.clamp(min=form.eps) if form.normalize == "clamp" else d + form.eps)[..., None]
    directions, empty = 1 if form.causal else 2, d.new_empty
    both = lambda xs: torch.stack(xs).expand(directions, *xs[0].shape) if len(xs) < directions else torch.stack(xs)
    return (
        o.to(q.dtype),
        torch.cat(last),
        torch.cat(last_z) if normal else empty(0),
        d if normal else empty(0),
        both(bkv) if form.stride else empty(directions, k.shape[0], 0, *k.shape[2:], v.shape[-1]),
        both(bz) if form.stride and normal else empty(directions, k.shape[0], 0, *k.shape[2:]),
        both([x.view(v.shape) for x in u]) if form.writes else empty(directions, k.shape[0], 0, *v.shape[2:]),
    )


def _nothing(q, k, v, kv, z, cu_seqlens, form: Form):
    """What a call without tokens returns."""
    (B, _, H, K), V, D, normal = k.shape, v.shape[-1], 1 if form.causal else 2, form.normalize != "none"
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = lambda *shape: q.new_zeros(shape, dtype=torch.float32)
    rows = boundary_rows(0, 1 if cu_seqlens is None else N, form.stride)
    return (
        q.new_empty(*q.shape[:3], V),
        new(D, N, H, K, V) if kv is None else kv.clone(),
        (new(D, N, H, K) if z is None else z.clone()) if normal else new(0),
        new(*q.shape[:3]) if normal else new(0),
        new(D, B, rows, H, K, V),
        new(D, B, rows if normal else 0, H, K),
        new(D, B, 0, H, V),
    )


def _whole(x):
    return None if x is None else x.contiguous()


def _of(x, owned):
    """The directions of x that a pass owns."""
    return None if x is None else x[owned]


def backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form: Form):
    """As eager.backward: gradients (dq, dk, dv, dlog_decay, dbeta, dkv, dz)."""
    do, kv, z, dkv, dz = (_whole(x) for x in (do, kv, z, dkv, dz))
    if k.shape[1] == 0:
        like = lambda x: None if x is None else torch.zeros_like(x)
        return like(q), like(k), like(v), like(log_decay), like(beta), *((like(kv), like(z)) if dkv is None else (dkv.clone(), dz.clone()))
    if Short.takes(k, v, log_decay, beta, kv, cu_seqlens, form, dkv is not None):
        dq, dk, dv, dg = Short(q, k, v, log_decay, form).backward(do, o.contiguous(), d)
        return dq, dk, dv, _as_given(dg, log_decay), None, None, None
    passes = _passes(q, k, v, log_decay, beta, kv, cu_seqlens, form._replace(final=True))
    dtype = None if len(passes) == 1 else torch.float32
    o, d = (None, None) if form.normalize == "none" else (o.contiguous(), d)
    grads = []
    for owned, run in passes:
        mine = lambda x, owned=owned: None if x is None or not x.numel() else x[owned].sum(0)  # writes of both sides are one v
        states = (_of(dkv, owned), _of(dz, owned), mine(dbkv), mine(dbz), mine(dwrites), _of(kv, owned), _of(z, owned))
        grads.append(run.backward(do, o, d, *states, dtype))
    dq, dk, dv, dg, dbeta, dS, dZ = zip(*grads, strict=True)
    total = lambda xs: None if xs[0] is None else sum(xs[1:], xs[0])
    dg = _as_given(total(dg), log_decay)
    return total(dq).to(q.dtype), total(dk).to(k.dtype), total(dv).to(v.dtype), dg, total(dbeta), torch.cat(dS), torch.cat(dZ)


def _as_given(dg, log_decay):
    """A gradient per token and gate, in the shape of log_decay."""
    return None if dg is None else dg.sum(0) if log_decay.ndim == 1 else dg.view(log_decay.shape)


def step(q, k, v, log_decay, beta, kv, z, form: Form):
    """As eager.step: → o, kv, z."""
    q, k, v, log_decay, beta, kv, z = (None if x is None else x.contiguous() for x in (q, k, v, log_decay, beta, kv, z))
    (B, H, K), V, G = k.shape, v.shape[2], q.shape[1] // k.shape[1]
    o = torch.empty(B, H * G, V, dtype=q.dtype, device=q.device)
    new_kv, new_z = torch.empty_like(kv), None if z is None else torch.empty_like(z)
    if log_decay is None:
        decay = "none"
    elif log_decay.shape == k.shape:
        decay = "channel"
    else:
        decay = "head" if log_decay.ndim == 1 else "scalar"
    BK = power_of_two(K)
    BV = min(power_of_two(V), max(16, 4096 // BK))  # 32 numbers of the state per thread
    one_token[(-(-V // BV), B * H)](
        q, k, v, log_decay, beta, kv, z, o, new_kv, new_z, form.scale, form.eps, H, G,
        K=K, V=V, BK=BK, BV=BV, DECAY=decay, DELTA=beta is not None, DIVIDE=form.normalize, num_warps=4, **SAID,
    )  # fmt: skip
    return o, new_kv, new_z

"""From tensors to results: which passes a call takes, and how their results become the operator's."""

from functools import cache

import torch

from ..form import Form, boundary_rows
from ..tiles import power_of_two
from .decoding import step as one_token
from .direct import Fixed, launch, seen
from .passes import NoDecay, Pass, Short


def _passes(q, k, v, log_decay, beta, kv, cu_seqlens, form: Form, ends: bool, given) -> list[tuple[Pass, tuple]]:
    """The passes a call takes, and given(which directions each one owns; None: all there are): what it is handed."""
    inputs = (q, k, v, log_decay, beta, cu_seqlens, form)
    if not form.causal and (beta is not None or form.stride):
        sides = [given(slice(side, side + 1)) for side in range(2)]
        return [(Pass(*inputs, side, *handed), handed) for side, handed in enumerate(sides)]
    handed = given(None)
    if Short.takes(k, v, log_decay, beta, kv, cu_seqlens, form, ends):
        return [(Short(q, k, v, log_decay, form, *handed), handed)]
    if not form.causal and log_decay is None:
        return [(NoDecay(q, k, v, cu_seqlens, form, *handed), handed)]
    return [(Pass(*inputs, 0 if form.causal else None, *handed), handed)]


def forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form: Form):
    """As eager.forward: → o, kv, z, row sums, boundaries kv and z, writes; None: not asked for."""
    kv, z, normal = _whole(kv), _whole(z), form.normalize != "none"
    if k.shape[1] == 0:
        return _nothing(q, k, v, kv, z, cu_seqlens, form)
    given = lambda owned: (_of(kv, owned), _of(z, owned))
    passes = _passes(q, k, v, log_decay, beta, kv, cu_seqlens, form, form.final, given)
    how = (form.normalize, q.dtype) if len(passes) == 1 else ("none", torch.float32)
    outs = [run.forward(*handed, *how) for run, handed in passes]
    o, d, last, last_z, *records = outs[0]
    D = 1 if form.causal else 2
    if len(passes) == 2:
        _, (o2, d2, last2, last_z2, *_) = outs
        o, d = o + o2, d + d2 if normal else None
        if normal:
            o = o / (d.clamp(min=form.eps) if form.normalize == "clamp" else d + form.eps)[..., None]
        o = o.to(q.dtype)
        last, last_z = (None, None) if last is None else (torch.cat((last, last2)), torch.cat((last_z, last_z2)))
        records = [x if x is None else torch.stack((x, y)) for x, y in zip(records, outs[1][4:], strict=True)]
    else:  # records of both sides are one, where there is one pass; and never memory of the caller's v
        records = [x if x is None else torch.stack([x] * D) for x in records]
    bkv, bz, u = records
    return o, last, last_z if normal else None, d, bkv, bz, u if u is None else u.view(D, *v.shape)


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
    return x if x is None or owned is None else x[owned]


def backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form: Form):
    """As eager.backward: gradients (dq, dk, dv, dlog_decay, dbeta, dkv, dz); None for those of states that were not given."""
    do, kv, z, dkv, dz = (_whole(x) for x in (do, kv, z, dkv, dz))
    if k.shape[1] == 0:
        like = lambda x: None if x is None else torch.zeros_like(x)
        return like(q), like(k), like(v), like(log_decay), like(beta), *((like(kv), like(z)) if dkv is None else (dkv.clone(), dz.clone()))
    o, d = (None, None) if form.normalize == "none" else (o.contiguous(), d)

    def given(owned):
        mine = lambda x: None if x is None or not x.numel() else _of(x, owned).sum(0)  # writes of both sides are one v
        return do, o, d, _of(dkv, owned), _of(dz, owned), mine(dbkv), mine(dbz), mine(dwrites), _of(kv, owned), _of(z, owned)

    passes = _passes(q, k, v, log_decay, beta, kv, cu_seqlens, form, dkv is not None, given)
    grads = [run.backward(*handed, None if len(passes) == 1 else torch.float32) for run, handed in passes]
    if len(passes) == 1:
        dq, dk, dv, dg, dbeta, dS, dZ = grads[0]
    else:
        (dq, dk, dv, dg, dbeta, dS, dZ), second = grads
        dq, dk, dv = ((a + b).to(q.dtype) for a, b in zip((dq, dk, dv), second[:3], strict=True))
        dg, dbeta = (a if a is None else a + b for a, b in zip((dg, dbeta), second[3:5], strict=True))
        dS, dZ = (a if a is None else torch.cat((a, b)) for a, b in zip((dS, dZ), second[5:], strict=True))
    return dq, dk, dv, _as_given(dg, log_decay), dbeta, dS, dZ


def _as_given(dg, log_decay):
    """A gradient per token and gate, in the shape of log_decay."""
    return dg if dg is None or log_decay.ndim > 1 else dg.sum((0, 1))


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
    fixed = _step(K, V, decay, form.normalize, k.device, seen(q, k, v, log_decay, beta, kv, z))
    tensors, numbers = (q, k, v, log_decay, beta, kv, z, o, new_kv, new_z), (float(form.scale), float(form.eps), H, G)
    launch(one_token, (-(-V // fixed.constexprs["BV"]), B * H), tensors, numbers, fixed)
    return o, new_kv, new_z


@cache
def _step(K: int, V: int, decay: str, divide: str, device, given: tuple) -> Fixed:
    """What `step` is compiled for, of tensors `given`."""
    BK = power_of_two(K)
    BV = min(power_of_two(V), max(16, 4096 // BK))  # 32 numbers of the state per thread
    known = {"K": K, "V": V, "BK": BK, "BV": BV, "DECAY": decay, "DELTA": given[5] is not None, "DIVIDE": divide}
    return Fixed(one_token, known, 4, 1, given[0])

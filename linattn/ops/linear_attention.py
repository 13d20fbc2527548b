"""The operator: its two entry points, all checks, and its torch.library registration, once for all backends."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .backends import BY_NAME, choose
from .form import GATINGS, KINDS, NORMALIZERS, Call, Form, accumulator, boundary_rows

RECORDS = ("boundaries", "writes")
_STEP_KINDS = {1: "head", 2: "scalar", 3: "channel"}


class State(NamedTuple):
    """What the operator remembers. Bidirectional calls carry a leading axis of 2: seen from the left, and from the right."""

    kv: Tensor  # [B H K V] float32 (float64 for float64 inputs); packed: [N H K V]
    z: Tensor | None = None  # [B H K], only where the call is normalised


class Record(NamedTuple):
    """What `record=` asked for; what it did not is None."""

    boundaries: State | None  # states before every `stride`-th token in scan order: kv [B rows H K V], z [B rows H K]
    writes: Tensor | None  # u [B T H V]: what each token added to the state; bidirectional: [2 B T H V]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    causal: bool = True,
    gating: Literal["source", "target", "symmetric"] | None = None,
    normalize: bool | Literal["sum", "clamp"] = False,
    eps: float = 1e-6,
    scale: float | None = None,
    offset: float = 0.0,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    record: Sequence[str] = (),
    stride: int = 64,
    check_values: bool | None = None,
    backend: str = "auto",
):
    """Linear attention with decay, delta rule and normaliser, causal or bidirectional, over whole sequences.

        S_t = A_t S_{t-1} + k_t u_tᵀ,  z_t = A_t z_{t-1} + k_t,  o_t = scale · S_tᵀ q_t      A_t = diag(exp(log_decay_t))
        u_t = v_t, or with beta the delta rule:  u_t = beta_t · (v_t − (A_t S_{t-1})ᵀ k_t)

    q             [B T HQ K]   HQ a multiple of H: grouped heads, query head h reads the state of head h // (HQ / H)
    k, v          [B T H K], [B T H V]     float64, float32, bfloat16 or float16, all of one dtype
    log_decay     None | [H] | [B T H] | [B T H K]     natural log, <= 0; the shape is the kind; any floating dtype, computed in float32
    beta          [B T H], in (0, 1) or (0, 2): the delta rule
    causal        False: every token sees every other, the decay counted on both sides, its own term once
    gating        needed where causal=False and log_decay varies in time: between two neighbours the gate is paid by the token that is
                  left ("source", LION as released), by the one that is entered ("target"), or always by the later one ("symmetric")
    normalize     divide by d_t = scale · z_tᵀ q_t:  True or "sum": by d_t + eps;  "clamp": by max(d_t, eps)
    scale         None: K ** -0.5
    offset        similarity scale · q·k + offset; not with a channel decay or beta. States then have K + 1 rows, the last for the constant
    initial_state State(kv [B H K V], z [B H K] if normalised); bidirectional: [2 B H K V], what precedes and what follows
    cu_seqlens    [N+1] int32 or int64, with B = 1: packed sequences, empty ones allowed; states are then [N H K V]
    record        any of "boundaries" (states before every `stride`-th token in scan order; packed sequence n that starts at token s has
                  its rows from s // stride + n on) and "writes" (u_t)
    check_values  look at values too (log_decay <= 0, cu_seqlens monotone and ending at T); None: on CPU tensors only, and not in torch.compile
    backend       "auto", or a name in `linattn.BACKENDS`

    Returns o [B T HQ V] in q's dtype and State (None unless return_state), and third a Record where `record` is not empty. Gradients reach
    every floating tensor, from o, the state and the record. Raises ValueError before any work for every bad argument.
    Sources: arXiv:2006.16236 (linear), 2312.06635 (chunkwise form, channel decay), 2406.06484, 2412.06464 (delta rule), 2502.16249 (bidirectional).
    """
    normalizer = {False: "none", True: "sum"}.get(normalize, normalize)
    _check_shapes(q, k, v, log_decay, beta, cu_seqlens)
    _check_options(causal, gating, log_decay, beta, normalizer, eps, offset, scale, record, stride)
    if check_values or (check_values is None and q.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_values(log_decay, cu_seqlens, q.shape[1])
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    if offset:  # the constant is one more key that every query meets with weight offset / scale
        pad = torch.nn.functional.pad
        q, k = pad(q, (0, 1), value=offset / scale), pad(k, (0, 1), value=1.0)
    kind = KINDS[0 if log_decay is None else log_decay.ndim]
    acc = accumulator(q.dtype)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kv, z = _initial(initial_state, normalizer, causal, (sequences, *k.shape[2:], v.shape[-1]), q.device, acc)
    log_decay = None if log_decay is None else log_decay.to(acc)
    beta = None if beta is None else beta.to(acc)
    name = choose(Call(q.device.type, q.dtype, kind, beta is not None, causal, k.shape[-1], v.shape[-1]), backend)
    form = Form(
        scale, causal, gating or "target", normalizer, float(eps), stride if "boundaries" in record else 0, "writes" in record
    )
    tensors = (q, k, v, log_decay, beta, kv, z, cu_seqlens)
    if name == "reference":  # plain autograd, never behind torch.library
        o, kv, z, bkv, bz, u = BY_NAME[name].run(*tensors, form)
    else:
        o, kv, z, _, bkv, bz, u = torch.ops.linattn.forward(*tensors, *form, name)
    squeeze = lambda x, used=True: None if x is None or not used else x[0] if causal else x
    normal = normalizer != "none"
    state = State(squeeze(kv), squeeze(z, normal)) if return_state else None
    if not record:
        return o, state
    boundaries = State(squeeze(bkv), squeeze(bz, normal)) if "boundaries" in record else None
    return o, state, Record(boundaries, squeeze(u, "writes" in record))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    state: State,
    normalize: bool | Literal["sum", "clamp"] = False,
    eps: float = 1e-6,
    scale: float | None = None,
    offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """One token of `linear_attention`: q [B HQ K], k [B H K], v [B H V], log_decay None | [H] | [B H] | [B H K], beta [B H].

    Returns o [B HQ V] and the new State; `state` itself is left as it was. Where a gradient is wanted it is `linear_attention` with T = 1.
    Raises ValueError for wrong ranks, shapes, dtypes and devices, as `linear_attention` does; values are not looked at.
    """
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"state must be a linattn.State(kv, z); got {type(state).__name__}")
    kv, z = state
    normalizer = {False: "none", True: "sum"}.get(normalize, normalize)
    if not offset and _step_is_plain(q, k, v, log_decay, beta, kv, z, normalizer):  # the decoding loop: one check, one crossing
        kind = "none" if log_decay is None else _STEP_KINDS[log_decay.ndim]
        name = choose(Call(q.device.type, q.dtype, kind, beta is not None, True, k.shape[2], v.shape[2]), backend)
        if name != "reference":
            form = Form(k.shape[2] ** -0.5 if scale is None else scale, True, "target", normalizer, eps, 0, False)
            o, kv, z = BY_NAME[name].step(q, k, v, log_decay, beta, kv, z, form)
            return o, State(kv, z)
    _check_tensors({"q": q, "k": k, "v": v, "state.kv": kv}, {"log_decay": log_decay, "beta": beta, "state.z": z})
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [B H {'V' if name == 'v' else 'K'}], of 3 dimensions: one token; got shape {tuple(x.shape)}")
    now = lambda x: x if x is None or x.ndim == 1 else x[:, None]
    o, new = linear_attention(
        now(q), now(k), now(v), now(log_decay), now(beta), normalize=normalize, eps=eps, scale=scale, offset=offset,
        initial_state=state, return_state=True, check_values=False, backend=backend,
    )  # fmt: skip
    return o[:, 0], new


# -- checks: plain `if`, so that torch.compile reads them --------------------------------------------------------------------------------


def _step_is_plain(q, k, v, log_decay, beta, kv, z, normalizer) -> bool:
    """Whether the arguments fit together without a conversion and want no gradient; if not, the general path sees to them."""
    given = (q, k, v, kv, *(x for x in (log_decay, beta, z) if x is not None))
    for x in given:
        if not isinstance(x, Tensor) or x.device != given[0].device:
            return False
    if q.dtype != k.dtype or q.dtype != v.dtype or any(x.dtype != accumulator(q.dtype) for x in given[3:]):
        return False
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return False
    (B, H, K), V = k.shape, v.shape[2]
    return (
        kv.shape == (B, H, K, V)
        and v.shape[:2] == (B, H)
        and q.shape[0] == B
        and q.shape[2] == K
        and q.shape[1] % H == 0
        and (log_decay is None or log_decay.shape in ((H,), (B, H), (B, H, K)))
        and (beta is None or beta.shape == (B, H))
        and normalizer in NORMALIZERS
        and (z is None) == (normalizer == "none")
        and (z is None or z.shape == (B, H, K))
    )


def _check_tensors(needed, optional):
    for name, x in needed.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    for name, x in optional.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor or None; got {type(x).__name__}")


def _check_shapes(q, k, v, log_decay, beta, cu_seqlens):
    _check_tensors({"q": q, "k": k, "v": v}, {"log_decay": log_decay, "beta": beta, "cu_seqlens": cu_seqlens})
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B T H {'V' if name == 'v' else 'K'}], of 4 dimensions; got shape {tuple(x.shape)}")
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    if min(HQ, H, K, V) == 0:
        raise ValueError(f"heads and widths must be at least 1; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if k.shape != (B, T, H, K):
        raise ValueError(f"k must be [B T H K] = {(B, T, H, K)} to go with q {tuple(q.shape)}; got {tuple(k.shape)}")
    if v.shape != (B, T, H, V):
        raise ValueError(f"v must be [B T H V] = {(B, T, H, V)} to go with k {tuple(k.shape)}; got {tuple(v.shape)}")
    if HQ % H:
        raise ValueError(f"q must have a multiple of the {H} heads of k and v; got {HQ} heads")
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q must be float64, float32, bfloat16 or float16; got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}; got {x.dtype}")
    if log_decay is not None and log_decay.shape not in ((H,), (B, T, H), (B, T, H, K)):
        raise ValueError(
            f"log_decay must be None, [H] = {(H,)}, [B T H] = {(B, T, H)} or [B T H K] = {(B, T, H, K)}; got {tuple(log_decay.shape)}"
        )
    if beta is not None and beta.shape != (B, T, H):
        raise ValueError(f"beta must be [B T H] = {(B, T, H)} to go with k {tuple(k.shape)}; got {tuple(beta.shape)}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be [N+1] int32 or int64 with N >= 1; got shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
            )
        if B != 1:
            raise ValueError(f"cu_seqlens needs the sequences packed into one row, B = 1; got q {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta), ("cu_seqlens", cu_seqlens)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")
        if x is not None and name in ("log_decay", "beta") and not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype; got {x.dtype}")


def _check_options(causal, gating, log_decay, beta, normalizer, eps, offset, scale, record, stride):
    if gating is not None and gating not in GATINGS:
        raise ValueError(f"gating must be one of {list(GATINGS)}; got {gating!r}")
    if causal and gating is not None:
        raise ValueError(f"gating is a convention of bidirectional calls, causal=False; got gating={gating!r} with causal=True")
    if not causal and gating is None and log_decay is not None and log_decay.ndim > 1:
        raise ValueError(
            f"gating must be chosen from {list(GATINGS)} where causal=False and log_decay varies in time: the three differ; got None"
        )
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalize must be False, True, 'sum' or 'clamp'; got {normalizer!r}")
    for name, x in (("eps", eps), ("offset", offset), ("scale", 1.0 if scale is None else scale)):
        if not isinstance(x, (int, float)):
            raise ValueError(f"{name} must be a number; got {type(x).__name__}")
    if scale is not None and offset and scale == 0:
        raise ValueError("scale must not be 0 where offset is given")
    if offset and (beta is not None or (log_decay is not None and log_decay.ndim == 4)):
        raise ValueError("offset has no meaning with beta or with a channel log_decay [B T H K]: a constant has no channel to decay in")
    if not isinstance(record, (tuple, list)) or any(name not in RECORDS for name in record):
        raise ValueError(f"record must be a sequence of names out of {list(RECORDS)}; got {record!r}")
    if not isinstance(stride, int) or stride < 16 or stride % 16:
        raise ValueError(f"stride must be a positive multiple of 16; got {stride}")


def _check_values(log_decay, cu_seqlens, T):
    if log_decay is not None and log_decay.numel() and (worst := log_decay.detach().amax()) > 0:
        raise ValueError(f"log_decay must be <= 0, a natural logarithm of a decay in (0, 1]; its largest value is {worst.item():.6g}")
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != T:
            raise ValueError(f"cu_seqlens must run from 0 to T = {T}; got {ends[0]} to {ends[-1]}")
        if any(a > b for a, b in zip(ends[:-1], ends[1:], strict=True)):
            raise ValueError(f"cu_seqlens must not decrease; got {ends if len(ends) < 20 else '…'}")


def _initial(state, normalizer, causal, shape, device, acc) -> tuple[Tensor, Tensor]:
    """Initial state with its directions axis explicit, zeros where none was given: kv [D N H K V], z [D N H K]."""
    lead = (1, *shape) if causal else (2, *shape)
    normal = normalizer != "none"
    if state is None:
        return torch.zeros(lead, device=device, dtype=acc), torch.zeros(lead[:-1], device=device, dtype=acc)
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"initial_state must be a linattn.State(kv, z); got {type(state).__name__}")
    kv, z = state
    _check_tensors({"initial_state.kv": kv}, {"initial_state.z": z})
    wanted = shape if causal else lead
    dims = "B H K V" if causal else "2 B H K V"
    if kv.shape != wanted:
        raise ValueError(f"initial_state.kv must be [{dims}] = {tuple(wanted)}; got {tuple(kv.shape)}")
    if (z is None) == normal:
        raise ValueError(f"initial_state.z must be {'given' if normal else 'None'} with normalize={normalizer!r}; got the opposite")
    if z is not None and z.shape != wanted[:-1]:
        raise ValueError(f"initial_state.z must be [{dims[:-2]}] = {tuple(wanted[:-1])}; got {tuple(z.shape)}")
    for name, x in (("kv", kv), ("z", z)):
        if x is not None and (x.device != device or not x.is_floating_point()):
            raise ValueError(f"initial_state.{name} must be floating, on {device}; got {x.dtype} on {x.device}")
    z = torch.zeros(lead[:-1], device=device, dtype=acc) if z is None else z.to(acc).reshape(lead[:-1])
    return kv.to(acc).reshape(lead), z


# -- torch.library: schema, kernel, fake and autograd, once ------------------------------------------------------------------------------

_LIB = torch.library.Library("linattn", "DEF")
_FORM = "float scale, bool causal, str gating, str normalize, float eps, int stride, bool writes, str backend"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor kv, Tensor z, Tensor? cu_seqlens"
_LIB.define(f"forward({_INPUTS}, {_FORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIB.define(
    "backward(Tensor do, Tensor dkv, Tensor dz, Tensor? dbkv, Tensor? dbz, Tensor? dwrites, "
    f"{_INPUTS}, Tensor o, Tensor d, {_FORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, scale, causal, gating, normalize, eps, stride, writes, backend):
    form = Form(scale, causal, gating, normalize, eps, stride, writes)
    return tuple(x.contiguous() for x in BY_NAME[backend].forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form))


def _forward_fake(q, k, v, log_decay, beta, kv, z, cu_seqlens, scale, causal, gating, normalize, eps, stride, writes, backend):
    (B, T, HQ, _), (H, K), V = q.shape, k.shape[2:], v.shape[3]
    normal, D = normalize != "none", 1 if causal else 2
    rows = boundary_rows(T, 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1, stride)
    return (
        q.new_empty(B, T, HQ, V),
        torch.empty_like(kv, memory_format=torch.contiguous_format),
        torch.empty_like(z, memory_format=torch.contiguous_format) if normal else kv.new_empty(0),
        kv.new_empty(B, T, HQ) if normal else kv.new_empty(0),
        kv.new_empty(D, B, rows, H, K, V),
        kv.new_empty(D, B, rows if normal else 0, H, K),
        kv.new_empty(D, B, T if writes else 0, H, V),
    )


def _backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, *rest):
    form, backend = Form(*rest[:-1]), rest[-1]
    inputs = (q, k, v, log_decay, beta, kv, z, cu_seqlens)
    grads = BY_NAME[backend].backward(do, dkv, dz, dbkv, dbz, dwrites, *inputs, o, d, form)
    return tuple(kv.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_fake(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, *rest):
    like = lambda x: kv.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return tuple(like(x) for x in (q, k, v, log_decay, beta, kv, z))


def _save(ctx, inputs, output):
    tensors, ctx.rest = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, output[0], output[3])
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, dkv, dz, _, dbkv, dbz, dwrites):
    *inputs, o, d = ctx.saved_tensors
    kv, z = inputs[5:7]
    _, stride, writes = ctx.rest[4], ctx.rest[5], ctx.rest[6]
    do = torch.zeros_like(o) if do is None else do
    dkv = torch.zeros_like(kv) if dkv is None else dkv
    dz = torch.zeros_like(z) if dz is None or not dz.numel() else dz
    dbkv, dbz = (dbkv, dbz) if stride else (None, None)
    if dbz is not None and dbkv is None:  # backends take both or neither
        dbkv = dbz.new_zeros(*dbz.shape, o.shape[-1])
    grads = torch.ops.linattn.backward(do, dkv, dz, dbkv, dbz, dwrites if writes else None, *inputs, o, d, *ctx.rest)
    grads = [None if x is None else g for x, g in zip(inputs[:7], grads, strict=True)]
    return *grads, *([None] * (1 + len(ctx.rest)))


def _no_second_derivative(ctx, *_):
    raise RuntimeError("linear_attention has no second derivative but with backend='reference'")


_LIB.impl("forward", _forward, "CompositeExplicitAutograd")
_LIB.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("linattn::forward", _forward_fake, lib=_LIB)
torch.library.register_fake("linattn::backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("linattn::forward", _autograd, setup_context=_save, lib=_LIB)
torch.library.register_autograd("linattn::backward", _no_second_derivative, lib=_LIB)

"""The operator: its two entry points, all checks, and its torch.library registration, once for all backends."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .backends import BY_NAME, choose
from .checks import check_options, check_shapes, check_tensors, initial_states, step_is_plain
from .checks import check_values as look_at_values
from .form import KINDS, Call, Form, accumulator, boundary_rows

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
    check_values  look at values too (log_decay <= 0, cu_seqlens monotone and ending at T); None: on CPU tensors only, not in torch.compile
    backend       "auto", or a name in `linattn.BACKENDS`

    Returns o [B T HQ V] in q's dtype and State (None unless return_state), and third a Record where `record` is not empty. Gradients reach
    every floating tensor, from o, the state and the record. Raises ValueError before any work for every bad argument.
    Sources: arXiv:2006.16236 (linear), 2312.06635 (chunkwise form, channel decay), 2406.06484 and 2412.06464 (delta rule), 2502.16249
    (bidirectional).
    """
    normalizer = {False: "none", True: "sum"}.get(normalize, normalize)
    check_shapes(q, k, v, log_decay, beta, cu_seqlens)
    check_options(causal, gating, log_decay, beta, normalizer, eps, offset, scale, record, stride)
    if check_values or (check_values is None and q.device.type == "cpu" and not torch.compiler.is_compiling()):
        look_at_values(log_decay, cu_seqlens, q.shape[1])
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    if offset:  # the constant is one more key that every query meets with weight offset / scale
        pad = torch.nn.functional.pad
        q, k = pad(q, (0, 1), value=offset / scale), pad(k, (0, 1), value=1.0)
    kind = KINDS[0 if log_decay is None else log_decay.ndim]
    acc = accumulator(q.dtype)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kv, z = initial_states(initial_state, normalizer, causal, (sequences, *k.shape[2:], v.shape[-1]), q.device, acc)
    log_decay, beta = (x if x is None or x.dtype == acc else x.to(acc) for x in (log_decay, beta))
    name = choose(Call(q.device.type, q.dtype, kind, beta is not None, causal, k.shape[-1], v.shape[-1]), backend)
    stride = stride if "boundaries" in record else 0
    form = Form(scale, causal, gating or "target", normalizer, float(eps), stride, "writes" in record, bool(return_state))
    inputs = (q, k, v, log_decay, beta, kv, z, cu_seqlens)
    if name == "reference":  # plain autograd, never behind torch.library
        kv, z = (kv, z) if kv is not None else _zero_states(q, k, v, cu_seqlens, form)
        o, kv, z, bkv, bz, u = BY_NAME[name].run(*inputs[:5], kv, z, cu_seqlens, form)
    elif not getattr(BY_NAME[name], "DIRECT", False) or _looked_on(inputs):
        o, kv, z, _, bkv, bz, u = torch.ops.linattn.forward(*inputs, *form, name)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        o, kv, z, _, bkv, bz, u = _Direct.apply(*inputs, form, name)
    else:
        o, kv, z, _, bkv, bz, u = BY_NAME[name].forward(*inputs, form)
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
    at_once = BY_NAME["cpu"].step_at_once if backend in ("auto", "cpu") and not offset else None
    if at_once and (found := at_once(q, k, v, log_decay, beta, kv, z, normalizer, scale, eps)):
        o, kv, z = found
        return o, State(kv, z)
    plain = not offset and isinstance(eps, (int, float)) and (scale is None or isinstance(scale, (int, float)))
    if plain and step_is_plain(q, k, v, log_decay, beta, kv, z, normalizer):  # the decoding loop: one check, one crossing
        kind = "none" if log_decay is None else _STEP_KINDS[log_decay.ndim]
        name = choose(Call(q.device.type, q.dtype, kind, beta is not None, True, k.shape[2], v.shape[2]), backend)
        if name != "reference":
            form = Form(k.shape[2] ** -0.5 if scale is None else scale, True, "target", normalizer, eps, 0, False)
            o, kv, z = BY_NAME[name].step(q, k, v, log_decay, beta, kv, z, form)
            return o, State(kv, z)
    check_tensors({"q": q, "k": k, "v": v, "state.kv": kv}, {"log_decay": log_decay, "beta": beta, "state.z": z})
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [B H {'V' if name == 'v' else 'K'}], of 3 dimensions: one token; got shape {tuple(x.shape)}")
    now = lambda x: x if x is None or x.ndim == 1 else x[:, None]
    o, new = linear_attention(
        now(q), now(k), now(v), now(log_decay), now(beta), normalize=normalize, eps=eps, scale=scale, offset=offset,
        initial_state=state, return_state=True, check_values=False, backend=backend,
    )  # fmt: skip
    return o[:, 0], new


# -- torch.library: schema, kernel, fake and autograd, once ------------------------------------------------------------------------------

_LIB = torch.library.Library("linattn", "DEF")
# States that nobody gave are None (both, or neither), and what nobody asked for is empty: they might be as many bytes again as the call.
_FORM = "float scale, bool causal, str gating, str normalize, float eps, int stride, bool writes, bool final, str backend"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? kv, Tensor? z, Tensor? cu_seqlens"
_LIB.define(f"forward({_INPUTS}, {_FORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIB.define(
    "backward(Tensor do, Tensor? dkv, Tensor? dz, Tensor? dbkv, Tensor? dbz, Tensor? dwrites, "
    f"{_INPUTS}, Tensor o, Tensor d, {_FORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _zero_states(q, k, v, cu_seqlens, form: Form) -> tuple[Tensor, Tensor]:
    """kv [D N H K V] and z [D N H K] of a call that starts from nothing."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kv = q.new_zeros(1 if form.causal else 2, N, *k.shape[2:], v.shape[3], dtype=accumulator(q.dtype))
    return kv, torch.zeros_like(kv[..., 0])


def _forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, *rest):
    form, backend = Form(*rest[:-1]), BY_NAME[rest[-1]]
    if kv is None and not backend.STATELESS:
        kv, z = _zero_states(q, k, v, cu_seqlens, form)
    out = backend.forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form)
    return tuple(x.contiguous() if used else _nothing(q) for x, used in zip(out, _used(form), strict=True))


def _nothing(like):
    return like.new_empty(0, dtype=accumulator(like.dtype))


def _used(form: Form):
    """Which of the outputs of `forward` there are: o, kv, z, d, boundaries kv and z, writes."""
    normal, marks = form.normalize != "none", form.stride > 0
    return True, form.final, form.final and normal, normal, marks, marks, form.writes


def _forward_fake(q, k, v, log_decay, beta, kv, z, cu_seqlens, *rest):
    (B, T, HQ, _), (H, K), V, form = q.shape, k.shape[2:], v.shape[3], Form(*rest[:-1])
    normal, D = form.normalize != "none", 1 if form.causal else 2
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = boundary_rows(T, 1 if cu_seqlens is None else N, form.stride)
    boundaries = (D, B, rows, H, K, V), (D, B, rows if normal else 0, H, K)
    shapes = (D, N, H, K, V), (D, N, H, K), (B, T, HQ), *boundaries, (D, B, T, H, V)
    new = lambda shape, used: q.new_empty(shape, dtype=accumulator(q.dtype)) if used else _nothing(q)
    return q.new_empty(B, T, HQ, V), *map(new, shapes, _used(form)[1:])


def _backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, *rest):
    form, backend = Form(*rest[:-1]), BY_NAME[rest[-1]]
    given = kv is not None
    if not backend.STATELESS:
        kv, z = (kv, z) if given else _zero_states(q, k, v, cu_seqlens, form)
        dkv, dz = (dkv, dz) if dkv is not None else (torch.zeros_like(kv), torch.zeros_like(z))
    inputs = (q, k, v, log_decay, beta, kv, z, cu_seqlens)
    grads = list(backend.backward(do, dkv, dz, dbkv, dbz, dwrites, *inputs, o, d, form))
    if not given:
        grads[5:] = None, None
    return tuple(d.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_fake(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, *rest):
    like = lambda x: d.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return tuple(like(x) for x in (q, k, v, log_decay, beta, kv, z))


def _save(ctx, inputs, output):
    tensors, ctx.rest = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, output[0], output[3])
    ctx.set_materialize_grads(False)


def _autograd(ctx, *sent, backward=torch.ops.linattn.backward):
    do, dkv, dz, _, dbkv, dbz, dwrites = sent
    *inputs, o, d = ctx.saved_tensors
    d = _nothing(o) if d is None else d
    form = Form(*ctx.rest[:-1])
    do = torch.zeros_like(o) if do is None else do
    dkv, dz = _both(dkv, dz, o.shape[-1]) if form.final else (None, None)
    dbkv, dbz = (dbkv, dbz) if form.stride else (None, None)
    if dbz is not None and dbkv is None:  # backends take both or neither
        dbkv = dbz.new_zeros(*dbz.shape, o.shape[-1])
    grads = backward(do, dkv, dz, dbkv, dbz, dwrites if form.writes else None, *inputs, o, d, *ctx.rest)
    grads = [None if x is None else g for x, g in zip(inputs[:7], grads, strict=True)]
    return *grads, *([None] * (1 + len(ctx.rest)))


def _both(dkv, dz, V):
    """Gradients of a state: both, or neither. A call that is not normalised has an empty z, but its kernels are handed a whole one."""
    dz = None if dz is None or not dz.numel() else dz
    if dkv is None and dz is not None:
        dkv = dz.new_zeros(*dz.shape, V)
    if dz is None and dkv is not None:
        dz = torch.zeros_like(dkv[..., 0])
    return dkv, dz


def _no_second_derivative(ctx, *_):
    raise RuntimeError("linear_attention has no second derivative but with backend='reference'")


_LIB.impl("forward", _forward, "CompositeExplicitAutograd")
_LIB.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("linattn::forward", _forward_fake, lib=_LIB)
torch.library.register_fake("linattn::backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("linattn::forward", _autograd, setup_context=_save, lib=_LIB)
torch.library.register_autograd("linattn::backward", _no_second_derivative, lib=_LIB)


# -- the same without registration ------------------------------------------------------------------------------------------------------

_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)  # private, so it may be gone one day


def _looked_on(inputs) -> bool:
    """Whether a tracer, a transform, a mode or a tensor of another kind wants to see the registered operator."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed():
        return True
    return type(inputs[0]) is not Tensor or has_torch_function(inputs)


class _Direct(torch.autograd.Function):
    """The registered operator less the crossings into it and back, tens of microseconds: for a backend whose own operators do the work."""

    @staticmethod
    def forward(ctx, *args):
        *inputs, form, name = args
        output = BY_NAME[name].forward(*inputs, form)
        _save(ctx, (*inputs, *form, name), output)
        return output

    @staticmethod
    def backward(ctx, *sent):
        if torch.is_grad_enabled():  # create_graph: the registered one says that there is no second derivative
            return _autograd(ctx, *sent)[:10]
        direct = lambda *args: BY_NAME[args[-1]].backward(*args[:16], Form(*args[16:-1]))
        return _autograd(ctx, *sent, backward=direct)[:10]

"""Backend `cpu`: the C++ kernels of csrc/cpu, reached by operator name once their library is loaded."""

import torch

from .form import GATINGS, NORMALIZERS, Call, Form

NAME = "cpu"
STATELESS = False  # it is handed zeros for a state that is not there

_LIB = torch.library.Library("linattn", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor kv, Tensor z, Tensor? cu_seqlens"
_FORM = "float scale, bool causal, int gating, int normalize, float eps, int stride"
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_LIB.define(f"cpu_forward({_INPUTS}, {_FORM}, bool writes) -> {_SEVEN}")
_LIB.define(
    f"cpu_backward(Tensor do, Tensor dkv, Tensor dz, Tensor? dbkv, Tensor? dbz, Tensor? dwrites, {_INPUTS}, "
    f"Tensor o, Tensor d, {_FORM}) -> {_SEVEN}"
)
_LIB.define(
    "cpu_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor kv, Tensor? z, "
    "float scale, int normalize, float eps) -> (Tensor, Tensor, Tensor?)"
)
_LIB.define("isa(str? use=None) -> str")


def _load() -> str | None:
    from .. import build

    if not build.LIBRARY.exists():
        return f"its library is not built: {build.why_not() or 'run `linattn build`'}"
    try:
        torch.ops.load_library(str(build.LIBRARY))
    except OSError as error:
        return f"its library does not load: {error}"
    return None


MISSING = _load()  # why the kernels are not there; None if they are. Looked up once, for torch.compile reads neither files nor caches


def why_not(call: Call) -> str | None:
    if call.device != "cpu":
        return f"device={call.device}, not cpu"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype={str(call.dtype).removeprefix('torch.')}, neither float32 nor bfloat16"
    return MISSING


def _rows(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _ready(q, k, v, log_decay, beta, kv, z, cu_seqlens):
    plain = (None if x is None else x.contiguous() for x in (log_decay, beta, kv, z, cu_seqlens))
    return _rows(q), _rows(k), _rows(v), *plain


def _codes(form: Form):
    return form.scale, form.causal, GATINGS.index(form.gating), NORMALIZERS.index(form.normalize), form.eps, form.stride


def forward(*args):
    *tensors, form = args
    return torch.ops.linattn.cpu_forward(*_ready(*tensors), *_codes(form), form.writes)


def backward(do, dkv, dz, dbkv, dbz, dwrites, *rest):
    *tensors, o, d, form = rest
    q, k, v, log_decay, beta, kv, z, cu_seqlens = _ready(*tensors)
    plain = [None if x is None else x.contiguous() for x in (dkv, dz, dbkv, dbz, dwrites)]
    grads = torch.ops.linattn.cpu_backward(_rows(do), *plain, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, *_codes(form))
    dq, dk, dv, dg, dbeta, dkv, dz = grads
    if log_decay is None:
        dg = None
    else:  # [directions B T H (K)], summed to the shape of log_decay
        dg = dg.sum((0, 1, 2)) if log_decay.ndim == 1 else dg[0] if form.causal else dg.sum(0)
    dbeta = None if beta is None else dbeta[0] if form.causal else dbeta.sum(0)
    return dq, dk, dv, dg, dbeta, dkv, dz


def step(q, k, v, log_decay, beta, kv, z, form: Form):
    tensors = [x if x is None or x.is_contiguous() else x.contiguous() for x in (q, k, v, log_decay, beta, kv, z)]
    return _STEP(*tensors, form.scale, NORMALIZERS.index(form.normalize), form.eps)


def _step_fake(q, k, v, log_decay, beta, kv, z, scale, normalize, eps):
    like = lambda x: None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return q.new_empty(*q.shape[:2], v.shape[2]), like(kv), like(z)


torch.library.register_fake("linattn::cpu_step", _step_fake, lib=_LIB)
_STEP = torch.ops.linattn.cpu_step.default

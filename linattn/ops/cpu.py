"""Backend `cpu`: the C++ kernels of csrc/cpu, reached by operator name once their library is loaded."""

import torch
from torch import Tensor

from .form import GATINGS, NORMALIZERS, Call, Form

NAME = "cpu"
STATELESS = True  # a state that is not there is neither read nor written
DIRECT = True  # `forward` and `backward` are one operator each, and return None for what is not wanted

_LIB = torch.library.Library("linattn", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? kv, Tensor? z, Tensor? cu_seqlens"
_FORM = "float scale, bool causal, int gating, int normalize, float eps, int stride"
_LIB.define(f"cpu_forward({_INPUTS}, {_FORM}, bool writes, bool final) -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)")
_LIB.define(
    f"cpu_backward(Tensor do, Tensor? dkv, Tensor? dz, Tensor? dbkv, Tensor? dbz, Tensor? dwrites, {_INPUTS}, "
    f"Tensor o, Tensor? d, {_FORM}) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?, Tensor?)"
)
_LIB.define(
    "cpu_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor kv, Tensor? z, "
    "float? scale, int normalize, float eps) -> (Tensor?, Tensor?, Tensor?)"
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


def _plain(x):
    return x if x is None or x.is_contiguous() else x.contiguous()


def _ready(q, k, v, log_decay, beta, kv, z, cu_seqlens):
    return _rows(q), _rows(k), _rows(v), _plain(log_decay), _plain(beta), _plain(kv), _plain(z), _plain(cu_seqlens)


def _codes(form: Form):
    return form.scale, form.causal, GATINGS.index(form.gating), NORMALIZERS.index(form.normalize), form.eps, form.stride


def forward(*args):
    *tensors, form = args
    return torch.ops.linattn.cpu_forward.default(*_ready(*tensors), *_codes(form), form.writes, form.final)


def backward(do, dkv, dz, dbkv, dbz, dwrites, *rest):
    *tensors, o, d, form = rest
    log_decay, plain = tensors[3], map(_plain, (dkv, dz, dbkv, dbz, dwrites))
    grads = torch.ops.linattn.cpu_backward.default(_rows(do), *plain, *_ready(*tensors), o, d, *_codes(form))
    dq, dk, dv, dg, dbeta, dkv, dz = grads
    if log_decay is not None and log_decay.ndim == 1:
        dg = dg.flatten(0, -2).sum(0)
    elif dg is not None and not form.causal:
        dg = dg.sum(0)
    return dq, dk, dv, dg, dbeta if form.causal or dbeta is None else dbeta.sum(0), dkv, dz


def step(q, k, v, log_decay, beta, kv, z, form: Form):
    return _STEP(*map(_plain, (q, k, v, log_decay, beta, kv, z)), form.scale, NORMALIZERS.index(form.normalize), form.eps)


def step_at_once(q, k, v, log_decay, beta, kv, z, normalizer: str, scale: float | None, eps: float):
    """`step` without a look at anything but types: its operator checks the rest. None where that says no, or it is not for this backend."""
    if MISSING or torch.compiler.is_compiling() or normalizer not in NORMALIZERS:
        return None
    if not (type(q) is type(k) is type(v) is type(kv) is Tensor and type(eps) is float and (scale is None or type(scale) is float)):
        return None
    wanted = torch.is_grad_enabled()
    for x in (q, k, v, kv, log_decay, beta, z):
        if x is not None and (type(x) is not Tensor or not x.is_cpu or (wanted and x.requires_grad)):
            return None
    found = _STEP(q, k, v, log_decay, beta, kv, z, scale, NORMALIZERS.index(normalizer), eps)
    return None if found[0] is None else found


def _step_fake(q, k, v, log_decay, beta, kv, z, scale, normalize, eps):
    like = lambda x: None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return q.new_empty(*q.shape[:2], v.shape[2]), like(kv), like(z)


torch.library.register_fake("linattn::cpu_step", _step_fake, lib=_LIB)
_STEP = torch.ops.linattn.cpu_step.default

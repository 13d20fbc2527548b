"""Backend `triton`: fused kernels for a GPU. Triton itself is imported when the first call arrives."""

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch

from ..form import Call, Form
from ..tiles import ARCHITECTURES, MAX_WIDTH, TABLE, row

NAME = "triton"
DEVICE = "cuda"
BY_NAME_ONLY = "its kernels have not been measured on a GPU yet"  # why "auto" does not take it, for `linattn info`
STATELESS = True  # a state that is not there is neither read nor written
DIRECT = True  # `forward` and `backward` return None for what is not wanted


def why_not(call: Call) -> str | None:
    if not installed():
        return "triton is not installed"
    if call.dtype == torch.float64:
        return "float64: tensor cores and the chunk states are at most float32"
    if call.dtype == torch.float16:
        return "float16: a chunk state may exceed its largest number, 65504; use bfloat16"
    if max(call.K, call.V) > MAX_WIDTH:
        return f"K={call.K} V={call.V}: heads wider than {MAX_WIDTH}"
    if interpreted():
        return None
    if call.device != "cuda":
        return f"tensors on {call.device}: Triton runs on a GPU"
    if not torch.cuda.is_available():
        return "no GPU driver"
    arch = architecture()
    if arch not in ARCHITECTURES:
        return f"no tiles for {arch}; there are tiles for {list(ARCHITECTURES)}"
    for both in (False, not call.causal):
        at = row(call.decay, call.delta, both, call.K, call.V, call.dtype.itemsize)
        if at not in TABLE[arch]:
            return f"no tiles on {arch} for {at[0]!r} at width {at[1]}"
    return None


@cache
def installed() -> bool:
    return find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter was on when it was first asked for: kernels then run on CPU tensors, for checks."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def architecture() -> str:
    """Name of the current GPU's row in the tiles table."""
    return "interpreter" if interpreted() else _architecture(torch.cuda.current_device())


@cache
def _architecture(device: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{0 if major >= 10 else minor}"


def forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form: Form):
    with _device_of(q):
        return _launch().forward(q, k, v, log_decay, beta, kv, z, cu_seqlens, form)


def backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form: Form):
    with _device_of(q):
        return _launch().backward(do, dkv, dz, dbkv, dbz, dwrites, q, k, v, log_decay, beta, kv, z, cu_seqlens, o, d, form)


def step(q, k, v, log_decay, beta, kv, z, form: Form):
    if torch.compiler.is_compiling():  # as one operator, which the tracer does not look into
        o, kv, z = torch.ops.linattn.triton_step(q, k, v, log_decay, beta, kv, z, form.scale, form.normalize, form.eps)
        return o, kv, None if form.normalize == "none" else z
    return _step(q, k, v, log_decay, beta, kv, z, form)


def _step(q, k, v, log_decay, beta, kv, z, form: Form):
    with _device_of(q):
        return _launch().step(q, k, v, log_decay, beta, kv, z, form)


def _step_operator(q, k, v, log_decay, beta, kv, z, scale, normalize, eps):
    o, kv, z = _step(q, k, v, log_decay, beta, kv, z, Form(scale, True, "target", normalize, eps, 0, False))
    return o, kv, kv.new_empty(0) if z is None else z


def _step_fake(q, k, v, log_decay, beta, kv, z, scale, normalize, eps):
    like = lambda x: kv.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return q.new_empty(*q.shape[:2], v.shape[2]), like(kv), like(z)


_LIB = torch.library.Library("linattn", "FRAGMENT")
_LIB.define(
    "triton_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor kv, Tensor? z, "
    "float scale, str normalize, float eps) -> (Tensor, Tensor, Tensor)"
)
_LIB.impl("triton_step", _step_operator, "CompositeExplicitAutograd")
torch.library.register_fake("linattn::triton_step", _step_fake, lib=_LIB)


@cache
def _launch():
    from . import launch

    return launch


_HERE = nullcontext()


def _device_of(x):
    """Triton launches on the current device; the tensors' may be another."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE

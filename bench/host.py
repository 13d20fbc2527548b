"""The host's share of a call of the Triton kernels: the operator's Python, ours and Triton's, up to a driver that launches nothing.

No GPU is needed. Kernels are not compiled; all else is what runs on one: a binary is Triton's own class with Triton's own launcher, of 3.9,
and only the C function at its end does nothing.
"""

import ctypes
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from linattn.ops import triton as backend
from linattn.ops.form import Form
from linattn.ops.triton import decoding, direct, launch, passes, plan

from . import machine

CALLS = {  # name → decay, delta, causal, normalize, B, T, H
    "causal": ("scalar", False, True, "none", 1, 4096, 4),
    "bidirectional, normalised": ("scalar", False, False, "sum", 1, 4096, 4),
    "no decay, normalised": ("none", False, False, "sum", 1, 4096, 4),
    "channel": ("channel", False, True, "none", 1, 4096, 4),
    "delta, cut": ("scalar", True, True, "none", 1, 4096, 4),
    "delta, whole": ("scalar", True, True, "none", 40, 32, 16),
    "short": ("scalar", False, True, "none", 2, 197, 4),
}
LAUNCHER = {  # what Triton's launcher reads off a kernel that needs nothing beside its arguments
    "gsan_enabled": False, "num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0,
    "profile_scratch_align": 1, "launch_cooperative_grid": False, "launch_pdl": False, "arg_annotations": (), "kernel_signature": b"",
}  # fmt: skip
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt
ROUNDS = 4  # of which the fastest counts: what else runs on a machine only ever adds
KERNELS = [x for module in (passes, decoding) for x in vars(module).values() if isinstance(x, JITFunction)]


@contextmanager
def no_driver(arch: str = "sm_90") -> Iterator[list[tuple]]:
    """Launches for `arch` go all the way to the driver's C function, which is not called. → (kernel, what it would be called with)."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    stub = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target)
    launched: list[tuple] = []

    def compiled(kernel, key, *_, **__):
        binary, launcher = (cls.__new__(cls) for cls in (CompiledKernel, CudaLauncher))
        vars(launcher).update(LAUNCHER, launch=lambda *values: launched.append((kernel.__name__, values)))
        vars(binary).update(
            src=None, name=kernel.__name__, module=None, function=1, packed_metadata=(4, 1, 0), _init_handles=lambda: None, _run=launcher
        )
        kernel.device_caches[0][0][key] = binary
        return binary

    kept = JITFunction._do_compile, passes.architecture, driver._active
    JITFunction._do_compile, passes.architecture = compiled, lambda: arch
    driver.set_active(stub)
    forget()
    try:
        yield launched
    finally:
        JITFunction._do_compile, passes.architecture, driver._active = kept
        forget()


def forget() -> None:
    """What was compiled for."""
    for kernel in KERNELS:
        kernel.device_caches.clear()
    plan.plan.cache_clear()
    launch._step.cache_clear()


def measure(name: str, repeats: int = 500) -> dict[str, float]:
    """Launches, and microseconds of the host, of one forward and one backward: medians."""
    decay, delta, causal, normalize, B, T, H = CALLS[name]
    D = 64
    q, k, v, do = (torch.zeros(B, T, H, D, dtype=torch.bfloat16) for _ in range(4))
    log_decay = {"none": None, "scalar": torch.zeros(B, T, H), "channel": torch.zeros(B, T, H, D)}[decay]
    inputs = (q, k, v, log_decay, torch.zeros(B, T, H) if delta else None, None, None, None)
    form = Form(D**-0.5, causal, "target", normalize, 1e-6, 0, False, False)
    found = {}
    with no_driver() as launched:
        o, _, _, d, *_ = backend.forward(*inputs, form)
        sides = {
            "forward": lambda: backend.forward(*inputs, form),
            "backward": lambda: backend.backward(do, None, None, None, None, None, *inputs, o, d, form),
        }
        for side, call in sides.items():
            whole, launches = _time(call, launched, repeats), _noted(call)
            ours = _time(lambda launches=launches: [direct.launch(*one) for one in launches], launched, repeats)
            triton = _time(lambda launches=launches: [_through_triton(*one) for one in launches], launched, repeats)
            found[side] = {"launches": len(launches), "us": whole, "launching": ours, "by triton": triton}
    return found


def _time(call: Callable[[], object], launched: list, repeats: int) -> float:
    """Microseconds of this thread, which other processes do not count to: a median."""
    call()
    times = []
    for _ in range(repeats):
        launched.clear()
        begin = time.thread_time_ns()
        call()
        times.append(1e-3 * (time.thread_time_ns() - begin))
    return median(times)


def _noted(call: Callable[[], object]) -> list[tuple]:
    launches: list[tuple] = []
    kept, passes.launch = passes.launch, lambda *one: launches.append(one)
    try:
        call()
    finally:
        passes.launch = kept
    return launches


def _through_triton(kernel, grid, tensors, numbers, fixed) -> None:
    kernel[grid](*tensors, *numbers, **fixed.constexprs, **fixed.options)


def markdown() -> str:
    keep = ctypes.CDLL(None).mallopt  # freed memory stays at hand, as it does on a GPU: else the system's pages are what is timed
    keep(MMAP_THRESHOLD, 32 << 20), keep(TRIM_THRESHOLD, 1 << 30)
    lines = ["# Host time of the Triton kernels, without a GPU", "", "`python -m bench host`", ""]
    versions = f"torch {torch.__version__}, Triton {importlib.metadata.version('triton')}"
    lines += [f"{machine.facts()['cpu']}, {versions}. Microseconds of one thread, medians, the lowest of {ROUNDS} rounds;"]
    lines += [
        "from the backend's entry, below checks and autograd, down to the driver's C function, which is not in them. *launching*: the share"
    ]
    lines += ["of `direct.launch`; *by Triton*: the same, made by Triton."]
    lines += [f"For scale, in the same run: `torch.empty(4, 4)` takes {_time(lambda: torch.empty(4, 4), [], 2000):.1f}.", ""]
    lines += ["| call | side | launches | µs per launch | of which launching | by Triton |", "|---|---|---:|---:|---:|---:|"]
    rounds = [{name: measure(name) for name in CALLS} for _ in range(ROUNDS)]
    for name, sides in rounds[0].items():
        for side, found in sides.items():
            lowest = [min(one[name][side][part] for one in rounds) / found["launches"] for part in ("us", "launching", "by triton")]
            lines.append(f"| {name} | {side} | {found['launches']} | {' | '.join(f'{x:.1f}' for x in lowest)} |")
    return "\n".join([*lines, ""])

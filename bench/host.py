"""The host's share of a call of the Triton kernels: all of Python and Triton, up to a driver that launches nothing. No GPU is needed."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace

import torch

from linattn.ops import triton as backend
from linattn.ops.form import Form

from . import machine

CALLS = {  # name → decay, delta, causal, normalize, B, T, H
    "causal": ("scalar", False, True, "none", 1, 4096, 4),
    "bidirectional, normalised": ("scalar", False, False, "sum", 1, 4096, 4),
    "no decay, normalised": ("none", False, False, "sum", 1, 4096, 4),
    "channel": ("channel", False, True, "none", 1, 4096, 4),
    "delta, cut": ("scalar", True, True, "none", 1, 4096, 4),
    "delta, whole": ("scalar", True, True, "none", 40, 64, 16),
    "short": ("scalar", False, True, "none", 2, 197, 4),
}


@contextmanager
def no_driver(arch: str = "sm_90") -> Iterator[list[str]]:
    """Launches go through all of Triton's own code for `arch` up to the driver, and nothing is compiled. → names of what was launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from linattn.ops.triton import passes

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    stub = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target)
    launched: list[str] = []

    def compiled(kernel, key, *_, **__):
        run = lambda *_: launched.append(kernel.__name__)
        binary = SimpleNamespace(run=run, launch_metadata=lambda *_: None, function=0, packed_metadata=())
        kernel.device_caches[0][0][key] = binary
        return binary

    kept = JITFunction._do_compile, passes.architecture, driver._active
    JITFunction._do_compile, passes.architecture = compiled, lambda: arch
    driver.set_active(stub)
    try:
        yield launched
    finally:
        JITFunction._do_compile, passes.architecture, driver._active = kept
        for kernel in _kernels():
            kernel.device_caches.clear()


def _kernels():
    from triton.runtime.jit import JITFunction

    from linattn.ops.triton import decoding, delta, gradients, nodecay, output, short, state

    for module in (decoding, delta, gradients, nodecay, output, short, state):
        yield from (x for x in vars(module).values() if isinstance(x, JITFunction))


def measure(name: str, repeats: int = 200) -> dict[str, float]:
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
            whole, launches = _time(call, repeats), []
            with _noted(launches):
                call()
            alone = _time(lambda launches=launches: [kernel.run(*args, **dict(named)) for kernel, args, named in launches], repeats)
            found |= {f"{side} launches": len(launches), f"{side} us": whole, f"{side} triton us": alone}
            launched.clear()
    return found


def _time(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of this thread, which other processes do not count to: a median."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.thread_time()
        call()
        times.append(1e6 * (time.thread_time() - begin))
    return median(times)


@contextmanager
def _noted(launches: list) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    kept = JITFunction.run
    JITFunction.run = lambda kernel, *args, **named: launches.append((kernel, args, tuple(named.items())))
    try:
        yield
    finally:
        JITFunction.run = kept


def markdown() -> str:
    lines = ["# Host time of the Triton kernels, without a GPU", "", "`python -m bench host`", ""]
    versions = f"torch {torch.__version__}, Triton {importlib.metadata.version('triton')}"
    lines += [f"{machine.facts()['cpu']}, {versions}. Microseconds of one thread, medians; the driver's own part is not in them."]
    lines += [f"For scale, in the same run: `torch.empty(4, 4)` takes {_time(lambda: torch.empty(4, 4), 2000):.1f}.", ""]
    lines += ["| call | side | launches | µs per launch | of which Triton's own |", "|---|---|---:|---:|---:|"]
    for name in CALLS:
        found = measure(name)
        for side in ("forward", "backward"):
            n = found[f"{side} launches"]
            lines.append(f"| {name} | {side} | {n} | {found[f'{side} us'] / n:.1f} | {found[f'{side} triton us'] / n:.1f} |")
    return "\n".join([*lines, ""])

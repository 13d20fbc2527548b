"""The only place that measures memory: one call in a fresh process, which sees C++ scratch that torch's own profiler does not.

A warm-up on 256 tokens, `malloc_trim`, then the high-water mark of resident memory is reset (/proc/self/clear_refs) and read again after
the call (VmHWM): extra = high-water mark − resident before − bytes of the outputs. Linux only. `step` is too small for that:
there the bytes that torch's allocator was asked for are counted.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

from . import peers
from .cases import FORMS, B, H, Inputs, K, V
from .machine import ROOT
from .records import Memory

CLEAR = Path("/proc/self/clear_refs")


def measure(form: str, call: str, size: int, threads: int, backend: str, missing: str | None = None) -> Memory:
    """Starts the process. `size` is T, or B · H for call "step"; `missing` is why there is nothing to measure."""
    b, t = (size // H, 1) if call == "step" else (B, size)
    sizes = dict(form=form, call=call, B=b, T=t, H=H, K=K, V=V, threads=threads)
    if missing or not CLEAR.exists():
        return Memory(**sizes, skipped=missing or f"no {CLEAR} on this system")
    command = [sys.executable, "-m", "bench.memory", form, call, str(size), str(threads), backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return Memory(**sizes, skipped=(done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return Memory(**sizes, **json.loads(done.stdout))


def _resident(name: str) -> int:
    """VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


def _bytes(found) -> int:
    if isinstance(found, torch.Tensor):
        return found.nbytes
    return sum(_bytes(x) for x in found) if isinstance(found, (tuple, list)) else 0


def _run(form: str, call: str, T: int, backend: str) -> dict:
    def prepared(T):
        inputs = Inputs.create(B=B, T=T)
        tensors = (*inputs.of(FORMS[form]), *([inputs.do] if call != "forward" else []))
        return next(side for side in peers.operator(form, inputs, backend) if side.call == call), _bytes(tensors)

    prepared(256)[0].run()
    side, given = prepared(T)
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    found = side.run()
    peak = _resident("VmHWM")
    o = 0 if call == "forward" else B * T * H * V * FORMS[form].dtype.itemsize  # alive during the backward, not returned
    outputs = _bytes(found) + o
    return {"inputs": given, "outputs": outputs, "extra": max(0, peak - before - outputs)}


def _step(form: str, states: int, backend: str) -> dict:
    from torch.profiler import ProfilerActivity, profile

    side = peers.step(form, states, backend)[0]
    side.run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = side.run()
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    allocated = sum(max(0, event.nbytes()) for event in events)
    return {"inputs": None, "outputs": _bytes(found), "extra": allocated - _bytes(found)}


if __name__ == "__main__":
    form, call, size, threads, backend = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_step(form, int(size), backend) if call == "step" else _run(form, call, int(size), backend)))

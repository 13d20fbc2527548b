"""The one dispatch point: an ordered tuple of backends, and each backend's reasons for saying no."""

import torch

from . import cpu, eager, oracle, triton
from .form import Call

# In order of preference; `reference` takes every call. The Triton kernels have not met a GPU yet: until they have been measured on one,
# "auto" prefers torch's own and they run where they are asked for by name.
BACKENDS = (cpu, eager, triton, oracle)
BY_NAME = {backend.NAME: backend for backend in BACKENDS}


class Refusal(ValueError):
    """No backend takes the call; the message holds every reason."""


def choose(call: Call, wanted: str = "auto") -> str:
    """Name of the first backend that takes `call`, or of `wanted`. ValueError lists the known names, Refusal every reason."""
    if wanted != "auto" and wanted not in BY_NAME:
        raise ValueError(f"backend must be 'auto' or one of {list(BY_NAME)}; got {wanted!r}")
    refusals = []
    for backend in BACKENDS if wanted == "auto" else (BY_NAME[wanted],):
        reason = backend.why_not(call)
        if reason is None:
            return backend.NAME
        refusals.append(f"  {backend.NAME}: {reason}")
    raise Refusal(f"no backend takes this call\n  {call}\n" + "\n".join(refusals))


def why_not(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, for a plain float32 call; None if it can."""
    if name not in BY_NAME:
        raise ValueError(f"name must be one of {list(BY_NAME)}; got {name!r}")
    plain = Call(getattr(BY_NAME[name], "DEVICE", "cpu"), torch.float32, "none", False, True, 64, 64)
    return BY_NAME[name].why_not(plain)

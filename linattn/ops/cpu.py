"""Backend `cpu`: the C++ kernels of csrc/cpu, reached by operator name."""

from .form import Call

NAME = "cpu"


def why_not(call: Call) -> str | None:
    return "the library is not built: run `linattn build`"

"""The only place that asks the machine how much memory was used."""

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """`with Peak(device) as peak: ...` - then peak.bytes is the most memory in use inside, beyond what was in use before.

    On a GPU: what torch allocated. On Linux: resident memory of this process; pages that the C library kept from before are not counted
    again, so a fresh process gives the truest figure. Elsewhere: the growth of the process's highest resident size.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    @property
    def method(self) -> str:
        return "torch.cuda.max_memory_allocated" if self.device.type == "cuda" else "peak resident memory of a process of its own"

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            if CLEAR.exists():
                CLEAR.write_text("5")  # the peak so far is forgotten: proc(5)
            self.before = _highest()
        return self

    def __exit__(self, *exception) -> None:
        self.bytes = (torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _highest()) - self.before


def highest(device: torch.device) -> int:
    """The most this process has had in use so far: on a GPU what torch allocated, else resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _highest()


def held(tree) -> int:
    """Bytes of the tensors in nested tuples and objects: what a state keeps, each storage once, room to grow included."""
    seen: dict[int, int] = {}

    def visit(node) -> None:
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, (tuple, list)):
            for child in node:
                visit(child)
        elif hasattr(node, "__dict__"):
            visit(list(vars(node).values()))

    visit(tree)
    return sum(seen.values())


def _highest() -> int:
    if STATUS.exists():  # not getrusage: that starts from the parent's figure
        return 1024 * int(next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

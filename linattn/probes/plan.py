"""What is kept of every call, how many bytes that is, and whether they fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import State
from .edits import check_heads

CHUNK = 64  # tokens between two boundaries with every=1
KEEPS: dict[str, tuple[str, ...]] = {  # what `keep` may name: the fields of a Piece that stay
    "final": ("final",),  # the last state, and the convolution's
    "boundaries": ("boundaries",),  # states before every `every`·64-th token
    "writes": ("k", "log_decay", "u"),  # with what it began with: exact states at any position
    "gates": ("log_decay", "beta"),
    "reads": ("q", "k", "v", "log_decay", "beta"),  # implicit attention and readers
    "output": ("o",),  # of the operator, before norm and gate
    "inputs": ("x",),  # of the layer, which its gates see
    "conv": ("conv",),  # the convolution's inputs: its state at any position
}


class Piece(NamedTuple):
    """One call of the operator, or the part of it between two edits. Shapes as in `linattn.linear_attention`."""

    start: int  # tokens before it
    length: int
    cu_seqlens: Tensor | None
    mask: Tensor | None
    before: State | None  # what it began with
    final: State | None = None
    boundaries: State | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    u: Tensor | None = None
    o: Tensor | None = None
    x: Tensor | None = None
    order: Tensor | None = None  # [T]: which tokens these are, where the layer walks them along a curve; None: as they come


class Plan:
    """keep, every, heads, dtype, device, detach and budget of `linattn.probe`, checked."""

    def __init__(self, keep: Sequence[str], every: int, heads, dtype, device, detach: bool, budget: float | None, needs: set[str]):
        keep = (keep,) if isinstance(keep, str) else tuple(keep)
        if bad := [name for name in keep if name not in KEEPS]:
            raise ValueError(f"keep must be of {list(KEEPS)}; got {bad}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of chunks of {CHUNK} tokens, at least 1; got {every!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be None or a floating torch dtype; got {dtype!r}")
        if heads is not None and (isinstance(heads, int) or not len(heads) or not all(isinstance(h, int) and h >= 0 for h in heads)):
            raise ValueError(f"heads must be None or numbers of heads of the state, at least one; got {heads!r}")
        if budget is not None and not budget >= 0:
            raise ValueError(f"budget must be a number of bytes, or None for half of what is free; got {budget!r}")
        self.keep, self.stride, self.heads, self.dtype, self.detach = keep, CHUNK * every, heads, dtype, detach
        try:
            self.device = None if device is None else torch.device(device)
        except RuntimeError:
            raise ValueError(f"device must be one of torch's, or None for where things are; got {device!r}") from None
        self.fields = {field for name in keep for field in KEEPS[name]}
        wanted = self.fields | needs
        self.record = tuple(name for name, field in (("boundaries", "boundaries"), ("writes", "u")) if field in wanted)
        self.state_wanted = "final" in wanted
        self.budget = budget
        self.used: dict[str, int] = {}  # bytes kept, by layer
        self.pinned = False

    def start(self, device: torch.device) -> None:
        """At the beginning of the block: what is free is looked up once, for torch.compile reads no files."""
        self.used.clear()
        self.where = self.device or device
        self.room = free_bytes(self.where) / 2 if self.budget is None else self.budget

    def check_room(self, name: str, layers: int, needed: dict[str, int], fresh: bool) -> None:
        """ValueError if what this call and those of the layers still to come would keep is more than the budget."""
        here = sum(needed.values())
        others = sum(size for layer, size in self.used.items() if layer != name)
        mine = 0 if fresh else self.used.get(name, 0)
        total = others + mine + here * (1 + layers - len({*self.used, name}))
        if total > self.room:
            parts = ", ".join(f"{field} {size_text(size)}" for field, size in sorted(needed.items(), key=lambda item: -item[1]) if size)
            raise ValueError(
                f"keep={list(self.keep)} would take {size_text(total)} on {self.where}, {size_text(here)} a layer ({parts}), and the "
                f"budget is {size_text(self.room)}: keep less, larger every, fewer layers or heads, dtype=torch.bfloat16, device='cpu'"
            )
        self.used[name] = mine + here

    def store(self, piece: Piece) -> Piece:
        """The fields that stay, of the heads that were asked for, where and as they were asked for."""
        kept: dict[str, Any] = {}
        for name in Piece._fields[5:-1]:
            value = getattr(piece, name)
            if value is None or name not in self.fields:
                kept[name] = None
            elif isinstance(value, State):
                kept[name] = self._state(value)
            else:
                kept[name] = self.put(self._cut(name, value, piece), copy=True)
        replays = self.fields & {"boundaries", "u", "q"}
        return piece._replace(
            cu_seqlens=None if piece.cu_seqlens is None else self.put(piece.cu_seqlens, copy=True),
            mask=None if piece.mask is None else self.put(piece.mask, copy=True),
            order=None if piece.order is None else self.put(piece.order, copy=True),
            before=self._state(piece.before) if piece.before is not None and replays else None,
            **kept,
        )

    def _state(self, state: State) -> State:
        kv, z = (t if t is None or self.heads is None else self._pick(t, dim) for t, dim in zip(state, (-3, -2)))
        return State(self.put(kv), None if z is None else self.put(z))

    def put(self, t: Tensor, copy: bool = False) -> Tensor:
        t = t.detach() if self.detach else t
        dtype = self.dtype if self.dtype is not None and t.is_floating_point() else t.dtype
        if dtype != t.dtype:
            t, copy = t.to(dtype), False
        if self.device is not None and self.device != t.device:
            host = self.device.type == "cpu" and t.device.type == "cuda"
            if host and self.detach:
                self.pinned = True  # the copy runs beside what comes next; `Probe.__exit__` waits for it
                return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            return t.to(self.device)
        return t.clone(memory_format=torch.contiguous_format) if copy else t

    def _pick(self, t: Tensor, dim: int) -> Tensor:
        return t.index_select(dim, torch.tensor(check_heads(self.heads, t.shape[dim]), device=t.device))

    def _cut(self, name: str, t: Tensor, piece: Piece) -> Tensor:
        if self.heads is None or name == "x":
            return t
        if name in ("q", "o"):
            H = piece.k.shape[2]
            return self._pick(t.unflatten(2, (H, -1)), 2).flatten(2, 3)
        return self._pick(t, 0 if t.ndim == 1 else 3 if name == "u" and t.ndim == 5 else 2)


class Shape(NamedTuple):
    """Of one call."""

    B: int
    T: int
    HQ: int
    H: int
    K: int
    V: int
    dim: int
    decay: int  # numbers of log_decay per token and head of k; 0 where it is constant in time
    delta: bool
    normal: bool
    sequences: int
    packed: bool
    directions: int
    item: int  # bytes of a number of q
    channels: int = 0  # of the short convolution beside it
    past: int = 0  # inputs it keeps of each


def needed(plan: Plan, s: Shape) -> dict[str, int]:
    """Bytes of every field that a call of shape `s` leaves behind."""
    h = s.H if plan.heads is None else len(plan.heads)
    item, acc = (s.item, max(s.item, 4)) if plan.dtype is None else (plan.dtype.itemsize, plan.dtype.itemsize)
    tokens, g = s.B * s.T, h * (s.HQ // s.H)
    state = s.directions * h * (s.K * s.V + s.normal * s.K) * acc
    rows = s.T // plan.stride + s.sequences if s.packed else s.B * -(-s.T // plan.stride)
    found = {
        "final": s.sequences * (state + s.channels * s.past * item),
        "boundaries": rows * state, "q": tokens * g * s.K * item, "k": tokens * h * s.K * item,
        "v": tokens * h * s.V * item, "log_decay": tokens * h * s.decay * acc, "beta": tokens * h * s.delta * acc,
        "u": s.directions * tokens * h * s.V * acc, "o": tokens * g * s.V * item, "x": tokens * s.dim * item,
        "conv": tokens * s.channels * item,
    }  # fmt: skip
    return {name: size for name, size in found.items() if name in plan.fields}


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated there, by what the system says of itself; 2**62 where it says nothing."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 2**62


def size_text(size: float) -> str:
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size:.0f} B"

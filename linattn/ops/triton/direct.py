"""The only place that launches: what Triton has compiled once is called again without Triton's own look at every argument."""

from math import prod

import torch
from triton import knobs
from triton.runtime.driver import driver

SAID = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is left unsaid, and 3.10 will do without
SIZES_MATTER = torch.version.hip is not None  # there Triton compiles for the sizes of tensors too, and has to look at them every time


def seen(*tensors: torch.Tensor | None) -> tuple:
    """What Triton compiles for in tensors of a caller: whether 16 divides all addresses, and the dtypes, None where there is no tensor."""
    addresses = 0
    for x in tensors:
        if x is not None:
            addresses |= x.data_ptr()
    return not addresses & 15, *[x if x is None else x.dtype for x in tensors]


class Fixed:
    """The constexprs and options of one kernel in one kind of call, and the binary they lead to. `again`: it is found out only once."""

    __slots__ = ("again", "binary", "constexprs", "device", "options", "values")

    def __init__(self, kernel, known: dict, warps: int, stages: int, again: bool):
        self.constexprs = {name: known[name] for name in kernel.arg_names if name in known}
        self.options = {"num_warps": warps, "num_stages": stages, **SAID}
        self.values, self.again, self.binary, self.device = tuple(self.constexprs.values()), again and not SIZES_MATTER, None, 0


class Scratch:
    """Memory of one pass that nobody sees but its kernels: one tensor, because each call of PyTorch costs as much as a launch."""

    __slots__ = ("address", "base", "device", "size")

    def __init__(self, device: torch.device):
        self.device, self.size, self.base, self.address = device, 0, None, 0

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> "Piece":
        """Room for a tensor. All of it is taken before any of it is used."""
        if self.base is not None:
            raise RuntimeError("scratch memory is in use; take all of it first")
        piece = Piece(self, self.size, prod(shape), dtype)
        self.size += (piece.count * dtype.itemsize + 255) // 256 * 256
        return piece

    def open(self) -> None:
        self.base = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        self.address = self.base.data_ptr()


class Piece:
    """A tensor in a `Scratch`, as far as a launch needs one."""

    __slots__ = ("_tensor", "count", "dtype", "offset", "scratch")

    def __init__(self, scratch: Scratch, offset: int, count: int, dtype: torch.dtype):
        self.scratch, self.offset, self.count, self.dtype, self._tensor = scratch, offset, count, dtype, None

    def data_ptr(self) -> int:
        if self.scratch.base is None:
            self.scratch.open()
        return self.scratch.address + self.offset

    def tensor(self) -> torch.Tensor:
        """Flat, for Triton itself, which asks for more."""
        if self._tensor is None:
            if self.scratch.base is None:
                self.scratch.open()
            self._tensor = self.scratch.base[self.offset : self.offset + self.count * self.dtype.itemsize].view(self.dtype)
        return self._tensor


def launch(kernel, grid: tuple[int, ...], tensors: tuple, numbers: tuple, fixed: Fixed) -> None:
    """kernel[grid](*tensors, *numbers, **fixed). A tensor may be None; integers are below 2³¹, and the kernel specialises on none.

    Triton looks at every argument of every launch, and asks whether the kernel is compiled for the like, which takes longer than all the
    rest of a call. Here one `Fixed` is for one kind of call: which tensors are there, of what dtype and alignment, follows from it
    (tests/triton_kernels/test_launches.py). So its binary is called as Triton would call it, but with addresses, which no launcher has to
    ask of a tensor, and without the chain of hooks, where there is none.
    """
    binary = fixed.binary
    if binary is None or kernel.pre_run_hooks:
        tensors = [x.tensor() if isinstance(x, Piece) else x for x in tensors]
        binary = kernel[grid](*tensors, *numbers, **fixed.constexprs, **fixed.options)
        if binary is not None and fixed.again:
            fixed.binary, fixed.device = binary, driver.active.get_current_device()
        return
    stream = driver.active.get_current_stream(fixed.device)
    addresses = [x if x is None else x.data_ptr() for x in tensors]
    enter, leave, metadata = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        metadata = binary.launch_metadata(grid, stream, *tensors, *numbers, *fixed.values)
    else:
        enter = leave = None
    x, y, z = (*grid, 1, 1)[:3]
    run = binary.run  # which loads what `function` is, if it is the first time
    run(x, y, z, stream, binary.function, binary.packed_metadata, metadata, enter, leave, *addresses, *numbers, *fixed.values)

"""What a backend is told besides tensors: `Call`, the facts it may refuse by, and `Form`, the shape of the sum it computes."""

from typing import NamedTuple

import torch

GATINGS = ("source", "target", "symmetric")
NORMALIZERS = ("none", "sum", "clamp")
KINDS = {0: "none", 1: "head", 3: "scalar", 4: "channel"}  # log_decay.ndim → decay kind


class Call(NamedTuple):
    """Facts about one call; never data."""

    device: str
    dtype: torch.dtype
    decay: str
    delta: bool
    causal: bool
    K: int
    V: int

    def __str__(self) -> str:
        facts = (f"{name}={str(value).removeprefix('torch.')}" for name, value in zip(self._fields, self, strict=True))
        return " ".join(facts)


class Form(NamedTuple):
    """The arguments of the operator that are not tensors, resolved: no None, no "auto"."""

    scale: float
    causal: bool
    gating: str  # one of GATINGS; without meaning where causal
    normalize: str  # one of NORMALIZERS
    eps: float
    stride: int  # tokens between recorded boundary states; 0: none recorded
    writes: bool  # whether the effective writes are recorded
    final: bool = True  # whether the last state is wanted


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """States, decays, betas and sums: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def boundary_rows(total: int, sequences: int, stride: int) -> int:
    """Rows of the boundary record. Sequence n that starts at token s has its rows from s // stride + n on; unused rows stay zero.

    A dense batch counts per batch entry, with one sequence of `total` tokens.
    """
    if stride == 0:
        return 0
    return -(-total // stride) if sequences == 1 else total // stride + sequences

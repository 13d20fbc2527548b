"""Chunk and tile sizes of the Triton kernels: one literal table per architecture, no search."""

from typing import NamedTuple

MAX_WIDTH = 256
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Tile(NamedTuple):
    C: int  # tokens per chunk
    BV: int  # columns of V per program, or per turn of a loop over V
    warps: int
    stages: int


def pick(arch: str, kernel: str, K: int, V: int, size: int, heavy: bool) -> Tile:
    return Tile(32 if heavy else 64, min(64, power_of_two(V)), 4, 2)


def power_of_two(n: int) -> int:
    """Smallest power of two that holds n, and a tensor core's least tile, 16."""
    return max(16, 1 << (n - 1).bit_length())


PROGRAMS = 528  # two waves of two programs on each of 132 multiprocessors


def chunks_per_segment(T: int, C: int, programs: int) -> int:
    """How many chunks a segment holds so that `programs` segments-in-parallel fill the chip; from shapes alone, so results do not vary."""
    chunks = max(1, -(-T // C))
    segments = min(chunks, max(1, -(-PROGRAMS // max(1, programs))))
    return -(-chunks // segments)

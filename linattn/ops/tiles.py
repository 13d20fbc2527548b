"""Chunk and tile sizes of the Triton kernels: one literal table per architecture, no search. `python -m bench kernels` checks every row."""

from functools import cache
from typing import NamedTuple

MAX_WIDTH = 256
LEAST = 4  # chunks per segment: joining segments is one more launch, and shorter ones are not worth it
FEWEST = 4  # segments of the delta rule: each is walked twice, so fewer are not worth it
JOINED = 128  # widest K at which they are joined, by products of [K K] in registers
SHORTEST = 256  # tokens of a sequence up to which the quadratic form is taken
PROGRAMS = 528  # two waves of two programs on each of 132 multiprocessors


class Tile(NamedTuple):
    C: int  # tokens per chunk, or block; all kernels of a forward share it, and all of a backward
    BV: int  # columns of V per program, or per turn of a loop over V
    warps: int
    stages: int
    TK: int = MAX_WIDTH  # columns of K per turn of a loop over K, in `output`, `bwd_dq` and `bwd_dkv`


# What a row is for. one: a decay that is one number per token, causal; both: the same from both sides.
KINDS = ("one", "both", "channel", "delta", "channel delta")
KERNELS = ("state", "output", "bwd_state", "bwd_dq", "bwd_dkv")  # others follow: scan and wy as state
WIDTHS = (64, 128, 256, 512)  # the larger of K and V, in a 2-byte dtype; float32 takes the row of twice its width

#            width   state           output          bwd_state       bwd_dq          bwd_dkv
HOPPER = {
    ("one", 64): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("one", 128): ((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2, 64), (64, 64, 4, 2, 64)),
    ("one", 256): ((32, 32, 8, 2), (32, 32, 8, 2, 64), (32, 32, 8, 2), (32, 32, 8, 2, 64), (32, 64, 8, 2, 64)),
    ("one", 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("both", 64): ((64, 64, 4, 2), (64, 32, 8, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("both", 128): ((64, 64, 8, 2), (64, 32, 8, 1), (64, 64, 8, 2), (64, 64, 8, 2, 64), (64, 64, 8, 2, 64)),
    ("both", 256): ((32, 32, 8, 2), (32, 32, 8, 2, 32), (32, 32, 8, 2), (32, 64, 4, 2, 64), (32, 64, 8, 2, 64)),
    ("both", 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("channel", 64): ((16, 64, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 8, 1)),
    ("channel", 128): ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2, 32), (16, 64, 4, 3, 32)),
    ("channel", 256): ((16, 32, 8, 1), (16, 32, 8, 1, 16), (16, 32, 8, 1), (16, 64, 4, 2, 32), (16, 64, 4, 2, 32)),
    ("channel", 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("delta", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
    ("delta", 128): ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2, 64)),
    ("delta", 256): ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 2, 64)),
    ("delta", 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("channel delta", 64): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 8, 1)),
    ("channel delta", 128): ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1), (16, 32, 8, 2), (16, 64, 8, 2, 64)),
    ("channel delta", 256): ((16, 32, 8, 1), (16, 32, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 2, 64)),
    ("channel delta", 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
# Without wgmma four warps hold too many accumulators; AMD has twice the registers at four warps, and 64 KiB of shared memory.
AMPERE = HOPPER | {
    ("one", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("one", 128): ((64, 64, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    ("both", 64): ((32, 64, 4, 2), (32, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2, 32), (64, 32, 4, 2, 32)),
    ("both", 128): ((32, 64, 4, 2), (32, 32, 8, 2, 64), (32, 64, 8, 2), (32, 64, 4, 2, 64), (32, 32, 8, 2, 64)),
    ("one", 256): (*HOPPER["one", 256][:4], (32, 64, 8, 1, 64)),
    ("both", 256): ((32, 32, 8, 2), (32, 32, 8, 1, 32), (32, 32, 8, 2), (32, 64, 4, 2, 64), (32, 32, 8, 1, 64)),
    ("delta", 64): ((32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 8, 2)),
    ("channel delta", 64): ((16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2), (16, 64, 8, 1)),
}
CDNA = {
    ("one", 64): HOPPER["one", 64],
    ("one", 128): ((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    ("both", 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("both", 128): ((64, 32, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 4, 1), (64, 32, 4, 1)),
    ("channel", 64): ((16, 64, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 1)),
    ("channel", 128): ((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1)),
    ("delta", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("delta", 128): ((32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("channel delta", 64): ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    ("channel delta", 128): ((16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 4, 2)),
}
# At 64 tokens Triton puts products into tensor memory, runs out of it and writes a trap; at 32 it takes the tensor cores' older way in.
BLACKWELL = HOPPER | {
    ("one", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("one", 128): ((32, 64, 4, 2), (32, 32, 8, 2), (32, 64, 4, 2), (32, 32, 8, 2, 64), (32, 64, 4, 2, 64)),
    ("both", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
    ("both", 128): ((32, 64, 4, 2), (32, 32, 8, 2, 64), (32, 64, 4, 2), (32, 64, 4, 2, 64), (32, 32, 8, 2, 64)),
    ("channel delta", 256): (*HOPPER["channel delta", 256][:4], (16, 32, 8, 1, 64)),
}
INTERPRETER = {(kind, width): ((32 if "delta" in kind else 64, 32, 1, 1, 32),) * len(KERNELS) for kind in KINDS for width in WIDTHS}
TABLE = {"sm_80": AMPERE, "sm_90": HOPPER, "sm_100": BLACKWELL, "gfx942": CDNA, "interpreter": INTERPRETER}
# The quadratic kernels, forward and backward: tokens per block, warps, stages. They hold K and V whole; a width without a row takes chunks.
SHORT_HOPPER = {
    ("one", 64): ((64, 4, 2), (64, 8, 2)),
    ("one", 128): ((64, 4, 2), (64, 8, 1)),
    ("both", 64): ((64, 4, 2), (32, 4, 1)),
    ("both", 128): ((64, 8, 2), (64, 8, 1)),
}
SHORT = {
    "sm_80": {("one", 64): ((32, 4, 2), (32, 4, 2)), ("both", 64): ((32, 4, 2), (32, 4, 1))},
    "sm_90": SHORT_HOPPER,
    "sm_100": {("one", 64): ((32, 4, 2), (32, 4, 1)), ("both", 64): ((32, 4, 2), (32, 4, 2))},
    "gfx942": {("one", 64): ((64, 4, 2), (32, 4, 2)), ("both", 64): ((64, 4, 2), (32, 4, 2))},
    "interpreter": {(kind, width): ((64, 1, 1),) * 2 for kind in ("one", "both") for width in WIDTHS},
}
ARCHITECTURES = tuple(name for name in TABLE if name != "interpreter")


@cache
def row(decay: str, delta: bool, both: bool, K: int, V: int, size: int) -> tuple[str, int]:
    """Which row of the table a call takes, for heads of K and V in a dtype of `size` bytes."""
    kind = ("channel delta" if delta else "channel") if decay == "channel" else "delta" if delta else "both" if both else "one"
    wanted = max(power_of_two(K), power_of_two(V)) * max(size, 2) // 2
    return kind, next(width for width in WIDTHS if width >= wanted)


@cache
def pick(arch: str, kernel: str, at: tuple[str, int], V: int) -> Tile:
    """The tile of `kernel` in row `at`."""
    tile = Tile(*TABLE[arch][at][KERNELS.index(kernel)])
    return tile._replace(BV=min(tile.BV, power_of_two(V)))


@cache
def pick_short(arch: str, backward: bool, at: tuple[str, int], V: int) -> Tile | None:
    """The tile of a quadratic kernel in row `at`; None where the architecture has none."""
    if at not in SHORT[arch]:
        return None
    C, warps, stages = SHORT[arch][at][backward]
    return Tile(C, power_of_two(V), warps, stages)


def power_of_two(n: int) -> int:
    """Smallest power of two that holds n, and a tensor core's least tile, 16."""
    return max(16, 1 << (n - 1).bit_length())


def chunks_per_segment(T: int, C: int, programs: int) -> int:
    """How many chunks a segment holds, so that segments on top of the `programs` there are anyway fill the chip.

    From shapes alone, so results do not vary from run to run.
    """
    chunks = max(1, -(-T // C))
    segments = min(-(-chunks // LEAST), max(1, -(-PROGRAMS // max(1, programs))))
    return -(-chunks // segments)

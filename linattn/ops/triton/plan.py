"""What of a pass its lengths, batch and heads do not decide: tiles and constexprs, made once for all calls alike."""

from functools import cache
from typing import NamedTuple

import torch

from ..tiles import Tile, pick, pick_short, power_of_two, row
from .direct import Fixed


class Kind(NamedTuple):
    """What makes two calls alike, seen from one side, or from both at once (None)."""

    arch: str
    device: torch.device
    dtype: torch.dtype
    decay: str
    delta: bool
    varlen: bool
    K: int
    V: int
    side: int | None
    causal: bool
    gating: str
    normalize: str
    stride: int
    given: tuple  # `seen` of the caller's tensors


class Plan:
    """Tiles and constexprs of one `Kind` of pass."""

    def __init__(self, kind: Kind):
        self.arch, self.K, self.V, self.decay, self.delta, self.stride = kind.arch, kind.K, kind.V, kind.decay, kind.delta, kind.stride
        self.both, self.normal = kind.side is None, kind.normalize != "none"
        self.directions = 2 if self.both else 1
        self.at = row(kind.decay, kind.delta, self.both, kind.K, kind.V, kind.dtype.itemsize)
        self.again = kind.given[0]
        left, right = _leaving(kind)
        self.known = {
            "K": kind.K, "V": kind.V, "BK": power_of_two(kind.K), "DECAY": kind.decay, "DELTA": kind.delta, "VARLEN": kind.varlen,
            "BOTH": self.both, "LEAVING": left, "LEAVING_LEFT": left, "LEAVING_RIGHT": right, "LEFT": left,
            "RIGHT": right, "NORMALIZE": self.normal,
            "CLAMP": kind.normalize == "clamp", "OWN": 1.0 if kind.causal or self.both else 0.5, "REVERSE": kind.side == 1,
            "CAUSAL": kind.causal, "PRECISION": "tf32x3" if kind.arch.startswith("sm") else "ieee",
        }  # fmt: skip
        self._tiles: dict[str, Tile] = {}
        self._fixed: dict[tuple, Fixed] = {}

    def tile(self, column: str) -> Tile:
        """The tile in a column of the table, or of one of the quadratic kernels, "short" and "short_bwd"."""
        found = self._tiles.get(column)
        if found is None:
            if column.startswith("short"):
                found = pick_short(self.arch, column == "short_bwd", self.at, self.V)
            else:
                found = pick(self.arch, column, self.at, self.V)
                found = found._replace(C=16) if self.stride % found.C else found  # a record falls on the start of a chunk
            self._tiles[column] = found
        return found

    def fixed(self, kernel, column: str, **more) -> Fixed:
        """What `kernel` is compiled for with the tile in `column`; `more`: what the kind of call does not say."""
        key = (kernel.fn, column, *more, *more.values())
        found = self._fixed.get(key)
        if found is None:
            tile = self.tile(column)
            known = self.known | {"BV": tile.BV, "C": tile.C, "PIPE": tile.stages, "TK": min(tile.TK, self.known["BK"])} | more
            found = self._fixed[key] = Fixed(kernel, known, tile.warps, tile.stages, self.again)
        return found


@cache
def plan(kind: Kind) -> Plan:
    return Plan(kind)


def _leaving(kind: Kind) -> tuple[bool, bool]:
    """Whether a token pays its gate on leaving, in the clock from the left and in the one from the right."""
    if kind.side is None:
        return kind.gating == "source", kind.gating == "target"
    return not kind.causal and kind.gating in (("source", "symmetric") if kind.side else ("source",)), False

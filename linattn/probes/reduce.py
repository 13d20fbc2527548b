"""Streaming reducers: figures of every call, in memory that grows with layers and heads alone. Any object with update and result is one.

needs                      the fields of a Piece it reads, of "boundaries", "final", "u"; all others are there anyway
update(layer, piece, how)  once a call, inside the forward: keep sums, not tensors
result()                   layer name -> what was found
merge(other)               the same reducer of another process added to this one
"""

import math
from typing import Any

import torch
from torch import Tensor

from .plan import Piece


def participation_ratio(S: Tensor) -> Tensor:
    """‖S‖_F⁴ / ‖SᵀS‖_F² of S [… K V]: (Σσ²)² / Σσ⁴, between 1 and min(K, V). Two matrix products, and it has a gradient."""
    return S.square().sum((-1, -2)).square() / (S.mT @ S).square().sum((-1, -2)).clamp_min(torch.finfo(S.dtype).tiny)


class Saturation:
    """Mean and largest participation ratio of the boundary states, and the mean of their norms: [H] each."""

    needs = ("boundaries", "final")

    def __init__(self):
        self.sums: dict[str, list[Tensor | float]] = {}

    def update(self, layer: str, piece: Piece, how: dict[str, Any]) -> None:
        states = [s.kv.detach() for s in (piece.boundaries, piece.final) if s is not None]
        S = torch.cat([s.flatten(0, -4) for s in states]).float()
        alive = S.square().sum((-1, -2)) > 0
        ratio, norm = participation_ratio(S) * alive, S.square().sum((-1, -2)).sqrt()
        n, total, largest, norms = self.sums.get(layer, [0, 0, 0, 0])
        largest = torch.maximum(ratio.amax(0), torch.as_tensor(largest))
        self.sums[layer] = [n + alive.sum(0), total + ratio.sum(0), largest, norms + norm.sum(0)]

    def result(self) -> dict[str, dict[str, Tensor]]:
        rest = lambda n: n.clamp_min(1)
        return {
            layer: {"mean": total / rest(n), "largest": largest, "norm": norms / rest(n)}
            for layer, (n, total, largest, norms) in self.sums.items()
        }

    def merge(self, other: "Saturation") -> "Saturation":
        for layer, (n, total, largest, norms) in other.sums.items():
            m, t, l, s = self.sums.get(layer, [0, 0, torch.zeros_like(largest), 0])
            self.sums[layer] = [n + m, total + t, torch.maximum(largest, l), norms + s]
        return self


class HalfLife:
    """ln ½ / mean log decay over all real tokens, [H] or [H K]: after how many tokens half is forgotten. inf without decay."""

    needs = ()

    def __init__(self):
        self.sums: dict[str, list] = {}

    def update(self, layer: str, piece: Piece, how: dict[str, Any]) -> None:
        g, n = piece.log_decay, 1
        heads = piece.k.shape[2]
        if g is None:
            g = torch.zeros(heads, device=piece.k.device)
        elif g.ndim > 1:
            n = math.prod(g.shape[:2]) if piece.mask is None else int(piece.mask.sum())
            g = g.detach().sum((0, 1))  # silent where masked
        old = self.sums.get(layer, [0, 0])
        self.sums[layer] = [old[0] + n, old[1] + g]

    def result(self) -> dict[str, Tensor]:
        return {layer: torch.where(total < 0, math.log(0.5) * n / total, torch.inf) for layer, (n, total) in self.sums.items()}

    def merge(self, other: "HalfLife") -> "HalfLife":
        for layer, (n, total) in other.sums.items():
            m, t = self.sums.get(layer, [0, 0])
            self.sums[layer] = [n + m, total + t]
        return self


class Moments:
    """Mean and covariance of a feature of the piece, [n d] rows: `feature(piece) → [… d]`. The default: what each query reads, o [… V]."""

    def __init__(self, feature=None, needs: tuple[str, ...] = ()):
        self.feature, self.needs = feature or (lambda piece: piece.o), needs
        self.sums: dict[str, list] = {}

    def update(self, layer: str, piece: Piece, how: dict[str, Any]) -> None:
        X = self.feature(piece).detach().double().flatten(0, -2)
        n, s, ss = self.sums.get(layer, [0, 0, 0])
        self.sums[layer] = [n + len(X), s + X.sum(0), ss + X.mT @ X]

    def result(self) -> dict[str, dict[str, Any]]:
        found = {}
        for layer, (n, s, ss) in self.sums.items():
            mean = s / n
            found[layer] = {"n": n, "mean": mean, "covariance": (ss - n * torch.outer(mean, mean)) / max(n - 1, 1)}
        return found

    def merge(self, other: "Moments") -> "Moments":
        for layer, sums in other.sums.items():
            self.sums[layer] = [a + b for a, b in zip(self.sums.get(layer, [0, 0, 0]), sums)]
        return self


class Sketch:
    """Every boundary state, flattened and projected to r numbers by one fixed random matrix: inner products survive, 1/√r noise added.

    result: layer → [states H r]. For CKA between states, or a basis of snapshots, without [K·V K·V].
    Source: Johnson & Lindenstrauss 1984. It grows with the number of states, by r numbers each.
    """

    needs = ("boundaries",)

    def __init__(self, r: int = 256, seed: int = 0):
        self.r, self.seed = r, seed
        self.rows: dict[str, list[Tensor]] = {}

    def update(self, layer: str, piece: Piece, how: dict[str, Any]) -> None:
        S = piece.boundaries.kv.detach().flatten(-2).flatten(0, -3).float()
        draw = torch.Generator().manual_seed(self.seed)
        P = torch.randn(S.shape[-1], self.r, generator=draw).to(S) / math.sqrt(self.r)
        self.rows.setdefault(layer, []).append(S @ P)

    def result(self) -> dict[str, Tensor]:
        return {layer: torch.cat(rows) for layer, rows in self.rows.items()}

    def merge(self, other: "Sketch") -> "Sketch":
        for layer, rows in other.rows.items():
            self.rows.setdefault(layer, []).extend(rows)
        return self

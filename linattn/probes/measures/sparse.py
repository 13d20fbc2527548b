"""Sparse autoencoders: activations, writes to a state among them, as sums of a few atoms each out of many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .controls import beside, check_share, split
from .fitted import LinearProbe, ProbeResult

CONTROLS = ("shuffled columns", "principal directions")


@dataclass(frozen=True, eq=False, repr=False)
class SparseCode:
    """A dictionary and its encoder, and what they do on rows held out. `encode` and `decode` take and give rows as they were given."""

    explained: float  # 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²
    active: float  # atoms in use per row, on average
    dead: float  # share of atoms that no row uses
    controls: dict[str, float]  # explained, of each control
    held_out: int
    encoder: Tensor  # [d atoms]
    threshold: Tensor  # [atoms], added before ReLU
    atoms: Tensor  # [atoms d], of length 1
    mean: Tensor  # [d]
    scale: float  # root of the mean square of x − mean, which rows are divided by
    k: tuple[int, int]
    complexity: ProbeResult | None  # what AdaptiveK asks for each row's number of atoms

    def counts(self, X: Tensor) -> Tensor:
        """[n]: atoms that each row of X may use."""
        low, high = self.k
        if self.complexity is None:
            return torch.full((len(X),), high, device=X.device)
        share = torch.sigmoid(6 * (self.complexity.predict(X)[:, 0] - 0.5))
        return (low + (high - low) * share).round().long()

    def encode(self, X: Tensor) -> Tensor:
        """z [n atoms] ≥ 0 of X [n d], at most `counts` of them above 0 in a row."""
        Z = (X.to(self.atoms) - self.mean) / self.scale
        return _largest(F.relu(Z @ self.encoder + self.threshold), self.counts(X))

    def decode(self, z: Tensor) -> Tensor:
        """x̂ [n d] of z [n atoms]."""
        return z @ self.atoms * self.scale + self.mean

    def __repr__(self) -> str:
        controls = beside({name: f"explained {value:.3f}" for name, value in self.controls.items()})
        head = f"explained {self.explained:.3f} by {self.active:.1f} of {len(self.atoms)} atoms a row, {self.dead:.0%} of them dead"
        chosen = "" if self.complexity is None else f"; complexity {self.complexity}"
        return f"{head} ({controls}; {self.held_out} rows held out{chosen})"


@dataclass(frozen=True)
class SparseAutoencoder:
    """TopK: z = top_k(ReLU((x − mean) E + t)),  x̂ = z D + mean, with atoms D of length 1. arXiv:2406.04093.

        found = SparseAutoencoder(atoms=512, k=8).fit(trace.u[:, :, head].flatten(0, 1))
        print(found)  # explained 0.83 by 8.0 of 512 atoms a row, 4% of them dead (controls: shuffled columns explained 0.41, …)

    Of whole writes, (k[..., :, None] * u[..., None, :]).flatten(-2), an atom is a [K V] matrix, of the shape of a state.

    atoms  in the dictionary; None: 8 · d
    k      atoms a row may use. A pair (low, high) is AdaptiveK, arXiv:2508.17320: low + (high − low) · σ(6 (c − ½)) with c ∈ [0, 1] what a
           linear probe tells of a row's complexity, which `fit` is then given
    steps, batch, lr   of Adam. E starts as Dᵀ
    dead_after  steps without use after which an atom is dead; the best 2·k of those then learn to make up what is left, at 1/32 of the loss
    held_out, seed   as in `LinearProbe`
    """

    atoms: int | None = None
    k: int | tuple[int, int] = 8
    steps: int = 1000
    batch: int = 512
    lr: float = 2e-3
    dead_after: int = 100
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self):
        low, high = self.limits
        whole = {"steps": self.steps, "batch": self.batch, "dead_after": self.dead_after, "k": low, "atoms": self.atoms or 1}
        for name, value in whole.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        if low > high or (self.atoms is not None and high > self.atoms):
            raise ValueError(f"k must be at most the number of atoms, a pair in order; got {self.k!r} of {self.atoms}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0; got {self.lr!r}")
        check_share(self.held_out)

    @property
    def limits(self) -> tuple[int, int]:
        return self.k if isinstance(self.k, tuple) else (self.k, self.k)

    def fit(
        self, X: Tensor, complexity: Tensor | None = None, *, controls: Sequence[str] = CONTROLS, groups: Tensor | None = None
    ) -> SparseCode:
        """X [n d]; complexity [n], real numbers of which the order counts, as each token's loss: needed where k is a pair.

        controls  "shuffled columns": the same fit to rows whose columns were put in another order one by one, so that each number is as it
                  was and nothing goes together; "principal directions": as many of those as atoms are active, dense
        """
        X = X.detach().float()
        if X.ndim != 2 or len(X) < 8 or not X.isfinite().all():
            raise ValueError(f"X must be [n d] of 8 rows or more, finite; got {tuple(X.shape)}")
        if (complexity is not None) != isinstance(self.k, tuple) or (complexity is not None and complexity.shape != (len(X),)):
            got = None if complexity is None else tuple(complexity.shape)
            raise ValueError(
                f"complexity must be [n] = ({len(X)},) where k is a pair, and None where it is not; got {got} and k={self.k!r}"
            )
        if unknown := [name for name in controls if name not in CONTROLS]:
            raise ValueError(f"controls must be of {list(CONTROLS)}; got {unknown}")
        draw = torch.Generator().manual_seed(self.seed)
        train, test = split(len(X), self.held_out, groups, draw)
        probe = None
        if complexity is not None:
            rank = complexity.argsort().argsort().to(X) / (len(X) - 1)
            probe = LinearProbe(held_out=self.held_out, seed=self.seed).fit(X, rank, groups=groups)
        found = self._score(X, train, test, probe, draw)
        others = {}
        for name in controls:
            if name == "principal directions":
                V = torch.linalg.svd(X[train] - found.mean, full_matrices=False).Vh[: round(found.active)]
                others[name] = _explained(X[test], (X[test] - found.mean) @ V.mT @ V + found.mean)
            else:
                mixed = torch.stack([column[torch.randperm(len(X), generator=draw)] for column in X.unbind(1)], 1)
                others[name] = self._score(mixed, train, test, probe, draw).explained
        return replace(found, controls=others)

    def _score(self, X: Tensor, train: Tensor, test: Tensor, probe: ProbeResult | None, draw: torch.Generator) -> SparseCode:
        code = self._map(X[train], probe, draw)
        used = torch.zeros(len(code.atoms), dtype=torch.bool, device=X.device)
        for rows in train.split(4096):
            used |= (code.encode(X[rows]) > 0).any(0)
        guess, active = torch.empty_like(X[test]), 0
        for place, rows in zip(torch.arange(len(test)).split(4096), test.split(4096)):
            z = code.encode(X[rows])
            guess[place], active, used = code.decode(z), active + int((z > 0).sum()), used | (z > 0).any(0)
        dead = 1 - used.double().mean().item()
        return replace(code, explained=_explained(X[test], guess), active=active / len(test), dead=dead, held_out=len(test))

    def _map(self, X: Tensor, probe: ProbeResult | None, draw: torch.Generator) -> SparseCode:
        n, d = X.shape
        m = 8 * d if self.atoms is None else self.atoms
        mean = X.mean(0)
        scale = max((X - mean).square().mean().sqrt().item(), torch.finfo(X.dtype).tiny)
        D = F.normalize(torch.randn(m, d, generator=draw), dim=1).to(X)
        weights = [D.mT.clone(), torch.zeros(m, device=X.device), D]
        code = SparseCode(0.0, 0.0, 0.0, {}, 0, *weights, mean, scale, self.limits, probe)
        counts, Z = code.counts(X), (X - mean) / scale
        for w in weights:
            w.requires_grad_(True)
        optimizer, idle = torch.optim.Adam(weights, lr=self.lr), torch.zeros(m, dtype=torch.int64, device=X.device)
        with torch.enable_grad():
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.lr * min(1.0, 5 * (1 - step / self.steps))  # the last fifth falls to 0
                rows = torch.randint(n, (min(self.batch, n),), generator=draw).to(X.device)
                x, (E, t, D) = Z[rows], weights
                raw = F.relu(x @ E + t)
                z = _largest(raw, counts[rows])
                left = x - z @ D
                loss = left.square().mean()
                idle = torch.where((z > 0).any(0), 0, idle + 1)
                if (dead := (idle > self.dead_after).nonzero()[:, 0]).numel():
                    k = torch.full_like(counts[rows], min(2 * self.limits[1], len(dead)))
                    again = _largest(F.softplus(x @ E[:, dead] + t[dead]), k) @ D[dead]  # ReLU would leave them without a gradient
                    loss = loss + (left.detach() - again).square().mean() / 32
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    D.copy_(F.normalize(D, dim=1))
        for w in weights:
            w.requires_grad_(False)
        return code


def _largest(z: Tensor, k: Tensor) -> Tensor:
    """z [n m] with all but the k [n] largest numbers of each row 0."""
    top = z.topk(min(int(k.max()), z.shape[1]), dim=1)
    kept = torch.arange(top.values.shape[1], device=z.device) < k[:, None]
    return torch.zeros_like(z).scatter(1, top.indices, top.values * kept)


def _explained(X: Tensor, guess: Tensor) -> float:
    left, there = (X - guess).square().sum().item(), (X - X.mean(0)).square().sum().item()
    return 1 - left / there if there else math.nan

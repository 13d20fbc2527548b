"""Codes by magnitude: the same directions for every position, told apart by scale alone, which no linear probe reads out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .controls import LABELS, beside, check_ids, check_share, least_squares, relabelled, split
from .fitted import LinearProbe


@dataclass(frozen=True, eq=False, repr=False)
class OnionResult:
    """Accuracies on held-out rows, by position and on average: of peeling, and of one linear probe for each position."""

    peeled: Tensor  # [L]
    linear: Tensor  # [L]: where this is as high, the code is by direction as well
    controls: dict[str, float]  # of peeling, on average
    chance: float
    held_out: int
    scales: Tensor  # [L], the largest 1 in size: |scales| falling by a constant factor is what a decay leaves
    codes: Tensor  # [c d], a direction for each of `classes`, shared by all positions
    bias: Tensor  # [d]
    classes: Tensor  # [c]

    def peel(self, X: Tensor) -> Tensor:
        """[n L] classes of X [n d]: the nearest code of the loudest position, which is subtracted, then the next, and so on."""
        return self.classes[_peel(X.to(self.codes), self.scales, self.codes, self.bias)]

    def __repr__(self) -> str:
        controls = beside({name: f"{value:.3f}" for name, value in self.controls.items()})
        mean = f"accuracy {self.peeled.mean():.3f} peeled, {self.linear.mean():.3f} linear"
        return f"{mean} ({controls}; chance {self.chance:.3f}; {self.held_out} rows held out)"


@dataclass(frozen=True)
class OnionProbe:
    """x ≈ bias + Σ_i scale_i · code[token_i]: is a sequence stored as an onion, the same codes in layers of decreasing size?

    A state that decays is one where keys and values depend on their tokens alone: scale_i = ∏ α after token i. Scales and codes by least
    squares, from the best rank-1 approximation of a code for each position and class, with the two in turn held still. After
    arXiv:2408.10920, where a small network peels.

    ridge  of all least squares, in units of the mean of their diagonal
    held_out, seed   as in `LinearProbe`
    """

    ridge: float = 1e-6
    sweeps: int = 20
    held_out: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0; got {self.ridge!r}")
        check_share(self.held_out)

    def fit(
        self, X: Tensor, tokens: Tensor, *, controls: Sequence[str] = ("shuffled labels",), groups: Tensor | None = None
    ) -> OnionResult:
        """X [n d], as last states of one head, flattened; tokens [n L], whole numbers. controls: "shuffled labels", whole rows of tokens.

        ValueError for shapes that do not go together, and for fewer rows than positions times classes.
        """
        if X.ndim != 2 or tokens.ndim != 2 or len(X) != len(tokens) or tokens.is_floating_point() or not X.isfinite().all():
            got = f"{tuple(X.shape)} and {tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"X and tokens must be [n d], finite, and whole numbers [n L] of the same samples; got {got}")
        if unknown := [name for name in controls if name not in LABELS[:1]]:
            raise ValueError(f"controls must be of {list(LABELS[:1])}; got {unknown}")
        check_ids(len(X), groups=groups)
        X = X.detach().double()
        classes, y = tokens.to(X.device).unique(return_inverse=True)
        draw = torch.Generator().manual_seed(self.seed)
        train, test = split(len(X), self.held_out, groups, draw)
        if len(train) < y.shape[1] * len(classes):
            raise ValueError(f"X must have more rows than {y.shape[1]} positions of {len(classes)} classes; {len(train)} are left to fit")

        def peeled(y):
            onion = self._map(X[train], y[train], len(classes))
            return (_peel(X[test], *onion) == y[test]).double().mean(0), onion

        score, onion = peeled(y)
        linear = torch.stack([self._linear(X, column, len(classes), train, test) for column in y.unbind(1)])
        others = {name: peeled(relabelled(name, y, None, draw))[0].mean().item() for name in controls}
        chance = (y[test] == y[train].mode(0).values).double().mean().item()
        return OnionResult(score, linear, others, chance, len(test), *onion, classes)

    def _linear(self, X, y, count, train, test) -> Tensor:
        found = LinearProbe(ridge=1e-4).map(X, y, torch.arange(count), train)
        return ((X[test] @ found["weight"] + found["bias"]).argmax(-1) == y[test]).double().mean()

    def _map(self, X: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        mean = X.mean(0)
        hot = torch.nn.functional.one_hot(y, count).to(X)  # [n L c]
        hot = hot - hot.mean(0)
        each = least_squares(hot.flatten(1), X - mean, self.ridge).view(*hot.shape[1:], -1)  # [L c d]
        U, s, Vh = torch.linalg.svd(each.flatten(1), full_matrices=False)
        scales, codes = U[:, 0], (s[0] * Vh[0]).view(count, -1)
        for _ in range(self.sweeps):
            scales = scales / scales[scales.abs().argmax()]
            codes = least_squares(torch.einsum("nlc,l->nc", hot, scales), X - mean, self.ridge)
            layers = torch.einsum("nlc,cd->lnd", hot, codes).flatten(1)
            scales = least_squares(layers.mT, (X - mean).flatten()[:, None], self.ridge)[:, 0]
        top = scales[scales.abs().argmax()]
        scales, codes = scales / top, codes * top
        shares = torch.nn.functional.one_hot(y, count).to(X).mean(0)  # [L c]
        return scales, codes, mean - torch.einsum("l,lc,cd->d", scales, shares, codes)


def _peel(X: Tensor, scales: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """[n L] rows of `codes`."""
    left, found = X - bias, torch.empty(len(X), len(scales), dtype=torch.int64, device=X.device)
    for i in scales.abs().argsort(descending=True).tolist():
        layer = scales[i] * codes
        found[:, i] = (left @ layer.mT - layer.square().sum(-1) / 2).argmax(-1)
        left = left - layer[found[:, i]]
    return found

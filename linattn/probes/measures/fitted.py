"""What a fitted linear map can tell from activations, always beside its controls; and LEACE, which takes that away. Rows are samples."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LABELS = ("shuffled labels", "random labels")


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult:
    """How well labels can be told from rows that the fit has not seen, what the same fit finds where there is nothing, and the map."""

    score: float  # accuracy of classes, R² of numbers
    controls: dict[str, float]  # the same score of each control
    chance: float  # share of the commonest class of the fitted rows, where that were always the guess; 0 of numbers
    held_out: int  # rows that `score` is of
    weight: Tensor  # [d c], zero outside `features`
    bias: Tensor  # [c]
    classes: Tensor | None  # [c], what a column stands for; None: numbers
    features: Tensor  # columns of X in use, the most telling first where the probe is k-sparse

    @property
    def selectivity(self) -> float | None:
        """score − the best control's, arXiv:1909.03368; None where there was no control."""
        return self.score - max(self.controls.values()) if self.controls else None

    def predict(self, X: Tensor) -> Tensor:
        """[n] classes, or [n c] numbers, of X [n d]."""
        out = X.to(self.weight) @ self.weight + self.bias
        return out if self.classes is None else self.classes[out.argmax(-1)]

    def __repr__(self) -> str:
        name = "R²" if self.classes is None else "accuracy"
        controls = ", ".join(f"{name} {value:.3f}" for name, value in self.controls.items())
        chance = "" if self.classes is None else f"; chance {self.chance:.3f}"
        return f"{name} {self.score:.3f} ({f'controls: {controls}' if controls else 'no control'}{chance}; {self.held_out} rows held out)"


@dataclass(frozen=True)
class LinearProbe:
    """Fits labels from activations by a linear map, scored on rows that were held out.

        found = LinearProbe().fit(reads, value, groups=sequence, against={"random key": other_reads})
        print(found)  # accuracy 0.998 (controls: shuffled labels 0.033, random key 0.041; chance 0.034; 600 rows held out)

    kind      "ridge": least squares on standardised columns, in closed form, of numbers or of one column per class (the largest wins);
              "logistic": multinomial logistic regression by scikit-learn, classes only
    ridge     added to each eigenvalue of the columns' correlation matrix, each of which is 1 on average; logistic: C = 1 / (ridge · rows)
    k         None: all columns. Else the k columns whose variance labels explain best (one-way ANOVA's F puts them in the same order),
              chosen on the fitted rows alone: k-sparse probing, arXiv:2305.01610
    held_out  share of rows, or of groups, that the fit does not see
    seed      of the split and of the controls

    Raises ValueError for sizes out of range. Source of linear probes: arXiv:1610.01644.
    """

    kind: str = "ridge"
    ridge: float = 1e-2
    k: int | None = None
    held_out: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if self.kind not in ("ridge", "logistic"):
            raise ValueError(f"kind must be 'ridge' or 'logistic'; got {self.kind!r}")
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0; got {self.ridge!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1); got {self.held_out!r}")
        if self.k is not None and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k must be a number of columns, at least 1, or None; got {self.k!r}")

    def fit(
        self, X: Tensor, y: Tensor, *, controls: Sequence[str] = ("shuffled labels",), against: Mapping[str, Tensor] | None = None,
        groups: Tensor | None = None, types: Tensor | None = None,
    ) -> ProbeResult:  # fmt: skip
        """X [n d]; y [n] whole numbers or bool, which are classes, or real numbers [n] or [n c].

        controls  of the labels: "shuffled labels", y in another order; "random labels", y drawn anew for each of `types` [n] (None: row):
                  what it scores is learned by heart from the types, arXiv:1909.03368. () for none, and the result says so
        against   by name other activations [n d'] of the same samples: reads with `random_keys`, or an untrained model's
        groups    [n] whole numbers: rows of one, as those of one sequence, are held out together
        """
        X, y, classes = _samples(X, y)
        against = dict(against or {})
        if unknown := [name for name in controls if name not in LABELS]:
            raise ValueError(f"controls must be of {list(LABELS)}; got {unknown}")
        if self.kind == "logistic" and classes is None:
            raise ValueError("y must be classes, whole numbers or bool, where kind='logistic'; got real numbers")
        if self.k is not None and self.k > X.shape[1]:
            raise ValueError(f"k must be at most the {X.shape[1]} columns of X; got {self.k}")
        for name, other in against.items():
            if other.ndim != 2 or len(other) != len(X) or not other.isfinite().all():
                raise ValueError(f"against[{name!r}] must be [n d], finite, of the same {len(X)} samples; got {tuple(other.shape)}")
        for name, ids in (("groups", groups), ("types", types)):
            if ids is not None and ids.shape != (len(X),):
                raise ValueError(f"{name} must be [n] = ({len(X)},); got {tuple(ids.shape)}")
        draw = torch.Generator().manual_seed(self.seed)
        train, test = self._split(len(X), groups, draw)
        if classes is not None and (missing := set(range(len(classes))) - set(y[train].tolist())):
            raise ValueError(f"y must have every class among the fitted rows; {classes[sorted(missing)].tolist()} is held out altogether")
        score, weight, bias, features = self._score(X, y, classes, train, test)
        chance = 0.0 if classes is None else (y[test] == y[train].mode().values).double().mean().item()
        found = {}
        for name in controls:
            found[name] = self._score(X, _control(name, y, types, draw), classes, train, test)[0]
        for name, other in against.items():
            found[name] = self._score(other.detach().to(X), y, classes, train, test)[0]
        return ProbeResult(score, found, chance, len(test), weight, bias, classes, features)

    def _split(self, n: int, groups: Tensor | None, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.arange(n) if groups is None else groups.cpu().unique(return_inverse=True)[1]
        count = int(ids.max()) + 1
        out = round(self.held_out * count)
        if not 0 < out < count:
            raise ValueError(
                f"held_out must leave something on both sides of {count} {'rows' if groups is None else 'groups'}; got {self.held_out}"
            )
        kept = torch.ones(count, dtype=torch.bool)
        kept[torch.randperm(count, generator=draw)[:out]] = False
        return kept[ids].nonzero()[:, 0], (~kept[ids]).nonzero()[:, 0]

    def _score(self, X, y, classes, train, test) -> tuple[float, Tensor, Tensor, Tensor]:
        Y = y if classes is None else torch.nn.functional.one_hot(y, len(classes)).to(X)
        mean, std = X[train].mean(0), X[train].std(0)
        std = std.where(std > 10 * torch.finfo(X.dtype).eps * mean.abs(), torch.inf)  # a column that does not move tells nothing
        Z = (X - mean) / std
        features = torch.arange(X.shape[1], device=X.device)
        if self.k is not None:
            features = explained(Z[train], y[train], classes).topk(min(self.k, X.shape[1])).indices
        W, b = self._map(Z[train][:, features], Y[train], y[train])
        out = Z[test][:, features] @ W + b
        if classes is not None:
            score = (out.argmax(-1) == y[test]).double().mean().item()
        else:
            left, there = (out - Y[test]).square().sum(), (Y[test] - Y[train].mean(0)).square().sum()
            score = 1 - (left / there.clamp_min(torch.finfo(X.dtype).tiny)).item()
        weight = X.new_zeros(X.shape[1], W.shape[1])
        weight[features] = W / std[features, None]
        return score, weight, b - mean @ weight, features

    def _map(self, Z, Y, y) -> tuple[Tensor, Tensor]:
        if self.kind == "ridge":
            eye = torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
            return torch.linalg.solve(Z.mT @ Z / len(Z) + self.ridge * eye, Z.mT @ (Y - Y.mean(0)) / len(Z)), Y.mean(0)
        from sklearn.linear_model import LogisticRegression

        seen = y.unique()  # a control's labels may leave classes out: none of those is ever the guess
        whole_W, whole_b = Z.new_zeros(Z.shape[1], Y.shape[1]), Z.new_full((Y.shape[1],), -torch.inf)
        if len(seen) == 1:
            whole_b[seen] = 0
            return whole_W, whole_b
        fitted = LogisticRegression(C=1 / (self.ridge * len(Z)), max_iter=1000).fit(Z.cpu().numpy(), y.cpu().numpy())
        W, b = torch.as_tensor(fitted.coef_).to(Z), torch.as_tensor(fitted.intercept_).to(Z)
        if len(seen) == 2:  # they have one row there
            W, b = torch.cat([-W, W]) / 2, torch.cat([-b, b]) / 2
        whole_W[:, seen], whole_b[seen] = W.mT, b
        return whole_W, whole_b


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """One probe's results by layer, in their order."""

    results: dict[str, ProbeResult] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The layer of the highest score."""
        return max(self.results, key=lambda name: self.results[name].score)

    def __repr__(self) -> str:
        width = max(map(len, self.results))
        return "\n".join(f"{name:{width}}  {result}" for name, result in self.results.items())


def layer_curve(
    activations: Mapping[str, Tensor], y: Tensor, probe: LinearProbe | None = None, *, untrained: Mapping[str, Tensor] | None = None,
    against: Mapping[str, Mapping[str, Tensor]] | None = None, controls: Sequence[str] = ("shuffled labels",),
    groups: Tensor | None = None, types: Tensor | None = None,
) -> Curve:  # fmt: skip
    """`probe` fitted to the activations [n d] of every layer: at which depth can y be told? arXiv:1610.01644.

    untrained  the same layers' of a model at its random start, a control without which a curve says little: an untrained recurrence already
               holds what can be counted. against: further controls, name → layer → activations. The rest as in `LinearProbe.fit`
    """
    if not activations:
        raise ValueError("activations must have at least one layer; got none")
    others = dict(against or {}) | ({} if untrained is None else {"untrained model": untrained})
    for name, layers in others.items():
        if missing := [layer for layer in activations if layer not in layers]:
            raise ValueError(f"{name} must have the same layers as activations; {missing} are missing")
    fit = (probe or LinearProbe()).fit
    return Curve({
        layer: fit(X, y, controls=controls, against={name: of[layer] for name, of in others.items()}, groups=groups, types=types)
        for layer, X in activations.items()
    })  # fmt: skip


def explained(X: Tensor, y: Tensor, classes: Tensor | None) -> Tensor:
    """[d]: the share of each column's variance that lies between classes, or its mean squared correlation with y's columns."""
    X = X - X.mean(0)
    total, tiny = X.square().sum(0), torch.finfo(X.dtype).tiny
    if classes is None:
        Y = y - y.mean(0)
        return ((X.mT @ Y).square() / (total[:, None] * Y.square().sum(0)).clamp_min(tiny)).mean(1)
    hot = torch.nn.functional.one_hot(y, len(classes)).to(X)
    return ((hot.mT @ X).square() / hot.sum(0).clamp_min(1)[:, None]).sum(0) / total.clamp_min(tiny)


def random_keys(like: Tensor, seed: int = 0) -> Tensor:
    """Keys of the shape and norms of `like` [… K] in random directions: what is read with them is the control of what is read with keys."""
    keys = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
    return torch.nn.functional.normalize(keys, dim=-1) * like.norm(dim=-1, keepdim=True)


def leace(X: Tensor, y: Tensor, *, svd_tol: float = 1e-2, affine: bool = True):
    """LEACE of y in X [n d], arXiv:2306.03819: the least change after which no linear map tells more of y than its mean does.

    y as in `LinearProbe.fit`. The eraser of the package `concept-erasure` comes back: eraser(X) [… d] is X without y, and, where X are
    reads Sᵀ k, `S @ eraser.P.mT` is a state whose every read has gone through it (ask for affine=False: a state has no place for a mean).
    Correlations below svd_tol stay, and so does what is not linear; score `LinearProbe` on erased rows that the fit has not seen.
    """
    X, y, classes = _samples(X, y)
    if not svd_tol > 0:
        raise ValueError(f"svd_tol must be above 0; got {svd_tol!r}")
    with warnings.catch_warnings():  # it scripts a function when imported, which torch has begun to deprecate
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        from concept_erasure import LeaceEraser

    return LeaceEraser.fit(X, y if classes is None else torch.nn.functional.one_hot(y, len(classes)).to(X), svd_tol=svd_tol, affine=affine)


def _samples(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """X [n d] and y, numbers [n c] or indices [n] of the classes that come with them; without gradients."""
    if X.ndim != 2 or y.ndim not in (1, 2) or len(y) != len(X) or len(X) < 4:
        raise ValueError(
            f"X and y must be [n d] and [n] or [n c] of the same samples, 4 or more; got {tuple(X.shape)} and {tuple(y.shape)}"
        )
    X = X.detach()
    X = X if X.dtype == torch.float64 else X.float()
    if not X.isfinite().all():
        raise ValueError("X must be finite; got values that are not")
    if y.is_floating_point():
        if not y.isfinite().all():
            raise ValueError("y must be finite; got values that are not")
        if (y == y[0]).all():
            raise ValueError("y must differ between samples; got one value alone")
        y = y.detach().to(X)
        return X, y if y.ndim == 2 else y[:, None], None
    if y.ndim != 1:
        raise ValueError(f"y must be [n] where it holds classes; got {y.dtype} {tuple(y.shape)}")
    classes, y = y.to(X.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y must have two classes or more; got {classes.tolist()} alone")
    return X, y, classes


def _control(name: str, y: Tensor, types: Tensor | None, draw: torch.Generator) -> Tensor:
    n = len(y)
    if name == "shuffled labels":
        return y[torch.randperm(n, generator=draw)]
    ids = torch.arange(n) if types is None else types.cpu().unique(return_inverse=True)[1]
    return y[torch.randint(0, n, (int(ids.max()) + 1,), generator=draw)[ids]]  # one row's label, drawn for each type

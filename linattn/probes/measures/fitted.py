"""What a fitted linear map can tell from activations, always beside its controls; and LEACE, which takes that away. Rows are samples."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .controls import LABELS, beside, check_ids, check_share, relabelled, split


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult:
    """How well labels can be told from rows that the fit has not seen, what the same fit finds where there is nothing, and the map."""

    score: float  # accuracy of classes, R² of numbers
    controls: dict[str, float]  # the same score of each control
    chance: float  # share of the commonest class of the fitted rows, where that were always the guess; 0 of numbers
    held_out: int  # rows that `score` is of
    weight: Tensor  # [d c], zero outside `features`; of states [K V c]
    bias: Tensor  # [c]
    classes: Tensor | None  # [c], what a column stands for; None: numbers
    features: Tensor  # columns of X in use, the most telling first where the probe is k-sparse

    @property
    def selectivity(self) -> float | None:
        """score − the best control's, arXiv:1909.03368; None where there was no control."""
        return self.score - max(self.controls.values()) if self.controls else None

    def predict(self, X: Tensor) -> Tensor:
        """[n] classes, or [n c] numbers, of X [n d], or of states [n K V]."""
        out = X.to(self.weight).flatten(1) @ self.weight.flatten(0, -2) + self.bias
        return out if self.classes is None else self.classes[out.argmax(-1)]

    def __repr__(self) -> str:
        name = "R²" if self.classes is None else "accuracy"
        controls = beside({control: f"{value:.3f}" for control, value in self.controls.items()})
        chance = "" if self.classes is None else f"; chance {self.chance:.3f}"
        return f"{name} {self.score:.3f} ({controls}{chance}; {self.held_out} rows held out)"


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

    Raises ValueError for sizes out of range. Source of linear probes: arXiv:1610.01644. Of states as they are: `BilinearProbe`.
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
        check_share(self.held_out)
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
        X, y, classes = samples(X, y)
        if self.kind == "logistic" and classes is None:
            raise ValueError("y must be classes, whole numbers or bool, where kind='logistic'; got real numbers")
        if self.k is not None and self.k > X.shape[1]:
            raise ValueError(f"k must be at most the {X.shape[1]} columns of X; got {self.k}")
        return scored(self, ProbeResult, X, y, classes, controls, against, groups, types)

    def map(self, X: Tensor, y: Tensor, classes: Tensor | None, train: Tensor) -> dict[str, Tensor]:
        """weight, bias and features of the rows `train` of X [n d] and y, as `samples` gives them."""
        Y = y if classes is None else torch.nn.functional.one_hot(y, len(classes)).to(X)
        mean, std = X[train].mean(0), X[train].std(0)
        std = std.where(std > 10 * torch.finfo(X.dtype).eps * mean.abs(), torch.inf)  # a column that does not move tells nothing
        Z = (X - mean) / std
        features = torch.arange(X.shape[1], device=X.device)
        if self.k is not None:
            features = explained(Z[train], y[train], classes).topk(min(self.k, X.shape[1])).indices
        W, b = self._map(Z[train][:, features], Y[train], y[train])
        weight = X.new_zeros(X.shape[1], W.shape[1])
        weight[features] = W / std[features, None]
        return {"weight": weight, "bias": b - mean @ weight, "features": features}

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


def leace(X: Tensor, y: Tensor, *, svd_tol: float = 1e-2, affine: bool = True):
    """LEACE of y in X [n d], arXiv:2306.03819: the least change after which no linear map tells more of y than its mean does.

    y as in `LinearProbe.fit`. The eraser of the package `concept-erasure` comes back: eraser(X) [… d] is X without y, and, where X are
    reads Sᵀ k, `S @ eraser.P.mT` is a state whose every read has gone through it (ask for affine=False: a state has no place for a mean).
    Correlations below svd_tol stay, and so does what is not linear; score `LinearProbe` on erased rows that the fit has not seen.
    """
    X, y, classes = samples(X, y)
    if not svd_tol > 0:
        raise ValueError(f"svd_tol must be above 0; got {svd_tol!r}")
    with warnings.catch_warnings():  # it scripts a function when imported, which torch has begun to deprecate
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        from concept_erasure import LeaceEraser

    return LeaceEraser.fit(X, y if classes is None else torch.nn.functional.one_hot(y, len(classes)).to(X), svd_tol=svd_tol, affine=affine)


def samples(X: Tensor, y: Tensor, form: str = "n d") -> tuple[Tensor, Tensor, Tensor | None]:
    """X of that form and y, numbers [n c] or indices [n] of the classes that come with them; without gradients."""
    if X.ndim != len(form.split()) or y.ndim not in (1, 2) or len(y) != len(X) or len(X) < 4:
        got = f"{tuple(X.shape)} and {tuple(y.shape)}"
        raise ValueError(f"X and y must be [{form}] and [n] or [n c] of the same samples, 4 or more; got {got}")
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


def scored(probe, result, X, y, classes, controls, against, groups, types) -> ProbeResult:
    """`probe.map` of rows that are not held out, scored on those that are, and again for every control; X, y, classes as of `samples`."""
    against = dict(against or {})
    if unknown := [name for name in controls if name not in LABELS]:
        raise ValueError(f"controls must be of {list(LABELS)}; got {unknown}")
    for name, other in against.items():
        if other.ndim != X.ndim or len(other) != len(X) or not other.isfinite().all():
            form = "[n d]" if X.ndim == 2 else "[n K V]"
            raise ValueError(f"against[{name!r}] must be {form}, finite, of the same {len(X)} samples; got {tuple(other.shape)}")
    check_ids(len(X), groups=groups, types=types)
    draw = torch.Generator().manual_seed(probe.seed)
    train, test = split(len(X), probe.held_out, groups, draw)
    if classes is not None and (missing := set(range(len(classes))) - set(y[train].tolist())):
        raise ValueError(f"y must have every class among the fitted rows; {classes[sorted(missing)].tolist()} is held out altogether")

    def score(X, y, map):
        out = X[test].flatten(1) @ map["weight"].flatten(0, -2) + map["bias"]
        if classes is not None:
            return (out.argmax(-1) == y[test]).double().mean().item()
        left, there = (out - y[test]).square().sum(), (y[test] - y[train].mean(0)).square().sum()
        return 1 - (left / there.clamp_min(torch.finfo(X.dtype).tiny)).item()

    found = probe.map(X, y, classes, train)
    chance = 0.0 if classes is None else (y[test] == y[train].mode().values).double().mean().item()
    others = {name: (X, relabelled(name, y, types, draw)) for name in controls}
    others |= {name: (other.detach().to(X), y) for name, other in against.items()}
    scores = {name: score(X_, y_, probe.map(X_, y_, classes, train)) for name, (X_, y_) in others.items()}
    return result(score=score(X, y, found), controls=scores, chance=chance, held_out=len(test), classes=classes, **found)

"""Linear maps between activations: layer to layer, model to model, subject to object, each scored on rows that its fit has not seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .controls import beside, check_ids, check_share, least_squares, split


@dataclass(frozen=True, eq=False, repr=False)
class MapResult:
    """A map, how well it does on rows held out, and how well its controls do."""

    r2: float  # 1 − Σ‖Y − Ŷ‖² / Σ‖Y − mean‖², below 0 where the mean is the better guess
    precision: float  # share of rows whose own target, or own top choice, is among the k nearest, or the k highest
    controls: dict[str, tuple[float, float]]  # name → r2, precision
    k: int
    held_out: int
    weight: Tensor  # [a b]
    bias: Tensor  # [b], 0 without intercept

    def __call__(self, X: Tensor) -> Tensor:
        return X.to(self.weight) @ self.weight + self.bias

    def __repr__(self) -> str:
        text = lambda r2, precision: f"R² {r2:.3f}, precision@{self.k} {precision:.3f}"
        controls = beside({name: text(*found) for name, found in self.controls.items()})
        return f"{text(self.r2, self.precision)} ({controls}; {self.held_out} rows held out)"


@dataclass(frozen=True)
class LinearMap:
    """Y ≈ X A (+ b) by least squares: how much of Y [n b] is a linear function of X [n a]?

        LinearMap().fit(hidden[2], hidden[7], decode=model.logits)      # mat's short cut from layer to layer, arXiv:2303.09435
        LinearMap(intercept=True, ridge=1e-2).fit(teacher, student)     # between two models, arXiv:1309.4168
        LinearMap().fit(trace.x.flatten(0, 1), trace.o.flatten(0, 1).flatten(1))        # 1 − R²: what memory adds to the token itself

    intercept  b, fitted with A
    ridge      in units of X's mean variance; 0: plain least squares, by the pseudo-inverse, for n ≥ 10 · a rows
    k          of precision@k
    held_out, seed   as in `LinearProbe`
    """

    intercept: bool = False
    ridge: float = 0.0
    k: int = 1
    held_out: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0; got {self.ridge!r}")
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be a whole number, at least 1; got {self.k!r}")
        check_share(self.held_out)

    def fit(
        self, X: Tensor, Y: Tensor, *, decode: Callable[[Tensor], Tensor] | None = None, groups: Tensor | None = None,
        against: Mapping[str, Tensor] | None = None,
    ) -> MapResult:  # fmt: skip
        """X [n a], Y [n b] of the same samples.

        decode   from rows of Y to logits: precision is then of decode(Ŷ) against the top choice of decode(Y). None: whether the own row of
                 Y is among the k nearest to Ŷ by cosine, of the rows held out
        groups   [n], held out together
        against  by name other X [n a'] of the same samples, as an untrained model's

        Controls that are always there: "shuffled rows", X fitted to Y in another order, and, of one width, "identity", Ŷ = X.
        ValueError for shapes that do not go together and for values that are not finite.
        """
        X, Y = (Z.detach() if Z.dtype == torch.float64 else Z.detach().float() for Z in (X, Y))
        same_rows(X, Y)
        others = {name: other.detach().to(X) for name, other in (against or {}).items()}
        for name, Z in {"X": X, "Y": Y, **others}.items():
            if Z.ndim != 2 or len(Z) != len(X) or not Z.isfinite().all():
                raise ValueError(f"{name} must be [n d], finite, of the same {len(X)} samples; got {tuple(Z.shape)}")
        check_ids(len(X), groups=groups)
        draw = torch.Generator().manual_seed(self.seed)
        train, test = split(len(X), self.held_out, groups, draw)
        A, b = self._solve(X[train], Y[train])
        score = lambda guess: self._score(guess, Y[test], Y[train].mean(0), decode)
        of = lambda X, Y: score(X[test] @ (m := self._solve(X[train], Y[train]))[0] + m[1])
        controls = {"shuffled rows": of(X, Y[torch.randperm(len(Y), generator=draw)])}
        if X.shape == Y.shape:
            controls["identity"] = score(X[test])
        controls |= {name: of(other, Y) for name, other in others.items()}
        return MapResult(*score(X[test] @ A + b), controls, self.k, len(test), A, b)

    def _solve(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        mean, target = (X.mean(0), Y.mean(0)) if self.intercept else (X.new_zeros(X.shape[1]), Y.new_zeros(Y.shape[1]))
        Z, Y = X - mean, Y - target
        A = least_squares(Z, Y, self.ridge) if self.ridge else torch.linalg.pinv(Z) @ Y
        return A, target - mean @ A

    def _score(self, guess: Tensor, Y: Tensor, mean: Tensor, decode) -> tuple[float, float]:
        total = (Y - mean).square().sum().clamp_min(torch.finfo(Y.dtype).tiny)
        r2 = 1 - ((guess - Y).square().sum() / total).item()
        if decode is None:
            unit = lambda Z: torch.nn.functional.normalize(Z, dim=-1)
            logits, wanted = unit(guess) @ unit(Y).mT, torch.arange(len(Y), device=Y.device)
        else:
            with torch.no_grad():
                logits, wanted = decode(guess), decode(Y).argmax(-1)
        hit = (logits.topk(min(self.k, logits.shape[-1])).indices == wanted[:, None]).any(-1)
        return r2, hit.double().mean().item()


@dataclass(frozen=True, eq=False, repr=False)
class RelationResult:
    """o ≈ beta · J s + b, and for how many subjects that were not used its top choice is the model's."""

    faithfulness: float
    controls: dict[str, float]
    held_out: int
    J: Tensor  # [o d], the mean Jacobian
    bias: Tensor  # [o], the mean of f(s) − J s
    beta: float

    def __call__(self, S: Tensor) -> Tensor:
        return self.beta * S.to(self.J) @ self.J.mT + self.bias

    def concepts(self, objects: Tensor, rank: int) -> Tensor:
        """[c d]: of each object [c o] the unit direction J⁺ (o − b) that subjects of it share, J⁺ of J's `rank` largest singular values.

        A linear relational concept, arXiv:2311.08968; subjects [n d] are told apart by `subjects @ concepts.mT`.
        """
        if not isinstance(rank, int) or not 1 <= rank <= min(self.J.shape):
            raise ValueError(f"rank must lie in [1, {min(self.J.shape)}], the sides of J; got {rank!r}")
        if objects.ndim != 2 or objects.shape[1] != len(self.J):
            raise ValueError(f"objects must be [c {len(self.J)}]; got {tuple(objects.shape)}")
        U, s, Vh = torch.linalg.svd(self.J, full_matrices=False)
        inverse = Vh[:rank].mT / s[:rank] @ U[:, :rank].mT
        return torch.nn.functional.normalize((objects.to(self.J) - self.bias) @ inverse.mT, dim=-1)

    def __repr__(self) -> str:
        controls = beside({name: f"{value:.3f}" for name, value in self.controls.items()})
        return f"faithfulness {self.faithfulness:.3f} ({controls}; {self.held_out} subjects held out)"


@dataclass(frozen=True)
class LinearRelation:
    """What a model does with subjects, to first order: the mean of f's Jacobian over a few of them, and of the rest. LRE, arXiv:2308.09124.

        f, S = probes.between(model, lambda: model(tokens), "blocks.0", "norm", at=subject, to=-1)
        found = LinearRelation(beta=2.0).fit(f, S, decode=model.logits)

    beta      by which J is scaled, for a Jacobian falls short of how far apart subjects are: norms are flat about any point
    examples  subjects that the map is made of; all others are held out
    seed      of which
    """

    beta: float = 1.0
    examples: int = 8
    seed: int = 0

    def fit(self, f: Callable[[Tensor], Tensor], S: Tensor, decode: Callable[[Tensor], Tensor]) -> RelationResult:
        """f: subjects [n d] → objects [n o], each row in its own context; decode: objects → logits. One backward pass per column.

        Controls: "mean object", the same guess for all; "other subjects", the map of another's subject; "translation", s + mean(o − s).
        """
        n = len(S)
        if S.ndim != 2 or not 1 <= self.examples < n:
            raise ValueError(f"S must be [n d] with more rows than examples={self.examples}; got {tuple(S.shape)}")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        known, rest = order[: self.examples], order[self.examples :]
        S = S.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            O = f(S)
            if O.ndim != 2 or len(O) != n:
                raise ValueError(f"f must give objects [n o] of the {n} subjects; got {tuple(O.shape)}")
            columns = [torch.autograd.grad(column.sum(), S, retain_graph=True)[0][known].mean(0) for column in O[known].unbind(1)]
        S, O, J = S.detach(), O.detach(), torch.stack(columns)
        b = (O[known] - S[known] @ J.mT).mean(0)
        found = RelationResult(0.0, {}, len(rest), J, b, self.beta)
        with torch.no_grad():
            wanted = decode(O[rest]).argmax(-1)
            score = lambda guess: (decode(guess).argmax(-1) == wanted).double().mean().item()
            controls = {
                "mean object": score(O[known].mean(0).expand_as(O[rest])),
                "other subjects": score(found(S[rest.roll(1)])),
            }
            if S.shape == O.shape:
                controls["translation"] = score(S[rest] + (O[known] - S[known]).mean(0))
            return RelationResult(score(found(S[rest])), controls, len(rest), J, b, self.beta)


def between(
    model: nn.Module, run: Callable[[], object], source: str, target: str, *, at: int | Tensor, to: int | Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f and S [B d]: what module `target` gives at token `to`, as a function of what `source` gives at token `at`, and what that is now.

    run runs the model on B prompts; source and target are names in `model.named_modules()`, whose output, or its first part, is [B T d];
    at and to are positions, one for all or [B]. f is as much of the model as lies between, for `LinearRelation`, `jacobian`, or an edit.
    ValueError for a name that is not there.
    """
    modules = dict(model.named_modules())
    for name, given in (("source", source), ("target", target)):
        if given not in modules:
            raise ValueError(f"{name} must be the name of a module of {type(model).__name__}, as {list(modules)[1:9]} …; got {given!r}")
    first = lambda out: out[0] if isinstance(out, tuple) else out
    rows = lambda out, where: (torch.arange(len(out), device=out.device), torch.as_tensor(where, device=out.device))

    def put(S):
        def hook(module, args, out):
            hidden = first(out)
            new = hidden.index_put(rows(hidden, at), S.to(hidden)) if S is not None else hidden
            seen["source"] = new[rows(new, at)]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        def take(module, args, out):
            seen["target"] = first(out)[rows(first(out), to)]

        seen: dict[str, Tensor] = {}
        handles = [modules[source].register_forward_hook(hook), modules[target].register_forward_hook(take)]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        if missing := {"source", "target"} - seen.keys():
            raise ValueError(f"run must reach source and target; it did not reach {sorted(missing)}")
        return seen

    with torch.no_grad():
        S = put(None)["source"].detach()
    return lambda S: put(S)["target"], S


def same_rows(X: Tensor, Y: Tensor) -> None:
    """ValueError unless X is [n a] and Y [n b]."""
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise ValueError(f"X and Y must be [n a] and [n b] of the same samples; got {tuple(X.shape)} and {tuple(Y.shape)}")

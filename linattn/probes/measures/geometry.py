"""What two sets of activations have in common, how many dimensions one uses, and directions in it. Rows are samples."""

from typing import NamedTuple

import torch
from torch import Tensor

from .maps import same_rows


def cka(X: Tensor, Y: Tensor, rbf: float | None = None) -> Tensor:
    """CKA of X [n a] and Y [n b], 1 up to rotation and scale: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), centred. arXiv:1905.00414.

    rbf: None, linear; else of the kernel exp(−‖x − x'‖² / 2σ²) with σ this share of the median distance. tr K̃L̃ / (‖K̃‖ ‖L̃‖) then.
    """
    same_rows(X, Y)
    if rbf is None:
        X, Y = X - X.mean(0), Y - Y.mean(0)
        return (Y.mT @ X).square().sum() / ((X.mT @ X).norm() * (Y.mT @ Y).norm())
    K, L = (_centred(gram(Z, rbf)) for Z in (X, Y))
    return (K * L).sum() / (K.norm() * L.norm())


def gram(X: Tensor, rbf: float | None = None) -> Tensor:
    """[n n] of X [n d]: X Xᵀ, or with rbf exp(−‖x − x'‖² / 2σ²), σ = rbf · the median distance of different rows."""
    if rbf is None:
        return X @ X.mT
    if not rbf > 0:
        raise ValueError(f"rbf must be above 0, a share of the median distance; got {rbf!r}")
    median = torch.pdist(X).median()
    if not median > 0:
        raise ValueError("X and Y must have rows that differ: more than half of the distances are 0")
    return torch.exp(-torch.cdist(X, X).square() / (2 * (rbf * median) ** 2))


def _centred(K: Tensor) -> Tensor:
    return K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()


def rsa(X: Tensor, Y: Tensor, distance: str = "correlation") -> float:
    """Spearman's correlation of the distances between rows of X [n a] with those of Y [n b]: representational similarity analysis.

    distance: "correlation" (1 − Pearson's of two rows), "euclidean", or another of scipy's pdist. Kriegeskorte et al. 2008.
    """
    same_rows(X, Y)
    if len(X) < 3:
        raise ValueError(f"X must have at least 3 rows; got {len(X)}")
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    return float(spearmanr(*(pdist(Z.detach().double().cpu().numpy(), distance) for Z in (X, Y))).statistic)


class MinibatchCKA:
    """CKA over shuffled batches by the unbiased HSIC₁, numerators and denominators summed before the one division. arXiv:2010.15327.

    Batches below about 256 rows, or of rows that belong together, are biased upwards.
    """

    def __init__(self, rbf: float | None = None):
        self.rbf = rbf  # as in `cka`; σ is then each batch's own
        self.sums = [0.0, 0.0, 0.0]

    def update(self, X: Tensor, Y: Tensor) -> None:
        same_rows(X, Y)
        if len(X) < 4:
            raise ValueError(f"X must have at least 4 rows; got {len(X)}")
        K, L = gram(X, self.rbf), gram(Y, self.rbf)
        self.sums = [s + hsic1(*pair).item() for s, pair in zip(self.sums, ((K, L), (K, K), (L, L)))]

    def result(self) -> float:
        a, b, c = self.sums
        return a / (b * c) ** 0.5


def hsic1(K: Tensor, L: Tensor) -> Tensor:
    """The unbiased estimator of HSIC from Gram matrices [n n], n ≥ 4."""
    n = len(K)
    K, L = K - K.diag().diag(), L - L.diag().diag()
    rest = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * (K.sum(0) * L.sum(0)).sum() / (n - 2)
    return ((K * L).sum() + rest) / (n * (n - 3))


def rankme(X: Tensor, eps: float = 1e-7) -> Tensor:
    """exp of the entropy of the singular values of X [n d]: how many dimensions it uses. arXiv:2210.02885."""
    s = torch.linalg.svdvals(X)
    p = s / s.sum() + eps
    return torch.exp(-(p * p.log()).sum())


def lidar(X: Tensor, delta: float = 1e-4, eps: float = 1e-8) -> Tensor:
    """Effective rank of the between-class scatter whitened by the within-class one: X [classes views d]. arXiv:2312.04000.

    Classes of "the same key in different contexts" count how many associations a state can tell apart.
    """
    if X.ndim != 3 or min(X.shape[:2]) < 2:
        raise ValueError(f"X must be [classes views d], two of each or more; got {tuple(X.shape)}")
    mean = X.mean(1)
    inside, between = (X - mean[:, None]).flatten(0, 1), mean - mean.mean(0)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    within = inside.mT @ inside / (X.shape[0] * (X.shape[1] - 1)) + delta * eye
    values, U = torch.linalg.eigh(within)
    W = U * values.rsqrt() @ U.mT
    p = torch.linalg.eigvalsh(W @ (between.mT @ between / (len(mean) - 1)) @ W).clamp_min(0) + eps
    p = p / p.sum()
    return torch.exp(-(p * p.log()).sum())


def difference_of_means(X: Tensor, positive: Tensor) -> Tensor:
    """The unit direction from the mean of the other rows to that of the `positive` [n] bool ones. arXiv:2310.15154."""
    if positive.dtype != torch.bool or positive.shape != X.shape[:1] or positive.all() or not positive.any():
        raise ValueError(f"positive must be bool [n] = ({len(X)},), some True and some not; got {positive.dtype} {tuple(positive.shape)}")
    return torch.nn.functional.normalize(X[positive].mean(0) - X[~positive].mean(0), dim=0)


def ablated(X: Tensor, direction: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    """X [… d] with nothing along `direction` [d] but what `mean` [d] has there: X − d̂ d̂ᵀ(X − mean). arXiv:2310.15154.

    mean=0 takes the direction out; the mean of all X leaves it as uninformative as it can be. How much of a probe's score goes with it is
    `controlled`'s business: `against={"random direction": ablated(X, random_keys(direction))}`. Of states: `without_value_direction`.
    """
    if direction.ndim != 1 or direction.shape != X.shape[-1:]:
        raise ValueError(f"direction must be [d] = ({X.shape[-1]},); got {tuple(direction.shape)}")
    d = torch.nn.functional.normalize(direction.to(X), dim=0)
    return X - ((X - mean) @ d)[..., None] * d


def alignment(X: Tensor, Y: Tensor) -> Tensor:
    """Mean ‖x − y‖² between rows that belong together, on the unit sphere: 0 best, at most 4. X and Y [n d]; arXiv:2005.10242."""
    same_rows(X, Y)
    if X.shape != Y.shape:
        raise ValueError(f"X and Y must be of one width; got {X.shape[1]} and {Y.shape[1]}")
    X, Y = (torch.nn.functional.normalize(Z, dim=-1) for Z in (X, Y))
    return (X - Y).square().sum(-1).mean()


def uniformity(X: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of exp(−t ‖x − x'‖²) over pairs of rows [n d], on the unit sphere: the lower, the more evenly spread. As above."""
    if X.ndim != 2 or len(X) < 2 or not t > 0:
        raise ValueError(f"X must be [n d] with two rows or more, and t above 0; got {tuple(X.shape)} and t={t!r}")
    d = torch.pdist(torch.nn.functional.normalize(X, dim=-1)).square()
    return (-t * d).logsumexp(0) - torch.tensor(float(len(d))).log()


def causal_inner_product(U: Tensor, V: Tensor, unembedding: Tensor, shrinkage: float = 0.0) -> Tensor:
    """[u v]: U Cov(γ)⁻¹ Vᵀ for directions U [u d], V [v d] among the rows γ of `unembedding` [vocab d]. arXiv:2311.03658.

    It stays the same under any change of basis of that space, where a plain cosine does not. shrinkage in [0, 1]: the share of the
    covariance's mean eigenvalue in all directions that is mixed in, for vocabularies not much larger than d.
    """
    d = unembedding.shape[-1]
    if not U.ndim == V.ndim == unembedding.ndim == 2 or U.shape[1] != d or V.shape[1] != d:
        got = [tuple(X.shape) for X in (U, V, unembedding)]
        raise ValueError(f"U, V and unembedding must be [u d], [v d] and [vocab d]; got {got}")
    if not 0 <= shrinkage <= 1 or (not shrinkage and len(unembedding) <= d):
        raise ValueError(f"shrinkage must lie in [0, 1], above 0 for {len(unembedding)} words of width {d}; got {shrinkage!r}")
    C = unembedding.mT.cov()
    C = (1 - shrinkage) * C + shrinkage * C.diag().mean() * torch.eye(d, dtype=C.dtype, device=C.device)
    return U @ torch.linalg.solve(C, V.mT)


class IdealWords(NamedTuple):
    """X ≈ mean + Σ_f words[f][levels[f] == x's level], and how much of X that is."""

    mean: Tensor  # [d]
    words: list[Tensor]  # of each factor [its levels, d], of mean 0 over the rows
    levels: list[Tensor]  # of each factor, what a row of `words` stands for
    explained: float  # share of X's variance; the rest is how factors act on each other


def ideal_words(X: Tensor, factors: Tensor) -> IdealWords:
    """X [n d] as a sum of one vector for each of its factors [n f], whole numbers, by least squares. arXiv:2302.14383.

    Of balanced factors a vector is the mean of its rows less the mean of all. Reads of a state that adds up pairs are additive but for
    interference, which is what `explained` leaves.
    """
    if X.ndim != 2 or factors.ndim != 2 or len(X) != len(factors) or factors.is_floating_point() or not factors.numel():
        got = f"{tuple(X.shape)} and {factors.dtype} {tuple(factors.shape)}"
        raise ValueError(f"X and factors must be [n d] and whole numbers [n f] of the same samples; got {got}")
    mean = X.mean(0)
    found = [column.unique(return_inverse=True) for column in factors.to(X.device).unbind(1)]
    hot = [torch.nn.functional.one_hot(index).to(X) for _, index in found]
    H = torch.cat(hot, 1)
    fitted = torch.linalg.pinv(H) @ (X - mean)
    parts = fitted.split([h.shape[1] for h in hot])
    words = [part - (h @ part).mean(0) for h, part in zip(hot, parts)]
    left = (X - mean - H @ torch.cat(words)).square().sum() / (X - mean).square().sum().clamp_min(torch.finfo(X.dtype).tiny)
    return IdealWords(mean, words, [levels for levels, _ in found], 1 - left.item())

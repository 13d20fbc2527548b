"""What two sets of activations have in common, how many dimensions one uses, and linear maps between them. Rows are samples."""

import torch
from torch import Tensor


def cka(X: Tensor, Y: Tensor, rbf: float | None = None) -> Tensor:
    """CKA of X [n a] and Y [n b], 1 up to rotation and scale: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), centred. arXiv:1905.00414.

    rbf: None, linear; else of the kernel exp(−‖x − x'‖² / 2σ²) with σ this share of the median distance. tr K̃L̃ / (‖K̃‖ ‖L̃‖) then.
    """
    _same_rows(X, Y)
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
    _same_rows(X, Y)
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
        _same_rows(X, Y)
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


def linear_map(X: Tensor, Y: Tensor) -> Tensor:
    """A [a b] with X A ≈ Y in least squares, without intercept: mat's short cut from layer to layer, arXiv:2303.09435; n ≥ 10 · a rows."""
    _same_rows(X, Y)
    return torch.linalg.lstsq(X, Y).solution


def _same_rows(X: Tensor, Y: Tensor) -> None:
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise ValueError(f"X and Y must be [n a] and [n b] of the same samples; got {tuple(X.shape)} and {tuple(Y.shape)}")

"""What a probe can tell from states as they are, without being given a key: it finds the readers itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .controls import check_share
from .fitted import ProbeResult, samples, scored


@dataclass(frozen=True, eq=False, repr=False)
class BilinearResult(ProbeResult):
    """As `ProbeResult`, of states: weight [K V c] = Σ_r readers[r] ⊗ values[r]."""

    readers: Tensor  # [rank K], orthonormal: what the probe reads states with. Their span is what was found, not each alone
    values: Tensor  # [rank V c], what it makes of each read-out


@dataclass(frozen=True)
class BilinearProbe:
    """y_c = Σ_r a_rᵀ S b_rc + bias_c of states S [n K V]: `rank` readers a_r, which all columns of y share, and what they read in b_r.

        found = BilinearProbe(rank=2).fit(trace.state(t)[:, head], value)
        found.readers                                   # [2 K], to compare with `trace.readers` or to erase along

    A flat linear probe has K·V·c numbers to fit; this one has rank · (K + V · c). Least squares with readers and maps in turn held still,
    from the leading singular vectors of the covariance of S with y on, until the error no longer falls.

    rank   1 … K; K is the flat ridge
    ridge  in units of the mean variance of an entry; where y leaves the readers open, it is what chooses among them
    held_out, seed   as in `LinearProbe`

    Raises ValueError for sizes out of range. A low-rank matrix instead of a vector: after bilinear classifiers, Pirsiavash et al. 2009.
    """

    rank: int = 1
    ridge: float = 1e-2
    sweeps: int = 100
    held_out: float = 0.3
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "sweeps"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0; got {self.ridge!r}")
        check_share(self.held_out)

    def fit(
        self, S: Tensor, y: Tensor, *, controls: Sequence[str] = ("shuffled labels",), against: Mapping[str, Tensor] | None = None,
        groups: Tensor | None = None, types: Tensor | None = None,
    ) -> BilinearResult:  # fmt: skip
        """S [n K V], one head's states; all else as in `LinearProbe.fit`, `against` being other states, as an untrained model's."""
        S, y, classes = samples(S, y, "n K V")
        if self.rank > S.shape[1]:
            raise ValueError(f"rank must be at most the {S.shape[1]} keys of S; got {self.rank}")
        return scored(self, BilinearResult, S, y, classes, controls, against, groups, types)

    def map(self, S: Tensor, y: Tensor, classes: Tensor | None, train: Tensor) -> dict[str, Tensor]:
        """weight, bias, features, readers and values of the states `train` of S and y, as `samples` gives them."""
        Y = (y if classes is None else torch.nn.functional.one_hot(y, len(classes)).to(S))[train]
        mean, target = S[train].mean(0), Y.mean(0)
        Z, Y = S[train] - mean, Y - target
        scale = Z.square().mean().sqrt().clamp_min(torch.finfo(S.dtype).tiny)
        Z, (n, K, V) = Z / scale, Z.shape
        R = min(self.rank, K)  # of other states than those that were checked
        readers = torch.linalg.svd((Z.flatten(1).mT @ Y).view(K, -1), full_matrices=False).U[:, :R]
        readers = torch.linalg.qr(torch.cat([readers, torch.eye(K, dtype=S.dtype, device=S.device)], 1)).Q[:, :R]  # fewer than R: fill up
        last = torch.inf
        for _ in range(self.sweeps):
            read = torch.einsum("nkv,kr->nrv", Z, readers).flatten(1)
            values = self._solve(read.mT @ read, read.mT @ Y, n)
            error = (read @ values - Y).square().sum().item()
            values = values.view(R, V, -1)
            if R == K or error > last * (1 - 1e-5):
                break
            last = error
            seen = torch.einsum("nkv,rvc->nckr", Z, values).flatten(2).flatten(0, 1)
            readers = torch.linalg.qr(self._solve(seen.mT @ seen, seen.mT @ Y.flatten(), len(seen)).view(K, R)).Q
        weight = torch.einsum("kr,rvc->kvc", readers, values) / scale
        bias = target - torch.einsum("kv,kvc->c", mean, weight)
        return {"weight": weight, "bias": bias, "features": torch.arange(K * V), "readers": readers.mT, "values": values / scale}

    def _solve(self, gram: Tensor, right: Tensor, n: int) -> Tensor:
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram / n + self.ridge * eye, right / n)

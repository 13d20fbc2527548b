"""Random features: φ(x) = relu(xΩ) with orthogonal directions, MoLFormer's map (arXiv:2106.09553)."""

import torch
from torch import Tensor, nn

from .decays import Place, gate_dtype

REDRAWS = ("never", "training")


def haar(size: int) -> Tensor:
    """A rotation or reflection of R^size, uniform (Haar): QR of a Gaussian matrix with the signs of R's diagonal moved into Q.

    Without the signs the columns of Q lean to one side, and relu features, which are not symmetric, see position as well as distance.
    """
    Q, R = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return Q * R.diagonal().sign()


def orthogonal_features(width: int, count: int) -> Tensor:
    """Ω [width count]: columns orthogonal in runs of `width`, uniform in direction, their lengths those of Gaussian vectors."""
    directions = torch.cat([haar(width) for _ in range(-(-count // width))], 1)[:, :count]
    return directions * torch.randn(width, count, dtype=torch.float64).norm(dim=0)


class RandomFeatures(nn.Module):
    """φ(x) = relu(xΩ), Ω [K features] one for all heads, a buffer: what was trained with it is loaded with it.

    features  None: K / 2, as MoLFormer's 32 of 64
    redraw    "never"; or "training": anew at every forward pass in training mode, from torch's random state, so that a checkpointed block
              draws the same again. Outside training the last draw stands: embeddings do not change from call to call. `draw()` at will
    """

    omega: Tensor

    def __init__(self, place: Place, *, features: int | None = None, redraw: str = "never"):
        super().__init__()
        if redraw not in REDRAWS:
            raise ValueError(f"redraw must be one of {list(REDRAWS)}; got {redraw!r}")
        self.redraw, self.key_dim = redraw, max(place.key_dim // 2, 1) if features is None else features
        if self.key_dim < 1:
            raise ValueError(f"features must be at least 1; got {features}")
        self.register_buffer("omega", torch.empty(place.key_dim, self.key_dim))
        self.draw()

    def extra_repr(self) -> str:
        return f"features={self.key_dim}, redraw={self.redraw!r}"

    @torch.no_grad()
    def draw(self) -> None:
        """Draw Ω anew from torch's random state."""
        self.omega.copy_(orthogonal_features(*self.omega.shape))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B T · K] → [B T · features]."""
        if self.training and self.redraw == "training":
            self.draw()
        wide = gate_dtype(q)
        omega = self.omega.to(wide, copy=True)  # the next draw writes into the buffer, which autograd still needs
        return (q.to(wide) @ omega).relu().to(q.dtype), (k.to(wide) @ omega).relu().to(k.dtype)

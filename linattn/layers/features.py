"""Maps of queries, keys and values, element by element or along a head's channels: [… K] → [… K] in the same dtype."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    return x


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0, arXiv:2006.16236."""
    return F.elu(x) + 1


def softmax(x: Tensor) -> Tensor:
    """Softmax over the channels of a head: in (0, 1), sums to 1."""
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + 1e-6): length 1 where |x| >> 1e-3; 0 stays 0, and no gradient exceeds 1e3."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def silu_norm(x: Tensor) -> Tensor:
    """u / |u| of u = silu(x) + 1/2 > 0.22: positive, of length 1, arXiv:2502.16249."""
    u = F.silu(x.to(torch.promote_types(x.dtype, torch.float32))) + 0.5
    return (u * torch.linalg.vecdot(u, u).rsqrt()[..., None]).to(x.dtype)  # two passes less in the backward than u / u.norm()


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "elu1": elu1,
    "silu": F.silu,
    "softmax": softmax,
    "l2norm": l2norm,
    "silu_norm": silu_norm,
}

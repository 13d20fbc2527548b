"""What swapped attention has besides the variants of `linattn.layers`: maps and gates made to follow a softmax that is there already."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import VARIANTS, Variant
from ..layers.decays import ChannelGate, HeadDecay, Place, SigmoidGate, gate_dtype

POSITIVE = ("relu", "elu1", "softmax", "silu_norm")  # of FEATURES: q·k >= 0, so that dividing by the sum gives weights, as softmax does
OPEN = 1e-3  # |log-decay| that gates start from where they are to forget nothing yet


class Hedgehog(nn.Module):
    """φ(x) = [softmax(W x), softmax(−W x)] over a head's channels, W learnt per head of q and of k, from the identity: arXiv:2402.04347.

    q [B T HQ K], k [B T H K] → the same with 2 K channels. Query heads that share a key head share their W.
    """

    def __init__(self, place: Place):
        super().__init__()
        self.key_dim = 2 * place.key_dim
        self.q_map = nn.Parameter(torch.empty(place.heads, place.key_dim, place.key_dim))
        self.k_map = nn.Parameter(torch.empty(place.heads, place.key_dim, place.key_dim))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            for weight in (self.q_map, self.k_map):
                weight.copy_(torch.eye(weight.shape[-1]))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(q, self.q_map), self._map(k, self.k_map)

    def _map(self, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.einsum("bthgk,hjk->bthgj", x.unflatten(2, (weight.shape[0], -1)), weight.to(x.dtype)).flatten(2, 3)
        return torch.cat([y, -y], -1).unflatten(-1, (2, -1)).softmax(-1, dtype=gate_dtype(x)).flatten(-2).to(x.dtype)


class PooledGate(nn.Module):
    """[B T H]: logsigmoid(mean over a head's channels of its key) / 16: no parameters of its own, Liger, arXiv:2503.01496.

    Its input is the projected keys [B T H·K], before rotary positions.
    """

    reads_keys = True

    def __init__(self, place: Place, *, divisor: float = 16.0):
        super().__init__()
        self.heads, self.divisor = place.heads, divisor

    def forward(self, k: Tensor) -> tuple[Tensor, None]:
        return F.logsigmoid(k.to(gate_dtype(k)).unflatten(-1, (self.heads, -1)).mean(-1)) / self.divisor, None


SWAP_VARIANTS = {
    "hedgehog": Variant(source="arXiv:2402.04347", feature=Hedgehog, normalize=True, norm=None),
    "liger": Variant(source="arXiv:2503.01496", feature="softmax", decay=PooledGate, normalize=True, norm=None),
}


def known(variant: str | Variant) -> Variant:
    """A variant by its name here or in `linattn.VARIANTS`, or itself. ValueError lists all names."""
    if isinstance(variant, Variant):
        return variant
    names = VARIANTS | SWAP_VARIANTS
    if variant not in names:
        raise ValueError(f"variant must be a linattn.layers.Variant or one of {list(names)}; got {variant!r}")
    return names[variant]


def like_softmax(variant: Variant) -> Variant:
    """`variant` as a weighted mean of the values, which is what softmax attention is: positive features, divided by their sum.

    A map that may be negative gives way to Hedgehog's. ValueError for what no choice of weights brings near a softmax.
    """
    for wrong, why in ((variant.delta, "the delta rule"), (variant.multi_value, "one key for all heads")):
        if wrong:
            raise ValueError(
                f"init='from_softmax' needs a variant that can start as a weighted mean of values; {why} cannot: init='random'"
            )
    feature = variant.feature if callable(variant.feature) or variant.feature in POSITIVE else Hedgehog
    return replace(variant, feature=feature, normalize=variant.normalize or True, norm=None)


def open_gates(decay: nn.Module) -> None:
    """Set learnt gates so that they forget next to nothing at the start. A constant decay stays what it is."""
    with torch.no_grad():
        if isinstance(decay, ChannelGate):
            nn.init.constant_(decay.up.bias, -math.log(math.expm1(OPEN * decay.divisor)))
        if isinstance(decay, SigmoidGate):
            nn.init.constant_(decay.proj.bias, -math.log(math.expm1(OPEN)))
        if isinstance(decay, HeadDecay) and decay.a is not None:
            nn.init.constant_(decay.a, -math.log(math.expm1(OPEN)))
        for part in decay.modules():
            if hasattr(part, "A_log"):  # Mamba-2's gate, and KDA's
                part.get_parameter("A_log").zero_()
                part.get_parameter("dt_bias").fill_(math.log(math.expm1(OPEN)))

"""Every variant, one line each: adding one is adding a line, which tests, bench and docs then read.

What a line does not name is the plainest choice of `Variant`; projections have no bias but where a gate has one. Choices of ours:
    linear         the scale K ** -0.5 of all others, which the normaliser divides out again
    retnet         rotary positions without xPos' magnitude, which the decay does already
    lightning      decays by the formula of 2401.04658 in the layer of MiniMax-01, arXiv:2501.08313
    mamba2         keys of 2 · dim / num_heads channels, as wide as values, so that num_heads alone sets the state
    gated_delta    the released layer's ratio of widths to dim, for any num_heads, and its A ~ U(0, 16)
    lion_*         bidirectional, causal=False, with the paper's feature map; with elu1, as its code has it, lion_lit is linear with biases
    …_mlm          its masked-language-model form: no feature map and no normaliser; without the dropout on scores, which are never formed
    gating         "target" where a paper is causal: the same recurrence read from both ends
    taylorshift    a norm per head, which would divide the paper's factor √(N/d) out again; `taylor_attention` has the factor
    ecoformer      the hash's bandwidth frozen at its fit, so that no token's code depends on the others, and every value in the numerator
    molformer      random features drawn once, and no redrawing unless `RandomFeatures` is told to
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from .decays import ChannelGate, ChannelStepGate, HeadDecay, NoDecay, Place, ScalarGate, SigmoidGate, lightning, lion
from .features import FEATURES
from .hashing import KernelHash
from .norm import GATES, NORMS
from .random_features import RandomFeatures
from .taylor import TaylorShift

Gating = Literal["source", "target", "symmetric"] | None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A point in feature × decay × write × output; `LinearAttention` reads it and nothing else does."""

    source: str  # the paper
    bias: bool = False  # of the projections of q, k, v and of the output
    expand_k: float = 1.0  # width of all keys of num_heads heads / dim
    expand_v: float = 1.0
    multi_value: bool = False  # one query and one key head, shared by all value heads
    tied: bool = False  # keys are queries: one projection
    conv: int = 0  # width of the short convolution over q, k and v; 0: none
    conv_bias: bool = False
    activation: str = "identity"  # of FEATURES, on q, k and v, after the convolution
    rope: bool = False  # rotary positions on q and k, before the feature map, which must keep its sign
    feature: str | Callable[[Place], nn.Module] = "identity"  # of FEATURES, on q and k; or makes a module: (q, k) → (q, k)
    decay: Callable[[Place], nn.Module] = NoDecay
    delta: bool = False  # the delta rule, beta = sigmoid(x W)
    normalize: bool | Literal["sum", "clamp"] = False
    scale: float | None = None  # None: K ** -0.5
    offset: float = 0.0  # similarity scale · q·k + offset
    gating: Gating = "target"  # where causal=False, unless the layer says otherwise
    skip: bool = False  # o + D · v, D per head
    norm: Literal["head", "all", "layer"] | None = "head"
    gate: Literal["silu", "sigmoid"] | None = None  # on the output, of a projection of x
    gate_low_rank: bool = False  # that projection through the width of one value head, with bias
    gate_first: bool = False  # gate, then norm

    def __post_init__(self):
        for name, known in (("activation", FEATURES), ("feature", FEATURES), ("norm", (*NORMS, None)), ("gate", (*GATES, None))):
            if not callable(getattr(self, name)) and getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}; got {getattr(self, name)!r}")


# fmt: off
VARIANTS = {
    "linear": Variant(source="arXiv:2006.16236", feature="elu1", normalize=True, norm=None),
    "retnet": Variant(source="arXiv:2307.08621", expand_v=2.0, rope=True, decay=HeadDecay, gate="silu"),
    "lightning": Variant(source="arXiv:2401.04658", activation="silu", decay=partial(HeadDecay, rule=lightning), norm="all",
                         gate="sigmoid"),
    "mamba2": Variant(source="arXiv:2405.21060", expand_k=2.0, expand_v=2.0, multi_value=True, conv=4, conv_bias=True, activation="silu",
                      decay=partial(ScalarGate, write=True), scale=1.0, skip=True, norm="all", gate="silu", gate_first=True),
    "gla": Variant(source="arXiv:2312.06635", expand_k=0.5, decay=ChannelGate, gate="silu"),
    "delta": Variant(source="arXiv:2406.06484", conv=4, activation="silu", feature="l2norm", delta=True),
    "gated_delta": Variant(source="arXiv:2412.06464", expand_k=0.75, expand_v=1.5, conv=4, activation="silu", feature="l2norm",
                           decay=partial(ScalarGate, a_range=(0.0, 16.0)), delta=True, gate="silu"),
    "kda": Variant(source="arXiv:2510.26692", conv=4, activation="silu", feature="l2norm", decay=ChannelStepGate, delta=True,
                   gate="sigmoid", gate_low_rank=True),
    "lion_lit": Variant(source="arXiv:2502.16249", bias=True, feature="silu_norm", normalize=True, norm=None),
    "lion_d": Variant(source="arXiv:2502.16249", bias=True, feature="silu_norm", decay=partial(HeadDecay, rule=lion, trainable=True),
                      normalize=True, gating="source", norm=None),
    "lion_s": Variant(source="arXiv:2502.16249", bias=True, feature="silu_norm", decay=SigmoidGate, normalize=True, gating="source",
                      norm=None),
    "lion_lit_mlm": Variant(source="arXiv:2502.16249", bias=True, norm="layer"),
    "lion_d_mlm": Variant(source="arXiv:2502.16249", bias=True, decay=partial(HeadDecay, rule=lion, trainable=True), gating="source",
                          norm=None),
    "lion_s_mlm": Variant(source="arXiv:2502.16249", bias=True, decay=SigmoidGate, gating="source", norm=None),
    "taylorshift": Variant(source="arXiv:2403.02920", bias=True, feature=TaylorShift, normalize=True, scale=1.0),
    "ecoformer": Variant(source="arXiv:2209.09004", bias=True, tied=True, feature=KernelHash, normalize=True, scale=1.0, norm=None),
    "molformer": Variant(source="arXiv:2106.09553", bias=True, rope=True, feature=RandomFeatures, normalize=True, scale=1.0, norm=None),
}
# fmt: on


def variant_of(variant: str | Variant) -> Variant:
    """The variant of that name, or `variant` itself. ValueError lists the known names."""
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"variant must be a linattn.layers.Variant or one of {list(VARIANTS)}; got {variant!r}")
    return VARIANTS[variant]

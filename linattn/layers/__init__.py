"""Parameters, features, decays and the operator put together: the attention layers and the parts beside them."""

from .convolution import ShortConvolution
from .curves import snake, snakes
from .features import FEATURES
from .linear_attention import LayerState, LinearAttention
from .mixer import Mixer
from .mlp import MLP, SwiGLU
from .softmax import SoftmaxAttention, SoftmaxState
from .variants import VARIANTS, Variant

__all__ = [
    "FEATURES", "MLP", "VARIANTS", "LayerState", "LinearAttention", "Mixer", "ShortConvolution", "SoftmaxAttention", "SoftmaxState",
    "SwiGLU", "Variant", "snake", "snakes",
]  # fmt: skip

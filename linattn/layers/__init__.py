"""Parameters, features, decays and the operator put together: the attention layers and the parts beside them."""

from .bytenet import ByteNetBlock
from .convolution import ShortConvolution
from .curves import snake, snakes
from .features import FEATURES
from .linear_attention import LayerState, LinearAttention
from .mixer import Mixer
from .mlp import MLP, SwiGLU
from .recattn import RecAttention
from .scatter import ScatterFormerBlock, segment_linear_attention, windows
from .softmax import SoftmaxAttention, SoftmaxState
from .sse import EXPANSIONS, ExpandedState, SparseStateExpansion
from .taylor import taylor_attention
from .variants import VARIANTS, Variant

__all__ = [
    "EXPANSIONS", "FEATURES", "MLP", "VARIANTS", "ByteNetBlock", "ExpandedState", "LayerState", "LinearAttention", "Mixer", "RecAttention",
    "ScatterFormerBlock", "ShortConvolution", "SoftmaxAttention", "SoftmaxState", "SparseStateExpansion", "SwiGLU", "Variant",
    "segment_linear_attention", "snake", "snakes", "taylor_attention", "windows",
]  # fmt: skip

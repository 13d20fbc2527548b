"""Efficient linear-attention architectures on one operator, with fused kernels. Names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "linattn.ops": ("BACKENDS", "Record", "Refusal", "State", "linear_attention", "step", "why_not"),
    "linattn.layers": ("VARIANTS", "LinearAttention", "SoftmaxAttention"),
    "linattn.models": ("Decoder", "DecoderConfig", "Encoder", "EncoderConfig", "VisionConfig", "VisionTransformer"),
    "linattn.swap": ("from_pretrained", "register_hf", "swap_attention"),
    "linattn.probes": ("probe",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF, "__version__"]

if TYPE_CHECKING:
    from .layers import VARIANTS, LinearAttention, SoftmaxAttention
    from .models import Decoder, DecoderConfig, Encoder, EncoderConfig, VisionConfig, VisionTransformer
    from .ops import BACKENDS, Record, Refusal, State, linear_attention, step, why_not
    from .probes import probe
    from .swap import from_pretrained, register_hf, swap_attention


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'linattn' has no attribute {name!r}; there are {sorted(_HOME_OF)}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)

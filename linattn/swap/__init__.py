"""Linear attention for models that have softmax attention: swap it, bring the quality back, save and load. No extra is imported here."""

from .adapters import ADAPTERS, Adapter, Heads, register_adapter
from .attention import SwappedAttention, SwappedState
from .interface import register_hf
from .maps import SWAP_VARIANTS, Hedgehog, PooledGate
from .report import SwapReport
from .storage import from_pretrained
from .swap import swap_attention, undo

__all__ = [
    "ADAPTERS", "SWAP_VARIANTS", "Adapter", "Heads", "Hedgehog", "PooledGate", "SwapReport", "SwappedAttention", "SwappedState",
    "from_pretrained", "register_adapter", "register_hf", "swap_attention", "undo",
]  # fmt: skip

"""Linear attention for models that have softmax attention: swap it, bring the quality back, save and load. No extra is imported here."""

from .adapters import ADAPTERS, Adapter, Heads, register_adapter
from .attention import SwappedAttention, SwappedState
from .interface import register_hf
from .linearise import distill, errors, finetune, importance, mode, transfer, with_lora
from .maps import SWAP_VARIANTS, Hedgehog, PooledGate
from .report import SwapReport
from .storage import from_pretrained
from .swap import swap_attention, undo

__all__ = [
    "ADAPTERS", "SWAP_VARIANTS", "Adapter", "Heads", "Hedgehog", "PooledGate", "SwapReport", "SwappedAttention", "SwappedState", "distill",
    "errors", "finetune", "from_pretrained", "importance", "mode", "register_adapter", "register_hf", "swap_attention", "transfer", "undo",
    "with_lora",
]  # fmt: skip

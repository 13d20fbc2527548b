"""Stacks of the layers, with names, sizes, files and text generation."""

from .block import Block
from .config import DecoderConfig
from .decoder import Decoder, next_token_loss
from .generation import decode, prefill
from .presets import PRESETS

__all__ = ["PRESETS", "Block", "Decoder", "DecoderConfig", "decode", "next_token_loss", "prefill"]

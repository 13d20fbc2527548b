"""Stacks of the layers, with names, sizes, files and text generation."""

from .block import Block
from .config import DecoderConfig
from .decoder import Decoder, next_token_loss
from .encoder import Encoder, EncoderConfig, masked_token_loss
from .generation import decode, prefill
from .l2vit import L2ViT, L2ViTConfig
from .presets import PRESETS
from .vision import ImageAttention, VisionTransformer
from .vision_config import VisionConfig

__all__ = [
    "PRESETS", "Block", "Decoder", "DecoderConfig", "Encoder", "EncoderConfig", "ImageAttention", "L2ViT", "L2ViTConfig",
    "VisionConfig", "VisionTransformer",
    "decode", "masked_token_loss", "next_token_loss", "prefill",
]  # fmt: skip

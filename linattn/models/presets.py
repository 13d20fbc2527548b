"""The sizes that have names: functions from a vocabulary and a variant to a config. Parameter counts are of GLA."""

from .config import DecoderConfig


def tiny(vocab_size: int, variant: str = "gla") -> DecoderConfig:
    """0.9 M at 256: trains on a laptop's CPU in minutes."""
    return DecoderConfig(vocab_size=vocab_size, variant=variant, dim=128, num_layers=4, num_heads=2)


def small(vocab_size: int, variant: str = "gla") -> DecoderConfig:
    """17 M at 8 192."""
    return DecoderConfig(vocab_size=vocab_size, variant=variant, dim=384, num_layers=8, num_heads=6)


def base(vocab_size: int, variant: str = "gla") -> DecoderConfig:
    """125 M at 50 304: GPT-2 small."""
    return DecoderConfig(vocab_size=vocab_size, variant=variant, dim=768, num_layers=12, num_heads=12)


def medium(vocab_size: int, variant: str = "gla") -> DecoderConfig:
    """355 M at 50 304: GPT-2 medium."""
    return DecoderConfig(vocab_size=vocab_size, variant=variant, dim=1024, num_layers=24, num_heads=16)


def large(vocab_size: int, variant: str = "gla") -> DecoderConfig:
    """1.1 B at 50 304."""
    return DecoderConfig(vocab_size=vocab_size, variant=variant, dim=2048, num_layers=20, num_heads=16)


PRESETS = {"tiny": tiny, "small": small, "base": base, "350m": medium, "1b": large}

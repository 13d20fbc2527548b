"""Training a decoder on text: config, recipes, data, loop, checkpoints, and what is measured and shown afterwards."""

from .config import Config
from .loop import Run, train
from .recipes import pretrain

__all__ = ["Config", "Run", "pretrain", "train"]

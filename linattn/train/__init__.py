"""Training: tasks, config, recipes, data, loop, checkpoints, and what is measured and shown afterwards."""

from .config import Config
from .loop import Run, train
from .recipes import pretrain
from .tasks import TASKS, Task

__all__ = ["TASKS", "Config", "Run", "Task", "pretrain", "train"]

"""What can be trained. Adding a task is a file and a line of this table; `task.py` says what it owes."""

from .decoder import DecoderTask
from .distillation import DistillationTask
from .image import ImageTask
from .masked import MaskedTask
from .task import Batch, Task
from .transformers import TransformersTask

TASKS: dict[str, type[Task]] = {
    "decoder": DecoderTask,
    "masked": MaskedTask,
    "image": ImageTask,
    "distillation": DistillationTask,
    "transformers": TransformersTask,
}

__all__ = ["TASKS", "Batch", "DecoderTask", "DistillationTask", "ImageTask", "MaskedTask", "Task", "TransformersTask"]

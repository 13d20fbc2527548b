"""What can be trained. Adding a task is a file and a line of this table; `task.py` says what it owes."""

from .decoder import DecoderTask
from .task import Batch, Task

TASKS: dict[str, type[Task]] = {
    "decoder": DecoderTask,
}

__all__ = ["TASKS", "Batch", "DecoderTask", "Task"]

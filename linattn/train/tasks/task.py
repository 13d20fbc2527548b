"""The only place that says what can be trained: a Task is data, a model and two questions, and the loop around it is the same for all.

A task is one file beside this one: a subclass of `Task`, and one line of the table in `__init__.py`. The loop calls, in this order,

    task = TASKS[config.task](config, saved)      reads the data; `saved` is the checkpoint that is gone on from, or None
    model = task.create()  or  task.load(saved)   the random state is set before by the loop
    for step …:
        task.losses(model, task.batch(step, rows))          one number per target, under autocast, with gradients
        for batch in task.evaluation(): task.score(model, batch)      now and then, without gradients
        model.save_pretrained(folder); task.save(folder)    at a checkpoint

and moves batches to the device, accumulates, steps, logs, saves, stops and resumes. The loss of a step is the mean over all targets of its
`config.batch` rows, however these are split over processes and micro-batches; the metric is Σ score / Σ weight over all of `evaluation()`.

What a step draws at random is a function of (config.seed, step, row), `data.derive("mask", config.seed, step, row)` being a seed for it:
then a resumed run, and one on another number of processes, sees what an uninterrupted one would. A task's own options come as
`config.options`; it makes a frozen dataclass of them, which checks them and refuses unknown names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from ..config import Config

Batch = dict[str, Tensor]


class Task(ABC):
    """One run's data and model. `create`, `batch`, `losses`, `evaluation` and `score` are what a task has to say."""

    metric: str  # what `score` measures: a column of log.csv, such as "bits_per_byte" or "accuracy"
    fingerprint: str  # of the data: equal on equal data only
    source: str  # the data in words, for the line a run opens with
    tokens_per_row: int  # what a row of a batch counts for in tokens/s
    title: str  # of the model, for the same line
    starts_whole: bool = False  # whether `create` loads weights, so that it cannot make a model whose parameters are shared out already

    @abstractmethod
    def __init__(self, config: Config, saved: Path | None):
        """Read and check the data. ValueError for what is wrong with it or with `config.options`."""
        self.config, self.title = config, f"{config.preset} {config.variant}"

    @abstractmethod
    def create(self) -> nn.Module:
        """A new model, drawn from torch's random state as it is. It has `save_pretrained(folder)`."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The model that `save_pretrained` wrote to `folder`."""

    def save(self, folder: Path) -> None:  # noqa: B027 - most tasks have nothing to add
        """Write beside the model what is needed to use it: a tokenizer, the names of classes. Nothing, unless a task says so."""

    @abstractmethod
    def batch(self, step: int, rows: range) -> Batch:
        """The examples `rows` ⊂ range(config.batch) of step `step`: a function of these two and the config alone, on the CPU."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each target, in float32 and of any shape. Call `model` itself, once, not its parts: it may be wrapped."""

    def targets(self, batch: Batch) -> int | None:
        """How many losses `batch` has, where that is not the same for all batches of as many rows: masked tokens, say."""
        return None

    def part(self, batch: Batch, index: int, of: int) -> Batch:
        """Part `index` of `of` equal ones of each sequence, for context parallelism. ValueError where sequences cannot be cut."""
        raise ValueError(f"context_parallel must be 1 for the task {self.config.task}; got {of}")

    @abstractmethod
    def evaluation(self) -> Iterable[Batch]:
        """The held-out examples, the same every time."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor | float, Tensor | float]:
        """What the batch adds to the metric, and its weight: (correct answers, images), or (bits, bytes)."""


def cut(x: Tensor, index: int, of: int) -> Tensor:
    """Part `index` of `of` equal ones of x [B T …]. ValueError where T is no multiple of `of`."""
    length, rest = divmod(x.shape[1], of)
    if rest:
        raise ValueError(f"context must be a multiple of context_parallel = {of}; got {x.shape[1]}")
    return x[:, index * length : (index + 1) * length]

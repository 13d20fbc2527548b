"""A task of a user's own runs on the same loop, resumes bit for bit, and its metric is a column of the log."""

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file

from linattn.train import TASKS, Config, Task, train
from linattn.train.data import derive


class Perceptron(torch.nn.Linear):
    def save_pretrained(self, folder):
        save_file(self.state_dict(), Path(folder) / "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Options:
    noise: float = 0.0


class Halves(Task):
    """Which half of a square a point lies in."""

    metric = "accuracy"
    fingerprint, source, tokens_per_row = "square", "points of a square", 1

    def __init__(self, config, saved):
        super().__init__(config, saved)
        self.options = Options(**config.options)

    def create(self):
        return Perceptron(2, 2)

    def load(self, folder):
        model = Perceptron(2, 2)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    def _points(self, *seeds):
        x = torch.stack([torch.rand(2, generator=torch.Generator().manual_seed(derive(*seed))) for seed in seeds])
        return {"x": x - 0.5, "y": (x[:, 0] > 0.5).long()}

    def batch(self, step, rows):
        return self._points(*(("points", self.config.seed, step, row) for row in rows))

    def losses(self, model, batch):
        return F.cross_entropy(model(batch["x"] + self.options.noise), batch["y"], reduction="none")

    def evaluation(self):
        yield self._points(*(("held out", i) for i in range(50)))

    def score(self, model, batch):
        return (model(batch["x"]).argmax(-1) == batch["y"]).sum(), len(batch["y"])


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(TASKS, "halves", Halves)
    return Config(task="halves", batch=8, steps=30, lr=0.1, warmup=1, eval_every=10, save_every=10, keep=5)


def test_a_task_of_ones_own(config, tmp_path):
    quiet = Console(file=StringIO())
    whole = train(config, tmp_path / "a", console=quiet)
    assert [row["step"] for row in whole.rows if row["accuracy"] is not None] == [0, 10, 20, 30]
    assert whole.rows[-1]["accuracy"] > 0.9 and whole.rows[-1]["tokens"] == 8 * 30
    for name in ("step-00000030", "step-00000020"):  # as if the machine had gone down after step 10
        (tmp_path / "a" / name / "complete.json").unlink()
    again = train(config, tmp_path / "a", console=quiet)
    assert [(row["loss"], row["accuracy"]) for row in again.rows] == [(row["loss"], row["accuracy"]) for row in whole.rows]


def test_options_are_part_of_the_run(config, tmp_path):
    quiet = Console(file=StringIO())
    train(config, tmp_path, console=quiet)
    with pytest.raises(ValueError, match=r"its config differs: options: {} here, {'noise': 0.5} asked"):
        train(Config(**{**vars(config), "options": {"noise": 0.5}}), tmp_path, console=quiet)

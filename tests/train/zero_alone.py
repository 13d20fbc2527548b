"""Run by test_zero.py in a process of its own: for each stage, the groups of the optimizer, a step that is not finite, and accumulation."""

import math
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from launching import some_text
from rich.console import Console

from linattn.train import Config, train
from linattn.train.tasks import DecoderTask

out = Path(sys.argv[1])
(out / "text").mkdir()
torch.set_num_threads(1)
base = Config(
    data=(str(some_text(out / "text")),), overrides=dict(dim=32, num_layers=2), variant="mamba2", held_out=0.2, context=32, batch=4,
    steps=5, warmup=1, lr=1e-2, eval_every=5, eval_windows=8, save_every=100, weight_decay=0.5, device="cpu", keep=9,
)  # fmt: skip
losses, trained = DecoderTask.losses, []


def poisoned(task, model, batch):
    """The loss of the third step, and of its second micro-batch alone, is not finite."""
    trained.append(torch.is_grad_enabled())
    bad = trained[-1] and math.ceil(sum(trained) / task.config.accumulate) == 3 and sum(trained) % task.config.accumulate == 0
    return losses(task, model, batch) * (math.inf if bad else 1)


DecoderTask.losses = poisoned


def run(name, **changes):
    trained.clear()
    done = train(replace(base, **changes), out / name, console=Console(file=StringIO()))
    return [(row["loss"], row["grad_norm"], row["skipped"]) for row in done.rows[1:]], done.rows[-1]["bits_per_byte"]


wanted, figure = run("plain")
assert [skipped for _, _, skipped in wanted] == [0, 0, 1, 0, 0]
for stage in range(4):
    rows, metric = run(f"zero-{stage}", zero=stage, accumulate=1 + stage % 2)
    assert [skipped for _, _, skipped in rows] == [0, 0, 1, 0, 0], rows
    for one, two in zip(rows, wanted, strict=True):
        assert two[2] or all(math.isclose(a, b, rel_tol=2e-4) for a, b in zip(one[:2], two[:2], strict=True)), (stage, rows, wanted)
    assert math.isclose(metric, figure, rel_tol=1e-5), (stage, metric, figure)
    print(f"stage {stage}: as they should be")

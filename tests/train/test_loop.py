"""The loop: the same losses however often it is stopped, and nothing lost on the way."""

import errno
import math
import os
import re
import signal
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from linattn.train import Config, checkpoint, loop, optimizer, train
from linattn.train.data import standard_library
from linattn.train.engine import Engine
from linattn.train.log import read
from linattn.train.stop import Stop
from linattn.train.tasks import TASKS, DecoderTask


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i, document in enumerate(list(standard_library())[:40]):
        (folder / f"{i:02d}.txt").write_bytes(document[:3000])
    return folder


@pytest.fixture
def config(text):
    return Config(
        data=(str(text),), overrides=dict(dim=32, num_layers=2), held_out=0.2, context=32, batch=4, steps=8, warmup=2, lr=1e-2,
        eval_every=4, eval_windows=8, save_every=100,
    )  # fmt: skip


def run(config, out, **how):
    console = Console(file=StringIO(), width=200)
    result = train(config, out, console=console, **how)
    return result, console.file.getvalue()


def losses(rows):
    return [(row["step"], row["loss"], row["grad_norm"], row["bits_per_byte"]) for row in rows]


class StopAfter(Stop):
    """As if Ctrl-C came during step `at`."""

    at = 0

    def __enter__(self):
        self.steps = 0
        step = Engine.step

        def counting(engine, batch, lr):
            self.steps += 1
            if self.steps == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            return step(engine, batch, lr)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Engine, "step", counting)
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        super().__exit__(*exception)


@pytest.mark.parametrize("variant", ["gla", "softmax"])
def test_stopped_twice_gives_the_losses_of_never(config, tmp_path, monkeypatch, variant):
    config = replace(config, variant=variant)
    whole, _ = run(config, tmp_path / "whole")
    assert whole.step == 8 and whole.rows[-1]["bits_per_byte"] < whole.rows[0]["bits_per_byte"]
    monkeypatch.setattr(loop, "Stop", StopAfter)
    for at, step in ((3, 3), (2, 5)):
        monkeypatch.setattr(StopAfter, "at", at)
        part, said = run(config, tmp_path / "parts")
        assert part.stopped_by == signal.SIGINT and part.step == step
        assert f"saved {part.checkpoint}" in said and f"to go on: linattn train --out {tmp_path / 'parts'} --resume auto" in said
    monkeypatch.setattr(StopAfter, "at", 0)
    rest, said = run(config, tmp_path / "parts")
    assert "going on from" in said and rest.stopped_by is None
    assert losses(rest.rows) == losses(whole.rows)
    one, two = (load_file(r.checkpoint / "model.safetensors") for r in (whole, rest))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bfloat16_trains(config, tmp_path):
    result, _ = run(replace(config, precision="bfloat16", steps=3), tmp_path)
    assert result.rows[-1]["bits_per_byte"] < result.rows[0]["bits_per_byte"]


def test_a_finished_run_is_left_alone(config, tmp_path):
    config = replace(config, steps=2)
    first, _ = run(config, tmp_path)
    again, _ = run(config, tmp_path)
    assert losses(again.rows) == losses(first.rows) and again.checkpoint == first.checkpoint


def test_another_run_is_refused_naming_what_differs(config, tmp_path, text):
    run(replace(config, steps=1), tmp_path)
    with pytest.raises(
        ValueError, match=r"another run, its config differs: variant: 'gla' here, 'delta' asked; steps: 1 here, 8 asked; lr"
    ):
        run(replace(config, variant="delta", lr=0.5), tmp_path)
    with pytest.raises(ValueError, match="holds a run at step 1: choose another folder"):
        run(replace(config, steps=1), tmp_path, resume="never")
    (text / "new.txt").write_text("more")
    with pytest.raises(ValueError, match=r"its data differs: 41 documents.* is not what it was trained on"):
        run(replace(config, steps=1), tmp_path)
    (text / "new.txt").unlink()


def test_a_torn_checkpoint_costs_only_its_own_steps(config, tmp_path):
    config = replace(config, steps=6, save_every=2, keep=3)
    whole, _ = run(config, tmp_path)
    (tmp_path / "step-00000006" / "optimizer.safetensors").write_bytes(b"")
    again, said = run(config, tmp_path)
    assert "skipping" in said and "optimizer.safetensors has 0 bytes" in said and "going on from" in said and "step-00000004" in said
    assert losses(again.rows) == losses(whole.rows)


def test_a_full_disk_is_said_and_outlived(config, tmp_path, monkeypatch):
    config, save = replace(config, steps=6, save_every=2), optimizer.save

    def full(made, model, path):
        if "step-00000004" in str(path):
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(made, model, path)

    monkeypatch.setattr(optimizer, "save", full)
    result, said = run(config, tmp_path)
    assert re.search(r"could not save step 4 in .*No space left on device; .*step-00000002 is as it was; the run goes on", said)
    assert result.checkpoint.name == "step-00000006"


def test_a_full_disk_at_the_last_save_is_an_error(config, tmp_path, monkeypatch):
    def full(folder, step, facts, write, *, keep, world):
        raise checkpoint.SaveError("could not save")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(checkpoint.SaveError):
        run(replace(config, steps=1), tmp_path)


def test_steps_that_are_not_finite_are_skipped_and_counted(config, tmp_path, monkeypatch):
    losses, calls = DecoderTask.losses, []

    def poisoned(task, model, batch):
        calls.append(model.training)
        return losses(task, model, batch) * (math.nan if sum(calls) == 3 and model.training else 1)

    monkeypatch.setattr(DecoderTask, "losses", poisoned)
    result, said = run(replace(config, steps=5), tmp_path)
    assert [row["skipped"] for row in result.rows[1:]] == [0, 0, 1, 0, 0] and "1 skipped" in said
    assert math.isnan(result.rows[3]["loss"]) and math.isfinite(result.rows[-1]["bits_per_byte"])


def test_a_run_that_stays_not_finite_is_given_up(config, tmp_path, monkeypatch):
    losses = DecoderTask.losses
    monkeypatch.setattr(DecoderTask, "losses", lambda task, model, batch: losses(task, model, batch) * math.inf)
    monkeypatch.setattr(loop, "PATIENCE", 3)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row up to step 3 .*lower lr than 0.01"):
        run(config, tmp_path)


def test_what_decays(config, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2, bias=False))
    model[2].weight._no_weight_decay = True
    decayed, spared = optimizer.make(model, lr=1.0, betas=(0.9, 0.9), weight_decay=0.5).param_groups
    assert decayed["weight_decay"] == 0.5 and decayed["params"] == [model[0].weight]
    assert spared["weight_decay"] == 0.0 and len(spared["params"]) == 4


def test_the_optimizer_of_another_model_is_refused(tmp_path):
    def made(width):
        model = torch.nn.Linear(width, 2)
        adam = optimizer.make(model, lr=0.1, betas=(0.9, 0.9), weight_decay=0.0)
        model(torch.ones(1, width)).sum().backward()
        adam.step()
        return model, adam

    model, adam = made(3)
    optimizer.save(adam, model, tmp_path / "o.safetensors")
    other, its = made(4)
    with pytest.raises(ValueError, match="is the optimizer of another model: weight"):
        optimizer.load(its, other, tmp_path / "o.safetensors")


def test_a_log_cut_short_by_a_kill_is_read_up_to_there(config, tmp_path):
    result, _ = run(replace(config, steps=3), tmp_path)
    path = tmp_path / "log.csv"
    path.write_text(path.read_text()[:-12].rsplit(",", 2)[0])
    assert losses(read(path)) == losses(result.rows)[:-1]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(tokenizer="words"), r"tokenizer must be one of \['bytes', 'bpe'\], or a .json file of .*; got 'words'"),
        (dict(schedule="step"), "schedule must be one of"),
        (dict(steps=0), "steps must be at least 1; got 0"),
        (dict(lr=-1.0), "lr must be above 0; got -1.0"),
        (dict(lr=math.nan), "lr must be above 0; got nan"),
        (dict(held_out=1.0), "held_out must lie between 0 and 1"),
        (dict(min_lr=2.0), r"min_lr is a share of lr and must lie in \[0, 1\]"),
        (dict(betas=(0.9,)), "betas must be two numbers"),
        (dict(report=("telegraph",)), r"report must be of \['tensorboard', 'wandb'\]; got \['telegraph'\]"),
        (dict(accumulate=3), "batch must be a multiple of accumulate = 3; got 8"),
        (dict(deepspeed=[]), "deepspeed must be the object of a DeepSpeed configuration"),
    ],
)
def test_bad_configs_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Config(**change)


def test_a_report_that_cannot_be_made_is_said_first(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report 'wandb' needs the package wandb"):
        run(replace(config, report=("wandb",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_router_owes_is_in_the_loss(config):
    config = replace(config, variant="sse_gdn", options=dict(balance=0.5), overrides=dict(dim=16, num_layers=2))
    task = TASKS["decoder"](config, None)
    model, batch = task.create().train(), task.batch(0, range(2))
    loss, owed = task.losses(model, batch).mean(), model.balance_loss
    assert owed >= 1  # of two layers: 2 where all is even
    torch.testing.assert_close(loss, task.losses(model.eval(), batch).mean() + 0.5 * owed)


def test_tensorboard_has_what_the_log_has(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, _ = run(replace(config, report=("tensorboard",)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in result.rows[1:]])
    assert len(events.Scalars("bits_per_byte")) == 3


@pytest.mark.parametrize(
    "change, how, said",
    [
        (dict(task="poetry"), {}, r"task must be one of \['decoder'"),
        (dict(options=dict(rhyme=True)), {}, r"the task decoder has no option 'rhyme'; there are \['balance'\]"),
        (dict(options=dict(balance=-1.0)), {}, "balance must be at least 0; got -1.0"),
        (dict(variant="mha"), {}, "variant must be one of"),
        (dict(preset="huge"), {}, "preset must be one of"),
        (dict(overrides=dict(depth=3)), {}, "has no field 'depth'"),
        (dict(device="abacus"), {}, "device 'abacus' cannot be used here"),
        ({}, dict(resume="maybe"), "resume must be 'auto' or 'never'; got 'maybe'"),
    ],
)
def test_bad_runs_are_refused_and_leave_nothing(config, tmp_path, change, how, said):
    with pytest.raises(ValueError, match=said):
        run(replace(config, **change), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_config_survives_json(config, tmp_path):
    config.save(tmp_path / "run.json")
    assert Config.load(tmp_path / "run.json") == config
    (tmp_path / "run.json").write_text('{"model_type": "x"}')
    with pytest.raises(ValueError, match="is not the config of a linattn training run: a config has no fields"):
        Config.load(tmp_path / "run.json")

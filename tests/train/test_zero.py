"""DeepSpeed with real processes over gloo: whatever happens to them, the losses are those of a run to which nothing happened."""

import importlib.util
import os
import random
import re
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import LIMIT, command, finish, launched, orphans, some_text, wait_for, workers
from rich.console import Console
from safetensors.torch import load_file

from linattn.train import Config, train
from linattn.train.log import read

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]

SMALL = "--set dim=32 --set num_layers=2 --held-out 0.2 --context 32 --batch 4 --warmup 2 --lr 1e-2 --device cpu".split()
STEPS = 24


def arguments(text, out, *more, steps=STEPS, save_every=4):
    every = ["--steps", steps, "--save-every", save_every, "--eval-every", 8]
    return ["train", "--data", text, *SMALL, *every, "--out", out, *more]


def losses(out):
    return [(row["step"], row["loss"], row["grad_norm"], row["bits_per_byte"]) for row in read(out / "log.csv")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return some_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """ZeRO-2 in two processes, left alone."""
    out = tmp_path_factory.mktemp("zero") / "whole"
    code, said = finish(command(2, *arguments(text, out, "--zero", 2)))
    assert code == 0 and "2 processes, ZeRO 2" in said, said
    assert len(losses(out)) == STEPS + 1
    return out


def killed(launch, out, row, who):
    """SIGKILL to a worker (or to torchrun itself) once the log has `row` rows. All others must end by themselves."""
    with launched(launch) as process:
        wait_for(lambda: (out / "log.csv").exists() and len(read(out / "log.csv")) > row, process)
        victims = workers(process) if who == "worker" else [process.pid]
        os.kill(random.choice(victims), signal.SIGKILL)
        process.communicate(timeout=LIMIT)
        assert orphans(process, within=60.0) == []


def test_killed_twice_gives_the_losses_of_never(text, whole, tmp_path):
    out = tmp_path / "run"
    launch = command(2, *arguments(text, out, "--zero", 2))
    for row, who in ((6, "worker"), (14, "torchrun")):
        killed(launch, out, row, who)
    code, said = finish(launch)
    assert code == 0 and f"going on from {out}" in said, said
    assert losses(out) == losses(whole)
    one, two = (load_file(run / f"step-{STEPS:08d}" / "model.safetensors") for run in (out, whole))
    assert all(one[name].equal(two[name]) for name in one)


def test_another_number_of_processes_goes_on_by_the_same_command(text, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"step-{STEPS:08d}")
    code, said = finish(command(0, *arguments(text, out, "--zero", 2)))
    assert code == 0 and "saved by 2 processes" in said, said
    assert [step for step, *_ in losses(out)] == [step for step, *_ in losses(whole)]
    for one, two in zip(losses(out)[1:], losses(whole)[1:], strict=True):
        assert one[1:3] == pytest.approx(two[1:3], rel=1e-4)
    assert not list(out.glob(".step-*"))


def test_a_step_that_is_not_finite_is_skipped_by_all_stages_and_the_groups_are_whole(tmp_path):
    """In one process of its own, for all four stages: see the script."""
    code, said = finish([sys.executable, str(Path(__file__).parent / "zero_alone.py"), str(tmp_path)])
    assert code == 0 and said.count("as they should be") == 4, said


@pytest.mark.parametrize(
    "by, more",
    [
        ("state", ["--variant", "gated_delta", "--zero", 3]),  # convolution, delta rule and decay: all that crosses the cut
        pytest.param("heads", ["--variant", "mamba2", "--set", "softmax_every=2", "--zero", 2], marks=pytest.mark.slow),
        pytest.param("state", ["--recipe", "masked", "--zero", 1], marks=pytest.mark.slow),  # from both sides
        pytest.param("heads", ["--recipe", "masked", "--zero", 3], marks=pytest.mark.slow),
    ],
)
def test_a_sequence_on_two_processes_trains_as_on_one(text, tmp_path, by, more):
    how = ["--context-parallel", 2, "--context-parallel-by", by, *more]
    code, said = finish(command(2, *arguments(text, tmp_path / "two", *how, steps=6)))
    assert code == 0, said
    train(replace(Config.load(tmp_path / "two" / "run.json"), zero=None, context_parallel=1), tmp_path / "one", console=Console(quiet=True))
    one, two = (read(tmp_path / name / "log.csv") for name in ("one", "two"))
    for a, b in zip(one[1:], two[1:], strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)
    metric = next(name for name in ("bits_per_byte", "accuracy") if name in one[-1])
    assert one[-1][metric] == pytest.approx(two[-1][metric], rel=1e-4)


# -- the long ones ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_resumes_bit_for_bit_twice(text, tmp_path, stage, precision, processes):
    out = tmp_path / "run"
    out.mkdir()
    config = Config(
        data=(str(text),), overrides=dict(dim=32, num_layers=2), held_out=0.2, context=32, batch=4, warmup=2, lr=1e-2, device="cpu",
        steps=9, save_every=3, eval_every=3, keep=9, zero=stage, precision=precision,
    )  # fmt: skip
    config.save(out / "run.json")
    launch = command(processes, "train", "--out", out)
    code, said = finish(launch)
    assert code == 0, said
    before = losses(out)
    for lost in (("6", "9"), ("9",)):  # the second time it goes on from what the first resumed run has saved
        for step in lost:
            shutil.rmtree(out / f"step-0000000{step}")
        code, said = finish(launch)
        assert code == 0 and f"going on from {out}" in said, said
        assert losses(out) == before


@pytest.mark.slow
def test_killed_at_twenty_moments(text, whole, tmp_path):
    out = tmp_path / "run"
    launch = command(2, *arguments(text, out, "--zero", 2))
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        killed(launch, out, random.randrange(STEPS - 2), random.choice(["worker", "torchrun"]))
        code, said = finish(launch)
        assert code == 0, said
        assert losses(out) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "STOP"])
def test_asked_to_stop_all_save_together(text, tmp_path, how):
    out = tmp_path / "run"
    launch = command(2, *arguments(text, out, "--zero", 1, steps=100_000, save_every=100_000))
    with launched(launch) as process:
        wait_for(lambda: (out / "log.csv").exists() and len(read(out / "log.csv")) > 5, process)
        if how == "STOP":
            (out / "STOP").touch()
        else:
            os.kill(process.pid, getattr(signal, how))
        said, _ = process.communicate(timeout=LIMIT)
        assert orphans(process) == []
    step = int(re.search(r"stopped by \w+ at step (\d+)", said)[1])
    assert (out / f"step-{step:08d}" / "complete.json").exists() and losses(out)[-1][0] == step and not (out / "STOP").exists()


@pytest.mark.slow
def test_a_full_disk_in_one_process_leaves_the_last_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    code, said = finish(command(2, *arguments(text, out, "--zero", 2, steps=4)))
    assert code == 0, said
    limit = 100_000  # bytes of a file: enough for the log, too few for DeepSpeed's

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    shutil.copytree(out, tmp_path / "other")
    config = Config.load(out / "run.json")
    assert config.steps == 4
    code, said = finish(command(2, *arguments(text, tmp_path / "more", "--zero", 2, steps=8)), preexec_fn=small_disk)
    assert code != 0 and "could not save step 4" in said and "the run goes on" in said and "there is no earlier one" in said, said
    assert not list((tmp_path / "more").glob("*step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
@pytest.mark.parametrize("stage", range(4))
def test_world_size_changes_both_ways(text, tmp_path, stage, before, after):
    out = tmp_path / "run"
    code, said = finish(command(before, *arguments(text, out, "--zero", stage, steps=8)))
    assert code == 0, said
    wanted = losses(out)
    shutil.rmtree(out / "step-00000008")
    code, said = finish(command(after, *arguments(text, out, "--zero", stage, steps=8)))
    assert code == 0 and f"saved by {before} processes" in said, said
    for one, two in zip(losses(out)[1:], wanted[1:], strict=True):
        assert one[1:3] == pytest.approx(two[1:3], rel=1e-4)


def by_deepspeed(port, *arguments):
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), "--module", "linattn"]
    return [*launcher, *map(str, arguments)]


@pytest.mark.slow
def test_sigterm_to_the_deepspeed_runner_saves_and_leaves_no_one(text, tmp_path):
    """It takes down the runner alone; its launcher and the processes below would train on."""
    out = tmp_path / "run"
    with launched(by_deepspeed(29578, *arguments(text, out, "--zero", 1, steps=100_000, save_every=100_000))) as process:
        wait_for(lambda: (out / "log.csv").exists() and len(read(out / "log.csv")) > 5, process)
        os.kill(process.pid, signal.SIGTERM)
        assert orphans(process, within=60.0) == []
    assert (out / f"step-{losses(out)[-1][0]:08d}" / "complete.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["decoder", "masked", "image"])
def test_a_compiled_engine_trains_as_the_plain_one(text, tmp_path, recipe):
    of = ["--recipe", recipe, "--variant", {"decoder": "mamba2", "masked": "lion_s_mlm", "image": "lion_s"}[recipe], "--zero", 2]
    more = [*of, "--checkpoint-activations"]
    if recipe == "image":
        more += ["--held-out", 0.2]
    for name, how in (("plain", more), ("compiled", [*of, "--compile"])):
        code, said = finish(command(2, *_of(recipe, text, tmp_path / name, *how)))
        assert code == 0, said
    one, two = (read(tmp_path / name / "log.csv") for name in ("plain", "compiled"))
    assert [row["loss"] for row in one[1:]] == pytest.approx([row["loss"] for row in two[1:]], rel=1e-4)


def _of(recipe, text, out, *more):
    if recipe != "image":
        return arguments(text, out, *more, steps=4)
    every = [
        "--steps",
        4,
        "--save-every",
        2,
        "--eval-every",
        4,
        "--batch",
        8,
        "--device",
        "cpu",
        "--set",
        "dim=16",
        "--set",
        "num_layers=2",
    ]
    return ["train", *every, "--out", out, *more]


@pytest.mark.slow
def test_the_deepspeed_launcher_and_a_configuration_of_its_own(text, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        '{"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},'
        '"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}}'
    )
    out = tmp_path / "run"
    more = ["--deepspeed", file, "--accumulate", 2, "--checkpoint-activations"]
    code, said = finish(by_deepspeed(29577, *arguments(text, out, *more, steps=6)))
    assert code == 0 and losses(out)[-1][0] == 6, said
    assert '"auto"' not in (out / "deepspeed.json").read_text()
    code, said = finish(command(0, *arguments(text, tmp_path / "alone", steps=6)))
    for one, two in zip(losses(out)[1:], losses(tmp_path / "alone")[1:], strict=True):
        assert one[1] == pytest.approx(two[1], rel=1e-5)

"""The command line: help that reads, errors of one line, and the main job from training to text."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from linattn import cli

SMALL = ["--set", "dim=32", "--set", "num_layers=1", "--context", "32", "--batch", "2", "--threads", "1", "--held-out", "0.2"]
ENV = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}


def run(*args):
    return CliRunner().invoke(cli.app, list(map(str, args)), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"This is the text of number {i}. " * 30)
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run("train", "--data", text, *SMALL, "--steps", 6, "--lr", 0.01, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["probe"], ["bench"], ["demo"], ["info"], ["build"]])
def test_help_reads(command):
    result = run(*command, "--help")
    assert result.exit_code == 0 and "Usage:" in result.output
    assert not re.search(r"Annotated|None\b|<function", result.output)


def test_help_loads_nothing_heavy():
    code = "import sys; from linattn.cli import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_help_names_every_preset_and_variant():
    from linattn.models import PRESETS
    from linattn.models.config import MIXERS
    from linattn.train.recipes import OF_PRESET
    from linattn.train.schedule import SCHEDULES

    said = run("train", "--help").output
    assert list(PRESETS) == list(OF_PRESET)
    assert all(name in said for name in (*PRESETS, *SCHEDULES))
    assert re.split(r", | or ", cli.VARIANTS) == list(MIXERS)


@pytest.mark.parametrize(
    "args, said",
    [
        (["train", "--variant", "mha"], "variant must be one of"),
        (["train", "--preset", "huge"], "preset must be one of ['tiny'"),
        (["train", "--schedule", "up"], "schedule must be one of ['cosine'"),
        (["train", "--steps", "0"], "steps must be at least 1; got 0"),
        (["train", "--data", "/nowhere/at/all"], "data: there is no /nowhere/at/all"),
        (["train", "--set", "depth"], "set must be NAME=VALUE; got 'depth'"),
        (["train", "--set", "depth=3"], "has no field 'depth'"),
        (["train", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["train", "--backend", "abacus"], "backend must be 'auto' or one of"),
        (["generate", "nowhere"], "checkpoint: there is no nowhere"),
        (["bench", "--lengths", "1,2"], "lengths must be at least 2; got 1"),
        (["bench", "--lengths", "many"], "lengths must be whole numbers with commas between; got 'many'"),
        (["bench", "--variant", "mha"], "variant must be one of"),
        (["warmup", "--dtype", "int8"], "dtype must be one of ['bfloat16', 'float32']; got 'int8'"),
    ],
)
def test_errors_are_one_line(args, said, tmp_path, text):
    quick = ["--out", tmp_path / "out", *([] if "--data" in args else ["--data", text])] if args[0] == "train" else []
    result = run(*args, *quick)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and said in result.stderr


def test_traceback_on_request():
    with pytest.raises(ValueError, match="there is no nowhere"):
        CliRunner().invoke(cli.app, ["--traceback", "generate", "nowhere"], catch_exceptions=False)


def test_generate_streams_the_same_text_for_a_seed(trained):
    one, two, three, four = (run("generate", trained, "--prompt", "This is", "--tokens", 20, "--seed", seed) for seed in (1, 1, 2, 3))
    assert one.exit_code == 0 and all(result.stdout.startswith("This is") for result in (one, three, four))
    assert one.stdout == two.stdout and len({result.stdout for result in (one, three, four)}) > 1
    assert run("generate", trained / "step-00000006", "--tokens", 5).exit_code == 0


def test_a_bad_sampling_option_is_refused_before_a_word(trained):
    result = run("generate", trained, "--prompt", "This is", "--top-p", 2)
    assert result.exit_code == 2 and result.stdout == "" and "top_p must lie in (0, 1]" in result.stderr


def test_a_recipe_has_a_folder_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    small = ["--set", "dim=16", "--set", "num_layers=1", "--steps", 1, "--threads", 1]
    assert run("train", "--recipe", "image", "--variant", "gla", *small).exit_code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["image-micro-gla"]
    teacher = ["--option", "teacher=runs/image-micro-gla"]
    assert run("train", "--recipe", "distillation", *teacher, *small).exit_code == 0
    assert (tmp_path / "runs" / "distillation-micro-lion_s" / "run.json").exists()


def test_a_foreign_run_is_refused_and_given_options_may_be_left_out(trained):
    result = run("train", "--recipe", "image", "--out", trained)
    assert result.exit_code == 2 and "recipe must be that of the run in" in result.stderr and "decoder, or --out another" in result.stderr
    result = run("train", "--out", trained, "--lr", 0.5)
    assert result.exit_code == 2 and "lr: 0.01 here, 0.5 asked" in result.stderr
    assert run("train", "--out", trained).exit_code == 0  # finished already: its own config is taken, and nothing is left to do


def test_bpe_from_training_to_text(text, tmp_path):
    result = run(
        "train", "--data", text, *SMALL, "--tokenizer", "bpe", "--vocab-size", 300, "--steps", 2, "--context", 8, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    said = run("generate", tmp_path, "--prompt", "This is", "--tokens", 8).stdout
    assert said.startswith("This is")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_keeps_a_checkpoint_and_says_how_to_go_on(text, tmp_path, number, code):
    out = tmp_path / "a run"
    args = ["train", "--data", str(text), *SMALL, "--steps", "100000", "--save-every", "100000", "--out", str(out)]
    child = subprocess.Popen([sys.executable, "-m", "linattn", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    try:
        deadline = time.monotonic() + 60
        while not (out / "log.csv").exists() or (out / "log.csv").read_text().count("\n") < 4:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(number)
        said = child.communicate(timeout=60)[0]
    finally:
        child.kill()
    assert child.returncode == code and "Traceback" not in said
    step = int(re.search(rf"stopped by {number.name} at step (\d+) of 100000; saved {re.escape(str(out))}", said).group(1))
    assert [entry.name for entry in out.glob("*step-*")] == [f"step-{step:08d}"]
    if number == signal.SIGTERM:
        return
    again = shlex.split(re.search("to go on: (.*)", said).group(1))
    child = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    assert any(f"going on from {out}" in line for line in child.stdout)
    child.kill()
    child.communicate()


def test_bench_measures_and_records(tmp_path):
    result = run("bench", "--lengths", "2,128", "--seconds", 0, "--threads", 1, "--out", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["T"], row["variant"]) for row in record["rows"]] == [(2, "softmax"), (2, "gla"), (128, "softmax"), (128, "gla")]
    assert all(row[name] > 0 for row in record["rows"] for name in ("train_tokens_per_s", "decode_tokens_per_s", "state_bytes"))
    states = {(row["T"], row["variant"]): row["state_bytes"] for row in record["rows"]}
    assert states[2, "gla"] == states[128, "gla"] and states[2, "softmax"] < states[128, "softmax"]
    assert "versions" in record and "128" in result.output


def test_info_names_every_backend():
    import linattn

    said = run("info").output
    assert all(name in said for name in linattn.BACKENDS) and "torch" in said

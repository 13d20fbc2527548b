"""The record of a pretraining that is killed: the demo's decoder under ZeRO-2 in two processes, left alone and killed twice."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from linattn.train.log import read

from . import machine

KILLS = (("worker", 0.28), ("torchrun", 0.65))  # who is sent SIGKILL, once this share of the steps is in the log
SETTLED = 5  # steps that a process is given before its speed counts


def run(out: Path, *, steps: int, command: str, say) -> dict:
    """Train, kill, compare, measure one process beside two; write pretrain.json, and pretrain.png where matplotlib is, to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("whole", "killed", "1", "2")}
        recipe = [
            "--variant",
            "gla",
            "--steps",
            steps,
            "--save-every",
            max(1, steps // 10),
            "--eval-every",
            max(1, steps // 4),
            "--zero",
            2,
        ]
        say(f"{steps} steps in 2 processes, left alone")
        _to_the_end(2, runs["whole"], recipe)
        kills = []
        for who, share in KILLS:
            say(f"the same, {who} killed at step {int(share * steps)} or a little later")
            kills.append(_kill(2, runs["killed"], recipe, who, int(share * steps)))
        _to_the_end(2, runs["killed"], recipe)
        speeds = []
        for processes in (1, 2):
            say(f"tokens/s of {processes}")
            _to_the_end(processes, runs[str(processes)], [*recipe[:3], 30, "--save-every", 1000, "--eval-every", 1000, "--zero", 2])
            rows = read(runs[str(processes)] / "log.csv")[1 + SETTLED :]
            speeds.append({"processes": processes, "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows)})
        curves = {name: [_figures(row) for row in read(runs[name] / "log.csv")] for name in ("whole", "killed")}
        resolved = json.loads((runs["whole"] / "deepspeed.json").read_text())
    record = {
        "command": command, **machine.git(), "machine": machine.facts(), "versions": machine.versions(),
        "equal": curves["whole"] == curves["killed"], "kills": kills, "scaling": speeds, "deepspeed": resolved, "curves": curves,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "pretrain.json").write_text(json.dumps(record) + "\n")
    _draw(record, out / "pretrain.png", say)
    return record


def _draw(record: dict, path: Path, say) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        say("no figure: it needs matplotlib")
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, how in (("whole", dict(color="#1f6f8b", linewidth=3, alpha=0.4)), ("killed", dict(color="#c8553d", linewidth=0.9))):
        axes.plot([row[0] for row in record["curves"][name][1:]], [row[1] for row in record["curves"][name][1:]], label=name, **how)
    for kill in record["kills"]:
        axes.axvline(kill["at_step"], color="#444444", linewidth=0.8, linestyle=":")
        axes.annotate(f" SIGKILL: {kill['killed']}", (kill["at_step"], 0.95), xycoords=("data", "axes fraction"), fontsize=8)
    axes.set(xlabel="training step", ylabel="loss, nats per byte", title="GLA decoder, ZeRO-2, 2 processes: left alone, and killed twice")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _figures(row: dict) -> list:
    return [row["step"], row["loss"], row["grad_norm"], row["bits_per_byte"]]


def _launch(processes: int, out: Path, more: list) -> subprocess.Popen:
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m", "linattn", "train", "--device", "cpu"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.Popen(
        [sys.executable, *map(str, [*program, "--out", out, *more])], env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _to_the_end(processes: int, out: Path, more: list) -> None:
    process = _launch(processes, out, more)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a run of {processes} processes failed:\n{said}")


def _kill(processes: int, out: Path, more: list, who: str, step: int) -> dict:
    """Send SIGKILL to one worker, or to torchrun, once `step` is in the log; wait until all are gone; say what was lost."""
    process = _launch(processes, out, more)
    while not (rows := read(out / "log.csv")) or rows[-1]["step"] < step:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it was killed:\n{process.communicate()[0]}")
        time.sleep(0.05)
    victim = _children(process.pid)[-1] if who == "worker" else process.pid
    os.kill(victim, signal.SIGKILL)
    process.communicate()  # its pipe closes with the last worker
    reached, saved = read(out / "log.csv")[-1]["step"], max(int(path.name[5:]) for path in out.glob("step-*"))
    return {"killed": who, "at_step": reached, "newest_checkpoint": saved, "steps_lost": reached - saved}


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found

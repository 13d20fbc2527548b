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
SETTLED = 3  # steps that a process is given before its speed counts
SIZES = {  # name: what is trained, each with the same batch whatever the number of processes
    "the demo's decoder, 4 windows of 512": ["--eval-windows", 1],
    "the same, 16 windows of 512": ["--eval-windows", 1, "--batch", 16],
}


def run(out: Path, *, steps: int, command: str, say) -> dict:
    """Train, kill, compare; write pretrain.json, and pretrain.png where matplotlib is, to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        recipe = ["--steps", steps, "--save-every", max(1, steps // 10), "--eval-every", max(1, steps // 10), "--zero", 2]
        facts = {"command": command, **machine.git(), "machine": machine.facts(), "versions": machine.versions()}
        say(f"{steps} steps in 2 processes, left alone")
        began = time.monotonic()
        _to_the_end(2, whole, recipe)
        seconds, kills = time.monotonic() - began, []
        for who, share in KILLS:
            say(f"the same, {who} killed at step {int(share * steps)} or a little later")
            kills.append(_kill(2, killed, recipe, who, int(share * steps)))
        _to_the_end(2, killed, recipe)
        curves = {path.name: [_figures(row) for row in read(path / "log.csv")] for path in (whole, killed)}
        resolved = json.loads((whole / "deepspeed.json").read_text())
    record = {
        **facts, "seconds": round(seconds), "equal": curves["whole"] == curves["killed"], "kills": kills, "deepspeed": resolved,
        "curves": curves,
    }  # fmt: skip
    _write(out / "pretrain.json", record)
    _draw(record, out / "pretrain.png", say)
    return record


def scaling(out: Path, *, steps: int, command: str, say) -> dict:
    """Tokens/s of one process and of two, a thread each, taking turns, twice; write pretrain-scaling.json to `out`."""
    record = {"command": command, **machine.git(), "machine": machine.facts(), "versions": machine.versions(), "steps": steps}
    found: dict[tuple[str, int], list[float]] = {(size, n): [] for size in SIZES for n in (1, 2)}
    for _ in range(2):
        for (size, n), rates in found.items():
            say(f"{size}, {n} processes")
            with tempfile.TemporaryDirectory() as folder:
                _to_the_end(n, Path(folder), [*SIZES[size], "--steps", steps, "--save-every", steps, "--eval-every", steps, "--zero", 2])
                rates += [row["tokens_per_s"] for row in read(Path(folder) / "log.csv")[1 + SETTLED :]]
    rows = [{"size": size, "processes": n, "tokens_per_s": statistics.median(rates)} for (size, n), rates in found.items()]
    _write(out / "pretrain-scaling.json", record | {"rows": rows})
    return record | {"rows": rows}


def _write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")


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

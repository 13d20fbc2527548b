"""The demo, as an order of parts that stand elsewhere: train two decoders on the same text, generate, measure both, draw."""

import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..models import Decoder
from . import figure, recipes, sample, throughput
from .log import read
from .loop import LOG, Run, saved_config, train
from .tokenizer import Bytes

VARIANTS = ("gla", "softmax")
SECONDS = 1.0  # for each figure of the table
PROMPT = "def read(self, size=-1):\n    "


def run(*, steps: int | None, lengths: list[int], out: Path | None, threads: int, command: str, facts: dict, console: Console) -> int:
    """The demo, in `out` (None: bench/results of a checkout, else linattn-demo). Returns the exit code: 130 after Ctrl-C.

    A demo that was stopped goes on where it was; one that was finished starts anew. `facts` go into the record as they are.
    """
    began = time.perf_counter()
    console.print(_machine(facts), highlight=False)
    checkout = (Path("pyproject.toml").exists() and Path("linattn", "__main__.py").exists()) and out is None
    out = out or (Path("bench", "results") if checkout else Path("linattn-demo"))
    folders = {variant: (Path("runs", "demo") if checkout else out / "runs") / variant for variant in VARIANTS}
    _forget_a_finished_one(folders)
    runs: dict[str, Run] = {}
    for variant, folder in folders.items():
        config = replace(recipes.demo(variant, steps=steps), threads=threads)
        console.rule(f"training {variant}")
        runs[variant] = train(config, folder, command=command, console=console)
        if runs[variant].stopped_by:
            return 130 if runs[variant].stopped_by == signal.SIGINT else 0
    trained = time.perf_counter() - began
    console.rule("held-out text, bits per byte")
    held = {variant: figure.points(r.rows, "bits_per_byte") for variant, r in runs.items()}
    for variant, points in held.items():
        console.print(f"{variant}: {points[0][1]:.3f} before, {points[-1][1]:.3f} after {points[-1][0]} steps", highlight=False)
    ratio = held["gla"][-1][1] / held["softmax"][-1][1]
    console.print(f"gla / softmax: {ratio:.4f}", highlight=False)
    console.rule("a sample of gla")
    model = Decoder.from_pretrained(runs["gla"].checkpoint, backend=config.backend).eval()
    text = PROMPT
    console.print(text, end="", markup=False, highlight=False)
    for piece in sample.continuation(model, Bytes(), PROMPT, tokens=300, temperature=0.7, top_p=0.95, seed=0):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        text += piece
    console.print()
    console.rule("throughput")
    machine: dict[str, Any] = dict(threads=threads, device=config.device, backend=config.backend)
    rows = throughput.table(config.preset, list(VARIANTS)[::-1], lengths, seconds=SECONDS, console=console, **machine)
    seconds = {"training": round(trained, 1), "all": round(time.perf_counter() - began, 1)}
    figures = {"held_out_ratio": ratio, "held_out_bits_per_byte": held, "sample": text, "seconds": seconds}
    throughput.save(out / "demo.json", rows, command=command, **facts, **figures, config=asdict(config))
    try:
        figure.draw(out / "demo.png", {v: r.rows for v, r in runs.items()}, rows, title=_title(config.preset, model, facts))
    except ValueError as error:  # all but the picture is there without matplotlib
        console.print(f"no figure: {error}", markup=False)
    else:
        console.print(f"figure: {out / 'demo.png'}", markup=False, highlight=False)
    console.print(f"record: {out / 'demo.json'}\nmodel:  {runs['gla'].checkpoint}", markup=False, highlight=False)
    return 0


def _forget_a_finished_one(folders: dict[str, Path]) -> None:
    last = list(folders.values())[-1]
    config = saved_config(last)
    if config and any(row["step"] == config.steps for row in read(last / LOG)):
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def _title(preset: str, model: Decoder, facts: dict) -> str:
    return f"{preset} decoder, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, B = 1, {_machine(facts)}"


def _machine(facts: dict) -> str:
    ready = [name for name, found in facts["backends"].items() if found == "ready"]
    return f"{facts['machine']['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, backend {ready[0]}"

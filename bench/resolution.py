"""The only place that measures what large images cost a vision transformer: time and memory against the number of patches."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linattn.models import VisionTransformer
from linattn.train.memory import Peak

VARIANTS = ("softmax", "linear", "gla", "lion_d", "lion_s", "lion_s_natural")
SIZES = (224, 448, 1024)
MODES = ("forward", "forward+backward")
ROUNDS = 3
# glibc gives the pages of freed tensors back and faults them in again, in every layer of every variant: 70,000 faults, or 0.17 s, in a
# forward of 4096 patches. This has it keep them, as jemalloc and tcmalloc do.
KEEP_PAGES = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def run(variants: list[str] | None, sizes: list[int] | None, device: str, say: Callable[[str], None]) -> list[dict]:
    """`vit_tiny_{variant}`, B = 1: time and peak memory of each variant, size and mode.

    Times are the best of ROUNDS, in which the variants take turns, so that a machine that is busy for a while is so for all of them; memory
    is measured in a process per point. On a CPU one thread in float32, and the thread's own time, under KEEP_PAGES; on a GPU bfloat16, and
    the clock.
    """
    rows = []
    for size in sizes or SIZES:
        names = list(variants or VARIANTS)
        for mode in MODES:
            seconds = _apart("times", KEEP_PAGES, variants=names, size=size, mode=mode, device=device)
            for variant in names:
                peak = _apart("peak", variant=variant, size=size, mode=mode, device=device)
                row = dict(variant=variant, size=size, tokens=(size // 16) ** 2, mode=mode, seconds=seconds[variant], peak_bytes=peak)
                rows.append(row)
                say(f"{variant} {size}² {mode}: {row['seconds']:.3f} s, {peak / 1e6:.0f} MB")
    return rows


def _apart(what: str, switches: dict[str, str] | None = None, **point) -> Any:
    """`times` or `peak` in a process of its own, with these switches in its environment."""
    command = [sys.executable, "-m", "bench.resolution", what, json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (switches or {}))
    if done.returncode:
        raise ValueError(f"{what} of {point} failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
    return json.loads(done.stdout)


def _call(variant: str, size: int, mode: str, device: str) -> Callable[[], None]:
    """One forward, or forward and backward, of a model made here; the first call, which libraries keep things from, is done."""
    on = torch.device(device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.float32 if on.type == "cpu" else torch.bfloat16
    model = VisionTransformer.create(f"vit_tiny_{variant}", img_size=size).to(on, dtype)
    image = torch.randn(1, 3, size, size, device=on, dtype=dtype)

    def call(x: torch.Tensor = image) -> None:
        with torch.set_grad_enabled(mode != "forward"):
            y = model(x)
        if mode != "forward":
            y.sum().backward()
            model.zero_grad(set_to_none=True)
        if on.type != "cpu":
            torch.accelerator.synchronize()

    call(image[..., :64, :64])
    return call


def times(*, variants: list[str], size: int, mode: str, device: str) -> dict[str, float]:
    """variant → seconds."""
    clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
    calls = {variant: _call(variant, size, mode, device) for variant in variants}
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(ROUNDS):
        for variant, call in calls.items():
            began = clock()
            call()
            best[variant] = min(best[variant], clock() - began)
    return best


def peak(*, variant: str, size: int, mode: str, device: str) -> int:
    """Bytes beyond the weights."""
    call = _call(variant, size, mode, device)
    with Peak(torch.device(device)) as most:
        call()
    return most.bytes


def save(path: Path, rows: list[dict], **facts) -> None:
    """JSON of the rows and the facts they were measured under, with a plot beside it."""
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    draw(path.with_suffix(".png"), rows)


def draw(path: Path, rows: list[dict]) -> None:
    """Per mode: time and memory against the number of patches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    counts = sorted({row["tokens"] for row in rows})
    for i, (column, unit, factor) in enumerate([("seconds", "seconds", 1), ("peak_bytes", "peak MB beyond the weights", 1e-6)]):
        for j, mode in enumerate(MODES):
            axes = figure.add_subplot(2, 2, 2 * i + j + 1)
            for place, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
                line = [(row["tokens"], row[column] * factor) for row in rows if (row["variant"], row["mode"]) == (variant, mode)]
                look = dict(color="black", linewidth=2.2) if variant == "softmax" else dict(color=f"C{place}", linewidth=1.4)
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, label=variant, **look)
            axes.set(xlabel="patches", ylabel=unit, xscale="log", yscale="log", title=mode)
            axes.set_xticks(counts, counts)
            axes.minorticks_off()
            axes.grid(True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    print(json.dumps({"times": times, "peak": peak}[sys.argv[1]](**json.loads(sys.argv[2]))))

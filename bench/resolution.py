"""The only place that measures what large images cost a vision transformer: time and memory against the number of patches."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from linattn.models import VisionTransformer
from linattn.train.memory import Peak

VARIANTS = ("softmax", "linear", "gla", "lion_d", "lion_s", "lion_s_natural")
SIZES = (224, 448, 1024)
MODES = ("forward", "forward+backward")


def run(variants: list[str] | None, sizes: list[int] | None, device: str, say: Callable[[str], None]) -> list[dict]:
    """`vit_tiny_{variant}`, B = 1: the better of two runs and the peak memory, each point in its own process.

    On a CPU one thread in float32, and the time is the thread's, which a busy machine disturbs less than the clock on the wall; on a GPU
    bfloat16 weights, and the clock.
    """
    rows = []
    for size in sizes or SIZES:
        for variant in variants or VARIANTS:
            for mode in MODES:
                point = dict(variant=variant, size=size, mode=mode, device=device)
                done = subprocess.run([sys.executable, "-m", "bench.resolution", json.dumps(point)], capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"{variant} at {size} failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
                rows.append(json.loads(done.stdout))
                say(f"{variant} {size}² {mode}: {rows[-1]['seconds']:.3f} s, {rows[-1]['peak_bytes'] / 1e6:.0f} MB")
    return rows


def measure(*, variant: str, size: int, mode: str, device: str = "cpu") -> dict:
    on = torch.device(device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.float32 if on.type == "cpu" else torch.bfloat16
    model = VisionTransformer.create(f"vit_tiny_{variant}", img_size=size).to(on, dtype)
    image = torch.randn(1, 3, size, size, device=on, dtype=dtype)
    clock = time.process_time if on.type == "cpu" else time.perf_counter

    def call(x: torch.Tensor) -> None:
        with torch.set_grad_enabled(mode != "forward"):
            y = model(x)
        if mode != "forward":
            y.sum().backward()
            model.zero_grad(set_to_none=True)
        if on.type != "cpu":
            torch.accelerator.synchronize()

    call(image[..., :64, :64])  # what libraries keep from their first call on is not the size's
    with Peak(on) as peak:
        call(image)
    times = []
    for _ in range(2):
        began = clock()
        call(image)
        times.append(clock() - began)
    return dict(variant=variant, size=size, tokens=(size // 16) ** 2, mode=mode, seconds=min(times), peak_bytes=peak.bytes)


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
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

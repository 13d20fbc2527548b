"""The only place that holds vision models against each other: what they learn from small images, and what large ones cost them."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from linattn.models import VisionTransformer
from linattn.train import recipes, train
from linattn.train.memory import Peak

Say = Callable[[str], None]


def accuracy(variants: list[str], *, dataset: str, steps: int, seeds: int, overrides: dict, say: Say) -> list[dict]:
    """`vit_micro_{variant}` on a dataset of `linattn.train.images`, the same steps for all: one row per run, with its curve."""
    rows = []
    for seed in range(seeds):
        for variant in variants:
            config = recipes.image("micro", variant, steps=steps)
            began = time.process_time()
            with TemporaryDirectory() as folder:
                own = {**overrides, "curves": 2} if variant.endswith("_natural") else overrides
                config = replace(
                    config, variant=variant.removesuffix("_natural"), overrides=own, options={"dataset": dataset}, seed=seed,
                    threads=1, save_every=steps, eval_every=max(1, steps // 5),
                )  # fmt: skip
                run = train(config, Path(folder), console=Console(quiet=True))
            if run.stopped_by:
                raise SystemExit(f"stopped by {run.stopped_by.name} in {variant} seed {seed}: no record")
            curve = [(row["step"], row["accuracy"]) for row in run.rows if row["accuracy"] is not None]
            rows.append(dict(variant=variant, seed=seed, accuracy=curve[-1][1], curve=curve, cpu_s=time.process_time() - began))
            say(f"{variant} seed {seed}: {curve[-1][1]:.4f} in {rows[-1]['cpu_s']:.0f} s of CPU")
    return rows


def resolution(variants: list[str], *, sizes: list[int], backward: bool, say: Say) -> list[dict]:
    """`vit_tiny_{variant}`, B = 1, one thread: the better of two runs and the peak memory, each point in its own process."""
    rows = []
    for size in sizes:
        for variant in variants:
            for mode in ("forward", "forward+backward") if backward else ("forward",):
                point = dict(variant=variant, size=size, mode=mode)
                done = subprocess.run([sys.executable, "-m", "bench.vision", json.dumps(point)], capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"{variant} at {size} failed: {done.stderr.strip().splitlines()[-1]}")
                rows.append(json.loads(done.stdout))
                say(f"{variant} {size}² {mode}: {rows[-1]['cpu_s']:.2f} s of CPU, {rows[-1]['peak_bytes'] / 1e6:.0f} MB")
    return rows


def save(path: Path, rows: list[dict], **facts) -> None:
    """JSON of the rows and the facts they were measured under, with a plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    draw(path.with_suffix(".png"), rows)


def measure(*, variant: str, size: int, mode: str) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VisionTransformer.create(f"vit_tiny_{variant}", img_size=size)
    image = torch.randn(1, 3, size, size)

    def call(x: torch.Tensor) -> None:
        with torch.set_grad_enabled(mode != "forward"):
            y = model(x)
        if mode != "forward":
            y.sum().backward()
            model.zero_grad(set_to_none=True)

    call(image[..., :64, :64])  # what libraries keep from their first call on is not the size's
    with Peak(torch.device("cpu")) as peak:
        call(image)
    times = []
    for _ in range(2):  # CPU time of one thread, which a busy machine disturbs less than the clock on the wall
        began = time.process_time()
        call(image)
        times.append(time.process_time() - began)
    return dict(variant=variant, size=size, tokens=(size // 16) ** 2, mode=mode, cpu_s=min(times), peak_bytes=peak.bytes)


def summary(rows: list[dict]) -> dict[str, dict]:
    """variant → mean, standard deviation and number of its accuracies."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row["accuracy"])
    return {
        name: dict(mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else 0.0, seeds=len(values))
        for name, values in found.items()
    }


def draw(path: Path, rows: list[dict]) -> None:
    """Curves of accuracy, or cost against size, whichever the rows are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    learnt = "accuracy" in rows[0]
    figure = Figure(figsize=(8 if learnt else 11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    if learnt:
        axes = figure.add_subplot()
        for variant in dict.fromkeys(row["variant"] for row in rows):
            curves = [row["curve"] for row in rows if row["variant"] == variant]
            means = [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*curves, strict=True)]
            axes.plot(*zip(*means, strict=True), marker="o", markersize=3, label=variant)
        axes.set(xlabel="training step", ylabel="accuracy on held-out images", title="Mean over the seeds")
    for i, (field, unit, factor) in enumerate([] if learnt else [("cpu_s", "seconds of CPU", 1), ("peak_bytes", "peak MB", 1e-6)]):
        axes = figure.add_subplot(1, 2, i + 1)
        for variant, mode in dict.fromkeys((row["variant"], row["mode"]) for row in rows):
            line = [(row["tokens"], row[field] * factor) for row in rows if (row["variant"], row["mode"]) == (variant, mode)]
            axes.plot(
                *zip(*line, strict=True), marker="o", markersize=3, linestyle="-" if mode == "forward" else "--", label=f"{variant}, {mode}"
            )
        axes.set(xlabel="patches", ylabel=unit, xscale="log", yscale="log")
        axes.set_xticks(counts := sorted({row["tokens"] for row in rows}), counts)
        axes.minorticks_off()
    for axes in figure.axes:
        axes.grid(True, alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

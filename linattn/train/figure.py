"""The only place that draws: the curves of a comparison and its throughput, on one page."""

import math
from pathlib import Path

COLOURS = ("#c8553d", "#1f6f8b", "#5b8c5a", "#7d5ba6", "#b08d2e", "#444444")
SMOOTHED = 10
PANELS = (  # field of a row, title, unit, factor
    ("train_tokens_per_s", "Forward + backward", "tokens / s", 1),
    ("decode_tokens_per_s", "Generation, after T tokens", "tokens / s", 1),
    ("train_peak_bytes", "Peak memory of forward + backward", "MB", 1e-6),
    ("state_bytes", "Kept while generating: state or cache", "MB", 1e-6),
)


def draw(path: Path, curves: dict[str, list[dict]], rows: list[dict], *, title: str) -> None:
    """curves: variant -> rows of its log.csv; rows: of `throughput.table`. ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ModuleNotFoundError:
        raise ValueError("the figure needs matplotlib: pip install matplotlib") from None
    variants = list(dict.fromkeys([*curves, *(row["variant"] for row in rows)]))
    colour = dict(zip(variants, COLOURS * len(variants), strict=False))
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, width_ratios=(1.35, 1, 1))
    loss = figure.add_subplot(grid[:, 0])
    for variant, steps in curves.items():
        trained, held = points(steps, "loss"), points(steps, "bits_per_byte")
        label = f"{variant}: {held[-1][1]:.3f} after {held[-1][0]} steps"
        loss.plot(*zip(*_bits(trained), strict=True), color=colour[variant], alpha=0.3, linewidth=1)
        loss.plot(*zip(*held, strict=True), color=colour[variant], marker="o", markersize=4, label=label)
    loss.set(xlabel="training step", ylabel="bits per byte", title="Held-out text (points) and training (pale)", yscale="log")
    ticks = [1.5, 2, 2.5, 3, 4, 5, 6, 8]
    low, high = loss.get_ylim()
    ticks = [tick for tick in ticks if low <= tick <= high]  # one outside would widen the axis
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.yaxis.set_minor_formatter(NullFormatter())
    loss.legend(frameon=False)
    for place, (field, name, unit, factor) in zip([grid[0, 1], grid[0, 2], grid[1, 1], grid[1, 2]], PANELS, strict=True):
        axes = figure.add_subplot(place)
        for variant in dict.fromkeys(row["variant"] for row in rows):
            line = [(row["T"], row[field] * factor) for row in rows if row["variant"] == variant]
            axes.plot(*zip(*line, strict=True), color=colour[variant], marker="o", markersize=4, label=variant)
        lengths = sorted({row["T"] for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="T (tokens)", ylabel=unit, title=name)
        axes.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths], minor=False)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize=9)
    for axes in figure.axes:
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10.5)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def points(rows: list[dict], column: str) -> list[tuple[int, float]]:
    """(step, value) of the rows of a log.csv that have one in `column`."""
    return [(row["step"], row[column]) for row in rows if row[column] is not None]


def _bits(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Nats of single steps to bits, each the mean of the last SMOOTHED."""
    nats = [value for _, value in losses]
    windows = [nats[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(nats))]
    return [(step, sum(window) / len(window) / math.log(2)) for (step, _), window in zip(losses, windows, strict=True)]

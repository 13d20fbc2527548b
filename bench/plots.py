"""The only place that draws: time against T and the ratios to the peers, from a Record."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .cases import CALLS
from .checks import EAGER, SOFTMAX, threads_of
from .records import Record, Row

# colours that the common kinds of colour blindness keep apart (Okabe and Ito); peers are grey and dashed
OURS = {
    "none": "#999999",
    "head": "#56B4E9",
    "scalar": "#0072B2",
    "channel": "#009E73",
    "delta": "#D55E00",
    "bidirectional": "#CC79A7",
    "bf16": "#E69F00",
}
PEERS = {
    ("sdpa", "causal"): ("softmax (SDPA)", "-", "#111111"),
    ("eager", "scalar"): ("eager, scalar", "--", "#777777"),
    ("copy", ""): ("plain copy of the bytes", ":", "#777777"),
}
DRAWN = ("scalar", "channel", "delta", "bidirectional", "bf16")  # none and head lie on scalar


def draw(record: Record, path: Path) -> Path | None:
    """Times above, ratios below; forward left, forward+backward right; with the most threads measured. None if nothing was timed."""
    rows = [row for row in record.rows if row.call in CALLS and row.p50 is not None]
    if not rows:
        return None
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]
    figure = Figure(figsize=(11, 8), dpi=140, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(1.25, 1))
    for column, call in enumerate(CALLS):
        chosen = [row for row in rows if row.call == call]
        _times(axes[0, column], chosen)
        _ratios(axes[1, column], chosen)
        axes[0, column].set_title(call, loc="left", fontweight="bold")
        axes[1, column].set_xlabel("T (tokens)")
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("times faster")
    for ax in axes[:, 0]:
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    one, commit = rows[0], (record.git["commit"] or "")[:7] + ("+" if record.git["dirty"] else "")
    figure.suptitle(f"Linear attention on a CPU: B={one.B} H={one.H} K={one.K} V={one.V}, {threads_of(threads)}")
    note = f"{record.machine['cpu']}, torch {record.versions['torch']}, {commit}, {record.date[:10]}; medians, bands 20–80 %"
    figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(path)
    return path


def _line(axes: Axes, rows: Sequence[Row], y, color: str, style: str, label: str, band: bool = False) -> None:
    rows = sorted(rows, key=lambda row: row.T)
    if not rows:
        return
    x = [row.T for row in rows]
    axes.plot(x, [y(row) for row in rows], style, color=color, label=label, marker="o", markersize=3.5, linewidth=1.6)
    if band:
        axes.fill_between(x, [row.p20 for row in rows], [row.p80 for row in rows], color=color, alpha=0.18, linewidth=0)


def _times(axes: Axes, rows: Sequence[Row]) -> None:
    median = lambda row: row.p50
    for (peer, form), (label, style, color) in PEERS.items():
        _line(axes, [row for row in rows if (row.peer, row.form) == (peer, form)], median, color, style, label, band=True)
    for form in DRAWN:
        _line(axes, [row for row in rows if (row.peer, row.form) == ("cpu", form)], median, OURS[form], "-", form, band=True)
    _scales(axes)


def _ratios(axes: Axes, rows: Sequence[Row]) -> None:
    for peer, style in (("sdpa", "-"), ("eager", "--")):
        for form in ("scalar", "channel", "delta"):
            chosen = [row for row in rows if (row.peer, row.form) == ("cpu", form) and peer in row.ratios]
            _line(axes, chosen, lambda row, peer=peer: row.ratios[peer], OURS[form], style, "_")
    goals = {T: goal for T, goal in SOFTMAX.items() if any(row.T == T for row in rows)}
    axes.plot([], [], "-", color="#111111", label="than softmax; colours as above")  # the line styles alone, for the legend
    axes.plot([], [], "--", color="#111111", label="than eager")
    axes.plot(list(goals), list(goals.values()), "_", color="#111111", markersize=16, markeredgewidth=1.8, label="wanted, than softmax")
    axes.axhline(EAGER, color="#777777", linewidth=0.9, linestyle=":", label="wanted, than eager, from 1k on")
    _scales(axes)


def _scales(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for line in axes.lines for x in line.get_xdata() if x > 1})
    axes.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)

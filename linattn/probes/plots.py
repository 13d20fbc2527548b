"""The only place that draws what a probe saw: figures of matplotlib, and one HTML page that holds them and needs nothing else."""

import base64
import html
import io
import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .measures.fitted import Curve
from .report import COLUMNS, Report
from .storage import Traces
from .trace import Direction, Trace

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise ValueError("plots of probes need matplotlib: pip install 'linattn[probe]'") from None

SIGNED, UNSIGNED = "RdBu_r", "Reds"
WORDS = 100  # more cannot be read under one row
ACROSS = 8  # heads in a line
TILES = 64  # of a pooled map, a side
POOLED = 4096  # tokens; of more a page draws no pooled map, which takes time in their square
RED = "#c8553d"


def states(trace: Trace, t: int | None = None, *, sequence: int = 0, direction: Direction = None) -> Figure:
    """Heat maps of S after token t (None: the last), one per head, K down and V across, one scale for all of them."""
    t = _token(trace, t)
    S = trace.state(t, direction)
    S = S[_sequence(len(S), sequence)].detach().float().cpu()
    title = f"{trace.name}: S after token {t}" + (f", from the {direction}" if direction else "")
    return _per_head(S, title, "value channel", "key channel", signed=True)


def pooled(trace: Trace, block: int | None = None, *, sequence: int = 0) -> Figure:
    """Σ |a_tj| over tiles of block × block tokens (None: so large that there are at most 64 a side), one map per head, who reads down."""
    block = -(-trace.length // TILES) if block is None else block
    a = trace.attention_pooled(block)
    a = a[_sequence(len(a), sequence)].detach().float().cpu()
    return _per_head(a, f"{trace.name}: Σ|a| over tiles of {block} × {block} tokens", "tile written", "tile reading", signed=False)


def attention(trace: Trace, row: int | None = None, words: Sequence[str] | None = None, *, sequence: int = 0) -> Figure:
    """The implicit attention a of token `row` (None: the last), heads down and tokens across: o_row = Σ_j a_j v_j.

    words: the tokens as text.
    """
    row = _token(trace, row)
    a = _attention(trace, row, sequence)
    _check_words(words, a.shape[-1])
    figure = Figure(figsize=(11, 1.4 + 0.22 * len(a)), layout="constrained")
    axes = figure.subplots()
    top = float(a.abs().max()) or 1.0
    image = axes.imshow(a.numpy(), cmap=SIGNED, vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.set(xlabel="token", ylabel="head")
    axes.set_yticks(range(len(a)))
    if words is not None and len(words) <= WORDS:
        axes.set_xticks(range(len(words)), [_label(word) for word in words], rotation=90, fontsize=7, parse_math=False)
    axes.set_title(f"{trace.name}: attention of token {row}", fontsize=10, parse_math=False)
    figure.colorbar(image, ax=axes)
    return figure


def by_layer(report: Report) -> Figure:
    """Half-life and participation ratio by layer: every head a point, their median a line. What never forgets is counted, not drawn."""
    layers = list(dict.fromkeys(row.layer for row in report.rows))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, name, unit in zip(figure.subplots(1, 2), ("half_life", "participation"), ("tokens", "directions in use"), strict=True):
        here = [[x for row in report.rows if row.layer == layer and (x := getattr(row, name)) is not None] for layer in layers]
        finite = [[x for x in values if math.isfinite(x)] for values in here]
        points = [(i, x) for i, values in enumerate(finite) for x in values]
        medians = [(i, statistics.median(values)) for i, values in enumerate(finite) if values]
        if points:
            axes.scatter(*zip(*points, strict=True), color=RED, alpha=0.5, s=16)
            axes.plot(*zip(*medians, strict=True), color=RED)
        never = sum(map(len, here)) - len(points)
        title = (
            f"{COLUMNS[name][0]} of heads, and their median"
            + (f" ({never} heads never forget)" if never else "")
            + ("" if any(here) else ": not kept")
        )
        axes.set(xlabel="layer", ylabel=unit, title=title)
        axes.set_xticks(range(len(layers)))
        if name == "half_life" and points:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def curve(found: Curve) -> Figure:
    """Score by layer of a fitted probe, its controls dashed and chance dotted beside it; without controls the title says so."""
    results = list(found.results.values())
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([result.score for result in results], color=RED, marker="o", label="probe")
    for name in dict.fromkeys(name for result in results for name in result.controls):
        axes.plot([result.controls.get(name, math.nan) for result in results], linestyle="--", marker=".", label=name)
    classes = results[0].classes is not None
    if classes:
        axes.plot([result.chance for result in results], color="#444444", linestyle=":", label="chance")
    axes.set(xlabel="layer", ylabel="held-out accuracy" if classes else "held-out R²")
    axes.set_title("" if any(result.controls for result in results) else "no control")
    axes.set_xticks(range(len(results)))
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}img{max-width:100%}dt{font-weight:600}dd{margin:0 0 .3em 1.5em}.wide{overflow-x:auto}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;border:1px solid #ddd;padding:.6em}.at{outline:2px solid #222}"""


def page(
    traces: Traces, words: Sequence[str], *, title: str, at: int | None = None, sequence: int = 0, facts: dict[str, str] | None = None
) -> str:
    """One HTML page: the table, half-life and rank by layer, and of every layer states and attention, those at token `at` (None: the last).

    traces kept "final", "writes" and "reads"; words are the tokens as text, facts what else is to be said at the top. The figures are
    in the page, and its Content-Security-Policy forbids it to load anything.
    """
    report = traces.report()
    parts = [_image(by_layer(report), "half-life and participation ratio by layer"), f'<div class="wide">{report._repr_html_()}</div>']
    meant = [f"<dt>{html.escape(COLUMNS[name][0])}</dt><dd>{html.escape(COLUMNS[name][1])}</dd>" for name in report.cells()[0]]
    parts.append(f"<details><summary>What the columns say</summary><dl>{''.join(meant)}</dl></details>")
    for name in traces:
        trace = traces[name]
        t = _token(trace, at)
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for direction in (None,) if trace.causal else ("left", "right"):
            parts.append(_image(states(trace, t, sequence=sequence, direction=direction), f"state of {name} after token {t}"))
        parts.append(_image(attention(trace, t, words, sequence=sequence), f"attention of token {t} in {name}"))
        if trace.length <= POOLED:
            parts.append(_image(pooled(trace, sequence=sequence), f"attention of all tokens in {name}"))
        parts.append(_coloured(words, _attention(trace, t, sequence).abs().mean(0), t))
    about = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in (facts or {}).items())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>{html.escape(title)}</title>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", f"<dl>{about}</dl>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def _coloured(words: Sequence[str], weights: Tensor, at: int) -> str:
    """The text, every word as red as its weight is of the largest."""
    shares = (weights / weights.max().clamp_min(torch.finfo(weights.dtype).tiny)).tolist()
    spans = []
    for i, (word, share, weight) in enumerate(zip(words, shares, weights.tolist(), strict=True)):
        mark = ' class="at"' if i == at else ""
        style = f' style="background:rgba(200,85,61,{share:.2f})"' if share >= 0.01 else ""
        spans.append(f'<span{mark}{style} title="token {i}: {weight:.3g}">{html.escape(word)}</span>')
    return f'<p>Mean over heads of |a|, {weights.max():.3g} at the reddest:</p><div class="text">{"".join(spans)}</div>'


def _per_head(maps: Tensor, title: str, across: str, down: str, *, signed: bool) -> Figure:
    """Maps [H rows columns] side by side, on one scale."""
    columns, lines = min(len(maps), ACROSS), -(-len(maps) // ACROSS)
    figure = Figure(figsize=(1.2 + 2 * columns, 0.6 + 2.2 * lines), layout="constrained")
    top = float(maps.abs().max()) or 1.0
    for h, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        if h >= len(maps):
            axes.set_axis_off()
            continue
        image = axes.imshow(
            maps[h].numpy(),
            cmap=SIGNED if signed else UNSIGNED,
            vmin=-top if signed else 0,
            vmax=top,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_title(f"head {h}", fontsize=9)
        axes.set_xlabel(across, fontsize=7)
        axes.set_ylabel(down, fontsize=7)
        axes.tick_params(labelsize=7)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _image(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"></p>'


def _attention(trace: Trace, row: int, sequence: int) -> Tensor:
    """[HQ T]"""
    a = trace.attention([row])
    return a[_sequence(len(a), sequence), :, 0].detach().float().cpu()


def _token(trace: Trace, t: int | None) -> int:
    return trace.first + trace.length - 1 if t is None else t


def _sequence(count: int, sequence: int) -> int:
    if not 0 <= sequence < count:
        raise ValueError(f"sequence must be one of the {count} that were kept; got {sequence}")
    return sequence


def _check_words(words: Sequence[str] | None, length: int) -> None:
    if words is not None and len(words) != length:
        raise ValueError(f"words must be one for each of {length} tokens; got {len(words)}")


def _label(word: str) -> str:
    """What matplotlib's own font can show: a space as ␣, other letters it lacks as ·."""
    shown = "".join("␣" if c == " " else c if c.isprintable() and ord(c) < 0x530 else "·" for c in word)
    return shown if len(shown) <= 12 else shown[:11] + "…"

"""The only place that draws what a probe saw: figures of matplotlib."""

import math
import statistics
import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from .measures.fitted import Curve
from .report import COLUMNS, Report, Row
from .trace import Direction, Trace

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
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
    t = token_of(trace, t)
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
    row = token_of(trace, row)
    a = attention_row(trace, row, sequence)
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


def over_image(
    trace: Trace, image: Tensor, grid: tuple[int, int], token: int | None = None, *, sequence: int = 0, everyone: bool = True
) -> Figure:
    """Implicit attention laid over the image [C h w], a map per head: what `token` reads of every patch; below, the mean of all tokens.

    grid: rows and columns of patches. Tokens before the patches, such as a class token, are not drawn; the titles say their share of |a|.
    token: by its number in the model, whatever curve the layer walks; None: the first, or the middle patch where none comes before them.
    """
    rows, columns = grid
    prefix = prefix_of(trace, grid)
    token = middle(prefix, grid) if token is None else token
    order = torch.arange(trace.length) if trace.order is None else trace.order.cpu()
    at = trace.first + int((order == token).nonzero())
    lines = [("a of this token", attention_row(trace, at, sequence))]
    if everyone:
        lines.append(("mean |a| of all tokens", _received(trace, sequence)))
    heads, high = len(lines[0][1]), max(1.0, 2.1 * rows / columns)
    width = min(heads, ACROSS)
    below = -(-heads // ACROSS)
    figure = Figure(figsize=(1.4 + 2.1 * width, 0.7 + len(lines) * below * (0.5 + high)), layout="constrained")
    panels = figure.subplots(len(lines) * below, width, squeeze=False)
    picture = image.detach().float().cpu().mean(0).numpy()
    for line, (who, a) in enumerate(lines):
        a = a[:, order.argsort()]
        maps, before = a[:, prefix:].unflatten(1, grid), a[:, :prefix].abs().sum(1) / a.abs().sum(1).clamp_min(1e-30)
        top = float(maps.abs().max()) or 1.0
        low = 0.0 if line == 0 else min(float(maps.min()), 0.99 * top)  # means are much alike: what differs is shown
        for h, axes in enumerate(panels[line * below : (line + 1) * below].flat):
            axes.set_axis_off()
            if h >= heads:
                continue
            edges = (0, columns, rows, 0)
            axes.imshow(picture, cmap="gray", extent=edges, interpolation="nearest")
            shade = ((maps[h].abs() - low) / (top - low)).clamp(0, 1).sqrt().mul(0.85).numpy()
            colours = dict(cmap=SIGNED, vmin=-top, vmax=top) if line == 0 else dict(cmap=UNSIGNED, vmin=low, vmax=top)
            drawn = axes.imshow(maps[h].numpy(), alpha=shade, extent=edges, interpolation="nearest", **colours)
            axes.set_title(f"head {h}" + (f", {before[h]:.0%} of |a| elsewhere" if prefix else ""), fontsize=8)
            if line == 0 and token >= prefix:
                y, x = divmod(token - prefix, columns)
                axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
        figure.colorbar(drawn, ax=panels[line * below : (line + 1) * below], shrink=0.8, label=who)
    _title(figure, f"{trace.name}: which patches are read by {place(token, prefix, grid)}")
    return figure


def by_layer(report: Report) -> Figure:
    """Half-life and participation ratio by layer: every head a point, their median a line, that of each control dashed.

    What never forgets is counted, not drawn. Without controls the legend says so.
    """
    layers = list(dict.fromkeys(row.layer for row in report.rows))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, name, unit in zip(figure.subplots(1, 2), ("half_life", "participation"), ("tokens", "directions in use"), strict=True):
        here = _by_layer(report.rows, layers, name)
        finite = [[x for x in values if math.isfinite(x)] for values in here]
        points = [(i, x) for i, values in enumerate(finite) for x in values]
        if points:
            axes.scatter(*zip(*points, strict=True), color=RED, alpha=0.5, s=16)
            axes.plot(*_medians(finite), color=RED, label="" if report.controls else "no control")
            for control, rows in report.controls.items():
                axes.plot(*_medians(_by_layer(rows, layers, name)), linestyle="--", marker=".", label=control)
            axes.legend(frameon=False, fontsize=8, handlelength=0 if not report.controls else None)
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


def _by_layer(rows: Sequence[Row], layers: list[str], name: str) -> list[list[float]]:
    """Values of the column `name` in every layer; what was not kept is left out."""
    return [[x for row in rows if row.layer == layer and (x := getattr(row, name)) is not None] for layer in layers]


def _medians(values: list[list[float]]) -> list[list[float]]:
    """x and y of the medians of what is finite."""
    finite = [(i, [x for x in here if math.isfinite(x)]) for i, here in enumerate(values)]
    return [[i for i, here in finite if here], [statistics.median(here) for _, here in finite if here]]


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
    _title(figure, title)
    return figure


def attention_row(trace: Trace, row: int, sequence: int) -> Tensor:
    """[HQ T]"""
    a = trace.attention([row])
    return a[_sequence(len(a), sequence), :, 0].detach().float().cpu()


def _received(trace: Trace, sequence: int) -> Tensor:
    """[HQ T]: mean |a| that every token gets of all others, in the order of the walk."""
    total: Tensor | float = 0.0
    for start in range(0, trace.length, TILES):
        rows = trace.attention(range(trace.first + start, trace.first + min(start + TILES, trace.length)))
        total = total + rows[_sequence(len(rows), sequence)].detach().abs().sum(1)
    return (torch.as_tensor(total) / trace.length).float().cpu()


def prefix_of(trace: Trace, grid: tuple[int, int]) -> int:
    prefix = trace.length - grid[0] * grid[1]
    if prefix < 0 or min(grid) < 1:
        raise ValueError(f"grid must be rows and columns of the patches of one image, of {trace.length} tokens; got {grid}")
    return prefix


def middle(prefix: int, grid: tuple[int, int]) -> int:
    return 0 if prefix else grid[0] // 2 * grid[1] + grid[1] // 2


def place(token: int, prefix: int, grid: tuple[int, int]) -> str:
    row, column = divmod(token - prefix, grid[1])
    return f"token {token}, " + ("which comes before the patches" if token < prefix else f"the patch in row {row}, column {column}")


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() * 11)), fontsize=10, parse_math=False)


def token_of(trace: Trace, t: int | None) -> int:
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

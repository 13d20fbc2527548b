"""The only place that writes what a probe saw as one HTML page, which holds its figures and needs nothing else."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .plots import POOLED, Figure, attention, attention_row, by_layer, middle, over_image, place, pooled, prefix_of, states, token_of
from .report import COLUMNS, Report
from .storage import Traces

Grid = tuple[int, int]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}img{max-width:100%}dt{font-weight:600}dd{margin:0 0 .3em 1.5em}.wide{overflow-x:auto}
.figures{display:flex;flex-wrap:wrap;gap:0 1em;align-items:flex-start}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;border:1px solid #ddd;padding:.6em}.at{outline:2px solid #222}"""


def page(
    traces: Traces, words: Sequence[str] | None = None, *, title: str, image: Tensor | None = None,
    grid: Grid | Mapping[str, Grid] | None = None, at: int | None = None, sequence: int = 0, facts: dict[str, str] | None = None,
    against: Mapping[str, Report] | None = None,
) -> str:  # fmt: skip
    """One HTML page: the table, half-life and rank by layer, and of every layer states and attention, those at token `at`.

    traces kept "final", "writes" and "reads". words are the tokens as text, at None then the last of them; or image [C h w] with the grid
    of its patches, and at None as in `over_image`; of a pyramid a grid for each layer by name, and at None the middle patch of each.
    facts: what else is to be said at the top. against: controls of the table, as in `p.report`. The figures are in the page, and its
    Content-Security-Policy forbids it to load anything.
    """
    if (words is None) == (image is None) or (image is None) != (grid is None):
        raise ValueError("page needs words, or an image and the grid of its patches")
    report = traces.report(against=against)
    first = traces[next(iter(traces))]
    pyramid = isinstance(grid, Mapping)
    if pyramid and at is not None:
        raise ValueError(f"at must be None where layers have grids of their own; got {at}")
    if pyramid:
        shown = "the middle patch of every layer"
    elif grid is not None:
        prefix = prefix_of(first, grid)
        at = middle(prefix, grid) if at is None else at
        shown = place(at, prefix, grid)
    elif words is not None:
        at = token_of(first, at)
        shown = f"token {at}, {words[at - first.first]!r}"
    facts = {**(facts or {}), "drawn": shown}
    parts = [_image(by_layer(report), "half-life and participation ratio by layer"), f'<div class="wide">{report._repr_html_()}</div>']
    meant = [f"<dt>{html.escape(COLUMNS[name][0])}</dt><dd>{html.escape(COLUMNS[name][1])}</dd>" for name in report.cells()[0]]
    parts.append(f"<details><summary>What the columns say</summary><dl>{''.join(meant)}</dl></details>")
    for name in traces:
        trace = traces[name]
        here = grid[name] if isinstance(grid, Mapping) else grid
        token = middle(prefix_of(trace, here), here) if pyramid and here is not None else at
        t = token if trace.order is None else int((trace.order.cpu() == token).nonzero())
        figures = []
        for direction in (None,) if trace.causal else ("left", "right"):
            figures.append(_image(states(trace, t, sequence=sequence, direction=direction), f"state of {name} after token {t}"))
        if image is not None and here is not None:
            drawn = over_image(trace, image, here, token, sequence=sequence, everyone=trace.length <= POOLED)
            figures.append(_image(drawn, f"attention of {shown} over the image in {name}"))
        else:
            figures.append(_image(attention(trace, t, words, sequence=sequence), f"attention of token {t} in {name}"))
        if trace.length <= POOLED:
            figures.append(_image(pooled(trace, sequence=sequence), f"attention of all tokens in {name}"))
        parts.append(f'<h2>{html.escape(name)}</h2>\n<div class="figures">{"".join(figures)}</div>')
        if words is not None:
            parts.append(_coloured(words, attention_row(trace, t, sequence).abs().mean(0), t))
    about = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
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


def _image(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'

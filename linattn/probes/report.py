"""The only place for the table of what a probe saw: one row per layer and head, to print, to read in a notebook, to compute with."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .measures.states import half_life, ranks, surprise, transition, write_strength
from .trace import Trace


class Row(NamedTuple):
    """One head of one layer; of a bidirectional one, from one side. None: `keep` did not name what it takes, or it has no meaning."""

    layer: str
    head: int  # among those that were kept
    side: str | None  # "left" or "right"
    half_life: float | None
    participation: float | None
    rank: float | None
    norm: float | None
    write: float | None
    beta: float | None
    surprise: float | None
    turned: float | None
    bytes: int | None


COLUMNS = {  # field: title, what it says
    "layer": ("layer", "name of the layer's mixer"),
    "head": ("head", "of the state, among those that were kept"),
    "side": ("side", "where the scan of a bidirectional layer starts"),
    "half_life": (
        "half-life",
        "tokens after which half is forgotten, by the mean log decay; of a channel decay the median channel; ∞: never",
    ),
    "participation": ("PR", "participation ratio (Σσ²)² / Σσ⁴ of the last state: how many directions are in use"),
    "rank": ("rank", "singular values of the last state above 1 % of the largest"),
    "norm": ("‖S‖", "Frobenius norm of the last state"),
    "write": ("write", "mean ‖k_t‖ ‖u_t‖: what a token adds to the state"),
    "beta": ("β", "mean step of the delta rule"),
    "surprise": ("surprise", "mean ‖u_t‖ / (β_t ‖v_t‖): 0, the state knew the value; 1, it knew nothing under that key"),
    "turned": ("< 0", "share of tokens whose transition has a negative eigenvalue"),
    "bytes": ("bytes", "of the head's state, one sequence, its normaliser included, in the dtype that was kept"),
}


@dataclass(frozen=True, repr=False)
class Report:
    """`rows`, one `Row` per layer, head and side, and the same rows of each control. Prints as a table; empty columns are left out.

    Every row's controls stand below it, and the last line names them, or says that there is none.
    """

    rows: tuple[Row, ...]
    controls: dict[str, tuple[Row, ...]] = field(default_factory=dict)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns that some row has, and the rows as text, each with its controls behind it."""
        names = [name for name in COLUMNS if any(getattr(row, name) is not None for row in self.rows)]
        lines = []
        for i, row in enumerate(self.rows):
            lines.append([_text(getattr(row, name)) for name in names])
            for control, others in self.controls.items():
                lines.append([f"  {control}" if name == "layer" else _text(getattr(others[i], name)) for name in names])
        return names, lines

    def __rich__(self) -> Any:
        from rich.table import Table

        names, cells = self.cells()
        table = Table(box=None, pad_edge=False, caption=self.said(), caption_justify="left", caption_style="")
        for name in names:
            table.add_column(COLUMNS[name][0], justify="left" if name in ("layer", "side") else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        return table

    def said(self) -> str:
        return f"controls: {', '.join(self.controls)}" if self.controls else "no control"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=1000, color_system=None)
        with console.capture() as found:
            console.print(self, markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in found.get().splitlines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        names, cells = self.cells()
        line = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"
        body = "\n".join(line("td", row) for row in cells)
        head = line("th", [COLUMNS[name][0] for name in names])
        caption = f"<caption>{html.escape(self.said())}</caption>"
        return f"<table>\n{caption}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def report(traces: dict[str, Trace], against: Mapping[str, Report] | None = None) -> Report:
    """Means over sequences and real tokens. ValueError where nothing was kept, and for a control of other layers, heads or sides."""
    if not traces:
        raise ValueError("nothing was kept: no forward has run inside the block")
    rows = tuple(row for trace in traces.values() for row in _rows(trace))
    for name, other in (against or {}).items():
        if [row[:3] for row in other.rows] != [row[:3] for row in rows]:
            raise ValueError(f"against[{name!r}] must be a report of the same layers, heads and sides")
    return Report(rows, {name: other.rows for name, other in (against or {}).items()})


def _rows(trace: Trace) -> list[Row]:
    """Every figure is [H], or [sides H]."""
    found: dict[str, Tensor] = {}
    size = None
    if "final" in trace.keep:
        kv, z = trace.last
        used = ranks(kv)
        norm = kv.float().norm(dim=(-2, -1))
        found |= {"participation": used.participation.mean(-2), "rank": used.numeric.mean(-2), "norm": norm.mean(-2)}
        size = (kv[0].numel() if trace.causal else kv[0, 0].numel()) // kv.shape[-3] * kv.element_size()
        size += 0 if z is None else z.shape[-1] * z.element_size()
    if trace.u is not None and trace.k is not None:
        found["write"] = _mean(write_strength(trace), trace.mask)
    if trace.beta is not None:
        found["beta"] = _mean(trace.beta, trace.mask)
        if trace.u is not None and trace.v is not None:
            found["surprise"] = _mean(surprise(trace), trace.mask)
        if trace.k is not None:
            found["turned"] = transition(trace).negative
    if {"gates", "writes", "reads"} & set(trace.keep):
        life = half_life(trace)
        found["half_life"] = life if life.ndim == 1 else life.median(-1).values
    if not found:
        raise ValueError(
            f"{trace.name!r} has nothing to report: keep must name 'final', 'gates', 'writes' or 'reads'; got {list(trace.keep)}"
        )
    heads = max(x.shape[-1] for x in found.values())
    sides = [None] if trace.causal else ["left", "right"]
    figures = {name: x.detach().float().expand(len(sides), heads).tolist() for name, x in found.items()}
    none = dict.fromkeys(Row._fields[3:-1])
    return [
        Row(trace.name, h, side, **none | {name: x[i][h] for name, x in figures.items()}, bytes=size)
        for i, side in enumerate(sides)
        for h in range(heads)
    ]


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """[… B T H] → [… H] over real tokens."""
    if mask is None:
        return x.float().mean((-3, -2))
    real = mask[..., None].float()
    return (x.float() * real).sum((-3, -2)) / real.sum()


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)

"""A Record as text a person reads: markdown beside the JSON, and the checks on the console."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from .cases import CALLS, FORMS
from .checks import MIB, threads_of
from .records import Check, Record, Row

REASONS = 3  # why something was not measured: as many as the console is told
SHORT = {"eager": "e", "sdpa": "s", "float32": "f"}


def number(x: float | None) -> str:
    """Three significant digits, no exponent."""
    if x is None:
        return "–"
    if x != x or abs(x) >= 1000 or x == 0:
        return f"{x:,.0f}"
    digits = 2 if abs(x) < 10 else 1 if abs(x) < 100 else 0
    return f"{x:.{digits}f}" if abs(x) >= 1 else f"{x:.3g}"


def label(row: Row) -> str:
    return {"cpu": f"**{row.form}**", "sdpa": f"softmax {row.form}"}.get(row.peer, f"{row.peer} {row.form}".strip())


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(line, lines), ""]


# -- checks ------------------------------------------------------------------------------------------------------------------------------


def target(check: Check) -> str:
    return f"{'≥' if check.relation == '>=' else '≤'} {number(check.target)} {check.unit}"


def _worst(check: Check) -> str:
    return "–" if check.worst is None else number(check.worst.figure) + "*" * bool(check.missing)


def failure(check: Check) -> str:
    kept = sum(map(check.keeps, check.cells))
    figure = f"{number(check.worst.figure)} {check.unit} at {check.worst.where}"
    return f"{check.promise}, {check.form}: {figure}, wanted {target(check)}; kept by {kept} of {len(check.cells)} figures"


def _matrix(checks: Sequence[Check]):
    """Forms, and per promise its target and the check of each form or None."""
    forms = [form for form in FORMS if any(check.form == form for check in checks)]
    found = {(check.promise, check.form): check for check in checks}
    lines = []
    for promise in dict.fromkeys(check.promise for check in checks):
        line = [found.get((promise, form)) for form in forms]
        lines.append((promise, next(target(check) for check in line if check), line))
    return forms, lines


def verdicts(checks: Sequence[Check]) -> str:
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("pass", "fail", "not measured")}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing to check"


def _checks(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return []
    forms, lines = _matrix(checks)
    mark = {"pass": "{} ✓", "fail": "**{} ✗**", "not measured": "{}"}
    cell = lambda check: "" if check is None else mark[check.verdict].format(_worst(check))
    failed = [f"* {failure(check)}" for check in checks if check.verdict == "fail"]
    return [
        f"## Checks: {verdicts(checks)}",
        "",
        "Each figure is the worst of all lengths, calls and numbers of threads the promise speaks of; * some of them were not measured.",
        "",
        *_grid(["", "target", *forms], ([promise, wanted, *map(cell, line)] for promise, wanted, line in lines)),
        *([*failed, ""] if failed else []),
    ]


def print_checks(checks: Sequence[Check], console: Console) -> None:
    forms, lines = _matrix(checks)
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    table.add_column("worst figure of each promise", overflow="fold")
    for name in ("target", *forms):
        table.add_column(name, justify="right")
    style = {"pass": "green", "fail": "bold red", "not measured": "yellow"}
    mark = {"pass": "", "fail": " ✗", "not measured": ""}
    cell = lambda check: Text(_worst(check) + mark[check.verdict], style[check.verdict]) if check else ""
    for promise, wanted, line in lines:
        table.add_row(promise, wanted, *map(cell, line))
    console.print(table)
    for check in checks:
        if check.verdict == "fail":
            console.print(Text(failure(check), style["fail"]))
    reasons = dict.fromkeys(missing.split(": ", 1)[1] for check in checks for missing in check.missing)
    for reason in list(reasons)[:REASONS]:
        console.print(Text(f"not measured: {reason}", style["not measured"]))
    if len(reasons) > REASONS:
        console.print(Text(f"and {len(reasons) - REASONS} more reasons, which the record holds", style["not measured"]))
    console.print(verdicts(checks))


# -- figures -----------------------------------------------------------------------------------------------------------------------------


def _times(rows: Sequence[Row], call: str, threads: int) -> list[str]:
    chosen = {(label(row), row.T): row for row in rows if row.call == call and row.threads == threads}
    if not chosen:
        return []
    sizes = sorted({T for _, T in chosen})
    names = list(dict.fromkeys(name for name, _ in chosen))

    def cell(name, T):
        row = chosen.get((name, T))
        if row is None or row.p50 is None:
            return "–"
        faster = [f"{number(row.ratios[peer])}× {short}" for peer, short in SHORT.items() if peer in row.ratios]
        return number(row.p50) + (f"<br>{', '.join(faster)}" if faster and row.peer == "cpu" else "")

    grid = _grid(["", *(f"T = {T}" for T in sizes)], ([name, *(cell(name, T) for T in sizes)] for name in names))
    return [f"### {call}, {threads_of(threads)}, milliseconds", "", *grid]


def _steps(rows: Sequence[Row]) -> list[str]:
    chosen = {(label(row), row.B * row.H, row.threads): row for row in rows if row.call == "step"}
    if not chosen:
        return []
    columns = sorted({key[1:] for key in chosen}, key=lambda column: column[::-1])
    names = list(dict.fromkeys(name for name, *_ in chosen))

    def cell(name, size, threads):
        row = chosen.get((name, size, threads))
        if row is None or row.p50 is None:
            return "–"
        beside = row.peer == "cpu" and "copy" in row.ratios
        return number(row.p50 * 1e3) + (f"<br>{number(1 / row.ratios['copy'])}× copy" if beside else "")

    head = ["", *(f"B·H = {size}, {threads_of(n)}" for size, n in columns)]
    return ["### step, microseconds", "", *_grid(head, ([name, *(cell(name, *column) for column in columns)] for name in names))]


def _yardstick(rows: Sequence[Row]) -> list[str]:
    lines = []
    for n in sorted({row.threads for row in rows}):
        rates = sorted(row.gflops for row in rows if row.peer == "mm" and row.threads == n and row.gflops)
        if rates:
            lines.append([threads_of(n), number(rates[len(rates) // 2]), f"{number(rates[0])} – {number(rates[-1])}", str(len(rates))])
    grid = _grid(["", "median of the groups", "least – most", "groups"], lines)
    return ["### torch.mm, float32, 2048³, GFLOP/s", "", *grid] if lines else []


def _memory(record: Record) -> list[str]:
    lines = [
        [
            f"{one.form}, {one.call}",
            f"B·H = {one.B * one.H}" if one.call == "step" else f"T = {one.T}",
            str(one.threads),
            *(number(None if x is None else x / MIB) for x in (one.inputs, one.outputs, one.extra)),
        ]
        for one in record.memory
    ]
    head = ["", "size", "threads", "inputs", "outputs", "beyond both"]
    return ["### memory, MiB", "", *_grid(head, lines)] if lines else []


def _absent(record: Record) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in record.rows:
        if row.skipped:
            size = f"B·H = {row.B * row.H}" if row.call == "step" else f"T = {row.T}"
            reasons.setdefault(row.skipped, []).append(f"{label(row).strip('*')} {row.call} {size}, {threads_of(row.threads)}")
    for one in record.memory:
        if one.skipped:
            reasons.setdefault(one.skipped, []).append(f"memory of {one.form} {one.call}")
    lines = [f"* {reason}: {'; '.join(what) if len(what) < 9 else f'{len(what)} figures'}" for reason, what in reasons.items()]
    return ["## Not measured", "", *lines, ""] if lines else []


def markdown(record: Record, plot: str | None = None) -> str:
    machine, git, rows = record.machine, record.git, record.rows
    commit = f"{(git['commit'] or 'outside a checkout')[:12]}{' with changes not committed' if git['dirty'] else ''}"
    size = next((row for row in rows if row.call in CALLS), None)
    legend = "bold: backend `cpu`, with how many times faster it is than eager (e), softmax attention (s) and itself in float32 (f)."
    threads = sorted({row.threads for row in rows})
    lines = [
        f"# {record.name}",
        "",
        f"`{record.command}` · {record.date} · commit {commit} · {record.seconds:.0f} s",
        "",
        f"{machine['cpu']} ({machine['family_model_stepping']}), {machine['cores']} cores, {' '.join(machine['flags'])}; "
        f"huge pages {machine['huge_pages']}; {machine['memory_gib']} GiB; load {machine['load_at_start']:.2f} at the start; "
        + ", ".join(f"{name} {value}" for name, value in record.versions.items()),
        "",
        *([f"![time and ratios against T]({plot})", ""] if plot else []),
        *_checks(record.checks),
        *(["## Times", ""] if rows else []),
        *([f"B={size.B} H={size.H} K={size.K} V={size.V}; {legend}", ""] if size else []),
        *(line for n in threads for call in CALLS for line in _times(rows, call, n)),
        *_steps(rows),
        *_yardstick(rows),
        *_memory(record),
        *_absent(record),
        "## How",
        "",
        *(f"* {line}" for line in record.method),
    ]
    return "\n".join(lines) + "\n"

"""What is promised of the operator on a GPU, held against one run, and the page of that run."""

from typing import TYPE_CHECKING

from .records import Cell, Check, Record, Row

if TYPE_CHECKING:
    from .gpu_peers import Stage


def checks(rows: list[Row], first: dict[str, float], stage: "Stage") -> list[Check]:
    """The promises, as ratios within this run."""
    at = {(r.peer, r.form, r.call, r.B, r.T, r.K): r.p50 for r in rows}
    found = []

    def promise(text, form, call, shapes, over, relation, target):
        """over: the peer divided by us ('>=') or we by it ('<=')."""
        cells, missing = [], []
        for B, T, _, D in shapes:
            mine, its = at.get(("triton", form, call, B, T, D)), at.get((over, form, call, B, T, D))
            where = f"{form} {call} B{B} T{T} D{D}"
            if mine is None or its is None:
                missing.append(f"{where}: {'triton' if mine is None else over} was not timed")
            else:
                cells.append(Cell(where, its / mine if relation == ">=" else mine / its))
        found.append(Check(promise=text, form=form, relation=relation, target=target, cells=tuple(cells), missing=tuple(missing)))

    long = stage.long
    promise("forward over the bytes' floor", "scalar", "forward", long, "copy", "<=", 2.3)
    promise("faster than fla", "scalar", "forward", long, "fla", ">=", 2.5)
    promise("forward+backward over the floor", "scalar", "forward+backward", long, "copy", "<=", 3.6)
    promise("faster than fla", "scalar", "forward+backward", long, "fla", ">=", 2.5)
    promise("forward over the floor, D=64", "bidirectional scalar", "forward", long[:1], "copy", "<=", 2.6)
    promise("forward over the floor, D=128", "bidirectional scalar", "forward", long[1:], "copy", "<=", 3.3)
    promise("faster than fla flipped twice", "bidirectional scalar", "forward", long, "fla", ">=", 4.0)
    promise("forward over the floor", "bidirectional none", "forward", long, "copy", "<=", 1.3)
    promise("faster than flash attention", "bidirectional none", "forward", stage.crossing, "FLASH_ATTENTION", ">=", 1.0)
    promise("no slower than flash attention", "bidirectional none", "forward+backward", stage.vision[:1], "FLASH_ATTENTION", ">=", 1.0)
    for name, limit in (("warm", 0.5), ("cold", 10.0)):
        cells = (Cell(f"{name} cache", first[name]),) if name in first else ()
        found.append(Check(promise="first call", form=f"{name} cache", relation="<=", target=limit, unit="s", cells=cells))
    return found


def markdown(record: Record) -> str:
    lines = [f"# {record.name}", "", f"`{record.command}`", "", str(record.machine), "", str(record.versions), ""]
    lines += ["| form | call | B | T | D | peer | median ms | of the copy |", "|---|---|---|---|---|---|---|---|"]
    copies = {(r.form, r.call, r.B, r.T, r.K): r.p50 for r in record.rows if r.peer == "copy"}
    for r in record.rows:
        base = copies.get((r.form, r.call, r.B, r.T, r.K))
        figures = f"{r.p50:.3f} | {r.p50 / base:.2f}" if r.p50 and base else f"– | {r.skipped}"
        lines.append(f"| {r.form} | {r.call} | {r.B} | {r.T} | {r.K} | {r.peer} | {figures} |")
    lines += ["", "| promise | form | target | worst | verdict |", "|---|---|---|---|---|"]
    for c in record.checks:
        worst = "–" if c.worst is None else f"{c.worst.figure:.2f} {c.unit} at {c.worst.where}"
        lines.append(f"| {c.promise} | {c.form} | {c.relation} {c.target} {c.unit} | {worst} | {c.verdict} |")
    return "\n".join([*lines, ""])

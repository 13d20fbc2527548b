"""A record reads back as it was written, and its markdown says what it holds."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from bench import plots, records, report
from bench.records import Cell, Check, Memory, Record, Row, spread

SIZE = dict(B=1, H=8, K=64, V=64)


def row(peer, form, call, T, ms, **more):
    times = dict(samples=3, p20=0.9 * ms, p50=ms, p80=1.1 * ms) if ms else {}
    return Row(peer=peer, form=form, call=call, T=T, dtype="float32", threads=2, **SIZE, **times, **more)


@pytest.fixture
def record():
    rows = [
        row("cpu", "scalar", call, T, T / 100, flops=1000 * T, ratios={"eager": 7.5, "sdpa": 61.0})
        for call in ("forward", "forward+backward")
        for T in (1024, 16384)
    ]
    rows += [row("sdpa", "causal", "forward", 1024, 12345.6), row("sdpa", "causal", "forward", 16384, None, skipped="one call takes 55 s")]
    rows += [row("mm", "", "product", 1024, 100.0, flops=2 * 2048**3)]
    return Record(
        kind="cpu",
        date="2026-11-22T10:00:00+00:00",
        command="python -m bench cpu",
        git={"commit": "0123456789abcdef", "dirty": True},
        machine={
            "cpu": "A chip", "family_model_stepping": "6/1/2", "cores": 2, "flags": ["avx2", "avx512_bf16"], "huge_pages": "madvise",
            "memory_gib": 23.5, "load_at_start": 0.25,
        },
        versions={"torch": "2.13.0"},
        options={"quick": False},
        method=("Sides take turns.",),
        rows=tuple(rows),
        memory=(Memory(form="scalar", call="forward", T=16384, threads=2, inputs=3 << 20, outputs=1 << 20, extra=1 << 19, **SIZE),),
        checks=(
            Check(promise="faster", form="scalar", relation=">=", target=6.0, cells=(Cell("T=1024", 7.5), Cell("T=16384", 6.1))),
            Check(promise="faster", form="delta", relation=">=", target=6.0, cells=(Cell("T=1024", 5.5),), missing=("T=16384: refused",)),
            Check(promise="smaller", form="scalar", relation="<=", target=8.0, unit="MiB", missing=("scalar: not Linux",)),
        ),
        seconds=12.5,
    )  # fmt: skip


def test_a_record_reads_back_as_it_was(record, tmp_path):
    path = record.write(tmp_path)
    assert path.name == "cpu-2026-11-22-0123456.json"
    assert records.read(path) == record


def test_the_file_says_verdicts_and_quantiles(record, tmp_path):
    data = json.loads(record.write(tmp_path).read_text())
    assert [check["verdict"] for check in data["checks"]] == ["pass", "fail", "not measured"]
    assert data["checks"][0]["worst"] == {"where": "T=16384", "figure": 6.1}
    assert data["git"] == {"commit": "0123456789abcdef", "dirty": True}
    assert {"p20", "p50", "p80", "samples", "threads", "dtype", "ratios"} <= data["rows"][0].keys()


def test_another_schema_is_refused(record, tmp_path):
    path = record.write(tmp_path)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(ValueError, match="path must be a record of schema 1"):
        records.read(path)


def test_a_row_has_times_or_a_reason():
    with pytest.raises(ValueError, match="must have times or a reason"):
        row("cpu", "scalar", "forward", 256, None)
    with pytest.raises(ValueError, match="must have times or a reason"):
        row("cpu", "scalar", "forward", 256, 1.0, skipped="no reason to")


def test_spread_and_rate():
    one = row("cpu", "scalar", "forward", 256, None, **spread([1.0, 2.0, 3.0, 4.0, 6.0]), flops=6_000_000)
    assert (one.samples, one.p20, one.p50, one.p80) == pytest.approx((5, 1.8, 3.0, 4.4))
    assert one.gflops == pytest.approx(2.0)


def test_markdown_holds_the_figures(record):
    text = report.markdown(record, "plot.png")
    lines = text.splitlines()
    assert "# cpu-2026-11-22-0123456" in lines
    assert "## Checks: 1 pass, 1 fail, 1 not measured" in lines
    assert "| faster | ≥ 6.00 × | 6.10 ✓ | **5.50* ✗** |" in lines
    assert "| smaller | ≤ 8.00 MiB | – |  |" in lines
    assert "* faster, delta: 5.50 × at T=1024, wanted ≥ 6.00 ×; kept by 0 of 1 figures" in lines
    assert "| **scalar** | 10.2<br>7.50× e, 61.0× s | 164<br>7.50× e, 61.0× s |" in lines
    assert "| softmax causal | 12,346 | – |" in lines
    assert "* one call takes 55 s: softmax causal forward T = 16384, 2 threads" in lines
    assert "| scalar, forward | T = 16384 | 2 | 3.00 | 1.00 | 0.5 |" in lines
    assert "changes not committed" in text and "avx512_bf16" in text and "(plot.png)" in text
    assert f"| 2 threads | {2 * 2048**3 / 1e8:.0f} |" in text


def test_markdown_tables_are_rectangular(record):
    block = []
    for line in [*report.markdown(record).splitlines(), ""]:
        if line.startswith("|"):
            block.append(line.count("|"))
        elif block:
            assert len(set(block)) == 1, block
            block = []


def test_a_number_has_three_digits():
    figures = (None, 0, 0.012345, 0.5, 1.0, 9.999, 12.34, 123.4, 12345.6, -2.5)
    assert [report.number(x) for x in figures] == ["–", "0", "0.0123", "0.5", "1.00", "10.00", "12.3", "123", "12,346", "-2.50"]


def test_the_console_names_what_failed_and_what_is_missing(record):
    console = Console(width=150, record=True, file=io.StringIO())
    report.print_checks(record.checks, console)
    text = console.export_text()
    assert "5.50* ✗" in text and "faster, delta: 5.50 × at T=1024" in text and "not measured: not Linux" in text
    assert "1 pass, 1 fail, 1 not measured" in text


def test_plot_is_drawn_from_what_there_is(record, tmp_path):
    path = plots.draw(record, tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_nothing_timed_is_no_plot(record, tmp_path):
    assert plots.draw(replace(record, rows=()), tmp_path / "plot.png") is None
    assert not (tmp_path / "plot.png").exists()

"""The command line of the benchmarks: `python -m bench cpu`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import cases, machine, records, report
from . import cpu as on_cpu

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Measurements of linattn, written as records (JSON, markdown, a plot) that name the machine, the commit and the command."""


@app.command()
def cpu(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: up to 16k tokens, few samples.")] = False,
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads; repeat for more.", show_default="1 and 2")] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; repeat for more.", show_default="256 to 65536")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Only these parts ({', '.join(on_cpu.PARTS)}) or forms ({', '.join(cases.FORMS)}); repeat for more."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the record.", show_default="bench/results")] = records.RESULTS,
) -> None:
    """The operator, its decoding step and their memory on this CPU, beside eager torch, softmax attention, torch.mm and a plain copy.

    Ends with status 1 if a check fails. All of it takes about ten minutes, on a machine that does nothing else.
    """
    console = Console()
    cores = machine.facts()["cores"]
    try:
        options = on_cpu.Options(
            lengths=tuple(lengths or cases.LENGTHS),
            threads=tuple(threads or [n for n in (1, 2) if n <= cores]),
            only=tuple(only or ()),
        )
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    options = on_cpu.quick(options) if quick else options
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def told(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{done}/{total} {label}", highlight=False)

        record = on_cpu.run(options, command, told)
    report.print_checks(record.checks, console)
    path = record.write(out)
    plot = _draw(record, path.with_suffix(".png"), console)
    path.with_suffix(".md").write_text(report.markdown(record, plot and plot.name))
    console.print(f"written: {path} and .md{' and .png' if plot else ''}", soft_wrap=True, highlight=False)
    if any(check.verdict == "fail" for check in record.checks):
        raise typer.Exit(1)


def _draw(record: records.Record, path: Path, console: Console) -> Path | None:
    try:
        from . import plots
    except ImportError as error:
        console.print(f"no plot: {error}; pip install 'linattn[bench]'", highlight=False)
        return None
    return plots.draw(record, path)


if __name__ == "__main__":
    app(prog_name="python -m bench")

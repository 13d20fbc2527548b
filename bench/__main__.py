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


@app.command()
def probes(out: Annotated[Path, typer.Option(help="Folder of the record.", show_default="bench/results")] = records.RESULTS) -> None:
    """Probes beside TransformerLens on one gated-delta model: exactness, who follows a transplanted state, time and memory.

    Needs transformer-lens 4.3 in an environment of its own; about two minutes.
    """
    from .probes import run

    try:
        out.mkdir(parents=True, exist_ok=True)
        print(f"written: {run(out)}")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="Only this architecture; repeat for more.", show_default="all in the tiles table")
    ] = None,
    width: Annotated[list[int] | None, typer.Option(help="Only this K = V; repeat for more.", show_default="64, 128 and 256")] = None,
    form: Annotated[list[str] | None, typer.Option(help="Only this form; repeat for more.", show_default="all")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table.", show_default="bench/results")] = records.RESULTS,
) -> None:
    """Compile every Triton kernel ahead of time, without a GPU, and hold what the assembler says against its limits.

    Ends with status 1 if a kernel spills, has no matrix instruction, traps, overflows shared memory or moves more bytes than its budget.
    """
    from . import kernels as ahead

    for name, given, known in (
        ("--arch", arch, ahead.ARCHITECTURES),
        ("--width", width, ahead.WIDTHS),
        ("--form", form, tuple(ahead.FORMS)),
    ):
        if unknown := [one for one in given or () if one not in known]:
            raise typer.BadParameter(f"{name} must be in {list(known)}; got {unknown[0]!r}")
    console = Console()
    told = lambda row: console.print(
        f"{row.arch} {row.form} {row.width} {row.kernel} {row.tile} {row.assembler}: {row.registers} registers, {row.spills} B spilled, "
        f"{row.shared >> 10} KiB shared, {row.per_sm} per multiprocessor, {row.matrix} matrix, {row.copies} copies: "
        f"{'; '.join(row.faults) or 'pass'} {row.error}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    rows, faults = ahead.run(tuple(arch or ahead.ARCHITECTURES), tuple(width or ahead.WIDTHS[:3]), tuple(form or ahead.FORMS), told)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "kernels.md"
    path.write_text(ahead.markdown(rows, faults))
    console.print(f"written: {path}", soft_wrap=True, highlight=False)
    if faults:
        raise typer.Exit(1)


@app.command()
def host(out: Annotated[Path, typer.Option(help="Folder of the table.", show_default="bench/results")] = records.RESULTS) -> None:
    """Microseconds of the host per launch of the Triton kernels, without a GPU: everything up to the driver."""
    from . import host as by_the_host

    text = by_the_host.markdown()
    out.mkdir(parents=True, exist_ok=True)
    (out / "host.md").write_text(text)
    Console().print(text, highlight=False, soft_wrap=True)


@app.command()
def swap(
    only: Annotated[list[str] | None, typer.Option(help="text, images or cost; repeat for more.", show_default="all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of each stage: to see that it runs.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the record.", show_default="bench/results")] = records.RESULTS,
) -> None:
    """Softmax models swapped and linearised: quality after each stage, and the cost of generation before and after. About ten minutes."""
    import torch

    from . import swap as swapping

    torch.set_num_threads(threads)
    command, console = shlex.join(["python", "-m", "bench", *sys.argv[1:]]), Console()
    try:
        path = swapping.run(tuple(only or swapping.PARTS), out, command, lambda line: console.print(line, highlight=False), quick=quick)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"written: {path} and .md and .png", soft_wrap=True, highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def gpu(context: typer.Context) -> None:
    """The operator on a GPU, beside fla, softmax attention and a copy; the same as `python -m bench.gpu`, which needs torch alone."""
    from . import gpu as on_gpu

    raise typer.Exit(on_gpu.main(context.args))


@app.command()
def vision(
    part: Annotated[
        str, typer.Argument(help="accuracy (small images), longrange (pixel by pixel, ListOps) or resolution (vit_tiny from 224² on).")
    ],
    variant: Annotated[
        list[str] | None, typer.Option(help="Only these lines of the tables, or for resolution these variants; repeat for more.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="mnist5k or digits; pixels or listops. Repeat for more.", show_default="mnist5k; pixels and listops"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of each run.", min=1, show_default="the task's")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each line.", min=1)] = 3,
    size: Annotated[list[int] | None, typer.Option(help="Pixels of a side; repeat for more.", show_default="224, 448, 1024")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the record.", show_default="bench/results")] = records.RESULTS,
) -> None:
    """Vision transformers of every variant on one thread: what they learn from the same steps, or what large images cost.

    A run of accuracy or longrange is kept in OUT/vision-PART.jsonl as soon as it ends: called again, the command goes on from there. Ctrl-C
    writes a record of what there is; the file goes with the complete one.
    """
    from . import learning, resolution

    console = Console()
    say = lambda line: console.print(line, highlight=False)
    facts = dict(
        part=part, command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]), machine=machine.facts(), versions=machine.versions(),
        git=machine.git(), device=device,
    )  # fmt: skip
    path = out / f"vision-{part}.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if part == "resolution":
            resolution.save(path, resolution.run(variant, size, device, say), **facts, switches_of_times=resolution.KEEP_PAGES)
        elif part in learning.PARTS:
            tasks = learning.pick(part, task)
            rows, complete = learning.run(tasks, path.with_suffix(".jsonl"), seeds, say, variant, steps, device)
            if not rows:
                raise typer.Exit(130)
            learning.save(path, tasks, rows, complete, facts)
        else:
            raise ValueError(f"part must be one of {[*learning.PARTS, 'resolution']}; got {part!r}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    say(f"written: {path} and .png")


@app.command()
def pretrain(
    steps: Annotated[int | None, typer.Option(help="Training steps of each run.", show_default="200; 12 with --scaling")] = None,
    scaling: Annotated[bool, typer.Option("--scaling", help="Tokens/s of one process beside two instead.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Tokens/s and MFU of 350m decoders beside flash attention and fla instead.")] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="With --gpu: the same on a CPU and small, to see that it runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the record.", show_default="bench/results")] = records.RESULTS,
) -> None:
    """Pretrain in two processes under ZeRO-2, once left alone and once killed twice: the losses must be equal.

    Ends with status 1 if they are not. Needs the deepspeed extra. What it takes: 3 times the steps' own time.
    """
    import torch

    from . import pretrain as killed
    from . import pretrain_gpu

    console = Console()
    say = lambda message: console.print(message, highlight=False)
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    if gpu:
        if not rehearse and not torch.cuda.is_available():
            raise typer.BadParameter("there is no CUDA device; --rehearse goes through it on a CPU", param_hint="--gpu")
        raise typer.Exit(pretrain_gpu.run(None if rehearse else out, rehearse=rehearse, command=command, say=say))
    if scaling:
        for row in killed.scaling(out, steps=steps or 12, command=command, say=say)["rows"]:
            say(f"{row['size']}, {row['processes']} processes: {row['tokens_per_s']:,.0f} tokens/s")
        return
    record = killed.run(out, steps=steps or 200, command=command, say=say)
    for kill in record["kills"]:
        say(f"{kill['killed']} killed at step {kill['at_step']}: went on from step {kill['newest_checkpoint']}")
    say(f"losses equal to those of the run left alone, of {record['seconds']} s: {record['equal']}")
    raise typer.Exit(0 if record["equal"] else 1)


def _draw(record: records.Record, path: Path, console: Console) -> Path | None:
    try:
        from . import plots
    except ImportError as error:
        console.print(f"no plot: {error}; pip install 'linattn[bench]'", highlight=False)
        return None
    return plots.draw(record, path)


if __name__ == "__main__":
    app(prog_name="python -m bench")

"""Commands that say what this machine can do, and how fast: bench, demo, info, warmup, build."""

import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import MODEL, VARIANTS, Backend, Device, Preset, Threads, app, escaped

LENGTHS = "256,1024,4096,16384"


@app.command()
def bench(
    preset: Preset = None,
    variant: Annotated[list[str] | None, MODEL(help=f"Attention: {VARIANTS}; repeatable.", show_default="softmax, gla")] = None,
    lengths: Annotated[str, typer.Option(help="Numbers of tokens T, with commas.")] = LENGTHS,
    seconds: Annotated[float, typer.Option(help="Time spent on each figure; the longest T may take more.", min=0)] = 2.0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the record.")] = None,
    threads: Threads = 0,
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Measure decoders against the number of tokens: forward + backward, generation, and the memory of each."""
    from ..train import throughput

    rows = throughput.table(
        preset or "tiny", variant or ["softmax", "gla"], _integers("lengths", lengths, 2), seconds=seconds, threads=threads, device=device,
        backend=backend, console=Console(),
    )  # fmt: skip
    if out:
        throughput.save(out, rows, command=_command(), **_facts(threads))


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(help="Training steps of each decoder.", show_default="about a minute's")] = None,
    lengths: Annotated[str, typer.Option(help="Numbers of tokens T to measure at, with commas.")] = LENGTHS,
    out: Annotated[
        Path | None, typer.Option(help="Folder for demo.png and demo.json.", show_default="bench/results in a checkout, else linattn-demo")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Train a linear and a softmax decoder on real text, generate, measure both, and draw it: about three minutes on two cores."""
    from ..train import demo as show

    T, facts = _integers("lengths", lengths, 2), _facts(threads)
    raise typer.Exit(show.run(steps=steps, lengths=T, out=out, threads=threads, command=_command(), facts=facts, console=Console()))


@app.command()
def info() -> None:
    """Versions, devices, and which backends are there and why the others are not."""
    from rich.table import Table

    from ..info import facts

    table = Table(box=None, show_header=False)
    for section, lines in facts().items():
        table.add_row(f"[bold]{section}[/]")
        for name, found in lines.items():
            table.add_row(f"  {escaped(name)}", escaped(found))
    Console().print(table, highlight=False)


@app.command("warmup")
def warm_up(
    width: Annotated[list[int] | None, typer.Option(help="K = V of a head; repeatable.", show_default="64 and 128")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Compile the Triton kernels of the usual calls into Triton's cache, on the GPU at hand, so that nothing later waits for a compiler."""
    import torch

    from ..ops.triton.warmup import warmup

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {list(dtypes)}; got {dtype!r}")
    warmup(widths=tuple(width or (64, 128)), dtype=dtypes[dtype])


@app.command()
def build() -> None:
    """Compile the C++ kernels for the torch that is installed."""
    from ..build import build as compile_kernels

    compile_kernels()


def _command() -> str:
    """The same for a record, which names no folder of the machine it was made on."""
    return f"python -m linattn {shlex.join(sys.argv[1:])}"


def _facts(threads: int) -> dict[str, Any]:
    """What a record says of its making, besides the command; no folder of the machine either."""
    import torch

    from ..info import facts

    if threads:
        torch.set_num_threads(threads)
    found = facts()
    found["kernels"].pop("file", None)
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _commit(), **found}


def _commit() -> str:
    """The commit of the checkout this package lies in, with a + if it was changed since; "none" where it is installed elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return "none"
    git = lambda *args: subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _integers(name: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between; got {text!r}") from None
    if min(numbers) < least:
        raise ValueError(f"{name} must be at least {least}; got {min(numbers)}")
    return numbers

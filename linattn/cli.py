"""The command line: options become arguments, errors become one line. Nothing is computed here, nothing heavy imported before its use.

Longer than other files, because an option and its help stand nowhere else.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

LENGTHS = "256,1024,4096,16384"


class OneLineErrors(TyperGroup):
    """What a user can set right is one line on stderr and exit code 2; `--traceback` shows where it came from."""

    def invoke(self, ctx):
        from .build import CannotBuild

        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` is no error of ours
            raise
        except (ValueError, OSError, FloatingPointError, CannotBuild) as error:
            if ctx.params.get("traceback"):
                raise
            Console(stderr=True).print(f"[bold red]error:[/] {_escape(error) or type(error).__name__}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Linear attention on one operator: train, generate, measure.", context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

MODEL, DATA, OPTIMISATION, MACHINE, RUN, SAMPLING = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Model", "Data", "Optimisation", "Machine", "Run", "Sampling")
)
VARIANTS = (
    "linear, retnet, lightning, mamba2, gla, delta, gated_delta, kda, lion_lit, lion_d, lion_s, lion_lit_mlm, lion_d_mlm, lion_s_mlm, "
    "taylorshift, ecoformer, molformer, sse_gla, sse_gdn or softmax"
)
Preset = Annotated[str | None, MODEL(help="Size: tiny, small, base, 350m or 1b.", show_default="tiny")]
Variant = Annotated[str | None, MODEL(help=f"Attention: {VARIANTS}.", show_default="gla")]
Threads = Annotated[int, MACHINE(help="CPU threads; 0: torch's default.")]
Device = Annotated[str, MACHINE(help="auto, cpu, cuda, cuda:1, …")]
Backend = Annotated[str, MACHINE(help="Backend of the operator; `linattn info` lists them.")]


@app.callback()
def root(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Of the deepspeed launcher, which sets LOCAL_RANK too.")] = 0,
) -> None:
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Option(help="What is trained, and how: decoder, masked, image, distillation or transformers.", show_default="decoder"),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the recipe's task; repeatable.")] = None,
    preset: Preset = None,
    variant: Variant = None,
    set_: Annotated[list[str] | None, MODEL("--set", metavar="NAME=VALUE", help="Another field of the model's config; repeatable.")] = None,
    data: Annotated[
        list[str] | None,
        DATA(
            help="Text file or folder, repeatable; or a folder of `linattn data build`; of images see the docs.",
            show_default="Python's library",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, DATA(help="bytes, bpe (trained on the text), or a file of the package tokenizers.", show_default="bytes")
    ] = None,
    vocab_size: Annotated[int | None, DATA(help="Tokens of bpe.", show_default="4096")] = None,
    packing: Annotated[bool | None, DATA(help="Documents in a window do not see each other.", show_default="no")] = None,
    held_out: Annotated[float | None, DATA(help="Share of the text to evaluate on.", show_default="0.05")] = None,
    context: Annotated[int | None, DATA(help="Tokens in a window.", show_default="by preset")] = None,
    batch: Annotated[int | None, DATA(help="Windows in a step, over all processes.", show_default="by preset")] = None,
    accumulate: Annotated[int | None, DATA(help="Micro-batches that a step's windows are taken in.", show_default="1")] = None,
    steps: Annotated[int | None, OPTIMISATION(help="Steps in all.", show_default="by preset")] = None,
    lr: Annotated[float | None, OPTIMISATION(help="Highest learning rate.", show_default="by preset")] = None,
    warmup: Annotated[int | None, OPTIMISATION(help="Steps in which the rate rises.", show_default="a tenth")] = None,
    schedule: Annotated[str | None, OPTIMISATION(help="cosine, wsd, linear or constant.", show_default="cosine")] = None,
    min_lr: Annotated[float | None, OPTIMISATION(help="Floor of the schedule, as a share of --lr.", show_default="0.1")] = None,
    cooldown: Annotated[float | None, OPTIMISATION(help="wsd: share of the steps in which the rate falls.", show_default="0.2")] = None,
    weight_decay: Annotated[float | None, OPTIMISATION(help="Of matrices only.", show_default="0.1")] = None,
    betas: Annotated[tuple[float, float] | None, OPTIMISATION(help="Of AdamW's two means.", show_default="0.9 0.95")] = None,
    clip: Annotated[float | None, OPTIMISATION(help="Largest gradient norm.", show_default="1.0")] = None,
    seed: Annotated[int | None, OPTIMISATION(help="Of the start and the order.", show_default="0")] = None,
    precision: Annotated[str | None, MACHINE(help="float32, or bfloat16 (autocast).", show_default="float32")] = None,
    zero: Annotated[int | None, MACHINE(help="Stage of DeepSpeed's ZeRO: 0, 1, 2 or 3.", show_default="no DeepSpeed")] = None,
    deepspeed: Annotated[Path | None, MACHINE(help="DeepSpeed configuration, JSON; its autos are resolved.")] = None,
    context_parallel: Annotated[int | None, MACHINE(help="Processes that share one sequence.", show_default="1")] = None,
    context_parallel_by: Annotated[
        str | None, MACHINE(help="state (LASP-2), or heads (Ulysses), which softmax needs.", show_default="state")
    ] = None,
    compile_: Annotated[bool | None, MACHINE("--compile", help="torch.compile the model.", show_default="no")] = None,
    checkpoint_activations: Annotated[
        bool | None, MACHINE(help="Keep only what enters a block for the backward pass.", show_default="no")
    ] = None,
    device: Annotated[str | None, MACHINE(help="auto, cpu, cuda, cuda:1, …", show_default="auto")] = None,
    backend: Annotated[str | None, MACHINE(help="Backend of the operator; `linattn info` lists them.", show_default="auto")] = None,
    threads: Annotated[int | None, MACHINE(help="CPU threads.", show_default="torch's default")] = None,
    out: Annotated[Path | None, RUN(help="Folder of the run: config, log.csv, checkpoints.", show_default="runs/PRESET-VARIANT")] = None,
    resume: Annotated[str, RUN(help="auto: go on with the run in --out; never: refuse to.")] = "auto",
    eval_every: Annotated[int | None, RUN(help="Steps between evaluations.", show_default="a tenth")] = None,
    eval_windows: Annotated[int | None, RUN(help="Windows of held-out text in an evaluation.", show_default="64")] = None,
    save_every: Annotated[int | None, RUN(help="Steps between checkpoints.", show_default="a tenth")] = None,
    keep: Annotated[int | None, RUN(help="Complete checkpoints kept.", show_default="2")] = None,
    report: Annotated[list[str] | None, RUN(help="tensorboard or wandb, besides log.csv; repeatable.")] = None,
    dry_run: Annotated[bool, RUN("--dry-run", help="Say what the run would take, and train nothing.")] = False,
    processes: Annotated[int, RUN(help="With --dry-run: how many processes it is asked for.", min=1)] = 1,
) -> None:
    """Train a model, a decoder on text unless --recipe says otherwise, from nothing or from where it stopped.

    Ctrl-C ends the step, saves, and prints the command that goes on.
    A resumed run gives the losses of an uninterrupted one: on a CPU with the
    same number of threads bit for bit. What is not given comes from the run
    in --out, or else from the preset.
    """
    from .train import loop, recipes

    made = recipes.make(recipe, preset, variant, steps=steps)
    out = out or Path("runs") / "-".join([*([] if recipe in (None, "decoder") else [recipe]), made.preset, made.variant])
    options: dict[str, Any] = dict(
        preset=preset, variant=variant, options=_pairs("option", option) or None, overrides=_pairs("set", set_) or None,
        data=tuple(data) if data else None, tokenizer=tokenizer, vocab_size=vocab_size, packing=packing, held_out=held_out,
        context=context, batch=batch, accumulate=accumulate, steps=steps, lr=lr, warmup=warmup, schedule=schedule, min_lr=min_lr,
        cooldown=cooldown, weight_decay=weight_decay, betas=betas, clip=clip, seed=seed, precision=precision, zero=zero,
        deepspeed=_json("deepspeed", deepspeed), context_parallel=context_parallel,
        context_parallel_by=context_parallel_by, compile=compile_,
        checkpoint_activations=checkpoint_activations, device=device, backend=backend, threads=threads, eval_every=eval_every,
        eval_windows=eval_windows, save_every=save_every, keep=keep, report=tuple(report) if report else None,
    )  # fmt: skip
    saved = loop.saved_config(out) if resume == "auto" else None
    if saved is not None and recipe is not None and saved.task != made.task:
        raise ValueError(f"recipe must be that of the run in {out}, {saved.task}, or --out another folder; got {recipe!r}")
    base = saved or made
    config = replace(base, **{name: value for name, value in options.items() if value is not None})
    if dry_run:
        from .train import engine, estimate

        for line in estimate.dry_run(config, engine.pick_device(config.device), processes):
            print(line)
        return
    again = f"{_program()} train --out {shlex.quote(str(out))} --resume auto"
    run = loop.train(config, out, resume=resume, command=again, console=Console())
    raise typer.Exit(130 if run.stopped_by == signal.SIGINT else 0)


data_app = typer.Typer(no_args_is_help=True, help="Corpora, and data that is made.")
app.add_typer(data_app, name="data")


@data_app.command("build")
def build_data(
    out: Annotated[Path, typer.Argument(help="Folder to make, for `linattn train --data`.")],
    paths: Annotated[list[str], typer.Argument(help="Text, .jsonl and .parquet files, and folders of them.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, bpe (trained here), or a file of the package tokenizers.")] = "bytes",
    vocab_size: Annotated[int, typer.Option(help="Tokens of bpe.", min=258)] = 4096,
    held_out: Annotated[float, typer.Option(help="Share of the documents to evaluate on.")] = 0.05,
    field: Annotated[str, typer.Option(help="Of .jsonl and .parquet: where the text is.")] = "text",
) -> None:
    """Encode a corpus once, into files that every process of a training run maps and none reads as a whole."""
    from .train import tokens

    facts = tokens.build(tuple(paths), out, tokenizer=tokenizer, vocab_size=vocab_size, held_out=held_out, field=field)
    print(f"{out}: {facts['source']}, {facts['train']:,} tokens to train on, {facts['held_out']:,} held out, {facts['dtype']}")


@data_app.command("listops")
def make_listops(
    out: Annotated[Path, typer.Argument(help="The .npz file to write, for `linattn train --recipe image --data`.")],
    count: Annotated[int, typer.Option(help="Expressions.", min=1)] = 20_000,
    lengths: Annotated[tuple[int, int], typer.Option(help="Fewest and most symbols.")] = (500, 2000),
    max_depth: Annotated[int, typer.Option(help="Operations inside each other.")] = 10,
    max_args: Annotated[int, typer.Option(help="Arguments of one operation.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the expressions.")] = 0,
) -> None:
    """Make ListOps, nested operations on digits whose value is to be told: an image of one row, a symbol being a pixel of 15 channels.

    Train on it with --set patch_size=1 and --option shift=0.
    """
    from .train import listops

    listops.save(out, count, seed=seed, lengths=lengths, max_depth=max_depth, max_args=max_args)
    print(f"{out}: {count:,} expressions of {lengths[0]} to {lengths[1]} symbols")


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from; empty: the start of a document.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 256,
    temperature: Annotated[float, SAMPLING(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, SAMPLING(help="Only the k likeliest tokens.", show_default="all")] = None,
    top_p: Annotated[float | None, SAMPLING(help="Only the likeliest tokens of this total.", show_default="all")] = None,
    seed: Annotated[int, SAMPLING(help="Of the choices.")] = 0,
    threads: Threads = 0,
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Go on from a prompt, written as it is generated, in constant memory for the linear variants."""
    from .train import sample

    sample.stream(
        checkpoint, prompt, sys.stdout, say=_say_aside, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        threads=threads, device=device, backend=backend,
    )  # fmt: skip


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run of a decoder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Write a trained decoder as a folder of transformers, with its tokenizer: AutoModelForCausalLM loads it where linattn is installed."""
    from .models import Decoder
    from .train import checkpoint as checkpoints
    from .train import tokenizer

    try:
        from .models import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"export needs transformers ({error}): pip install 'linattn[hf]'") from None
    folder = checkpoints.find(checkpoint, _say_aside)
    coder = tokenizer.of_transformers(tokenizer.load(folder / "tokenizer.json"))
    transformers.export(Decoder.from_pretrained(folder), out, coder)
    print(f"{out}: AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


@app.command("probe")
def probe_input(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a saved model, of linattn or swapped, of a run, or of one of its checkpoints.")
    ],
    text: Annotated[str | None, typer.Option(help="What a decoder or an encoder reads.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture that a vision transformer sees.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write; one that is there is replaced.")] = Path("report.html"),
    at: Annotated[
        int | None,
        typer.Option(
            help="Token whose state and attention are drawn.", show_default="the last; of an image its first, or the middle patch"
        ),
    ] = None,
    threads: Threads = 0,
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Write what every layer remembers of a text or an image, as one HTML page with its figures: half-lives, ranks, states, attention.

    Beside the figures stand those of the same model at a random start.
    """
    import torch

    from . import probe
    from .probes import pages
    from .probes.points import points
    from .train import inputs

    if threads:
        torch.set_num_threads(threads)
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"out must be a file in a folder that is there; got {out}")
    found = inputs.opened(checkpoint, text=text, image=image, device=device, backend=backend, say=_say_aside)
    if at is not None and isinstance(found.grid, dict):
        raise ValueError(f"at must not be given for a pyramid, whose layers have patches of several sizes; got {at}")

    def seen(model):
        layers = [name for name in points(model) if not name.endswith(".routed")]  # whose rows are no text: see `probes.points`
        with torch.no_grad(), probe(model, layers=layers, keep=("final", "writes", "gates", "reads")) as p:
            model(found.inputs)
        return p

    p = seen(found.model)
    if at is not None and not 0 <= at < p[0].length:
        raise ValueError(f"at must be one of the {p[0].length} tokens, from 0; got {at}")
    against = {"untrained model": seen(found.untrained()).report()}
    shown = dict(words=found.words) if found.grid is None else dict(image=found.inputs[0], grid=found.grid)
    title = f"What {checkpoint.name} remembers"
    out.write_text(pages.page(p, title=title, at=at, facts=found.facts, against=against, **shown), encoding="utf-8")
    print(p.report(against=against))
    print(f"{out}: {len(p)} layers, {out.stat().st_size:,} bytes")


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
    from .train import throughput

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
    from .train import demo as show

    T, facts = _integers("lengths", lengths, 2), _facts(threads)
    raise typer.Exit(show.run(steps=steps, lengths=T, out=out, threads=threads, command=_command(), facts=facts, console=Console()))


@app.command()
def swap(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a causal language model of transformers.")],
    out: Annotated[Path, RUN(help="Folder for the linear model and report.json; a run that is in it goes on.")],
    variant: Annotated[str, MODEL(help="A variant, hedgehog or liger.")] = "hedgehog",
    window: Annotated[int, MODEL(help="Tokens of exact softmax before each, beside the linear attention.", min=0)] = 0,
    softmax: Annotated[int, MODEL(help="Layers that keep their softmax, chosen by KL importance.", min=0)] = 0,
    replace_sliding: Annotated[bool, MODEL("--replace-sliding", help="Also swap attention of a sliding window.")] = False,
    data: Annotated[list[str] | None, DATA(help="Text file or directory; repeatable.", show_default="Python's library")] = None,
    context: Annotated[int, DATA(help="Tokens in a window.", min=2)] = 512,
    batch: Annotated[int, DATA(help="Windows in a step.", min=1)] = 8,
    transfer: Annotated[int, OPTIMISATION(help="Steps of attention transfer.", min=0)] = 200,
    distill: Annotated[int, OPTIMISATION(help="Steps of distillation.", min=0)] = 400,
    lora: Annotated[int, OPTIMISATION(help="Steps of low-rank finetuning (needs peft).", min=0)] = 0,
    chain: Annotated[int, OPTIMISATION(help="Factors between the two of each low-rank adapter: LinChain.", min=0)] = 0,
    lr_transfer: Annotated[float, OPTIMISATION(help="Highest rate of the transfer.")] = 1e-2,
    lr: Annotated[float, OPTIMISATION(help="Highest rate of the distillation.")] = 1e-3,
    lr_lora: Annotated[float, OPTIMISATION(help="Highest rate of the finetuning.")] = 1e-4,
    hidden: Annotated[float, OPTIMISATION(help="Weight of hidden states in distillation.", min=0)] = 0.0,
    seed: Annotated[int, OPTIMISATION(help="Of the order of the text.")] = 0,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """Turn a softmax language model into a linear one: swap, transfer, choose layers, distill, finetune; judged after each stage.

    A run that was stopped goes on when the same command is given again.
    """
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from .swap.recipe import Recipe, linearise_model
    from .train import hosts

    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(
        variant=variant, window=window, softmax=softmax, replace_sliding=replace_sliding, transfer=transfer, distill=distill, lora=lora,
        chain=chain, lr_transfer=lr_transfer, lr=lr, lr_lora=lr_lora, hidden=hidden,
    )  # fmt: skip
    host = hosts.Host(model_dir, tuple(data or ()), context=context, rows=batch, seed=seed, device=device)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def told(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps)
            bar.update(tasks[stage], completed=step, description=f"{stage} {loss:.4f}")

        say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        rows = linearise_model(host.load, recipe, host.batch, host.bits_per_byte, out, source=host.source, say=say, told=told)
    if isinstance(host.coder, hosts.HostTokenizer):
        host.coder.tokenizer.save_pretrained(out)
    say("held-out bits per byte: " + ", ".join(f"{row['stage']} {row['value']:.3f}" for row in rows))
    say(f"the model: linattn.from_pretrained({str(out)!r}); the report: {out / 'report.json'}")


@app.command()
def info() -> None:
    """Versions, devices, and which backends are there and why the others are not."""
    from rich.table import Table

    from .info import facts

    table = Table(box=None, show_header=False)
    for section, lines in facts().items():
        table.add_row(f"[bold]{section}[/]")
        for name, found in lines.items():
            table.add_row(f"  {_escape(name)}", _escape(found))
    Console().print(table, highlight=False)


@app.command("warmup")
def warm_up(
    width: Annotated[list[int] | None, typer.Option(help="K = V of a head; repeatable.", show_default="64 and 128")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Compile the Triton kernels of the usual calls into Triton's cache, on the GPU at hand, so that nothing later waits for a compiler."""
    import torch

    from .ops.triton.warmup import warmup

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {list(dtypes)}; got {dtype!r}")
    warmup(widths=tuple(width or (64, 128)), dtype=dtypes[dtype])


@app.command()
def build() -> None:
    """Compile the C++ kernels for the torch that is installed."""
    from .build import build as compile_kernels

    compile_kernels()


def _program() -> str:
    """How this program was called, as it can be typed again."""
    name = Path(sys.argv[0]).name
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', os.environ['WORLD_SIZE'])} -m linattn"
    return shlex.join([sys.executable, "-m", "linattn"]) if name in ("__main__.py", "-c") else shlex.quote(sys.argv[0])


def _command() -> str:
    """The same for a record, which names no folder of the machine it was made on."""
    return f"python -m linattn {shlex.join(sys.argv[1:])}"


def _facts(threads: int) -> dict[str, Any]:
    """What a record says of its making, besides the command; no folder of the machine either."""
    import torch

    from .info import facts

    if threads:
        torch.set_num_threads(threads)
    found = facts()
    found["kernels"].pop("file", None)
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _commit(), **found}


def _commit() -> str:
    """The commit of the checkout this package lies in, with a + if it was changed since; "none" where it is installed elsewhere."""
    root = Path(__file__).parent.parent
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


def _json(option: str, path: Path | None) -> Any:
    try:
        return None if path is None else json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{option} must be a JSON file; {path} is not: {error}") from None


def _pairs(option: str, texts: list[str] | None) -> dict[str, object]:
    """name=value options; a value is an int, a float, true, false or text."""
    pairs: dict[str, object] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"{option} must be NAME=VALUE; got {text!r}")
        pairs[name] = {"true": True, "false": False}.get(value, _number(value))
    return pairs


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _escape(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def _say_aside(message: str) -> None:
    print(message, file=sys.stderr)


def main() -> None:
    app()

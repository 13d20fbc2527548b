"""Commands that make models and what they are made of: train, data, swap."""

import json
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import DATA, MACHINE, MODEL, OPTIMISATION, RUN, Device, Preset, Threads, Variant, app


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
    from ..train import loop, recipes

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
        from ..train import engine, estimate

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
    from ..train import tokens

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
    from ..train import listops

    listops.save(out, count, seed=seed, lengths=lengths, max_depth=max_depth, max_args=max_args)
    print(f"{out}: {count:,} expressions of {lengths[0]} to {lengths[1]} symbols")


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

    from ..swap.recipe import Recipe, linearise_model
    from ..train import hosts

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


def _program() -> str:
    """How this program was called, as it can be typed again."""
    name = Path(sys.argv[0]).name
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', os.environ['WORLD_SIZE'])} -m linattn"
    return shlex.join([sys.executable, "-m", "linattn"]) if name in ("__main__.py", "-c") else shlex.quote(sys.argv[0])


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

"""Commands that take a trained model: generate, export, probe."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import SAMPLING, Backend, Device, Threads, app, say_aside


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
    from ..train import sample

    sample.stream(
        checkpoint, prompt, sys.stdout, say=say_aside, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        threads=threads, device=device, backend=backend,
    )  # fmt: skip


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run of a decoder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Write a trained decoder as a folder of transformers, with its tokenizer: AutoModelForCausalLM loads it where linattn is installed."""
    from ..models import Decoder
    from ..train import checkpoint as checkpoints
    from ..train import tokenizer

    try:
        from ..models import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"export needs transformers ({error}): pip install 'linattn[hf]'") from None
    folder = checkpoints.find(checkpoint, say_aside)
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

    from .. import probe
    from ..probes import pages
    from ..probes.points import points
    from ..train import inputs

    if threads:
        torch.set_num_threads(threads)
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"out must be a file in a folder that is there; got {out}")
    found = inputs.opened(checkpoint, text=text, image=image, device=device, backend=backend, say=say_aside)
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

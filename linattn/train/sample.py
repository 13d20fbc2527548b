"""The only place that turns a checkpoint and a prompt into text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from ..models import Decoder
from . import checkpoint, tokenizer
from .engine import pick_device


def continuation(model: Decoder, coder: tokenizer.Tokenizer, prompt: str, *, tokens: int, **how) -> Iterator[str]:
    """Text after `prompt` as it comes, until `tokens` tokens or the end of the document. `how` as in `Decoder.stream`.

    ValueError before anything is generated.
    """
    start = coder.encode([prompt.encode()])[0].tolist() or [coder.end]  # a document starts after the end of another
    first = torch.tensor([start], device=next(model.parameters()).device)
    generated = model.stream(first, tokens, stop_tokens=(coder.end,), **how)
    return coder.letters(start, (int(token) for token in generated))


def stream(
    folder: Path, prompt: str, to: TextIO, *, tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int,
    threads: int, device: str, backend: str, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the prompt and its continuation by the newest model in `folder` to `to`, piece by piece."""
    if threads:
        torch.set_num_threads(threads)
    found = checkpoint.find(folder, say)
    coder = tokenizer.load(found / "tokenizer.json")
    model = Decoder.from_pretrained(found, backend=backend).to(pick_device(device)).eval()
    pieces = continuation(model, coder, prompt, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    to.write(prompt)
    for piece in pieces:
        to.write(piece)
        to.flush()
    to.write("\n")

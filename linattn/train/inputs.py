"""The only place that opens a saved model together with one input of its kind: a text for a decoder or an encoder, an image for a ViT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import Decoder, Encoder, VisionTransformer
from . import checkpoint, images, tokenizer
from .engine import pick_device

KINDS: dict[str, Any] = {
    "linattn_decoder": Decoder,
    "linattn_encoder": Encoder,
    "linattn_vision_transformer": VisionTransformer,
}


class Opened(NamedTuple):
    model: nn.Module
    inputs: Tensor  # what `model` takes: tokens [1 T], or an image [1 C h w]
    length: int  # tokens
    words: list[str]  # every token as text; of an image none
    grid: tuple[int, int] | None  # rows and columns of its patches
    facts: dict[str, str]  # what is to be said of both


def opened(path: Path, *, text: str | None, image: Path | None, device: str, backend: str, say: Callable[[str], None]) -> Opened:
    """The model saved in `path`, a folder or the newest checkpoint of a run, in evaluation mode, and its input.

    A folder without a tokenizer is read byte by byte. An image is read as the recipe `image` reads a folder's: its middle, scaled to the
    size of the model's config, pixels in [-1, 1]. ValueError for a text that is empty, an image for a model of text
    or the other way round, and a folder or a picture that cannot be read.
    """
    folder = checkpoint.find(path, say)
    kind = _kind(folder)
    wanted, given = ("image", image) if kind is VisionTransformer else ("text", text)
    if given is None or (text is not None and image is not None):
        got = " and ".join(name for name, x in (("text", text), ("image", image)) if x is not None) or "neither"
        raise ValueError(f"{wanted} must be given, and nothing else, for the {kind.__name__} in {folder}; got {got}")
    model = kind.from_pretrained(folder, backend=backend).to(pick_device(device)).eval()
    place = next(model.parameters()).device
    size = sum(weight.numel() for weight in model.parameters())
    facts = {"model": f"{folder.name}: {model.config.variant}, {model.config.num_layers} layers, {size:,} parameters"}
    if image is not None:
        config = model.config
        height, width = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
        if (mode := {1: "L", 3: "RGB"}.get(config.in_chans)) is None:
            raise ValueError(f"image must be of 1 or 3 channels; the model in {folder} sees {config.in_chans}")
        pixels = images.decoded(image, mode, (height, width)).float() / 127.5 - 1
        grid = model.patches.grid(pixels)
        facts["image"] = f"{image.name}, {height} × {width} pixels in {grid[0]} × {grid[1]} patches"
        return Opened(model, pixels[None].to(place), model.num_prefix_tokens + grid[0] * grid[1], [], grid, facts)
    coder = tokenizer.load(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else tokenizer.Bytes()
    ids = coder.encode([(text or "").encode()])[0].tolist()
    if not ids:
        raise ValueError("text must be at least one token; got ''")
    facts["text"] = f"{len(ids)} tokens ({coder.name})"
    words = [coder.decode([i]).decode("utf-8", "backslashreplace") for i in ids]
    return Opened(model, torch.tensor([ids], device=place), len(ids), words, None, facts)


def _kind(folder: Path) -> Any:
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no model: its config.json cannot be read ({error})") from None
    if found not in KINDS:
        raise ValueError(f"{folder / 'config.json'} must be of one of {list(KINDS)}; got {found!r}")
    return KINDS[found]

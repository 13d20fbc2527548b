"""The only place that opens a saved model together with one input of its kind: a text, or a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import Decoder, Encoder, L2ViT, VisionTransformer
from ..models.storage import model_type
from ..swap import storage as swapped_models
from . import checkpoint, hosts, images, tokenizer
from .engine import pick_device

KINDS: dict[str, Any] = {
    "linattn_decoder": Decoder,
    "linattn_encoder": Encoder,
    "linattn_vision_transformer": VisionTransformer,
    "linattn_l2vit": L2ViT,
}
PYRAMID = 224  # pixels a side for a model that takes any: what L²ViT was trained on

Grid = tuple[int, int]


class Opened(NamedTuple):
    model: nn.Module
    untrained: Callable[[], nn.Module]  # the same at a random start
    inputs: Tensor  # what `model` takes: tokens [1 T], or an image [1 C h w]
    words: list[str]  # every token as text; of an image none
    grid: Grid | dict[str, Grid] | None  # rows and columns of an image's patches; of a pyramid by the name of the layer
    facts: dict[str, str]  # what is to be said of both


def opened(path: Path, *, text: str | None, image: Path | None, device: str, backend: str, say: Callable[[str], None]) -> Opened:
    """The model saved in `path`, a folder or the newest checkpoint of a run, in evaluation mode, and its input.

    A swapped model of transformers reads a text with the tokenizer in its folder; without one, as ours, byte by byte. A picture is read as
    the recipe `image` reads a folder's: its middle, scaled to the size of the model's config, pixels in [-1, 1], or with the mean and
    deviation of a swapped model's preprocessor_config.json; L²ViT, which takes any size, sees 224 pixels a side. ValueError for a text that
    is empty, an image for a model of text or the other way round, and a folder or a picture that cannot be read.
    """
    folder = path if model_type(path) == swapped_models.MODEL_TYPE else checkpoint.find(path, say)
    swapped, place = model_type(folder) == swapped_models.MODEL_TYPE, pick_device(device)
    model: Any
    if swapped:
        model, again = swapped_models.from_pretrained(folder, backend=backend), lambda: swapped_models.unloaded(folder, backend=backend)
        sees, called = model.main_input_name == "pixel_values", type(model).__name__
        if model.main_input_name not in ("pixel_values", "input_ids") or getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"the model in {folder} must take a text or an image alone; a {called} takes {model.main_input_name}")
    else:
        kind = _kind(folder)
        model, again = kind.from_pretrained(folder, backend=backend), lambda: kind(model.config, backend=backend).eval()
        sees, called = kind in (VisionTransformer, L2ViT), kind.__name__

    def untrained() -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return again().to(place)

    wanted, given = ("image", image) if sees else ("text", text)
    if given is None or (text is not None and image is not None):
        got = " and ".join(name for name, x in (("text", text), ("image", image)) if x is not None) or "neither"
        raise ValueError(f"{wanted} must be given, and nothing else, for the {called} in {folder}; got {got}")
    model = model.to(place).eval()
    size = sum(weight.numel() for weight in model.parameters())
    variant = f", {model.config.variant}, {model.config.num_layers} layers" if hasattr(model.config, "variant") else ""
    facts = {"model": f"{folder.name}: {called}{variant}, {size:,} parameters"}
    if image is not None:
        pixels, grid = _picture(image, model, folder)
        each = set(grid.values()) if isinstance(grid, dict) else {grid}
        patches = ", ".join(f"{rows} × {columns}" for rows, columns in sorted(each, reverse=True))
        facts["image"] = f"{image.name}, {pixels.shape[1]} × {pixels.shape[2]} pixels in {patches} patches"
        return Opened(model, untrained, pixels[None].to(place), [], grid, facts)
    ids, words, name = _text(text or "", model, folder, swapped)
    facts["text"] = f"{len(ids)} tokens ({name})"
    return Opened(model, untrained, torch.tensor([ids], device=place), words, None, facts)


def _picture(image: Path, model: Any, folder: Path) -> tuple[Tensor, Grid | dict[str, Grid]]:
    """Pixels [C h w], and rows and columns of the patches."""
    config = model.config
    if isinstance(model, L2ViT):
        step = 4 * 2 ** (len(config.dims) - 1)
        side = -(-PYRAMID // step) * step
        size, channels, mean, deviation = (side, side), config.in_chans, 0.5, 0.5
    elif isinstance(model, VisionTransformer):
        size, channels, mean, deviation = config.img_size, config.in_chans, 0.5, 0.5
    else:
        file = folder / "preprocessor_config.json"
        values = json.loads(file.read_text()) if file.exists() else {}
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        mean, deviation = (torch.tensor(values.get(name, 0.5))[..., None, None] for name in ("image_mean", "image_std"))
    size = (size, size) if isinstance(size, int) else tuple(size)
    if (mode := {1: "L", 3: "RGB"}.get(channels)) is None:
        raise ValueError(f"image must be of 1 or 3 channels; the model in {folder} sees {channels}")
    pixels = (images.decoded(image, mode, size).float() / 255 - mean) / deviation
    if isinstance(model, L2ViT):
        sides = {i: side // 4 // 2**i for i in range(len(config.dims))}
        names = [name for name, module in model.named_modules() if name.endswith(".mixer")]
        return pixels, {name: (sides[int(name.split(".")[1])],) * 2 for name in names}
    if isinstance(model, VisionTransformer):
        return pixels, model.patches.grid(pixels)
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return pixels, (size[0] // patch, size[1] // patch)


def _text(text: str, model: Any, folder: Path, swapped: bool) -> tuple[list[int], list[str], str]:
    """Tokens, each as text, and what the tokenizer is called."""
    if swapped and hosts.has_tokenizer(folder):
        coder = hosts.tokenizer_of(folder, model.config)
        ids, name = coder(text)["input_ids"] if text else [], type(coder).__name__
        words = [coder.decode([i]) for i in ids]
    else:
        table = tokenizer.load(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else tokenizer.Bytes()
        ids, name = table.encode([text.encode()])[0].tolist(), table.name
        words = [table.decode([i]).decode("utf-8", "backslashreplace") for i in ids]
    if not ids:
        raise ValueError("text must be at least one token; got ''")
    if max(ids) >= (known := model.config.vocab_size):
        raise ValueError(f"the model in {folder} has {known} tokens, and the text token {max(ids)}: save its tokenizer beside it")
    return ids, words, name


def _kind(folder: Path) -> Any:
    found = model_type(folder)
    if found not in KINDS:
        raise ValueError(f"{folder / 'config.json'} must be of one of {[*KINDS, swapped_models.MODEL_TYPE]}; got {found!r}")
    return KINDS[found]

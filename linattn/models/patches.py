"""The only place that turns images into tokens: patches, grids, and position embeddings for grids of any size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.decays import gate_dtype
from ..layers.linear import Linear, without_weight_decay

Grid = tuple[int, int]  # rows and columns of patches


class Patches(nn.Module):
    """Images [B C h w] → tokens [B rows · columns dim]: each patch of size² pixels through one linear map with bias.

    pad  True: zeros at the right and the bottom fill up the last patches; False: an image that is not a multiple of the patch is refused
    """

    def __init__(self, size: int, channels: int, dim: int, *, pad: bool = False):
        super().__init__()
        self.size, self.channels, self.pad = size, channels, pad
        self.proj = Linear(channels * size**2, dim, bias=True)

    def extra_repr(self) -> str:
        return f"size={self.size}, pad={self.pad}"

    def grid(self, image: Tensor) -> Grid:
        """Rows and columns of patches of images [… C h w]. ValueError for other channels, no pixels, or sizes that do not divide."""
        channels, height, width = image.shape[-3:]
        if channels != self.channels or not image.is_floating_point():
            raise ValueError(f"images must be floating with in_chans={self.channels} channels; got {image.dtype} {tuple(image.shape)}")
        if height == 0 or width == 0:
            raise ValueError(f"images must not be empty; got one of {height} × {width} pixels")
        if not self.pad and (height % self.size or width % self.size):
            raise ValueError(
                f"images must be a multiple of the patch, {self.size} pixels, or the model made with pad=True; got {height} × {width}"
            )
        return -(-height // self.size), -(-width // self.size)

    def forward(self, images: Tensor) -> Tensor:
        size, (height, width) = self.size, images.shape[-2:]
        images = F.pad(images, (0, -width % size, 0, -height % size))
        cut = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B C rows size columns size]
        return self.proj(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class Positions(nn.Module):
    """A learnt embedding per patch of `grid`, added to the tokens; for another grid it is resized by antialiased bicubic interpolation."""

    def __init__(self, grid: Grid, dim: int, *, std: float = 0.02):
        super().__init__()
        self.weight = without_weight_decay(nn.Parameter(torch.empty(*grid, dim)))
        nn.init.normal_(self.weight, std=std)

    def extra_repr(self) -> str:
        return " × ".join(map(str, self.weight.shape))

    def forward(self, grid: Grid) -> Tensor:
        """[rows · columns dim]"""
        return self.resized(grid).flatten(0, 1)

    def resized(self, grid: Grid) -> Tensor:
        if grid == tuple(self.weight.shape[:2]):
            return self.weight
        image = self.weight.permute(2, 0, 1)[None].to(gate_dtype(self.weight))
        return F.interpolate(image, size=grid, mode="bicubic", antialias=True)[0].permute(1, 2, 0).to(self.weight.dtype)


def as_list(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Images of any sizes as a list of [C h w]. ValueError for no image, and for what is none."""
    images = list(images)
    if not images:
        raise ValueError("a pack must hold at least one image; got an empty list")
    for image in images:
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise ValueError(
                f"each image of a pack must be [C h w]; got {tuple(image.shape) if isinstance(image, Tensor) else type(image)}"
            )
    return images

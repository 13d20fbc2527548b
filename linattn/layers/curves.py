"""The only place that lays a curve through the patches of an image: the orders in which a decay may read them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def snake(height: int, width: int, *, by: str = "row") -> Tensor:
    """[height · width] int64: row-major places in the order of a snake, left to right, then right to left, …; by="column": down, up, …"""
    grid = torch.arange(height * width).view(height, width)
    grid = grid.T.clone() if by == "column" else grid
    grid[1::2] = grid[1::2].flip(-1)
    return grid.flatten()


def snakes(grids: Sequence[tuple[int, int]], *, prefix: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """[2 T] int64: the row snake and the column snake through images packed one behind the other, T = Σ (prefix + height · width).

    The first `prefix` tokens of an image, which have no place in it, keep theirs. One image: a batch of one size, or a single image.
    ValueError for a grid without a patch.
    """
    parts, start = [], 0
    for height, width in grids:
        if height < 1 or width < 1:
            raise ValueError(f"a grid must have at least one row and one column of patches; got {height} × {width}")
        front = torch.arange(prefix).expand(2, -1)
        curve = torch.stack([snake(height, width), snake(height, width, by="column")])
        parts.append(torch.cat([front, prefix + curve], 1) + start)
        start += prefix + height * width
    return torch.cat(parts, 1).to(device)

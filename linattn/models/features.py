"""What the image models share of timm's ways: heads, which blocks `forward_intermediates` means, and how features are handed out."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.linear import Linear


def classifier(dim: int, num_classes: int) -> nn.Module:
    """The head of a classifier; 0 classes: none."""
    return Linear(dim, num_classes, bias=True) if num_classes else nn.Identity()


def taken(indices: int | Sequence[int] | None, count: int, what: str = "blocks") -> set[int]:
    """None: all; n: the last n; negative ones count from the end. ValueError for what is not there, and for none."""
    if isinstance(indices, int):
        indices = range(-indices, 0)
    found = {i + count if i < 0 else i for i in (range(count) if indices is None else indices)}
    if not found or min(found) < 0 or max(found) >= count:
        raise ValueError(f"indices must name some of {count} {what}; got {indices!r}")
    return found


def handed_out(last: Tensor | None, maps: list[Tensor], prefixes: list[Tensor] | None, *, as_dict: bool) -> Any:
    """(last, maps), or maps alone where last is None; maps are pairs with prefixes where those are asked for. As a dict: timm's names."""
    if as_dict:
        named = dict(image_intermediates=maps, image_intermediates_prefix=prefixes, image_features=last)
        return {name: value for name, value in named.items() if value is not None}
    outputs = maps if prefixes is None else list(zip(maps, prefixes, strict=True))
    return outputs if last is None else (last, outputs)

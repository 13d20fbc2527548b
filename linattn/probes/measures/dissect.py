"""Network dissection: which units of an image model are on where a concept is."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .controls import beside


@dataclass(frozen=True, eq=False, repr=False)
class Dissection:
    """How well each unit's map, cut at its own threshold, covers each concept."""

    iou: Tensor  # [u c]
    thresholds: Tensor  # [u]
    floor: float  # a unit is a detector of a concept from this IoU on
    controls: dict[str, int]  # name → detectors

    @property
    def detectors(self) -> dict[int, tuple[int, float]]:
        """unit → its best concept and IoU there, where that is more than `floor`."""
        best = self.iou.max(1)
        return {u: (int(best.indices[u]), float(best.values[u])) for u in (best.values > self.floor).nonzero()[:, 0].tolist()}

    def __repr__(self) -> str:
        found, (u, c) = self.detectors, self.iou.shape
        concepts = len({concept for concept, _ in found.values()})
        head = f"{len(found)} of {u} units detect {concepts} of {c} concepts, best IoU {self.iou.max():.3f}"
        return f"{head} ({beside({name: f'{count} of {u}' for name, count in self.controls.items()})})"


def unit_maps(tokens: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """[B units rows columns] of [B T …] per token, as `trace.o` [B T H V], the value channels that are read at each patch.

    grid: rows and columns of patches, the first `prefix` tokens (class token, registers) being none. ValueError for another count.
    """
    if tokens.ndim < 3 or tokens.shape[1] != prefix + grid[0] * grid[1]:
        raise ValueError(f"tokens must be [B T …] with {prefix} + {grid[0]} · {grid[1]} tokens; got {tuple(tokens.shape)}")
    return tokens[:, prefix:].flatten(2).mT.unflatten(2, tuple(grid))


def dissect(
    maps: Tensor, masks: Tensor, *, quantile: float = 0.005, floor: float = 0.04, shuffled: bool = True,
    against: Mapping[str, Tensor] | None = None, seed: int = 0,
) -> Dissection:  # fmt: skip
    """maps [n units rows columns] and concepts' masks [n c height width] (bool) of the same images → IoU [units c]. arXiv:1704.05796.

    iou_uc = Σ |M_u ∩ L_c| / Σ |M_u ∪ L_c| over all images, M_u the map brought to the masks' size (bilinear) where it exceeds T_u, and
    T_u such that a share `quantile` of the unit's numbers does.

    shuffled  a control: every map with another image's masks, which where a concept is always at one place it detects too
    against   by name other maps of the same images, as an untrained model's

    Raises ValueError for shapes that do not go together and shares outside (0, 1).
    """
    for name, value in (("quantile", quantile), ("floor", floor)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1); got {value!r}")
    if masks.ndim != 4 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool [n c height width]; got {masks.dtype} {tuple(masks.shape)}")
    against = dict(against or {})
    for name, given in {"maps": maps, **against}.items():
        if given.ndim != 4 or len(given) != len(masks) or not given.isfinite().all():
            raise ValueError(f"{name} must be [n units rows columns], finite, of the same {len(masks)} images; got {tuple(given.shape)}")
    iou, thresholds = _overlap(maps, masks, quantile)
    count = lambda maps, masks: int((_overlap(maps, masks, quantile)[0].amax(1) > floor).sum())
    controls = {}
    if shuffled:
        if len(masks) < 2:
            raise ValueError("masks must be of two images or more for their order to be another; got 1")
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed))
        controls["shuffled images"] = count(maps[order], masks[order.roll(1)])
    controls |= {name: count(other, masks) for name, other in against.items()}
    return Dissection(iou, thresholds, floor, controls)


def _overlap(maps: Tensor, masks: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    flat = masks.flatten(2).transpose(0, 1).flatten(1)  # [c n·pixels]
    maps, labels = maps.detach().float(), flat.to(torch.float32)
    rows, thresholds = [], []
    for unit in maps.unbind(1):  # one at a time: n images of full size are held once, not once a unit
        values = unit.flatten().sort().values
        T = values[min(len(values) - 1, max(0, int((1 - quantile) * len(values)) - 1))]  # torch.quantile takes 16 million numbers at most
        on = (torch.nn.functional.interpolate(unit[:, None], size=masks.shape[-2:], mode="bilinear") > T).flatten()
        both = labels @ on.to(torch.float32)
        rows.append(both / (flat.sum(1) + on.sum() - both).clamp_min(1))
        thresholds.append(T)
    return torch.stack(rows), torch.stack(thresholds)

"""What a figure is held against, the same measure where there is nothing to find; and what all fits share: which rows they do not see."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LABELS = ("shuffled labels", "random labels")


def beside(controls: Mapping[str, Any]) -> str:
    """How every result prints its controls, or that it has none."""
    return f"controls: {', '.join(f'{name} {value}' for name, value in controls.items())}" if controls else "no control"


@dataclass(frozen=True, repr=False)
class Figure:
    """A number beside the same number of each control."""

    name: str
    value: float
    controls: dict[str, float] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.name} {self.value:.3g} ({beside({name: f'{value:.3g}' for name, value in self.controls.items()})})"


def controlled(
    measure: Callable[..., Any], *rows: Any, against: Mapping[str, Any] | None = None, shuffled: bool = False, seed: int = 0
) -> Figure:
    """`measure(*rows)` as a figure beside its controls, for a measure that gives one number.

        controlled(rankme, X, against={"untrained model": X0})       # rankme 7.1 (controls: untrained model 29)
        controlled(cka, X, Y, shuffled=True)                         # cka 0.81 (controls: shuffled rows 0.04)

    against   by name what the measure takes instead: one argument, or a tuple of all of them
    shuffled  with the rows of the last argument, a tensor, in another order, so that what belongs together no longer is
    Raises ValueError for a measure that gives more than one number.
    """
    others = {name: other if isinstance(other, tuple) else (other,) for name, other in (against or {}).items()}
    if shuffled:
        order = torch.randperm(len(rows[-1]), generator=torch.Generator().manual_seed(seed))
        others = {"shuffled rows": (*rows[:-1], rows[-1][order])} | others
    name = getattr(measure, "__name__", "measure").replace("<lambda>", "measure")

    def number(args) -> float:
        found = torch.as_tensor(measure(*args))
        if found.numel() != 1:
            raise ValueError(f"measure must give one number, as a mean over heads does; {name} gave {tuple(found.shape)}")
        return found.item()

    return Figure(name, number(rows), {name: number(args) for name, args in others.items()})


def random_keys(like: Tensor, seed: int = 0) -> Tensor:
    """Keys of the shape and norms of `like` [… K] in random directions: what is read with them is the control of what is read with keys."""
    keys = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
    return torch.nn.functional.normalize(keys, dim=-1) * like.norm(dim=-1, keepdim=True)


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same class and config at its random start, on the same device, in the same dtype and mode: the control of controls.

    A recurrence that never learnt anything already holds what can be counted. Raises ValueError for a model that cannot be made from its
    `config` alone, as one whose layers were swapped: make that one yourself.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        config = getattr(model, "config", None)
        fresh = None if config is None else type(model)(config)
    made_of = lambda m: ([type(part) for part in m.modules()], {name: t.shape for name, t in m.state_dict().items()})
    if fresh is None or made_of(fresh) != made_of(model):
        raise ValueError(f"model must be one that {type(model).__name__}(model.config) makes again; make an untrained one yourself")
    first = next(model.parameters())
    return fresh.to(first.device, first.dtype).train(model.training)


def relabelled(name: str, y: Tensor, types: Tensor | None, draw: torch.Generator) -> Tensor:
    """y in another order, or one row's label drawn anew for each type: the control tasks of `LABELS`."""
    n = len(y)
    if name == "shuffled labels":
        return y[torch.randperm(n, generator=draw)]
    ids = torch.arange(n) if types is None else types.cpu().unique(return_inverse=True)[1]
    return y[torch.randint(0, n, (int(ids.max()) + 1,), generator=draw)[ids]]


def split(n: int, held_out: float, groups: Tensor | None, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to score, those of one group on one side."""
    ids = torch.arange(n) if groups is None else groups.cpu().unique(return_inverse=True)[1]
    count = int(ids.max()) + 1
    out = round(held_out * count)
    if not 0 < out < count:
        raise ValueError(f"held_out must leave something on both sides of {count} {'rows' if groups is None else 'groups'}; got {held_out}")
    kept = torch.ones(count, dtype=torch.bool)
    kept[torch.randperm(count, generator=draw)[:out]] = False
    return kept[ids].nonzero()[:, 0], (~kept[ids]).nonzero()[:, 0]


def least_squares(Z: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """A of Z A ≈ Y, with `ridge` times the mean of the diagonal of ZᵀZ added to it."""
    gram = Z.mT @ Z
    size = gram.diagonal().mean().clamp_min(torch.finfo(Z.dtype).tiny)
    return torch.linalg.solve(gram + ridge * size * torch.eye(len(gram), dtype=Z.dtype, device=Z.device), Z.mT @ Y)


def check_share(held_out: float) -> None:
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie in (0, 1); got {held_out!r}")


def check_ids(n: int, **given: Tensor | Sequence | None) -> None:
    """ValueError unless groups, types and the like are [n]."""
    for name, ids in given.items():
        if ids is not None and ids.shape != (n,):
            raise ValueError(f"{name} must be [n] = ({n},); got {tuple(ids.shape)}")

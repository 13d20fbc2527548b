"""Where a model can be probed: every Mixer in it, whoever made it, with the short convolution beside it, by module name."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn


class Point(NamedTuple):
    mixer: Any  # a Mixer
    conv: Any  # a ShortConvolution, or None
    layer: Any  # the module that holds both; None: the mixer is the model
    slot: str = "probe"  # the mixer's attribute that is called instead of the operator


def points(model: nn.Module) -> dict[str, Point]:
    """Name → what can be probed, in the order of `named_modules`. A mixer that serves at two places has the first one's name.

    A mixer is known by its attribute `probe`, its convolution by `conv_probe` in the module that holds both; it is that of the first mixer
    there. The mixer `routed` of Sparse State Expansion sees packed sequences, one for each sequence and partition. A mixer of two curves
    is two points: its name is of the first, the other one's ends in ".second".
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        if "probe" not in vars(module):
            continue
        holder = modules.get(name.rpartition(".")[0]) if name else None
        convs = [child for child in holder.children() if "conv_probe" in vars(child)] if holder is not None else []
        taken = [point.conv for point in found.values()]
        found[name or "mixer"] = Point(module, convs[0] if convs and convs[0] not in taken else None, holder)
        if getattr(module, "second_decay", None) is not None:
            found[f"{name or 'mixer'}.second"] = Point(module, None, holder, "second_probe")
    if not found:
        raise ValueError(f"model has no linear attention to probe: {type(model).__name__} holds no Mixer")
    return found


def match(wanted: str | int | Sequence[str | int] | None, names: list[str], what: str = "layers") -> list[str]:
    """The names that are meant: None all, an int the n-th, a text one name or the pattern of some (fnmatch). ValueError lists the names."""
    if wanted is None:
        return names
    found: list[str] = []
    for one in wanted if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]:
        if not isinstance(one, (str, int)):
            raise ValueError(f"{what} must be names, patterns or numbers of {names}; got {one!r}")
        if isinstance(one, int):
            here = [names[one]] if -len(names) <= one < len(names) else []
        else:
            here = [one] if one in names else [name for name in names if fnmatchcase(name, one)]
        if not here:
            raise ValueError(f"{what} must match one of {names}; {one!r} matches nothing")
        found += [name for name in here if name not in found]
    if not found:
        raise ValueError(f"{what} must match one of {names}; got {wanted!r}")
    return found

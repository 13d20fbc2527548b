"""The only place that looks for attention in a model: what has an adapter, what is refused and why, and what a choice of layers means."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .adapters import ADAPTERS, REFUSED, adapter_of, path_of, rotation_of
from .attention import SwappedAttention

Layers = str | Sequence[int | str] | Callable[[str, nn.Module], bool]


def check_model(model: Any) -> None:
    """ValueError for a model that is wrapped, partitioned or compiled, or swapped already: swap first, wrap afterwards."""
    path = path_of(model) if isinstance(model, nn.Module) else f"{type(model).__module__}.{type(model).__qualname__}"
    first = "swap attention first, and wrap the model afterwards"
    if path.startswith(("deepspeed.", "torch.nn.parallel.", "torch.distributed.")):
        raise ValueError(f"model is wrapped by {path}: {first}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {path}")
    if path in ADAPTERS:
        raise ValueError(f"model is itself the attention ({type(model).__name__}): swap the model it is a part of")
    for name, module in model.named_modules():
        if path_of(module).startswith("torch.distributed.fsdp."):
            raise ValueError(f"{name} is wrapped by {path_of(module)}: {first}")
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(f"{name or 'model'} is offloaded by accelerate: {first}")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{name or 'model'} is compiled by torch.compile: {first}")
        if path_of(module).startswith("peft."):
            raise ValueError(f"{name or 'model'} is wrapped by PEFT ({type(module).__name__}): {first}")
        if isinstance(module, SwappedAttention):
            raise ValueError(f"{name} is swapped already: undo() that swap first")
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO-3: {first}")
        if type(p).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded (DTensor): {first}")


def attention_of(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module, str]]]:
    """(name, module) of every attention module that has an adapter, and (name, module, reason) of what else looks like attention."""
    modules = list(model.named_modules())
    parents = dict(modules)
    found, foreign = [], []
    for name, module in modules:
        path, parent = path_of(module), parents[name.rpartition(".")[0]] if name else None
        reason = REFUSED.get(path)
        if path in ADAPTERS:
            adapter = adapter_of(module)
            missing = [part for part in adapter.parts if not hasattr(module, part)]
            if missing and any(path_of(inner) in ADAPTERS for inner in module.children()):
                continue  # of a version where the attention is inside
            reason = f"it has no {missing[0]}: another version than its adapter was written for" if missing else adapter.refuse(module)
            if reason is None and not any(p.is_floating_point() for p in module.parameters()):
                reason = "its weights are quantised or packed"
            if reason is None and adapter.rotary and rotation_of(type(module)) is None:
                reason = f"there is no apply_rotary_pos_emb in {type(module).__module__}"
            if adapter.call == "torch" and type(parent) is not nn.TransformerEncoderLayer:
                reason = "torch.nn.MultiheadAttention is swapped inside torch.nn.TransformerEncoderLayer only"
            if reason is None:
                found.append((name, module))
                continue
        if reason:
            foreign.append((name, module, reason))
    sure = [name for name, _ in found] + [name for name, _, _ in foreign]
    inside = lambda a, b: a == b or b == "" or a.startswith(b + ".")
    called = [(name, module) for name, module in modules if any(re.search("Attention|Attn", k.__name__) for k in type(module).__mro__)]
    for name, module in called:  # the innermost of what is called attention, or inherits from it, if we know nothing of it
        known = any(inside(name, one) or inside(one, name) for one in sure)
        innermost = not any(other != name and inside(other, name) for other, _ in called)
        if innermost and not known and any(True for _ in module.parameters()):
            foreign.append((name, module, f"there is no adapter for {path_of(module)}; linattn.swap.register_adapter takes one"))
    return found, foreign


def select(layers: Layers, found: Sequence, foreign: Sequence, what: str) -> set[str]:
    """Names of the modules that `layers` means. ValueError for numbers and names that are not there."""
    names = [name for name, *_ in found]
    everything = [*names, *(name for name, *_ in foreign)]
    wrong = ValueError(f"{what} must be 'all', 'every:N', numbers, names, or a function of name and module; got {layers!r}")
    if callable(layers):
        return {name for name, module, *_ in (*found, *foreign) if layers(name, module)}
    if isinstance(layers, str):
        if layers == "all":
            return set(everything)
        step = layers.removeprefix("every:")
        if step == layers or not step.isdigit() or int(step) < 1:
            raise wrong
        return set(names[int(step) - 1 :: int(step)])
    if not isinstance(layers, Iterable):
        raise wrong
    chosen = set()
    for one in layers:
        if isinstance(one, str):
            if one not in everything:
                raise ValueError(f"{what}: there is no attention {one!r}; there are {everything}")
            chosen.add(one)
            continue
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise wrong
        if not 0 <= (number := operator.index(one)) < len(names):
            raise ValueError(f"{what} must lie in [0, {len(names)}), the number of attention modules; got {number}")
        chosen.add(names[number])
    return chosen


def swapped_of(model: nn.Module) -> dict[str, SwappedAttention]:
    """The swapped attention of a model, by name and in order. ValueError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, SwappedAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no swapped attention: swap_attention(model, …) first")
    return found

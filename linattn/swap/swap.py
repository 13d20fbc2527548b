"""The only place that changes a model: a plan that touches nothing, then all replacements at once, and the way back."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..layers.variants import Gating, Variant
from ..ops import why_not
from .adapters import Adapter, adapter_of
from .attention import How, SwappedAttention
from .calls import CALLS
from .find import Layers, attention_of, check_model, select, swapped_of
from .maps import known
from .report import Row, SwapReport

MARK = "_linattn_swap"  # attribute of a swapped model: what was asked for, and what is to be put back


def swap_attention(
    model: nn.Module,
    variant: str | Variant,
    *,
    layers: Layers = "all",
    keep: Layers = (),
    init: Literal["from_softmax", "random"] = "from_softmax",
    window: int = 0,
    causal: bool | None = None,
    gating: Gating = None,
    replace_sliding: bool = False,
    on_unsupported: Literal["raise", "keep"] = "raise",
    backend: str = "auto",
    dry_run: bool = False,
) -> SwapReport:
    """Replace the softmax attention of `model`, in place, by linear attention with the same projections. Returns what was done to which.

    variant         a name in `linattn.VARIANTS` or `linattn.swap.SWAP_VARIANTS`, or a Variant. Its feature map, decay, write and normaliser
                    are taken; convolution, activation and output gate, which no host has weights for, are not
    layers          which attention modules, in the model's order: "all"; "every:4" (numbers 3, 7, …); numbers or names; or a function of
                    name and module
    keep            which of these stay softmax, said in the same ways
    init            "from_softmax": start as near to the softmax as the maps allow: positive features (Hedgehog's where the variant's may be
                    negative), divided by their sum, learnt gates open. "random": start as the variant does
    window          > 0: exact softmax over the last `window` tokens, linear attention to those before, in one sum; causal hosts only
    causal          None: as each host. True or False: a host that is otherwise is an error
    gating          of bidirectional hosts, where the decay varies in time: as in `linattn.linear_attention`
    replace_sliding also swap attention that is itself limited to a sliding window, which changes what it can see
    on_unsupported  "raise", or "keep" attention that cannot be swapped, with the reason in the report
    dry_run         only report

    Weights, dtype, device, training mode and requires_grad stay as they are; new parameters can be trained. ValueError, with nothing
    changed, for whatever cannot be: see docs/swap.md.
    """
    check_model(model)
    chosen = How(variant=known(variant), init=init, window=window, gating=gating, backend=backend)
    _check_options(chosen, on_unsupported)
    found, foreign = attention_of(model)
    asked = select(layers, found, foreign, "layers")
    kept = select(keep, found, foreign, "keep")
    rows, plan = [], []
    for number, (name, host) in enumerate(found):
        adapter, why = adapter_of(host), None
        if name not in asked or name in kept:
            why = "kept" if name in kept else "not asked for"
        elif adapter.window(host) and not replace_sliding:
            why = _unsupported(
                name, host, f"it sees {adapter.window(host)} tokens back only; replace_sliding=True lets it see all", on_unsupported
            )
        if why is None:
            if causal is not None and causal != adapter.causal(host):
                is_, asked_ = ("causal", "bidirectional") if adapter.causal(host) else ("bidirectional", "causal")
                raise ValueError(f"{name} ({type(host).__name__}) is {is_}; it cannot take {asked_} attention: causal={causal}")
            plan.append((name, host, _made(name, host, adapter, chosen, (number, len(found)))))
        rows.append(_row(name, host, adapter, plan[-1][2] if why is None else None, why))
    for name, host, reason in foreign:
        if name in asked and name not in kept:
            _unsupported(name, host, reason, on_unsupported)
        rows.append(Row(name, type(host).__name__, "", status="kept", reason=f"unsupported: {reason}"))
    if not plan:
        raise ValueError(_nothing(model, rows))
    notes = _notes(plan, chosen)
    report = SwapReport(model, rows, notes, done=not dry_run)
    if not dry_run:
        spec = dict(
            variant=variant if isinstance(variant, str) else None, layers=[name for name, _, _ in plan], init=init, window=window,
            gating=gating, replace_sliding=replace_sliding,
        )  # fmt: skip
        apply(model, {name: new for name, _, new in plan}, spec)
        if any(adapter_of(host).dropout(host) > 0 for _, host, _ in plan):
            warnings.warn("dropout on attention weights has no counterpart in linear attention, and is gone", stacklevel=2)
    return report


def _check_options(how: How, on_unsupported: str) -> None:
    for name, value, allowed in (("init", how.init, ("from_softmax", "random")), ("on_unsupported", on_unsupported, ("raise", "keep"))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}; got {value!r}")
    if type(how.window) is not int or how.window < 0:
        raise ValueError(f"window must be a number of tokens, at least 0; got {how.window!r}")
    if how.window and how.init != "from_softmax":
        raise ValueError("window needs init='from_softmax': both parts are weights of one sum")
    if how.backend != "auto" and (reason := why_not(how.backend)):
        raise ValueError(f"backend {how.backend!r} cannot be used: {reason}")


def _made(name: str, host: nn.Module, adapter: Adapter, how: How, place: tuple[int, int]) -> SwappedAttention:
    """The module for the place of `host`, after one call of its mixer. ValueError says which module the trouble is with."""
    p = next(p for p in host.parameters() if p.is_floating_point())
    if p.dtype == torch.float16 and p.device.type == "cpu":
        raise ValueError(f"{name} is in float16 on a CPU, where sums overflow: use bfloat16 or float32")
    if how.window and not adapter.causal(host):
        raise ValueError(f"window={how.window}: {name} ({type(host).__name__}) sees both sides; a window is of the tokens before")
    try:
        new = CALLS[adapter.call](host, adapter, how, place)
        if p.device.type != "meta":
            h, mixer = new.heads, new.mixer
            zeros = lambda *size: torch.zeros(1, 2, *size, dtype=p.dtype, device=p.device)
            with torch.no_grad():
                x = zeros(h.keys * h.width if new.reads_keys else h.dim)
                mixer(x, zeros(h.queries, h.width), zeros(h.keys, h.width), zeros(h.keys, h.width))
        return new
    except ValueError as error:
        raise ValueError(f"{name} ({type(host).__name__}): {error}") from error


def _unsupported(name: str, host: nn.Module, reason: str, on_unsupported: str) -> str:
    if on_unsupported == "raise":
        raise ValueError(
            f"{name} ({type(host).__name__}) cannot be swapped: {reason}. keep=[{name!r}] leaves it softmax, on_unsupported='keep' all such"
        )
    return f"unsupported: {reason}"


def _nothing(model: nn.Module, rows: Sequence[Row]) -> str:
    why = sorted({f"{row.old}: {row.reason.removeprefix('unsupported: ')}" for row in rows if row.reason.startswith("unsupported")})
    return (
        f"nothing to swap in {type(model).__name__}: "
        + (f"of {len(rows)} attention modules none is left" if rows else "no attention of a class in linattn.swap.ADAPTERS")
        + (f". {'; '.join(why)}" if why else " by `layers` and `keep`" if rows else "")
    )


def _row(name: str, host: nn.Module, adapter: Adapter, new: SwappedAttention | None, why: str | None) -> Row:
    h = adapter.heads(host)
    added = 0 if new is None else sum(p.numel() for p in new.added().values())
    made = "" if new is None else type(new).__name__
    status, reason = ("swapped", "") if why is None else ("kept", why)
    return Row(
        name, type(host).__name__, made, f"{h.queries}/{h.keys}", h.width, adapter.causal(host), adapter.rotary, added, status, reason
    )


def _notes(plan: Sequence, how: How) -> list[str]:
    v = how.variant
    notes = ["quality falls until the new parts are trained: linattn.swap.transfer, then distill"]
    if dropping := [name for name, host, _ in plan if adapter_of(host).dropout(host) > 0]:
        notes.append(f"dropout on attention weights has no counterpart in linear attention and is gone in {len(dropping)} modules")
    parts = dict(convolution=v.conv, activation=v.activation != "identity", gate=v.gate, skip=v.skip)
    if left := [name for name, has in parts.items() if has]:
        notes.append(f"of the variant these parts are left out, as the host has no weights for them: {', '.join(left)}")
    return notes


# -- the change and the way back ---------------------------------------------------------------------------------------------------------


def apply(model: nn.Module, new: dict[str, SwappedAttention], spec: dict) -> None:
    """Put every module of `new` in its place, and tell the model around them what they need."""
    places = [(parent, child, new[name]) for name in new for parent, child in _places(model, new[name].host)]
    before: list[tuple[Any, str, Any]] = []  # attributes to be put back
    for parent, child, module in places:
        setattr(parent, child, module)
    for module in model.modules():
        changes: dict[str, Any] = {}
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, SwappedAttention) for m in module.modules()):
            changes = dict(use_nested_tensor=False, enable_nested_tensor=False)  # a nested tensor could not be read
        if hasattr(type(module), "_is_stateful"):  # of transformers: a state has no way back, so no assisted decoding
            changes = dict(_is_stateful=True)
            from .storage import save_swapped

            changes["save_pretrained"] = partial(save_swapped, module)  # which, unlike a method, can be pickled
        put: list[tuple[Any, str, Any]] = [(module, name, value) for name, value in changes.items()]
        if changes and getattr(module, "generation_config", None) is not None:
            put.append((module.generation_config, "disable_compile", True))  # a static cache would have it compiled on a GPU
        for thing, name, value in put:
            before.append((thing, name, thing.__dict__.get(name, MARK)))
            thing.__dict__[name] = value
    model.__dict__[MARK] = (spec, before)


def undo(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Put the original attention back, in all swapped places or in those of `names`. Weights are shared, so what was trained stays trained.

    ValueError for a model without swapped attention, and for names that are not of any.
    """
    swapped = swapped_of(model)
    if names is not None and (unknown := [name for name in names if name not in swapped]):
        raise ValueError(f"names must be of swapped attention; got {unknown}, there are {list(swapped)}")
    for name in swapped if names is None else names:
        host = swapped[name].host
        host.train(swapped[name].training)
        for parent, child in _places(model, swapped[name]):
            setattr(parent, child, host)
    left = [name for name in swapped if names is not None and name not in names]
    spec, before = model.__dict__.get(MARK, ({}, []))
    spec["layers"] = left
    if not left:
        for thing, name, value in before:
            if isinstance(value, str) and value == MARK:
                thing.__dict__.pop(name, None)
            else:
                thing.__dict__[name] = value
        model.__dict__.pop(MARK, None)


def _places(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute) wherever the module stands: more than once, where layers are shared."""
    return [(parent, child) for parent in model.modules() for child, module in parent._modules.items() if module is wanted]

"""`linattn.probe`: the block inside which a model is seen and edited."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import State
from .edits import Change, Knockout, written
from .plan import Plan, Shape, needed, size_text
from .points import Point, match, points
from .storage import Traces
from .tap import ConvChange, ConvTap, Tap
from .trace import Direction, Snapshot, Trace

At = int | Sequence[int]
Heads = Sequence[int] | None


class probe(Traces):
    """Sees, and edits, what the linear-attention layers of `model` remember while the block runs.

        with linattn.probe(model, keep=("writes", "gates")) as p:
            logits = model(tokens)
        trace = p["blocks.3.attention.mixer"]     # or p[3], or p["*.3.*"]: a Trace; iterating over p gives the names
        trace.state(t=1000)                       # [B H K V], exactly

    layers   names, fnmatch patterns or numbers of layers; None: all
    heads    of the state, which to keep; None: all
    keep     any of "final", "boundaries", "writes" (exact states anywhere), "gates", "reads" (who reads what), "output", "inputs", "conv"
    every    chunks of 64 tokens between two boundary states
    dtype    of what is kept; None: as it is
    device   of what is kept, copied there while the model goes on; None: where it is
    reduce   streaming reducers, as in `linattn.probes`: figures without keeping what they are of
    budget   bytes that may be kept; more is refused before any work in the layer. None: half of what is free there
    detach   False: what is kept has gradients

    A trace is of the last forward, and of the calls that went on from its states. Without edits the model's outputs stay the same bit for
    bit; to rounding under a feature map with a way round the operator, as taylorshift's, because a probe takes the operator. Edits are
    asked for with the methods below, before the forward they are meant for; one that was not reached is an error at the block's end. Within
    activation checkpointing each call is kept once. The block is not for two threads, and one model has one probe at a time.

    Raises ValueError for a layer that is not there, an unknown `keep`, a model whose sequences are split over several processes, and, in
    the forward, for what does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | int | Sequence[str | int] | None = None,
        heads: Heads = None,
        keep: str | Sequence[str] = ("final",),
        every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        reduce: Sequence[Any] = (),
        budget: float | None = None,
        detach: bool = True,
    ):
        here = points(model)
        names = match(layers, list(here))
        for reducer in reduce:
            if not (callable(getattr(reducer, "update", None)) and callable(getattr(reducer, "result", None))):
                raise ValueError(f"reduce must be of objects with update and result; got {type(reducer).__name__}")
        needs = {field for reducer in reduce for field in getattr(reducer, "needs", ())}
        self.plan = Plan(keep, every, heads, dtype, device, detach, budget, needs)
        self.model = model
        self.points = {name: here[name] for name in names}
        width = lambda conv: (0, 0) if conv is None else (conv.dim, conv.width - 1)
        self.taps = {name: Tap(name, self.plan, tuple(reduce), len(names), width(point.conv)) for name, point in self.points.items()}
        self.convs = {name: ConvTap(self.plan) for name, point in self.points.items() if point.conv is not None}
        self.changes: list[Change] = []
        self.knockouts: list[Knockout] = []
        self._log: list[Change] = []

    def __enter__(self) -> "probe":
        for name, point in self.points.items():
            if getattr(point.mixer, point.slot) is not None or (point.conv is not None and point.conv.conv_probe is not None):
                raise ValueError(f"model is being probed already, at {name!r}: leave that block first")
            if getattr(point.layer, "shard", None) is not None:
                raise ValueError(
                    f"model must not have its sequences split over several processes, as those of {name!r} are, where none has all states: "
                    "probe it with context_parallel=1"
                )
        first = next(self.model.parameters(), None)
        self.plan.start(torch.device("cpu") if first is None else first.device)
        for name, point in self.points.items():
            setattr(point.mixer, point.slot, self.taps[name])
            if point.conv is not None:
                point.conv.conv_probe = self.convs[name]
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for point in self.points.values():
            setattr(point.mixer, point.slot, None)
            if point.conv is not None:
                point.conv.conv_probe = None
        if self.plan.pinned:
            torch.cuda.synchronize()
        if kind is None:
            for edit in (*self.changes, *self.knockouts):
                if missed := sorted(edit.positions - edit.fired):
                    longest = self.taps[edit.layer].longest
                    what = f"{edit.kind} of {edit.layer!r}"
                    raise ValueError(f"{what} was not reached at {missed}: that layer saw {longest} tokens inside the block")

    def __repr__(self) -> str:
        return f"probe({type(self.model).__name__}, {len(self.taps)} layers, keep={list(self.plan.keep)})"

    def traces(self) -> dict[str, Trace]:
        found = {}
        for name, tap in self.taps.items():
            if not tap.pieces:
                continue
            conv = self.convs.get(name)
            kept: dict[str, Any] | None = None
            if conv is not None:
                inputs = torch.cat(conv.inputs, 1) if conv.inputs else None
                kept = {"final": conv.final, "inputs": inputs, "before": conv.before, "width": self.points[name].conv.width}
            edited = bool(tap.changes or tap.knockouts)
            found[name] = Trace(name, self.plan.keep, self.plan.stride, list(tap.pieces), tap.how, edited=edited, conv=kept)
        return found

    def __getitem__(self, layer: str | int) -> Trace:
        match(layer, list(self.taps), "layer")
        if not self.traces():
            raise ValueError("nothing was kept: no forward has run inside the block" + ("" if self.plan.fields else ", and keep is empty"))
        return super().__getitem__(layer)

    def estimate(self, batch: int, length: int) -> dict[str, int]:
        """Bytes that `keep` would take for `batch` sequences of `length` tokens, by field, over all layers; by the layers' own widths.

        Widths come from the last forward, or before any from the modules: heads and key width of the mixer, the value width of the layer
        around it (as wide as keys where it does not say).
        """
        total: dict[str, int] = {}
        for name, tap in self.taps.items():
            shape = tap.shape or _expected(self.points[name], tap.conv)
            shape = shape._replace(B=batch, T=length, sequences=batch, packed=False)
            for field, size in needed(self.plan, shape).items():
                total[field] = total.get(field, 0) + size
        return total

    def estimate_text(self, batch: int, length: int) -> str:
        found = self.estimate(batch, length)
        parts = ", ".join(f"{field} {size_text(size)}" for field, size in found.items())
        return f"{size_text(sum(found.values()))}: {parts}"

    @property
    def last_edit(self) -> Change:
        """The edit that was made last, with what it moved and what it changed for those it was to protect (`leak`)."""
        if not self._log:
            raise ValueError("no edit was made so far")
        return self._log[-1]

    # -- edits ---------------------------------------------------------------------------------------------------------------------------

    def edit(self, layer: str | int, *, at: At, fn: Callable[[Tensor], Tensor], heads: Heads = None, direction: Direction = None) -> None:
        """S ← fn(S) after token `at`, S [B H K V]; what follows sees the new one. `at` may be one position per sequence.

        direction: "left" or "right", the side whose state is meant; needed where the layer is bidirectional.
        """
        if not callable(fn):
            raise ValueError(f"fn must be a function of a state [B H K V]; got {fn!r}")
        self._change("edit", layer, at, lambda s: State(fn(s.kv), s.z), heads, direction)

    def erase(
        self, layer: str | int, *, at: At, readers: Tensor, protect: Tensor | None = None, ridge: float = 0.0,
        heads: Heads = None, direction: Direction = None,
    ) -> None:  # fmt: skip
        """After token `at` the state answers `readers` [B H R K] with nothing, and those to protect [B H P K] as before.

        S' = S − W R S with W the dual of the readers; `last_edit.leak` says how much a protected answer changed. Another layer, the
        convolution or the residual stream may still hold the fact. With ridge > 0 near-parallel readers do not blow up, and leak.
        """
        fn = lambda s: State(written(s.kv, readers, None, protect, ridge), s.z)
        self._change("erase", layer, at, fn, heads, direction, protect)

    def rewrite(
        self, layer: str | int, *, at: At, readers: Tensor, values: Tensor, protect: Tensor | None = None, ridge: float = 0.0,
        heads: Heads = None, direction: Direction = None,
    ) -> None:  # fmt: skip
        """As `erase`, but the readers then read `values` [V], [B V], [B H V] or [B H R V]."""
        fn = lambda s: State(written(s.kv, readers, values, protect, ridge), s.z)
        self._change("rewrite", layer, at, fn, heads, direction, protect)

    def steer(
        self, layer: str | int, *, at: At, key: Tensor, value: Tensor, strength: float = 1.0, heads: Heads = None,
        direction: Direction = None,
    ) -> None:  # fmt: skip
        """S ← S + strength · k vᵀ: key [… K] and value [… V] broadcast against [B H K] and [B H V]."""

        def fn(s: State) -> State:
            for name, given, width in (("key", key, s.kv.shape[-2]), ("value", value, s.kv.shape[-1])):
                if not given.ndim or given.shape[-1] != width:
                    raise ValueError(f"{name} must be [… {width}] to go with a state {tuple(s.kv.shape)}; got {tuple(given.shape)}")
            return State(s.kv + strength * key.to(s.kv)[..., :, None] * value.to(s.kv)[..., None, :], s.z)

        self._change("steer", layer, at, fn, heads, direction)

    def patch(
        self, layer: str | int, *, at: int, source: "Traces | Trace | Snapshot", source_at: int | None = None, conv: bool = True,
        heads: Heads = None, direction: Direction = None,
    ) -> None:  # fmt: skip
        """The state after token `at` becomes that of `source` after its token `source_at` (None: `at`), the convolution's with it.

        source: a probe, loaded traces, one trace or a snapshot; its batch is the model's, or 1. With conv=False the convolution keeps its
        own past, and what was not yet written when the state was taken comes from there. A source of another model is refused.
        """
        for name in match(layer, list(self.taps), "layer"):
            one = source
            if isinstance(one, Traces):
                if name not in one:
                    raise ValueError(f"source is of another model, or has not kept {name!r}; it has {list(one)}")
                one = one[name]
            one = one.snapshot(at if source_at is None else source_at, direction) if isinstance(one, Trace) else one
            if not isinstance(one, Snapshot):
                raise ValueError(f"source must be a probe, traces, a Trace or a Snapshot; got {type(source).__name__}")
            has = name in self.convs and direction != "right"
            if conv and has and one.conv is None:
                raise ValueError(f"source has no convolution state for {name!r}: its keep must name 'conv', or give conv=False")
            [change] = self._change("patch", name, at, _patched(one.state, name), heads, direction)
            if conv and has:
                self.convs[name].changes.append(ConvChange(change, one.conv))

    def knockout(self, layer: str | int, *, tokens: int | Sequence[int], what: str = "write", heads: Heads = None) -> None:
        """These tokens write nothing ("write"), or read nothing ("read"), in that layer: without cutting the sequence."""
        for name in match(layer, list(self.taps), "layer"):
            self.knockouts.append(Knockout(name, tokens, what, heads))
            self.taps[name].knockouts.append(self.knockouts[-1])

    def _change(self, kind, layer, at, fn, heads, direction, protect=None) -> list[Change]:
        if direction not in (None, "left", "right"):
            raise ValueError(f"direction must be None, 'left' or 'right'; got {direction!r}")
        made = []
        for name in match(layer, list(self.taps), "layer"):
            causal = getattr(self.points[name].mixer, "causal", direction is None)
            if (direction is None) != causal:
                what = "None: this layer is causal" if causal else "'left' or 'right': a bidirectional layer has a state from each side"
                raise ValueError(f"direction of the {kind} of {name!r} must be {what}; got {direction!r}")
            change = Change(kind, name, at, fn, heads=heads, direction=direction, log=self._log)
            change.protect = protect
            self.taps[name].changes.append(change)
            made.append(change)
        self.changes += made
        return made


def _patched(source: State, name: str) -> Callable[[State], State]:
    def fn(state: State) -> State:
        kv, fits = source.kv, (source.z is None) == (state.z is None)
        if not fits or kv.ndim != 4 or kv.shape[1:] != state.kv.shape[1:] or kv.shape[0] not in (1, len(state.kv)):
            raise ValueError(f"source is of another model: its state of {name!r} is {tuple(kv.shape)}; wanted {tuple(state.kv.shape)}")
        z = None if state.z is None else source.z.to(state.z).expand_as(state.z)
        return State(kv.to(state.kv).expand_as(state.kv), z)

    return fn


def _expected(point: Point, conv: tuple[int, int]) -> Shape:
    """The shape of a mixer's calls, by what the modules say of themselves."""
    mixer, layer = point.mixer, point.layer
    heads, K = mixer.place.heads, mixer.key_dim
    V = getattr(layer, "value_dim", None) or mixer.place.key_dim
    HQ = getattr(layer, "num_heads", None) or heads
    variant = mixer.variant
    weight = next(chain(mixer.parameters(), () if layer is None else layer.parameters()), torch.empty(0))
    x = torch.zeros(1, 1, mixer.place.dim, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        log_decay = mixer.decay(x)[0]
    decay = 0 if log_decay is None or log_decay.ndim == 1 else 1 if log_decay.ndim == 3 else K
    K += bool(variant.offset)
    normal = bool(variant.normalize)
    if normal and mixer.curves == 2:  # both curves share one denominator, which is one value channel more
        normal, V = False, V + 1
    return Shape(1, 1, HQ, heads, K, V, mixer.place.dim, decay, variant.delta, normal, 1, False, 1 if mixer.causal else 2,
                 weight.dtype.itemsize, *conv)  # fmt: skip

"""What stands in for the operator, and for the short convolution, while a probe is on: cuts the sequence where it is edited, and keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import State
from .edits import Change, Knockout
from .plan import Piece, Plan, Shape, needed


def recomputing() -> bool:
    """Whether this forward is activation checkpointing's second one, inside a backward pass. torch has no public word for it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def cut(cu_seqlens: Tensor | None, a: int, b: int) -> Tensor | None:
    """The packing of tokens a … b−1 of a packed row: sequences that lie elsewhere are empty, and hand their state through."""
    return None if cu_seqlens is None else cu_seqlens.clamp(a, b) - a


def ends(positions: set[int], start: int, total: int) -> list[int]:
    """Where `total` tokens that come after `start` others are cut: behind each of `positions`, and at both ends."""
    return sorted({0, total, *(at + 1 - start for at in positions if start <= at < start + total)})


class Tap:
    """Stands in for the operator of one mixer. `plan` says what to keep, `changes` and `knockouts` what to do."""

    def __init__(self, name: str, plan: Plan, reducers: tuple, layers: int, conv: tuple[int, int] = (0, 0)):
        self.name, self.plan, self.reducers, self.layers = name, plan, reducers, layers
        self.conv = conv  # channels and past of the short convolution beside it
        self.changes: list[Change] = []
        self.knockouts: list[Knockout] = []
        self.pieces: list[Piece] = []
        self.how: dict[str, Any] = {}
        self.shape: Shape | None = None
        self.seen = 0  # tokens of the sequences that are going on
        self.longest = 0

    def __call__(
        self, operate: Callable, x, q, k, v, log_decay, beta, state, cu_seqlens, mask, *, return_state: bool, how: dict[str, Any],
        order: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """What `operate` gives for the tensors. order [T]: of which tokens they are, where the layer walks them along a curve."""
        again, total = recomputing(), q.shape[1]
        start = 0 if state is None else self.seen
        if again and state is not None and (self.changes or self.knockouts):
            raise ValueError("an edit of a sequence that goes on from a state cannot be made again where activations are recomputed")
        if not how["causal"] and (return_state or state is not None):
            raise ValueError(f"segment must be None while {self.name!r} is probed: a trace is of whole sequences seen from both sides")
        for knockout in self.knockouts:
            if knockout.what == "write" and how["offset"]:
                raise ValueError(f"what must be 'read' in {self.name!r}: with an offset a token writes a constant as well; got 'write'")
            q, k, v, beta = knockout.apply(q, k, v, beta, start)
        self._check_directions(how["causal"])
        tensors, cuts = (q, k, v, log_decay, beta), ends({t for change in self.changes for t in change.last_seen}, start, total)
        keeps = not again and (self.plan.fields or self.reducers)
        if keeps:
            self.shape = shape_of(tensors, x, cu_seqlens, how, self.conv)
            self.plan.check_room(self.name, self.layers, needed(self.plan, self.shape), state is None)
        if not any(start <= t < start + total for change in self.changes for t in change.positions):
            o, last, parts = self._whole(operate, tensors, state, cu_seqlens, return_state, how)
        elif how["causal"]:
            o, last, parts = self._causal(operate, tensors, state, cu_seqlens, cuts, start, how)
        else:
            o, last, parts = self._bidirectional(operate, tensors, state, cu_seqlens, cuts, how)
        if not again:
            self.seen, self.longest, self.how = start + total, max(self.longest, start + total), how
        if keeps:
            if state is None:
                self.pieces.clear()
            for part in parts:
                self._keep(part, tensors, o, x, mask, order, cu_seqlens, start)
        return o, last if return_state or state is not None else None

    def _check_directions(self, causal: bool) -> None:
        for change in self.changes:
            if (change.direction is None) != causal:
                what = "None: this layer is causal" if causal else "'left' or 'right': this layer's state is one from each side"
                raise ValueError(f"direction of the {change.kind} of {self.name!r} must be {what}; got {change.direction!r}")

    # -- walks → (o, last state, parts), a part being (a, b, before, final, boundaries, u) -----------------------------------------------

    def _call(self, operate, tensors, state, cu_seqlens, a, b, return_state, how):
        """The operator on tokens a … b−1, from `state`, with the record that the plan wants; a single token's needs none."""
        tensors = [t if t is None or t.ndim == 1 else t[:, a:b] for t in tensors]
        record = () if b - a == 1 and state is not None and how["causal"] else self.plan.record
        if not record or recomputing():
            o, final = operate(*tensors, state, cut(cu_seqlens, a, b), return_state=return_state, **how)
            return o, (a, b, state, final, None, None)
        o, final, found = operate(
            *tensors, state, cut(cu_seqlens, a, b), return_state=return_state, record=record, stride=self.plan.stride, **how
        )
        return o, (a, b, state, final, found.boundaries, found.writes)

    def _whole(self, operate, tensors, state, cu_seqlens, return_state, how):
        """The outputs are those of the call that is made without a probe: a backend may add up in another order where it records."""
        wanted = return_state or state is not None or self.plan.state_wanted
        total = tensors[0].shape[1]
        if not self.plan.record or recomputing():
            o, part = self._call(operate, tensors, state, cu_seqlens, 0, total, wanted, how)
            return o, part[3], [part]
        o, last = operate(*tensors, state, cu_seqlens, return_state=return_state, **how)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.plan.detach):
            _, part = self._call(operate, tensors, state, cu_seqlens, 0, total, wanted, how)
        return o, last, [part]

    def _causal(self, operate, tensors, state, cu_seqlens, cuts, start, how):
        outs, parts = [], []
        for a, b in zip(cuts[:-1], cuts[1:]):
            o, part = self._call(operate, tensors, state, cu_seqlens, a, b, True, how)
            outs.append(o)
            parts.append(part)
            state = self._change(part[3], start + b - 1, None, cu_seqlens)
        return torch.cat(outs, 1), state, parts

    def _bidirectional(self, operate, tensors, state, cu_seqlens, cuts, how):
        """First what each part sees from the right, last part first; then every part with the states of both sides."""
        spans = list(zip(cuts[:-1], cuts[1:]))
        entering: list[State | None] = []
        right = None
        for a, b in reversed(spans):
            entering.append(right)
            _, part = self._call(operate, tensors, both(None, right), cu_seqlens, a, b, True, how)
            right = self._change(side(part[3], 1), a, "right", cu_seqlens)
        ended, left, outs, parts = right, None, [], []
        for (a, b), right in zip(spans, reversed(entering)):
            o, part = self._call(operate, tensors, both(left, right), cu_seqlens, a, b, True, how)
            outs.append(o)
            parts.append(part)
            left = self._change(side(part[3], 0), b - 1, "left", cu_seqlens)
        return torch.cat(outs, 1), both(left, ended), parts

    def _change(self, state: State, at: int, direction: str | None, cu_seqlens) -> State:
        """`state` with what is due after token `at`, in the order of the scan, made to it."""
        for change in self.changes:
            if at in change.positions and change.direction == direction:
                state = change.apply(state, at, cu_seqlens)
        return state

    def _keep(self, part, tensors, o, x, mask, order, cu_seqlens, start) -> None:
        a, b, before, final, boundaries, u = part
        order = None if order is None else order[a:b]
        q, k, v, log_decay, beta, o, x, mask = (t if t is None or t.ndim == 1 else t[:, a:b] for t in (*tensors, o, x, mask))
        if u is None and "writes" in self.plan.record:
            u = single_write(k, v, log_decay, beta, before)
        piece = Piece(start + a, b - a, cut(cu_seqlens, a, b), mask, before, final, boundaries, q, k, v, log_decay, beta, u, o, x, order)
        for reducer in self.reducers:
            reducer.update(self.name, piece, self.how)
        if self.plan.fields:
            self.pieces.append(self.plan.store(piece))


class ConvTap:
    """Stands in for one short convolution: keeps its inputs and its last state, and puts others' states in."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.inputs: list[Tensor] = []
        self.before: Tensor | None = None
        self.final: Tensor | None = None
        self.seen = 0
        self.changes: list[ConvChange] = []

    def __call__(self, run: Callable, x, state, cu_seqlens, *, return_state: bool) -> tuple[Tensor, Tensor | None]:
        total, start, first = x.shape[1], 0 if state is None else self.seen, state
        wanted = return_state or "final" in self.plan.fields or bool(self.changes)
        outs, cuts = [], ends({t for past in self.changes for t in past.change.positions}, start, total)
        for a, b in zip(cuts[:-1], cuts[1:]):
            y, state = run(x[:, a:b], state, cut(cu_seqlens, a, b), return_state=wanted)
            outs.append(y)
            for past in self.changes:
                state = past.apply(state, start + b - 1, cu_seqlens)
        if not recomputing():
            self.seen = start + total
            if "final" in self.plan.fields:
                self.final = self.plan.put(state)
            if "conv" in self.plan.fields:
                if first is None:
                    self.inputs.clear()
                    self.before = None
                elif not self.inputs:
                    self.before = self.plan.put(first)
                self.inputs.append(self.plan.put(x, copy=True))
        return torch.cat(outs, 1) if len(outs) != 1 else outs[0], state if return_state else None


class ConvChange:
    """Inputs [B C width−1] that the convolution sees as its past from the token after a patch on, in the sequences of that patch."""

    def __init__(self, change: Change, past: Tensor):
        self.change, self.past = change, past

    def apply(self, state: Tensor, at: int, cu_seqlens: Tensor | None) -> Tensor:
        if at not in self.change.positions:
            return state
        if self.past.shape[1:] != state.shape[1:] or self.past.shape[0] not in (1, state.shape[0]):
            raise ValueError(f"source is of another model: its convolution's is {tuple(self.past.shape)}; wanted {tuple(state.shape)}")
        return torch.where(self.change.rows(state, at, cu_seqlens)[:, None, None], self.past.to(state), state)


def both(left: State | None, right: State | None) -> State | None:
    """One State of two sides, zeros where there is none."""
    if left is None and right is None:
        return None
    some = left if right is None else right
    pick = lambda i: None if some[i] is None else torch.stack([torch.zeros_like(some[i]) if s is None else s[i] for s in (left, right)])
    return State(pick(0), pick(1))


def side(state: State, i: int) -> State:
    return State(state.kv[i], None if state.z is None else state.z[i])


def single_write(k, v, log_decay, beta, before: State) -> Tensor:
    """u of one token from the state before it: the operator's `step` gives no record."""
    v = v.to(before.kv.dtype)
    if beta is None:
        return v
    A = before.kv
    if log_decay is not None:
        g = log_decay[None, :, None] if log_decay.ndim == 1 else log_decay[:, 0] if log_decay.ndim == 4 else log_decay[:, 0, :, None]
        A = g.exp()[..., None] * A
    return beta[..., None] * (v - torch.einsum("bhkv,bthk->bthv", A, k.to(A.dtype)))


def shape_of(tensors, x, cu_seqlens, how, conv) -> Shape:
    q, k, v, log_decay, beta = tensors
    B, T, H, K = k.shape
    decay = 0 if log_decay is None or log_decay.ndim == 1 else 1 if log_decay.ndim == 3 else K
    K += bool(how["offset"])
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    return Shape(
        B, T, q.shape[2], H, K, v.shape[3], x.shape[-1], decay, beta is not None, bool(how["normalize"]), sequences,
        cu_seqlens is not None, 1 if how["causal"] else 2, q.dtype.itemsize, *conv,
    )  # fmt: skip

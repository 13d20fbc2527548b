"""What was kept of one layer: its states at any token, who reads them, and what they were made of.

Over 300 lines, because all of it is the one class that users hold.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import State
from .plan import Piece
from .reading import Over, carried, replay, rows_of

Direction = Literal["left", "right"] | None


def sequence_of(cu_seqlens: Tensor, t: int) -> int:
    """Which packed sequence token t is of."""
    return int((cu_seqlens[1:] <= t).sum())


class Snapshot(NamedTuple):
    """All a layer remembers after one token, enough to go on from."""

    state: State  # kv [B H K V]
    conv: Tensor | None  # [B channels width−1], where the layer has a short convolution and it was kept


class Trace:
    """One layer's record of the last forward, or of the calls that went on from each other's states since (generation).

        trace.final                 [B H K V] after the last token; of a bidirectional layer [2 B H K V], from the left and from the right
        trace.state(t)              [B H K V] after token t, exactly; of a packed row that of t's own sequence, [1 H K V]
        trace.boundaries            [B N H K V] as the operator recorded them, before the tokens `trace.at`
        trace.q … trace.u, trace.o  [B T …], what `keep` named, else None
        trace.attention(rows)       a with o_t = Σ_j a_tj v_j (+ what the state before the first token adds)
        trace.readers(rows, at=s)   r with o_t = S_sᵀ r_t + Σ_{j>s} a_tj v_j

    Positions count from the first token that the probe saw, padding included. ValueError where `keep` did not name what is asked for.
    """

    def __init__(self, name: str, keep: tuple[str, ...], stride: int, pieces: list[Piece], how: dict[str, Any], *, edited: bool = False,
                 conv: dict[str, Any] | None = None):  # fmt: skip
        self.name, self.keep, self.stride, self.pieces, self.how, self.edited = name, keep, stride, pieces, how, edited
        self._conv = conv  # final, inputs, before, width; None where the layer has no short convolution
        self.causal = how["causal"]

    def __repr__(self) -> str:
        return f"Trace({self.name!r}, {self.length} tokens, keep={list(self.keep)})"

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def _tokens(self, name: str) -> Tensor | None:
        found = [t for piece in self.pieces if (t := getattr(piece, name)) is not None]
        if not found or found[0].ndim == 1:
            return found[0] if found else None
        return found[0] if len(found) == 1 else torch.cat(found, 2 if name == "u" and found[0].ndim == 5 else 1)

    q = cached_property(lambda self: self._tokens("q"))
    k = cached_property(lambda self: self._tokens("k"))
    v = cached_property(lambda self: self._tokens("v"))
    log_decay = cached_property(lambda self: self._tokens("log_decay"))
    beta = cached_property(lambda self: self._tokens("beta"))
    u = cached_property(lambda self: self._tokens("u"))  # [B T H V]: what each token added; bidirectional [2 B T H V]
    o = cached_property(lambda self: self._tokens("o"))
    x = cached_property(lambda self: self._tokens("x"))
    mask = cached_property(lambda self: self._tokens("mask"))

    @property
    def order(self) -> Tensor | None:
        """[T]: which token is at each position, where the layer walks them along a curve; None: as they come."""
        found = [piece.order for piece in self.pieces if piece.order is not None]
        return torch.cat(found) if found else None

    def need(self, *names: str, hint: str) -> None:
        """ValueError unless every field is there."""
        if missing := [name for name in names if self._tokens(name) is None]:
            if hint in self.keep:
                raise ValueError(f"{self.name!r} has no {', '.join(missing)}: keep names {hint!r}, but such a layer has none")
            raise ValueError(f"{self.name!r} has no {', '.join(missing)}: keep must name {hint!r}; got {list(self.keep)}")

    # -- states --------------------------------------------------------------------------------------------------------------------------

    @property
    def final(self) -> Tensor:
        return self.last.kv

    @property
    def last(self) -> State:
        """The last state, with its normaliser."""
        state = self.pieces[-1].final if self.pieces else None
        if state is None:
            raise ValueError(f"{self.name!r} has no last state: keep must name 'final'; got {list(self.keep)}")
        return state

    @property
    def at(self) -> list[int]:
        """Tokens before which `boundaries` are. ValueError where sequences are packed: theirs start anew in each of them."""
        if any(piece.cu_seqlens is not None for piece in self.pieces):
            raise ValueError(f"{self.name!r} saw packed sequences, whose boundary states start anew in each: ask state(t)")
        rows = lambda piece: piece.boundaries.kv.shape[-4] if piece.boundaries is not None else 0
        return [piece.start + i * self.stride for piece in self.pieces for i in range(rows(piece))]

    @property
    def boundaries(self) -> Tensor:
        found = [piece.boundaries.kv for piece in self.pieces if piece.boundaries is not None]
        if not found:
            raise ValueError(f"{self.name!r} has no boundary states: keep must name 'boundaries'; got {list(self.keep)}")
        return torch.cat(found, -4)

    def state(self, t: int, direction: Direction = None) -> Tensor:
        """S after token t in the order of the scan: from the right it holds tokens t and on. An edit at t comes after it."""
        return self.carry(t, direction).kv

    def carry(self, t: int, direction: Direction = None) -> State:
        """As `state`, with the normaliser: what the operator takes as initial_state, one side of it where bidirectional."""
        if (direction is None) != self.causal or direction not in (None, "left", "right"):
            what = "None: the layer is causal" if self.causal else "'left' or 'right': a bidirectional layer has a state from each side"
            raise ValueError(f"direction must be {what}; got {direction!r}")
        piece = self._piece(t)
        i = int(direction == "right")
        pick = lambda s: s if s is None or self.causal else State(s.kv[i], None if s.z is None else s.z[i])
        first, end, n = 0, piece.length, 0
        local = t - piece.start
        if piece.cu_seqlens is not None:
            n = sequence_of(piece.cu_seqlens, local)
            first, end = int(piece.cu_seqlens[n]), int(piece.cu_seqlens[n + 1])
        walked = local - first if i == 0 else end - 1 - local  # tokens of this scan before t
        if walked + 1 == end - first and piece.final is not None:
            return self._only(pick(piece.final), n, piece)
        if piece.k is None or piece.u is None:
            if walked + 1 == end - first or (walked + 1) % self.stride or piece.boundaries is None:
                raise ValueError(f"the state of {self.name!r} after token {t} needs it: keep must name 'writes'; got {list(self.keep)}")
            return self._row(pick(piece.boundaries), first, n, (walked + 1) // self.stride, piece)
        if piece.boundaries is not None:
            chunk = walked // self.stride
            before, skipped = self._row(pick(piece.boundaries), first, n, chunk, piece), chunk * self.stride
        else:
            before, skipped = self._only(pick(piece.before), n, piece), 0
        u = piece.u if self.causal else piece.u[i]
        span = slice(first + skipped, local + 1) if i == 0 else slice(local, end - skipped)
        turn = (lambda x: x.flip(1)) if i else (lambda x: x)
        k, u = turn(piece.k[:, span]), turn(u[:, span])
        g = piece.log_decay
        if g is None or g.ndim == 1:
            return self._replayed(k, u, g, before)
        g = turn(g[:, span])
        if not self._leaving(i):
            return self._replayed(k, u, g, before)
        last, g = g[:, -1], torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], 1)  # paid on leaving: between tokens that of the earlier one
        after = self._replayed(k, u, g, before)
        a = last.exp().to(after.kv.dtype) if last.ndim == 3 else last.exp().to(after.kv.dtype)[..., None]
        return State(a[..., None] * after.kv, None if after.z is None else a * after.z)

    def _leaving(self, i: int) -> bool:
        return not self.causal and self.how["gating"] in (("source", "symmetric") if i else ("source",))

    def _replayed(self, k, u, g, before) -> State:
        acc = torch.promote_types(u.dtype, torch.float32)
        if before is None:
            K = k.shape[-1] + bool(self.how["offset"])
            z = u.new_zeros(*k.shape[:1], k.shape[2], K, dtype=acc) if self.how["normalize"] else None
            before = State(u.new_zeros(k.shape[0], k.shape[2], K, u.shape[-1], dtype=acc), z)
        before = State(before.kv.to(acc), None if before.z is None else before.z.to(acc))
        return replay(k, u, g, before, self.how["offset"])

    def _row(self, boundaries: State, first: int, n: int, chunk: int, piece: Piece) -> State:
        row = first // self.stride + n + chunk if piece.cu_seqlens is not None else chunk
        return State(boundaries.kv[:, row], None if boundaries.z is None else boundaries.z[:, row])

    def _only(self, state: State | None, n: int, piece: Piece) -> State | None:
        if state is None or piece.cu_seqlens is None:
            return state
        return State(state.kv[n : n + 1], None if state.z is None else state.z[n : n + 1])

    def _piece(self, t: int) -> Piece:
        if not isinstance(t, int) or not 0 <= t - self.first < self.length:
            span = f"[{self.first}, {self.first + self.length})"
            raise ValueError(f"t must be a token of the {self.length} that {self.name!r} saw, in {span}; got {t!r}")
        return next(piece for piece in self.pieces if piece.start <= t < piece.start + piece.length)

    @property
    def first(self) -> int:
        """Position of the first token that was kept: 0, but where the layer went on from a state that no probe saw."""
        return self.pieces[0].start if self.pieces else 0

    def snapshot(self, t: int | None = None, direction: Direction = None) -> Snapshot:
        """State and convolution after token t; None: after the last one. Of one sequence where packed."""
        end = self.first + self.length - 1
        conv = self._conv
        if conv is None:
            past = None
        elif (t is None or t == end) and conv["final"] is not None and self.pieces[-1].cu_seqlens is None:
            past = conv["final"]
        else:
            past = None if conv["inputs"] is None else self._conv_state(end if t is None else t)
        return Snapshot(self.carry(end if t is None else t, direction), past)

    def _conv_state(self, t: int) -> Tensor:
        """[B C width−1] inputs up to token t."""
        conv, piece = self._conv, self._piece(t)
        inputs, before, past = conv["inputs"], conv["before"], conv["width"] - 1
        first, n = 0, 0
        if piece.cu_seqlens is not None:
            n = sequence_of(piece.cu_seqlens, t - piece.start)
            first = piece.start + int(piece.cu_seqlens[n])
            before = None if before is None else before[n : n + 1]
        x = inputs[:, max(first, t + 1 - past) : t + 1].mT
        missing = past - x.shape[-1]
        if not missing:
            return x
        before = x.new_zeros(*x.shape[:2], past) if before is None else before
        return torch.cat([before[..., past - missing :], x], -1)

    # -- reading -------------------------------------------------------------------------------------------------------------------------

    def read(self, keys: Tensor, t: int | None = None, direction: Direction = None) -> Tensor:
        """Sᵀ k after token t (None: the last) for keys [… R K] that broadcast against [B H R K] → [B H R V]."""
        S = self.last.kv if t is None and self.causal else self.state(self.first + self.length - 1 if t is None else t, direction)
        return keys.to(S) @ S

    def attention(self, rows: Sequence[int], over: Over = "values") -> Tensor:
        """[B HQ R T]: a with o_t = Σ_j a_tj v_j, or over="writes" with o_t = Σ_j ā_tj u_j. Before norm and gate."""
        q, k, log_decay, beta, cu = self._whole()
        if over not in ("values", "writes"):
            raise ValueError(f"over must be 'values' or 'writes'; got {over!r}")
        if over == "writes" and beta is not None and not self.causal:
            raise ValueError("over must be 'values' where a delta rule writes from both sides; got 'writes'")
        before = self.pieces[0].before
        z = None if before is None else before.z
        local = [self._local(t) for t in rows]
        return rows_of(q, k, log_decay, beta if over == "values" else None, local, self.how, z=z, cu_seqlens=cu)[0]

    def attention_pooled(self, block: int = 64, *, signed: bool = False) -> Tensor:
        """[B HQ n n], n = ceil(T / block): Σ |a_tj| (signed: Σ a_tj) over tiles of block × block, without anything [T T]."""
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a whole number of tokens, at least 1; got {block!r}")
        T = self.length
        out = []
        for a in range(0, T, block):
            tile = self.attention(range(self.first + a, self.first + min(a + block, T)))
            tile = (tile if signed else tile.abs()).sum(2)
            out.append(torch.nn.functional.pad(tile, (0, -T % block)).unflatten(-1, (-1, block)).sum(-1))
        return torch.stack(out, 2)

    def readers(self, rows: Sequence[int], at: int, direction: Direction = None) -> Tensor:
        """[B HQ R K]: r with o_t = S_atᵀ r + what came after `at` in the scan. Rows come after `at`; of its own sequence where packed."""
        q, k, log_decay, beta, cu = self._whole()
        T, i, a = self.length, int(direction == "right"), self._local(at)
        local = [self._local(t) for t in rows]
        early = [t for t, x in zip(rows, local) if (x >= a if i else x <= a)]
        if early:
            raise ValueError(f"rows must come after token {at} in the scan{' from the right' if i else ''}; got {early}")
        span = slice(0, a) if i else slice(a + 1, T)
        z = None
        if self.how["normalize"]:
            here = self.carry(at, direction).z
            if cu is not None:  # those of the other sequences are not read
                here = here.new_zeros(len(cu) - 1, *here.shape[1:]).index_copy(0, torch.tensor([sequence_of(cu, a)]).to(cu.device), here)
            z = here if self.causal else torch.stack([torch.zeros_like(here), here] if i else [here, torch.zeros_like(here)])
        elif (direction is None) != self.causal:
            self.carry(at, direction)  # says what is wrong
        part = lambda t: t if t is None or t.ndim == 1 else t[:, span]
        packed = None if cu is None else cu.clamp(span.start, span.stop) - span.start
        r = rows_of(part(q), part(k), part(log_decay), part(beta), [x - span.start for x in local], self.how, z=z, cu_seqlens=packed)[1]
        r = r if self.causal else r[i]
        if cu is not None:
            n = sequence_of(cu, a)
            r = r[n : n + 1]
        return r

    def survival(self, j: int, at: Sequence[int]) -> Tensor:
        """[B H len(at)]: k_jᵀ (A_t … A_{j+1}) k_j / ‖k_j‖², what is left at t of j's write: 1 intact, 0 overwritten."""
        if not self.causal:
            raise ValueError("survival is of a causal layer; this one is bidirectional")
        _, k, log_decay, beta, cu = self._whole()
        start = self._local(j)
        acc = torch.promote_types(k.dtype, torch.float32)
        kj = k[:, start].to(acc)
        out = []
        for t in at:
            stop = self._local(t) + 1
            if stop <= start or (cu is not None and bool(((cu > start) & (cu < stop)).any())):
                raise ValueError(f"at must not come before token {j}, and be of its sequence; got {t}")
            part = lambda x, stop=stop: x if x is None or x.ndim == 1 else x[:, start + 1 : stop]
            left = carried(kj[..., None], part(k), part(log_decay), part(beta))[..., 0] if stop > start + 1 else kj
            out.append((kj * left).sum(-1) / kj.square().sum(-1))
        return torch.stack(out, -1)

    def _local(self, t: int) -> int:
        self._piece(t)
        return t - self.first

    def _whole(self):
        """q, k, log_decay, beta and the packing of the whole trace."""
        self.need("q", "k", hint="reads")
        if self.edited:
            raise ValueError(f"{self.name!r} was edited, and what its tokens read is no longer of one scan: probe again without the edit")
        if len(self.pieces) > 1 and self.pieces[0].cu_seqlens is not None:
            raise ValueError("rows of packed sequences that go on from a state are not joined: probe one call")
        return self.q, self.k, self.log_decay, self.beta, self.pieces[0].cu_seqlens

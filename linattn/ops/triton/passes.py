"""One sequence of launches: which kernels run, in what order, on which buffers."""

from math import isqrt

import torch
from torch import Tensor

from ..form import KINDS, Form, boundary_rows
from ..tiles import FEWEST, JOINED, SHORTEST, chunks_per_segment, pick_short, row
from . import architecture
from .delta import wy
from .direct import Piece, Scratch, launch, seen
from .gradients import bwd_dkv, bwd_dq
from .nodecay import nodecay_bwd, nodecay_out, seg_sum
from .output import output
from .plan import Kind, plan
from .short import short, short_bwd, short_gates
from .state import seg_scan, seg_state


class Pass:
    """A call seen from one side, or (side None) from both at once: its tensors and sizes, and the plan it shares with calls alike.

    A bidirectional call is one pass for both sides where what is written needs no order; the delta rule, and records, which count from each
    side's own end, take one pass per side, each owning half of a token's own term.
    """

    def __init__(self, q, k, v, log_decay, beta, cu_seqlens, form: Form, side: int | None, *given):
        """`given`: the caller's tensors that `forward` or `backward` will be handed."""
        self.q, self.k, self.v, self.g, self.beta = (None if x is None else x.contiguous() for x in (q, k, v, log_decay, beta))
        self.form, self.cu_seqlens = form, cu_seqlens
        (self.B, self.T, self.H, self.K), self.V = k.shape, v.shape[3]
        self.tokens, self.G = self.B * self.T, q.shape[2] // self.H
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.decay, self.normal = KINDS[0 if log_decay is None else log_decay.ndim], form.normalize != "none"
        self.device = k.device
        given = seen(self.q, self.k, self.v, self.g, self.beta, cu_seqlens, *given)
        self.plan = plan(
            Kind(
                architecture(), self.device, k.dtype, self.decay, beta is not None, cu_seqlens is not None, self.K, self.V, side,
                form.causal, form.gating, form.normalize, form.stride, given,
            )
        )  # fmt: skip
        self.D, self.scratch = self.plan.directions, Scratch(self.device)

    def rows(self, span: int) -> int:
        """Blocks of `span` tokens, see layout.py."""
        return self.T // span + self.N if self.cu_seqlens is not None else self.N * -(-self.T // span)

    def cut(self, column: str) -> None:
        """Cut the sequences into chunks and segments for the kernels that go with `column` of the tiles table."""
        tile = self.plan.tile(column)
        C = self.C = tile.C
        longest = max(self.T, 1)
        chunks = chunks_per_segment(longest, C, self.N * self.H * -(-self.V // tile.BV))
        if self.beta is not None:
            total = -(-longest // C)
            chunks = max(chunks, isqrt(total // 2))
            if self.K > JOINED or chunks * FEWEST > total:
                chunks = total
        self.chunks = chunks + (1 if self.cu_seqlens is not None and chunks * C == longest else 0)  # T // span is 0 for one segment
        self.segments, self.chunk_rows = self.rows(self.chunks * C), self.rows(C)
        self.scanned = self.segments > self.N

    def new(self, *shape, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def outputs(self, dtype) -> Tensor:
        if self.K == self.V:  # the quicker call
            return torch.empty_like(self.q, dtype=dtype)
        return self.new(*self.q.shape[:3], self.V, dtype=dtype)

    def last(self, families: int, wanted: bool, rows: int, room) -> tuple:
        """`room` (new, or scratch.take) for the states at the end of segments or sequences, and their z; None if nobody wants them."""
        if not wanted:
            return None, None
        return room(families, rows, self.H, self.K, self.V), room(families, rows, self.H, self.K)

    def wide(self, room, *shape: int):
        """`room` for something per gate, None without gates."""
        if self.g is None:
            return None
        return room(*shape, self.K) if self.decay == "channel" else room(*shape)

    def states(self, kv, z, ends: bool, dkv=None, dz=None, gradients=(), u=None, du=None):
        """Run wy, seg_state and seg_scan. → X, (chunk states, their z, fades, what enters the segments, its z), (last, last_z), parts.

        The delta rule's segments are walked first for their `parts` alone, sums, z, decays and R. What walks them again joins those before
        it: `output`, and in a backward a second seg_state.
        """
        grad, D, H, K, V, starts = bool(gradients), self.D, self.H, self.K, self.V, kv is not None
        do, o, d, dd, factor, dbkv, dbz, dwrites = gradients or (None,) * 8
        column, joined = "bwd_state" if grad else "state", self.beta is not None and self.scanned
        families = 2 * D if grad else D
        family = 1 if not grad and not self.scanned else 0  # P of an unbroken sequence is made by `output` itself
        kept = families if grad else D - 1
        take, rows = self.scratch.take, (kept, self.chunk_rows, H)
        X = None if self.beta is None else take(self.tokens, H, self.C)
        states = take(*rows, K, V, dtype=self.k.dtype) if kept else None
        zs = take(*rows, K) if kept and self.normal else None
        fades = self.wide(take, *rows) if kept else None
        sums = self.last(families, self.scanned, self.segments, take)
        totals = self.wide(take, families, self.segments, H) if self.scanned else None
        turns = take(self.segments, H, K, K) if joined else None
        last = self.last(families, starts if grad else ends, self.N, self.new)
        BV = self.plan.tile(column).BV
        tiles = -(-V // BV)

        def walk(columns: int, keep: bool, scanned: bool):
            resumed = joined and not scanned
            tensors = (
                self.q if grad else None, self.k, self.v, do, X, u, du, dwrites, o, d, dd, factor, self.g, kv, z, dkv, dz, dbkv, dbz,
                self.cu_seqlens, states, zs, fades, *(sums if scanned else last), *(sums if resumed else (None, None)), totals, turns,
            )  # fmt: skip
            numbers = (
                self.form.scale, self.form.eps, self.N, self.T, H, self.G, family, self.segments, self.chunks,
                max(1, self.form.stride // self.C),
            )  # fmt: skip
            fixed = self.plan.fixed(
                seg_state, column, GRAD=grad, SCANNED=scanned, RECORD=dbkv is not None, WRITES=dwrites is not None, KEEP=keep,
                RESUMED=resumed, STARTS=starts, ENDS=ends,
            )  # fmt: skip
            launch(seg_state, (columns, self.segments * H), tensors, numbers, fixed)

        if X is not None:
            tensors = (self.k, self.g, self.beta, self.cu_seqlens, X)
            launch(wy, (self.chunk_rows, H), tensors, (self.N, self.T, H), self.plan.fixed(wy, column))
        if families > family:
            walk((families - family) * tiles + (-(-K // BV) if joined else 0), not joined, self.scanned)
        if joined and grad:
            walk(families * tiles, True, False)
        elif self.scanned and not joined:
            launch(
                seg_scan, (families, self.N * H, tiles), (*sums, totals, kv, z, dkv, dz, *last, self.cu_seqlens),
                (self.N, self.T, H, self.segments, self.chunks),
                self.plan.fixed(seg_scan, column, GRAD=grad, STARTS=starts, ENDS=ends),
            )  # fmt: skip
            return X, (states, zs, fades, *sums), last, (None,) * 4
        return X, (states, zs, fades, kv, z), last, (*sums, totals, turns)

    def forward(self, kv, z, divide: str, dtype):
        """→ o [B T HQ V], d, last, last_z [D N H ·], recorded kv and z, writes; None: not asked for."""
        form, H, K, V, heads = self.form, self.H, self.K, self.V, self.H * self.G
        self.cut("output")
        X, (states, zs, fades, incoming, incoming_z), (last, last_z), parts = self.states(kv, z, form.final)
        o = self.outputs(dtype)
        d = self.new(self.B, self.T, heads) if self.normal else None
        bkv = bz = None
        if form.stride:
            rows = boundary_rows(self.T, self.N if self.cu_seqlens is not None else 1, form.stride)
            zeros = torch.zeros if self.cu_seqlens is not None else torch.empty  # packed rows between sequences belong to nobody
            bkv = zeros(self.B, rows, H, K, V, dtype=torch.float32, device=self.device)
            bz = zeros(self.B, rows if self.normal else 0, H, K, dtype=torch.float32, device=self.device)
        u = self.new(self.B, self.T, H, V) if form.writes and self.beta is not None else None
        tensors = (
            self.q, self.k, self.v, self.g, X, incoming, incoming_z, *parts, states, zs, fades, self.cu_seqlens, o, d, u, bkv, bz, last,
            last_z,
        )  # fmt: skip
        numbers = (
            form.scale, form.eps, self.N, self.T, H, self.G, self.segments, self.chunks, max(1, form.stride // self.C)
        )  # fmt: skip
        fixed = self.plan.fixed(
            output, "output", DIVIDE=divide, SCANNED=self.scanned, RECORD=form.stride > 0, WRITES=u is not None, STARTS=kv is not None,
            ENDS=form.final,
        )  # fmt: skip
        launch(output, (-(-V // self.plan.tile("output").BV), self.segments * heads), tensors, numbers, fixed)
        return o, d, last, last_z, bkv, bz, self.v.float() if u is None and form.writes else u

    def row_sums(self) -> tuple[Piece | None, Piece | None]:
        """Room for dd and factor of every row, which the first launch of a normalised backward fills."""
        rows = (self.tokens, self.H * self.G)
        return (self.scratch.take(*rows), self.scratch.take(*rows)) if self.normal else (None, None)

    def backward(self, do, o, d, dkv, dz, dbkv, dbz, dwrites, kv, z, dtype):
        """→ dq, dk, dv in `dtype` (None: those of q, k, v), dg per token or None, dbeta or None, dkv, dz [D N H · ·] or None."""
        H, D, delta, plan = self.H, self.D, self.beta is not None, self.plan
        self.cut("bwd_state")
        take = self.scratch.take
        u, du = (take(self.tokens, H, self.V, dtype=x) if delta else None for x in (self.v.dtype, torch.float32))
        dd, factor = self.row_sums()
        dg_rows, dg = None if delta else self.wide(take, self.tokens, H * self.G), self.wide(self.new, self.B, self.T, H)
        gradients = (do, o, d, dd, factor, dbkv, dbz, dwrites)
        _, (*own, incoming, incoming_z), (last, last_z), _ = self.states(kv, z, dkv is not None, dkv, dz, gradients, u, du)
        dq, dk, dv = (torch.empty_like(x, dtype=dtype) for x in (self.q, self.k, self.v))
        numbers = (self.form.scale, self.N, self.T, H, self.G, self.segments, self.chunks, self.chunk_rows)
        v, scanned = u if delta else self.v, self.scanned and not delta  # states of the delta rule are whole
        entered = (*own, *((incoming, incoming_z) if scanned else (None, None)))
        tensors = (self.q, self.k, v, do, dd, factor, self.g, *entered, self.cu_seqlens)
        if not delta:
            launch(bwd_dq, (self.chunk_rows, H * self.G), (*tensors, dq, dg_rows), numbers, plan.fixed(bwd_dq, "bwd_dq", SCANNED=scanned))
        dbeta = torch.empty_like(self.beta) if delta else None
        tensors = (*tensors, dg_rows, dwrites, self.v if delta else None, self.beta, du, dq if delta else None, dk, dv, dg, dbeta)
        fixed = plan.fixed(bwd_dkv, "bwd_dkv", SCANNED=scanned, WRITES=dwrites is not None)
        launch(bwd_dkv, (self.chunk_rows, H, 1 if delta else 2), tensors, numbers, fixed)
        return dq, dk, dv, dg, dbeta, *((None, None) if last is None else (last[D:], last_z[D:]))


class NoDecay(Pass):
    """The launches of a bidirectional call without decay: both sides are one sum."""

    def __init__(self, q, k, v, cu_seqlens, form: Form, *given):
        super().__init__(q, k, v, None, None, cu_seqlens, form, 0, *given)

    def sums(self, column, kv, z, ends: bool, dkv=None, dz=None, do=None, o=None, d=None, dd=None, factor=None):
        """S, and with gradients G, of each sequence: [1 or 2, N H ·] in the dtype of k, z in float32; last states [2 or 4, N H ·]."""
        H, K, V, grad, plan = self.H, self.K, self.V, do is not None, self.plan
        whether = {"GRAD": grad, "STARTS": kv is not None, "ENDS": ends}
        families, numbers, take = 2 if grad else 1, (self.N, self.T, H), self.scratch.take
        parts, parts_z = self.last(families, True, self.segments, take)
        whole, whole_z = take(families, self.N, H, K, V, dtype=self.k.dtype), take(families, self.N, H, K)
        tiles = -(-V // plan.tile(column).BV)
        launch(
            seg_state, (families * tiles, self.segments * H),
            (self.q if grad else None, self.k, self.v, do, *[None] * 4, o, d, dd, factor, None, kv, z, dkv, dz, None, None,
             self.cu_seqlens, None, None, None, parts, parts_z, None, None, None, None),
            (self.form.scale, self.form.eps, *numbers, self.G, 0, self.segments, self.chunks, 1),
            plan.fixed(seg_state, column, SCANNED=True, RECORD=False, WRITES=False, KEEP=False, RESUMED=False, **whether),
        )  # fmt: skip
        last, last_z = self.last(2 * families, kv is not None if grad else ends, self.N, self.new)
        tensors = (parts, parts_z, kv, z, dkv, dz, self.cu_seqlens, whole, whole_z, last, last_z)
        numbers = (*numbers, self.segments, self.chunks)
        launch(seg_sum, (families, self.N * H, tiles), tensors, numbers, plan.fixed(seg_sum, column, **whether))
        return whole, whole_z, last, last_z

    def forward(self, kv, z, divide: str, dtype):
        heads = self.H * self.G
        self.cut("state")
        whole, whole_z, last, last_z = self.sums("state", kv, z, self.form.final)
        o = self.outputs(dtype)
        d = self.new(self.B, self.T, heads) if self.normal else None
        launch(
            nodecay_out, (self.rows(self.plan.tile("output").C), heads), (self.q, whole, whole_z, self.cu_seqlens, o, d),
            (self.form.scale, self.form.eps, self.N, self.T, self.H, self.G), self.plan.fixed(nodecay_out, "output", DIVIDE=divide),
        )  # fmt: skip
        return o, d, last, last_z, None, None, self.v.float() if self.form.writes else None

    def backward(self, do, o, d, dkv, dz, dbkv, dbz, dwrites, kv, z, dtype):
        self.cut("bwd_state")
        dd, factor = self.row_sums()
        whole, whole_z, last, last_z = self.sums("bwd_state", kv, z, dkv is not None, dkv, dz, do, o, d, dd, factor)
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        launch(
            nodecay_bwd, (self.rows(self.plan.tile("bwd_dq").C), self.H * (self.G + 1)),
            (self.k, self.v, do, dd, factor, whole, whole_z, self.cu_seqlens, dwrites, dq, dk, dv),
            (self.form.scale, self.N, self.T, self.H, self.G), self.plan.fixed(nodecay_bwd, "bwd_dq", WRITES=dwrites is not None),
        )  # fmt: skip
        return dq, dk, dv, None, None, *((None, None) if last is None else (last[2:], last_z[2:]))


class Short(Pass):
    """The launches of a call on short sequences by the quadratic form: no chunks, no states."""

    @staticmethod
    def takes(k, v, log_decay, beta, kv, cu_seqlens, form: Form, ends: bool) -> bool:
        """Whether a call is one; `ends`: it has a last state, or the gradient of one."""
        plain = beta is None and (log_decay is None or log_decay.ndim < 4) and not form.stride and not form.writes
        if not plain or kv is not None or ends or cu_seqlens is not None or k.shape[1] > SHORTEST:
            return False
        at = row("scalar", False, not form.causal, k.shape[3], v.shape[3], k.element_size())
        return pick_short(architecture(), False, at, v.shape[3]) is not None

    def __init__(self, q, k, v, log_decay, form: Form, *given):
        super().__init__(q, k, v, log_decay, None, None, form, 0 if form.causal else None, *given)

    def forward(self, kv, z, divide: str, dtype):
        heads = self.H * self.G
        o = self.outputs(dtype)
        d = self.new(self.B, self.T, heads) if self.normal else None
        launch(
            short, (self.rows(self.plan.tile("short").C), heads), (self.q, self.k, self.v, self.g, o, d),
            (self.form.scale, self.form.eps, self.T, self.H, self.G), self.plan.fixed(short, "short", DIVIDE=self.form.normalize),
        )  # fmt: skip
        return o, d, None, None, None, None, None

    def backward(self, do, o, d, dkv, dz, dbkv, dbz, dwrites, kv, z, dtype):
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        rows, sizes = self.H * (self.G + 1), (self.T, self.H, self.G, self.tokens)
        sums = None if self.g is None else self.scratch.take(self.D, self.tokens, rows)
        launch(
            short_bwd, (self.rows(self.plan.tile("short_bwd").C), rows), (self.q, self.k, self.v, self.g, do, o, d, dq, dk, dv, sums),
            (self.form.scale, self.form.eps, *sizes), self.plan.fixed(short_bwd, "short_bwd", DIVIDE=self.form.normalize),
        )  # fmt: skip
        if self.g is None:
            return dq, dk, dv, None, None, None, None
        dg = self.new(self.B, self.T, self.H)
        launch(short_gates, (self.N, self.H), (sums, dg), sizes, self.plan.fixed(short_gates, "short", LONGEST=SHORTEST))
        return dq, dk, dv, dg, None, None, None

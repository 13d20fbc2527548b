"""One sequence of launches: which kernels run, in what order, on which buffers, with which constexprs.

Over 300 lines, because forward and backward share the buffers and read best side by side.
"""

import torch
from torch import Tensor

from ..form import KINDS, Form, boundary_rows
from ..tiles import FEWEST, JOINED, SHORTEST, Tile, chunks_per_segment, pick, pick_short, power_of_two, row
from . import architecture
from .delta import wy
from .gradients import bwd_dkv, bwd_dq
from .nodecay import nodecay_bwd, nodecay_out, seg_sum
from .output import output
from .short import short, short_bwd, short_gates
from .state import seg_scan, seg_state

SAID = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is left unsaid, and 3.10 will do without


class Pass:
    """A call seen from one side, or (BOTH) from both at once. Holds sizes and the constexprs its kernels share.

    A bidirectional call is one pass for both sides where what is written needs no order; the delta rule, and records, which count from each
    side's own end, take one pass per side, each owning half of a token's own term.
    """

    def __init__(self, q, k, v, log_decay, beta, cu_seqlens, form: Form, side: int | None):
        self.q, self.k, self.v, self.g, self.beta = (None if x is None else x.contiguous() for x in (q, k, v, log_decay, beta))
        self.form, self.cu_seqlens, self.side = form, cu_seqlens, side
        (B, T, self.H, self.K), self.V = k.shape, v.shape[3]
        self.tokens, self.T, self.G = B * T, T, q.shape[2] // self.H
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.D = 2 if side is None else 1
        self.decay = KINDS[0 if log_decay is None else log_decay.ndim]
        self.leave = (form.gating == "source", form.gating == "target") if side is None else (self._leaving(), False)
        self.normal = form.normalize != "none"
        self.arch = architecture()
        self.none = k.new_empty(0)  # stands for a tensor that the constexprs keep from being touched

    def _leaving(self) -> bool:
        return not self.form.causal and self.form.gating in (("source", "symmetric") if self.side else ("source",))

    def rows(self, span: int) -> int:
        """Blocks of `span` tokens, see layout.py."""
        return self.T // span + self.N if self.cu_seqlens is not None else self.N * -(-self.T // span)

    def tile(self, kernel: str) -> Tile:
        at = row(self.decay, self.beta is not None, self.D == 2, self.K, self.V, self.k.element_size())
        tile = pick(self.arch, kernel, at, self.V)
        return tile._replace(C=16) if self.form.stride % tile.C else tile  # a record falls on the start of a chunk

    def cut(self, kernel: str) -> None:
        """Cut the sequences into chunks and segments for the kernels that go with `kernel`."""
        tile = self.tile(kernel)
        C = self.C = tile.C
        per_segment = self.N * self.H * -(-self.V // tile.BV)
        longest = max(self.T, 1)
        chunks = chunks_per_segment(longest, C, per_segment)
        if self.beta is not None and (self.K > JOINED or chunks * FEWEST * C > longest):
            chunks = -(-longest // C)
        self.chunks = chunks + (1 if self.cu_seqlens is not None and chunks * C == longest else 0)  # T // span is 0 for one segment
        self.segments = self.rows(self.chunks * C)
        self.scanned = self.segments > self.N

    def options(self, kernel: str, **more) -> dict:
        tile = self.tile(kernel)
        shared = {
            "K": self.K, "V": self.V, "BK": power_of_two(self.K), "BV": tile.BV, "C": tile.C, "DECAY": self.decay,
            "VARLEN": self.cu_seqlens is not None, "num_warps": tile.warps, "num_stages": tile.stages, **SAID,
        }  # fmt: skip
        return shared | more

    def full(self, kernel: str, **more) -> dict:
        more = {
            "BOTH": self.D == 2, "LEAVING_LEFT": self.leave[0], "LEAVING_RIGHT": self.leave[1], "NORMALIZE": self.normal,
            "OWN": 1.0 if self.form.causal or self.D == 2 else 0.5, "REVERSE": self.side == 1, "SCANNED": self.scanned,
        } | more  # fmt: skip
        return self.options(kernel, **more)

    def new(self, *shape, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def last(self, families: int, wanted: bool, rows: int) -> tuple[Tensor, Tensor]:
        """Room for the states at the end of segments or sequences, and their z; empty if nobody wants them."""
        rows = rows if wanted else 0
        return self.new(families, rows, self.H, self.K, self.V), self.new(families, rows, self.H, self.K)

    def per_gate(self, heads: int) -> Tensor:
        if self.decay == "none":
            return self.none
        return self.new(self.tokens, heads, *([self.K] if self.decay == "channel" else []))

    def solve(self, kernel: str) -> Tensor | None:
        """X of the delta rule, [tokens H C]."""
        if self.beta is None:
            return None
        X = self.new(self.tokens, self.H, self.C)
        wy[(self.rows(self.C), self.H)](
            self.k, self.gate, self.beta, self.cu_seqlens, X, self.N, self.T, self.H,
            LEAVING=self.leave[0], REVERSE=self.side == 1, **self.options(kernel),
        )  # fmt: skip
        return X

    @property
    def gate(self) -> Tensor:
        return self.none if self.g is None else self.g

    def states(self, kv, z, ends: bool, dkv=None, dz=None, gradients=(), X=None, u=None, du=None):
        """Run seg_state and seg_scan. → (chunk states, their z, their fades, what enters the segments, its z), (last, last_z).

        The delta rule's segments are walked for what they add and for R alone, joined, and in a backward walked again for the states.
        """
        grad, D, H, K, V, whether = bool(gradients), self.D, self.H, self.K, self.V, {"STARTS": kv is not None, "ENDS": ends}
        do, o, d, dd, factor, dbkv, dbz, dwrites = gradients or (None,) * 8
        kernel, delta = "bwd_state" if grad else "state", X is not None
        joined = delta and self.scanned
        families = 2 * D if grad else D
        family = 1 if not grad and not self.scanned else 0  # P of an unbroken sequence is made by `output` itself
        chunk_rows = self.rows(self.C)
        kept = families if grad else D - 1
        states, zs = self.new(kept, chunk_rows, H, K, V, dtype=self.k.dtype), self.new(kept, chunk_rows, H, K if self.normal else 0)
        wide = [K] if self.decay == "channel" else []
        fades, totals = self.new(kept, chunk_rows, H, *wide), self.new(families, self.segments, H, *wide)
        wanted = kv is not None if grad else ends
        parts, parts_z = self.last(families, self.scanned or wanted, self.segments)
        turns = self.new(self.segments if joined else 0, H, K, K)
        tiles = -(-V // self.tile(kernel).BV)

        def walk(columns, kv, z, dkv, dz, **how):
            options = self.full(
                kernel, GRAD=grad, DELTA=delta, CLAMP=self.form.normalize == "clamp", RECORD=dbkv is not None, WRITES=dwrites is not None,
                PIPE=self.tile(kernel).stages, **whether | how,
            )  # fmt: skip
            seg_state[(columns, self.segments * H)](
                self.q if grad else None, self.k, self.v, do, X, u, du, dwrites, o, d, dd, factor, self.gate, kv, z,
                dkv, dz, dbkv, dbz, self.cu_seqlens, states, zs, fades, parts, parts_z, totals, turns,
                self.form.scale, self.form.eps, self.N, self.T, H, self.G, family, self.segments, self.chunks,
                max(1, self.form.stride // self.C), **options,
            )  # fmt: skip

        if families > family:
            columns = (families - family) * tiles + (-(-K // self.tile(kernel).BV) if joined else 0)
            walk(columns, kv, z, dkv, dz, KEEP=not joined, RESUMED=False)
        if not self.scanned:
            return (states, zs, fades, kv, z), (parts, parts_z)
        last, last_z = self.last(families, wanted, self.N)
        seg_scan[(families, self.N * H, tiles)](
            parts, parts_z, totals, turns, kv, z, dkv, dz, last, last_z, self.cu_seqlens, self.N, self.T, H, self.segments, self.chunks,
            PRECISION="tf32x3" if self.arch.startswith("sm") else "ieee",
            **self.options(kernel, BOTH=D == 2, DELTA=delta, NORMALIZE=self.normal, GRAD=grad, **whether),
        )  # fmt: skip
        if joined and grad:
            walk(families * tiles, parts, parts_z, parts, parts_z, KEEP=True, RESUMED=True, SCANNED=False, STARTS=False, ENDS=False)
        return (states, zs, fades, parts, parts_z), (last, last_z)

    def forward(self, kv, z, divide: str, dtype):
        """→ o [B T HQ V], d, last, last_z [D N H ·], recorded kv and z, writes."""
        form, H, K, V, delta = self.form, self.H, self.K, self.V, self.beta is not None
        B = 1 if self.cu_seqlens is not None else self.N
        self.cut("output")
        X = self.solve("state")
        (states, zs, fades, incoming, incoming_z), (last, last_z) = self.states(kv, z, form.final, X=X)
        o, d = self.new(B, self.T, H * self.G, V, dtype=dtype), self.new(B, self.T, H * self.G if self.normal else 0)
        rows = boundary_rows(self.T, self.N if self.cu_seqlens is not None else 1, form.stride)
        zeros = torch.zeros if self.cu_seqlens is not None else torch.empty  # packed rows between sequences belong to nobody
        bkv = zeros(B, rows, H, K, V, dtype=torch.float32, device=self.k.device)
        bz = zeros(B, rows if self.normal else 0, H, K, dtype=torch.float32, device=self.k.device)
        u = self.new(B, self.T, H, V) if form.writes and delta else None
        options = self.full(
            "output", DELTA=delta, DIVIDE=divide, RECORD=form.stride > 0, WRITES=u is not None, PIPE=self.tile("output").stages,
            STARTS=kv is not None, ENDS=form.final,
        )  # fmt: skip
        output[(-(-V // options["BV"]), self.segments * H * self.G)](
            self.q, self.k, self.v, self.gate, X, incoming, incoming_z, states, zs, fades, self.cu_seqlens, o, d, u, bkv, bz, last, last_z,
            form.scale, form.eps, self.N, self.T, H, self.G, self.segments, self.chunks, max(1, form.stride // self.C), **options,
        )  # fmt: skip
        return o, d, last, last_z, bkv, bz, self.v.float() if u is None and form.writes else u

    def row_sums(self, d) -> tuple[Tensor, Tensor]:
        """Room for dd and factor of every row, which the first launch of a normalised backward fills."""
        return (torch.empty_like(d), torch.empty_like(d)) if self.normal else (None, None)

    def backward(self, do, o, d, dkv, dz, dbkv, dbz, dwrites, kv, z, dtype):
        """→ dq, dk, dv in `dtype` (None: those of q, k, v), dg per token or None, dbeta or None, dkv, dz [D N H · ·]."""
        H, D, delta = self.H, self.D, self.beta is not None
        self.cut("bwd_state")
        X = self.solve("bwd_state")
        u, du = (torch.empty_like(self.v) if delta else None for _ in range(2))
        dd, factor = self.row_sums(d)
        gradients = (do, o, d, dd, factor, dbkv, dbz, dwrites)
        (states, zs, fades, incoming, incoming_z), (last, last_z) = self.states(kv, z, dkv is not None, dkv, dz, gradients, X, u, du)
        dq, dk, dv = (torch.empty_like(x, dtype=dtype or x.dtype) for x in (self.q, self.k, self.v))
        dg_rows, dg = self.per_gate(H * self.G), self.per_gate(H)
        entered = (states, zs, fades, incoming, incoming_z, self.cu_seqlens)
        sizes = (self.form.scale, self.N, self.T, H, self.G, self.segments, self.chunks, self.rows(self.C))
        v, scanned = u if delta else self.v, {"SCANNED": self.scanned and not delta}  # states of the delta rule are whole
        bwd_dq[(self.rows(self.C), H * self.G)](
            self.q, self.k, v, do, dd, factor, self.gate, *entered, dq, dg_rows, *sizes, **self.full("bwd_dq", **scanned)
        )
        dbeta = torch.empty_like(self.beta) if delta else None
        bwd_dkv[(self.rows(self.C), H, 1 if delta else 2)](
            self.q, self.k, v, do, dd, factor, self.gate, *entered, dg_rows, dwrites, self.v if delta else None, self.beta, du,
            dk, dv, dg, dbeta, *sizes, WRITES=dwrites is not None, DELTA=delta, **self.full("bwd_dkv", **scanned),
        )  # fmt: skip
        return dq, dk, dv, None if self.g is None else dg, dbeta, last[D:], last_z[D:]


class NoDecay(Pass):
    """The launches of a bidirectional call without decay: both sides are one sum."""

    def __init__(self, q, k, v, cu_seqlens, form: Form):
        super().__init__(q, k, v, None, None, cu_seqlens, form, 0)

    def sums(self, kernel, kv, z, ends: bool, dkv=None, dz=None, do=None, o=None, d=None, dd=None, factor=None):
        """S, and with gradients G, of each sequence: [1 or 2, N H ·] in the dtype of k, z in float32; last states [2 or 4, N H ·]."""
        H, K, V, none, grad, whether = self.H, self.K, self.V, self.none, do is not None, {"STARTS": kv is not None, "ENDS": ends}
        families = 2 if grad else 1
        parts, parts_z = self.new(families, self.segments, H, K, V), self.new(families, self.segments, H, K)
        options = self.full(
            kernel, GRAD=grad, DELTA=False, CLAMP=self.form.normalize == "clamp", KEEP=False, RESUMED=False, RECORD=False,
            WRITES=False, PIPE=self.tile(kernel).stages, SCANNED=True, **whether,
        )  # fmt: skip
        tiles = -(-V // options["BV"])
        seg_state[(families * tiles, self.segments * H)](
            self.q if grad else None, self.k, self.v, do, None, None, None, None, o, d, dd, factor, none, kv, z, dkv, dz, None, None,
            self.cu_seqlens, none, none, none, parts, parts_z, none, none, self.form.scale, self.form.eps, self.N, self.T, H, self.G, 0,
            self.segments, self.chunks, 1, **options,
        )  # fmt: skip
        whole, whole_z = self.new(families, self.N, H, K, V, dtype=self.k.dtype), self.new(families, self.N, H, K)
        last, last_z = self.last(2 * families, kv is not None if grad else ends, self.N)
        seg_sum[(families, self.N * H, tiles)](
            parts, parts_z, kv, z, dkv, dz, self.cu_seqlens, whole, whole_z, last, last_z,
            self.N, self.T, H, self.segments, self.chunks, NORMALIZE=self.normal, GRAD=grad, **whether, **self.options(kernel),
        )  # fmt: skip
        return whole, whole_z, last, last_z

    def forward(self, kv, z, divide: str, dtype):
        B, heads = 1 if self.cu_seqlens is not None else self.N, self.H * self.G
        self.cut("state")
        whole, whole_z, last, last_z = self.sums("state", kv, z, self.form.final)
        o, d = self.new(B, self.T, heads, self.V, dtype=dtype), self.new(B, self.T, heads if self.normal else 0)
        options = self.options("output", NORMALIZE=self.normal, DIVIDE=divide)
        nodecay_out[(self.rows(options["C"]), heads)](
            self.q, whole, whole_z, self.cu_seqlens, o, d, self.form.scale, self.form.eps, self.N, self.T, self.H, self.G, **options
        )
        return o, d, last, last_z, None, None, self.v.float() if self.form.writes else None

    def backward(self, do, o, d, dkv, dz, dbkv, dbz, dwrites, kv, z, dtype):
        self.cut("bwd_state")
        dd, factor = self.row_sums(d)
        whole, whole_z, last, last_z = self.sums("bwd_state", kv, z, dkv is not None, dkv, dz, do, o, d, dd, factor)
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        options = self.options("bwd_dq", NORMALIZE=self.normal, WRITES=dwrites is not None)
        nodecay_bwd[(self.rows(options["C"]), self.H * (self.G + 1))](
            self.k, self.v, do, dd, factor, whole, whole_z, self.cu_seqlens, dwrites, dq, dk, dv,
            self.form.scale, self.N, self.T, self.H, self.G, **options,
        )  # fmt: skip
        return dq, dk, dv, None, None, last[2:], last_z[2:]


class Short(Pass):
    """The launches of a call on short sequences by the quadratic form: no chunks, no states."""

    @staticmethod
    def takes(k, v, log_decay, beta, kv, cu_seqlens, form: Form, ends: bool) -> bool:
        """Whether a call is one; `ends`: it has a last state, or the gradient of one."""
        plain = beta is None and (log_decay is None or log_decay.ndim < 4) and not form.stride and not form.writes
        if not plain or kv is not None or ends or cu_seqlens is not None or k.shape[1] > SHORTEST:
            return False
        return Short.tile_of(False, k, v, form) is not None

    @staticmethod
    def tile_of(backward: bool, k, v, form: Form) -> Tile | None:
        K, V = k.shape[3], v.shape[3]
        return pick_short(architecture(), backward, row("scalar", False, not form.causal, K, V, k.element_size()), V)

    def __init__(self, q, k, v, log_decay, form: Form):
        super().__init__(q, k, v, log_decay, None, None, form, 0 if form.causal else None)

    def kernel(self, backward: bool) -> tuple[tuple[int, int], dict]:
        """Grid of one program per block and head, and the constexprs."""
        tile = self.tile_of(backward, self.k, self.v, self.form)
        shared = {
            "K": self.K, "V": self.V, "BK": power_of_two(self.K), "BV": tile.BV, "C": tile.C, "DECAY": self.decay,
            "CAUSAL": self.form.causal, "LEFT": self.leave[0], "RIGHT": self.leave[1], "DIVIDE": self.form.normalize, "PIPE": tile.stages,
            "num_warps": tile.warps, "num_stages": tile.stages, **SAID,
        }  # fmt: skip
        return (self.rows(tile.C), self.H * (self.G + backward)), shared

    def forward(self, kv, z, divide: str, dtype):
        heads = self.H * self.G
        o, d = self.new(self.N, self.T, heads, self.V, dtype=dtype), self.new(self.N, self.T, heads if self.normal else 0)
        grid, options = self.kernel(False)
        short[grid](self.q, self.k, self.v, self.gate, o, d, self.form.scale, self.form.eps, self.T, self.H, self.G, **options)
        return o, d, *self.last(self.D, False, 0), None, None, None

    def backward(self, do, o, d):
        """→ dq, dk, dv, dg per token or None."""
        dq, dk, dv = (torch.empty_like(x) for x in (self.q, self.k, self.v))
        sizes, sums = (self.T, self.H, self.G, self.tokens), self.new(self.D, self.tokens, self.H * (self.G + 1))
        grid, options = self.kernel(True)
        short_bwd[grid](self.q, self.k, self.v, self.gate, do, o, d, dq, dk, dv, sums, self.form.scale, self.form.eps, *sizes, **options)
        dg = None if self.g is None else self.per_gate(self.H)
        if dg is not None:
            options = {name: options[name] for name in ("CAUSAL", "LEFT", "RIGHT")}
            short_gates[(self.N, self.H)](sums, dg, *sizes, LONGEST=SHORTEST, num_warps=4, **SAID, **options)
        return dq, dk, dv, dg

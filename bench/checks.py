"""The promises of the CPU operator, computed from rows and memory figures alone."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from .cases import CALLS, FORMS, STEP_FORMS, H, K, V
from .records import Cell, Check, Memory, Row

MIB = 1 << 20
ROOM = 8  # MiB of scratch, allocator rounding and thread stacks, whatever T is; one K × V state is 16 KiB
STRIDE = 64  # backward may keep a state every so many tokens: as much as one of its inputs, and 1/64 of the states of all tokens
EAGER = 6.0  # times faster than eager, from T = 1024 on
SOFTMAX = {256: 1.0, 1024: 6.0, 16384: 60.0}  # T → times faster than softmax attention; 1.0 also where T is not named

Figure = tuple[str, float | None, str | None]  # where, the figure, and why there is none


def check(promise: str, form: str, relation: str, target: float, figures: Iterable[Figure], unit: str = "×") -> Check:
    cells, missing = [], []
    for where, figure, reason in figures:
        if figure is None:
            missing.append(f"{where}: {reason}")
        else:
            cells.append(Cell(where, figure))
    return Check(promise=promise, form=form, relation=relation, target=target, unit=unit, cells=tuple(cells), missing=tuple(missing))


def threads_of(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


class Table:
    """Rows by what they measure; the size is T, or B · H for `step`."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = {(row.peer, row.form, row.call, row.B * row.H if row.call == "step" else row.T, row.threads): row for row in rows}
        self.sizes = sorted({key[3] for key in self.rows if key[2] in CALLS})
        self.states = sorted({key[3] for key in self.rows if key[2] == "step"})
        self.threads = sorted({key[4] for key in self.rows})
        self.forms = [form for form in FORMS if any(key[:2] == ("cpu", form) and key[2] in CALLS for key in self.rows)]

    def has(self, *key) -> bool:
        return key in self.rows and self.rows[key].p50 is not None

    def ratio(self, above: tuple, below: tuple, where: str) -> Figure:
        """Median of `above` / median of `below`."""
        for key in (above, below):
            if not self.has(*key):
                return where, None, self.rows[key].skipped if key in self.rows else f"{key[0]} {key[1]} was not asked for"
        return where, self.rows[above].p50 / self.rows[below].p50, None

    def against(self, peer: tuple[str, str], form: str, lengths: Sequence[int], calls: Sequence[str] = CALLS) -> Iterator[Figure]:
        """How many times as long `peer`, a (peer, form), takes for the calls of backend cpu."""
        for T, call, n in product(lengths, calls, self.threads):
            yield self.ratio((*peer, call, T, n), ("cpu", form, call, T, n), f"T={T} {call}, {threads_of(n)}")

    def backward(self, form: str) -> Iterator[Figure]:
        for T, n in product(self.sizes, self.threads):
            where, ratio, reason = self.ratio(*(("cpu", form, call, T, n) for call in reversed(CALLS)), f"T={T}, {threads_of(n)}")
            yield where, None if ratio is None else ratio - 1, reason

    def growth(self, form: str) -> Iterator[Figure]:
        for call, n in product(CALLS, self.threads):
            yield self.ratio(*(("cpu", form, call, T, n) for T in (65536, 16384)), f"{call}, {threads_of(n)}")

    def rate(self, form: str, T: int) -> Iterator[Figure]:
        """FLOP rate of the forward as a part of torch.mm's in the same group."""
        for n in self.threads:
            key, mm, where = ("cpu", form, "forward", T, n), ("mm", "", "product", T, n), f"T={T}, {threads_of(n)}"
            _, ratio, reason = self.ratio(mm, key, where)
            yield where, None if ratio is None else self.rows[key].gflops / self.rows[mm].gflops, reason


def operator_checks(rows: Sequence[Row], flags: Sequence[str]) -> list[Check]:
    """One check per promise and form, over all lengths, thread counts and calls the promise speaks of."""
    table, checks = Table(rows), []
    exact = [form for form in table.forms if form != "bf16"]
    for form in exact:
        longer = [T for T in table.sizes if T >= 1024]
        checks.append(check("times faster than eager, T ≥ 1024", form, ">=", EAGER, table.against(("eager", form), form, longer)))
    for form in exact:
        softmax = ("sdpa", "causal" if FORMS[form].causal else "bidirectional")
        known = [T for T in table.sizes if any(table.has(*softmax, call, T, n) for call, n in product(CALLS, table.threads))]
        checks.append(check("times faster than softmax, every T", form, ">=", 1.0, table.against(softmax, form, known)))
        for T, target in SOFTMAX.items():
            if T in table.sizes and target > 1:
                checks.append(check(f"times faster than softmax, T = {T}", form, ">=", target, table.against(softmax, form, [T])))
    for form in ("none", "head", "scalar"):
        if form in exact and 16384 in table.sizes:
            checks.append(check("FLOP rate as a part of torch.mm's, T = 16384", form, ">=", 0.75, table.rate(form, 16384)))
    if "bf16" in table.forms:
        has = "avx512_bf16" in flags
        figures = table.against(("cpu", "scalar"), "bf16", table.sizes) if has else [("bf16", None, "this chip has no AVX512-BF16")]
        checks.append(check("times faster than float32", "bf16", ">=", 1.6, figures))
    if "bidirectional" in table.forms:
        pairs = product(table.sizes, table.threads)
        time = lambda form, T, n: ("cpu", form, "forward", T, n)
        figures = (table.ratio(time("bidirectional", T, n), time("scalar", T, n), f"T={T}, {threads_of(n)}") for T, n in pairs)
        checks.append(check("forward beside the causal one", "bidirectional", "<=", 1.7, figures))
    for form in table.forms:
        if {16384, 65536} <= set(table.sizes):
            checks.append(check("time at T = 65536 beside 16384", form, "<=", 4.3, table.growth(form)))
        checks.append(check("backward beside forward", form, "<=", 3.0, table.backward(form)))
    return [one for one in checks if one.cells or one.missing]


def step_checks(rows: Sequence[Row], memory: Sequence[Memory]) -> list[Check]:
    """`step` beside `Tensor.copy_` of its states into memory that is there already: each read once and written once, nothing allocated."""
    table, checks = Table(rows), []
    for form in STEP_FORMS:
        keys = [(form, "step", size, n) for size, n in product(table.states, table.threads) if ("cpu", form, "step", size, n) in table.rows]
        figures = (table.ratio(("cpu", *key), ("copy", "", *key[1:]), f"B·H={key[2]}, {threads_of(key[3])}") for key in keys)
        checks.append(check("step beside reading and writing the states once", form, "<=", 2.0, figures))
        extra = ((f"B·H={one.B * one.H}", one.extra, one.skipped) for one in memory if (one.form, one.call) == (form, "step"))
        checks.append(check("step: allocated beside the outputs", form, "<=", 0, extra, "B"))
    return [one for one in checks if one.cells or one.missing]


def memory_checks(memory: Sequence[Memory]) -> list[Check]:
    """What a call may hold beyond inputs and outputs: ROOM, and for the backward the states of every STRIDE-th token."""
    checks = []
    for form, call, T in dict.fromkeys((one.form, one.call, one.T) for one in memory if one.call in CALLS):
        kept = T // STRIDE * H * K * V * 4 / MIB if call == CALLS[1] else 0
        extra = (
            (threads_of(one.threads), None if one.extra is None else one.extra / MIB, one.skipped)
            for one in memory
            if (one.form, one.call, one.T) == (form, call, T)
        )
        every = T * H * K * V * 4 / MIB
        checks.append(check(f"memory of {call}, T = {T} (all states: {every:,.0f} MiB)", form, "<=", kept + ROOM, extra, "MiB"))
    return checks

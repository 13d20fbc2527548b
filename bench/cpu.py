"""`python -m bench cpu`: the operator, its decoding step and their memory on this machine's CPU, beside their peers, as one Record."""

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

import linattn

from . import checks, machine, memory, peers
from .cases import CALLS, FORMS, LENGTHS, STEP_FORMS, STEPS, B, H, Inputs, K, V, counted_flops
from .records import Memory, Record, Row, spread
from .timing import Budget, take_turns

PARTS = ("operator", "step", "memory")
FULL = Budget(seconds=0.6, patience=6, cap=25)
QUICK = Budget(seconds=0.05, least=1, patience=1, cap=2.5)
METHOD = (
    "Sides take turns (A B C A B C …, each round starting one side later). Quantiles are 20/50/80 of the samples.",
    "A time is one whole call. The allocation of fresh outputs and their release are in it; warm-up is not (a first call over 1 s counts).",
    "Ratios are of medians of one group: the sides that took turns with each other, on one size and one number of threads.",
    "Up to T = 2048 each side has inputs of its own, above they are shared. No cache is flushed: a side finds what the others leave.",
    "The operator is called with its defaults, values are checked. softmax attention gets contiguous [B H T D] made beforehand.",
    "Rates of the operator count 4KV + 2·32·(K+V) FLOPs per token and head, forward.",
    "copy: as many tensors read, and written to fresh memory, as the call has to (addcmul, clone).",
    "step goes through 32 MiB of states in turn. Its target is Tensor.copy_ of the states into memory that is there already; clone, shown "
    "beside it, writes fresh memory as step does.",
    "Memory: high-water mark of resident memory in a process of its own, less what was resident before and the outputs.",
    "Memory of step: bytes asked of torch's allocator, less the outputs.",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. `only` holds names out of PARTS and FORMS; without a part all parts, without a form all forms."""

    lengths: tuple[int, ...] = LENGTHS
    threads: tuple[int, ...] = (1, 2)
    only: tuple[str, ...] = ()
    quick: bool = False
    budget: Budget = FULL

    def __post_init__(self):
        known = [*PARTS, *FORMS]
        if unknown := [name for name in self.only if name not in known]:
            raise ValueError(f"only must hold names out of {known}; got {unknown}")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"threads must be one or more positive numbers; got {self.threads}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be one or more positive numbers; got {self.lengths}")

    @property
    def parts(self) -> list[str]:
        return [name for name in PARTS if name in self.only] or list(PARTS)

    @property
    def forms(self) -> list[str]:
        return [name for name in FORMS if name in self.only] or list(FORMS)


def quick(options: Options) -> Options:
    """About a minute: to 16k tokens, few samples, slow peers left out."""
    lengths = tuple(T for T in options.lengths if T <= 16384) or options.lengths
    return replace(options, quick=True, lengths=lengths, budget=QUICK)


@dataclass
class Group:
    """Sides that take turns with each other: one size, one number of threads."""

    label: str
    threads: int
    size: dict
    make: Callable[[], list[peers.Side]]


def groups(options: Options) -> Iterator[Group]:
    """What is timed, shorter before longer, so that a slow side's time is known before its longer call is started."""
    if "operator" in options.parts:
        for n, T in product(options.threads, sorted(options.lengths)):
            make = lambda T=T: _operator_sides(options.forms, T)
            yield Group(f"T={T}, {n} thread{'s' * (n > 1)}", n, dict(B=B, T=T), make)
    if "step" in options.parts:
        for n, states in product(options.threads, STEPS):
            make = lambda states=states: _step_sides(options.forms, states)
            yield Group(f"step, B·H={states}, {n} thread{'s' * (n > 1)}", n, dict(B=states // H, T=1), make)


def _operator_sides(forms: Sequence[str], T: int) -> list[peers.Side]:
    inputs = Inputs.create(B=B, T=T)
    sides = [side for form in forms for side in peers.operator(form, inputs, "cpu")]
    sides += [side for form in forms if form != "bf16" for side in peers.operator(form, inputs, "eager")]
    sides += peers.sdpa(inputs, causal=True)
    if "bidirectional" in forms:
        sides += peers.sdpa(inputs, causal=False)
    return sides + peers.copy(inputs) + peers.mm()


def _step_sides(forms: Sequence[str], states: int) -> list[peers.Side]:
    sides = [side for form in STEP_FORMS if form in forms for side in peers.step(form, states, "auto")]
    return sides + peers.state_copies(states) + peers.step("scalar", states, "eager")


def time_group(group: Group, budget: Budget, known: dict, missing: str | None) -> list[Row]:
    """Rows of one group. `known` holds (T, milliseconds) of the sides of shorter groups; `missing` is why backend cpu cannot be timed."""
    before = torch.get_num_threads()
    torch.set_num_threads(group.threads)
    try:
        rows, timed = [], []
        for side in group.make():
            if reason := _refusal(side, missing) or _too_long(side, group, budget, known):
                rows.append(_row(side, group, skipped=reason))
            else:
                timed.append(side)
        for side, samples in zip(timed, take_turns([side.run for side in timed], budget), strict=True):
            row = _row(side, group, **spread(samples))
            known[side.peer, side.form, side.call, group.threads] = (group.size["T"], row.p50)
            rows.append(row)
    finally:
        torch.set_num_threads(before)
    return [replace(row, ratios=_ratios(row, rows)) for row in rows]


def _refusal(side: peers.Side, missing: str | None) -> str | None:
    """Why the operator does not take this call; asked on a few tokens, so that it costs nothing."""
    if side.peer != "cpu":
        return None
    if missing or side.call == "step":
        return missing
    small = next(one for one in peers.operator(side.form, Inputs.create(B=B, T=16), "cpu") if one.call == side.call)
    try:
        small.run()
    except linattn.Refusal as refusal:
        return str(refusal).splitlines()[-1].strip()
    return None


def _too_long(side: peers.Side, group: Group, budget: Budget, known: dict) -> str | None:
    key = (side.peer, side.form, side.call, group.threads)
    if key not in known or side.call == "step":
        return None
    T, milliseconds = known[key]
    expected = milliseconds / 1e3 * (group.size["T"] / T) ** side.growth
    if expected <= budget.cap:
        return None
    return f"one call would take about {expected:.0f} s (from T = {T}); the limit is {budget.cap:g} s"


def _row(side: peers.Side, group: Group, **figures) -> Row:
    flops = None
    if side.peer == "mm":
        flops = 2 * peers.MM**3
    elif side.peer in ("cpu", "eager") and side.call == "forward" and side.form in FORMS and FORMS[side.form].causal:
        flops = counted_flops(group.size["T"])
    dtype = str(FORMS[side.form].dtype if side.form in FORMS else torch.float32).removeprefix("torch.")
    what = dict(peer=side.peer, form=side.form, call=side.call, dtype=dtype, flops=flops)
    return Row(**what, **group.size, H=H, K=K, V=V, threads=group.threads, **figures)


def _ratios(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """How many times as long each peer of a row takes for the same call in the same dtype, and for bf16 its float32 twin."""
    if row.p50 is None or row.peer not in ("cpu", "eager"):
        return {}
    rivals = {"eager": row.form if row.call != "step" else "scalar", "copy": "", "clone": ""}
    if row.call in CALLS:
        rivals["sdpa"] = "causal" if FORMS[row.form].causal else "bidirectional"
    same = (other for other in rows if (other.call, other.dtype) == (row.call, row.dtype) and other.peer != row.peer and other.p50)
    found = {other.peer: other.p50 / row.p50 for other in same if rivals.get(other.peer) == other.form}
    if row.form == "bf16":
        twin = [other.p50 for other in rows if (other.peer, other.form, other.call) == (row.peer, "scalar", row.call) and other.p50]
        found |= dict(float32=twin[0] / row.p50) if twin else {}
    return found


def measure_memory(options: Options, missing: str | None) -> Iterator[Memory]:
    """Extra memory on the longest length for the three kinds of state update, and what a step allocates."""
    kinds = [form for form in ("scalar", "channel", "delta") if form in options.forms]
    steps = [form for form in STEP_FORMS if form in options.forms]
    threads = options.threads
    if options.quick:  # each figure is a process, which takes seconds to start
        kinds, steps, threads = kinds[:1], steps[-1:], threads[-1:]
    wanted = [(form, call, max(options.lengths), n) for n, form, call in product(threads, kinds, CALLS)]
    wanted += [(form, "step", STEPS[-1], threads[-1]) for form in steps]
    for form, call, size, n in wanted:
        yield memory.measure(form, call, size, n, "auto" if call == "step" else "cpu", missing)


def run(options: Options, command: str, told: Callable[[str, int, int], None] = lambda label, done, total: None) -> Record:
    """Measure everything asked for. `told` hears what is measured next, and how much of the whole is done."""
    start = time.monotonic()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts, git, missing = machine.facts(), machine.git(), linattn.why_not("cpu")
    plan = list(groups(options))
    total = len(plan) + ("memory" in options.parts)
    rows: list[Row] = []
    known: dict = {}
    for done, group in enumerate(plan):
        told(group.label, done, total)
        rows += time_group(group, options.budget, known, missing)
    used: list[Memory] = []
    if "memory" in options.parts:
        told("memory", total - 1, total)
        used = list(measure_memory(options, missing))
    told("done", total, total)
    return Record(
        kind="cpu-quick" if options.quick else "cpu",
        date=date,
        command=command,
        git=git,
        machine=facts,
        versions=machine.versions(),
        options={"lengths": list(options.lengths), "threads": list(options.threads), "only": list(options.only), "quick": options.quick},
        method=METHOD,
        rows=tuple(rows),
        memory=tuple(used),
        checks=tuple(checks.operator_checks(rows, facts["flags"]) + checks.step_checks(rows, used) + checks.memory_checks(used)),
        seconds=round(time.monotonic() - start, 1),
    )

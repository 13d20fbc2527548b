"""The one place that knows what a legal call of the operator looks like, how to run it whole, and when two answers agree."""

import itertools
import random
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

import linattn
from linattn.ops.backends import BY_NAME
from linattn.ops.form import Call

DECAYS = ("none", "head", "scalar", "channel")
DIRECTIONS = ("causal", "source", "target", "symmetric")  # the last three: causal=False with that gating
NORMALIZERS = ("none", "sum", "clamp")
PLAIN = Call("cpu", torch.float32, "none", False, True, 64, 64)
PRESENT = tuple(name for name in linattn.BACKENDS if BY_NAME[name].why_not(PLAIN) is None)  # on CPU tensors
RECORDS = ((), ("boundaries",), ("writes",), ("boundaries", "writes"))
FLOOR = 100  # roundings, of a right answer's largest element, that it may be off by; `eager` has needed 70 (clocks of strong decays)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: everything but the numbers, which `inputs` draws from a seed."""

    decay: str = "scalar"
    delta: bool = False
    direction: str = "causal"
    normalize: str = "none"
    groups: int = 1
    T: int = 37
    dtype: torch.dtype = torch.float32
    widths: tuple[int, int] = (8, 6)  # K, V
    B: int = 2
    H: int = 2
    packed: bool = False  # B = 1, `lengths` of T in all
    state: bool = True  # an initial state is given
    final: bool = True  # the last one is asked for
    record: tuple[str, ...] = ()
    stride: int = 16

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequence lengths of the packed call: empty ones at both ends and inside, one of a single token where T allows it."""
        one, third = min(self.T, 1), self.T // 3
        return 0, one, third, 0, self.T - one - third, 0

    @property
    def causal(self) -> bool:
        return self.direction == "causal"

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        words = [self.decay, "delta" if self.delta else "additive", self.direction, self.normalize, f"T{self.T}", f"G{self.groups}"]
        words += [str(self.dtype).removeprefix("torch."), "x".join(map(str, self.widths)), "packed" if self.packed else "dense"]
        return "-".join(
            [*words, "from" if self.state else "fresh", "to" if self.final else "open", "+".join(self.record) or "plain", str(self.stride)]
        )

    def inputs(self, seed: int = 0) -> tuple[dict, dict]:
        """(tensors, options) of `linear_attention`. Normalised calls have positive features, and clamped ones some rows of q negative,
        so that every row sum lies well to one side of its clamp; keys of the delta rule have length 1."""
        draw = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
        rand = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)
        (K, V), T, H = self.widths, self.T, self.H
        B = 1 if self.packed else self.B
        q, k, v = randn(B, T, H * self.groups, K), randn(B, T, H, K), randn(B, T, H, V)
        if self.normalize != "none":
            q, k = 0.5 + rand(*q.shape), 0.5 + rand(*k.shape)
        if self.normalize == "clamp":
            q[:, ::3] *= -1
        if self.delta:
            k = k / k.norm(dim=-1, keepdim=True)
        shape = {"none": None, "head": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}[self.decay]
        log_decay = None if shape is None else -torch.exp(1.5 * randn(*shape) - 3)  # mostly mild, a few strong
        beta = rand(B, T, H) if self.delta else None
        n = (() if self.causal else (2,)) + (len(self.lengths) if self.packed else B,)
        kv, z = randn(*n, H, K, V), rand(*n, H, K)
        if not self.state:
            kv = z = None
        elif self.normalize == "none":
            z = None
        to = lambda x, dtype: None if x is None else x.to(dtype)
        tensors = {name: to(x, self.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        rest = (("log_decay", log_decay), ("beta", beta), ("kv", kv), ("z", z))
        tensors |= {name: to(x, self.accumulator) for name, x in rest}
        options = {"causal": self.causal, "gating": None if self.causal else self.direction, "normalize": self.normalize}
        options |= {"eps": 0.1, "record": self.record, "stride": self.stride, "return_state": self.final}
        options["normalize"] = False if self.normalize == "none" else self.normalize
        if self.packed:
            options["cu_seqlens"] = torch.tensor((0, *itertools.accumulate(self.lengths)))
        return tensors, options


def takes(backend: str, case: Case) -> bool:
    """Whether `backend` takes the call of `case`."""
    call = Call("cpu", case.dtype, case.decay, case.delta, case.causal, *case.widths)
    return BY_NAME[backend].why_not(call) is None


def widest(backend: str) -> torch.dtype:
    """The most exact dtype `backend` takes: a property of the maths is best seen there."""
    return torch.float64 if takes(backend, Case(dtype=torch.float64)) else torch.float32


@contextmanager
def instruction_set(name: str):
    """Backend `cpu` on instruction set `name`; skips the test where the build or the machine has none."""
    if "cpu" not in PRESENT:
        pytest.skip(linattn.why_not("cpu"))
    best = torch.ops.linattn.isa(None)
    try:
        torch.ops.linattn.isa(name)
    except (RuntimeError, ValueError) as refused:  # by the version of torch
        pytest.skip(str(refused))
    try:
        yield
    finally:
        torch.ops.linattn.isa(best)


def call(tensors: dict, options: dict, backend: str) -> dict[str, torch.Tensor]:
    """`linear_attention` on a dict of tensors → a flat dict of all it returns that is there."""
    q, k, v, log_decay, beta, kv, z = (tensors[name] for name in ("q", "k", "v", "log_decay", "beta", "kv", "z"))
    initial = None if kv is None else linattn.State(kv, z)
    o, state, *rest = linattn.linear_attention(
        q, k, v, log_decay, beta, initial_state=initial, **{"return_state": True, **options}, backend=backend
    )
    out = {"o": o}
    if state is not None:
        out |= {"state.kv": state.kv, "state.z": state.z}
    if rest:
        boundaries, writes = rest[0]
        out |= {"writes": writes} | ({} if boundaries is None else {"boundaries.kv": boundaries.kv, "boundaries.z": boundaries.z})
    return {name: x for name, x in out.items() if x is not None}


def cotangent(name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient that comes in for output `name`: the same numbers for every backend, exact in `dtype`."""
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(x.shape, generator=draw, dtype=torch.float64).to(dtype).to(x.dtype)


def whole(case: Case, backend: str, *, double: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """All outputs of `case` and the gradients of all its floating inputs from all of them; `double`: the same numbers in float64."""
    tensors, options = case.inputs(seed)
    to = (lambda x: x.double()) if double else (lambda x: x)
    tensors = {name: None if x is None else to(x).requires_grad_() for name, x in tensors.items()}
    out = call(tensors, options, backend)
    given = {name: x for name, x in tensors.items() if x is not None}
    reached = {name: x for name, x in out.items() if x.requires_grad}  # at T = 0 an output may hang on nothing
    incoming = [cotangent(name, x, case.dtype) for name, x in reached.items()]
    torch.autograd.backward(list(reached.values()), incoming)
    found = {f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in given.items()}
    return {name: x.detach() for name, x in (out | found).items()}


def worst(error: torch.Tensor) -> tuple[int, ...]:
    """Index of the largest error; a NaN is the largest."""
    return tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))


def check(case: Case, backend: str, got: dict, eager: dict, gold: dict) -> None:
    """|got − gold| ≤ 2·|eager − gold| + (FLOOR · eps(accumulator) + eps(dtype)) · size, everywhere; eager itself: the floor alone.

    size is max|gold|, and for a gradient at least |G|max·|o|max: its terms may cancel, their roundings do not.
    """
    assert got.keys() == gold.keys()
    failures = []
    eps = FLOOR * torch.finfo(case.accumulator).eps + (case.dtype != case.accumulator) * torch.finfo(case.dtype).eps
    incoming = 4 * gold["o"].abs().max().item() if gold["o"].numel() else 0.0  # cotangents are standard normal
    for name, true in gold.items():
        mine, other = got[name], eager[name]
        if mine.shape != true.shape:
            failures.append(f"{name}: shape {tuple(mine.shape)}, wanted {tuple(true.shape)}")
            continue
        if mine.numel() == 0:
            continue
        wanted_dtype = case.dtype if name in ("o", "dq", "dk", "dv") else case.accumulator
        if mine.dtype != wanted_dtype:
            failures.append(f"{name}: dtype {mine.dtype}, wanted {wanted_dtype}")
        error, its = (mine.double() - true).abs(), (other.double() - true).abs()
        size = max(true.abs().max().item(), incoming if name.startswith("d") else 0.0)
        if name == "dlog_decay" and case.decay == "head":
            size *= 4  # a sum over all tokens of running sums, whose roundings are of one sign: cpu has needed 213, eager 22
        allowed = eps * size + (0 if got is eager else 2 * its.max().item())
        if not error.max().item() <= allowed:  # not ≤ rather than >: NaN fails too
            at = worst(error)
            failures.append(
                f"{name}{list(at)}: {backend} {mine[at].item():.9g}, gold {true[at].item():.9g}, error {error[at].item():.3g} "
                f"> {allowed:.3g}; eager's error there {its[at].item():.3g}, its worst {its.max().item():.3g}; size {size:.3g}"
            )
    assert not failures, f"{case}\n" + "\n".join(failures)


def agree(a: torch.Tensor, b: torch.Tensor, what: str = "", slack: float = FLOOR) -> None:
    """Two ways to one answer, apart by rounding only: |a − b| ≤ slack · eps · max|b|."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.numel() == 0:
        return
    error, allowed = (a - b).abs(), slack * torch.finfo(a.dtype).eps * b.abs().max().item()
    if not error.max().item() <= allowed:
        at = worst(error)
        raise AssertionError(f"{what}{list(at)}: {a[at].item():.9g} and {b[at].item():.9g}, apart {error[at].item():.3g} > {allowed:.3g}")


def pairwise(axes: dict[str, tuple], seed: int = 0) -> list[dict]:
    """A few rows of values in which any value of one axis meets any value of another at least once; greedy, from a seed."""
    draw = random.Random(seed)
    pairs = lambda row: set(itertools.combinations(row.items(), 2))
    todo = {((a, x), (b, y)) for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b]}
    rows = []
    while todo:
        missing = dict(min(todo, key=repr))
        rows.append(
            max(
                ({name: missing.get(name, draw.choice(values)) for name, values in axes.items()} for _ in range(50)),
                key=lambda row: len(todo & pairs(row)),
            )
        )
        todo -= pairs(rows[-1])
    return rows


# -- for tests of properties: every backend, in a few calls of every kind ---------------------------------------------------------------

PROPERTY_AXES = {"decay": DECAYS, "delta": (False, True), "direction": DIRECTIONS, "normalize": NORMALIZERS, "groups": (1, 2)}
SOME = [Case(**row) for row in pairwise(PROPERTY_AXES)]
BACKEND = pytest.mark.parametrize("backend", PRESENT)


def some(cases=SOME, **changes):
    return pytest.mark.parametrize("case", [replace(case, **changes) for case in cases], ids=str)


def all_agree(some: dict, other: dict, slack: float = FLOOR) -> None:
    assert some.keys() == other.keys()
    for name in some:
        agree(some[name], other[name], name, slack)


def states(out: dict) -> dict:
    return {name: x for name, x in out.items() if name.startswith("state")}

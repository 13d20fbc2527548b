"""Every backend against the float64 oracle: outputs, states, records and the gradient of every floating input from all of them."""

import functools
import itertools

import pytest
import torch
from cases import DECAYS, DIRECTIONS, NORMALIZERS, PRESENT, RECORDS, Case, check, instruction_set, pairwise, takes, whole

import linattn

NARROW = (torch.float32, torch.bfloat16)
AXES = {
    "decay": DECAYS,
    "delta": (False, True),
    "direction": DIRECTIONS,
    "normalize": NORMALIZERS,
    "groups": (1, 2, 3),
    "T": (0, 1, 37, 64, 257),
    "widths": ((1, 1), (5, 3), (16, 16), (33, 48), (64, 64)),
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "packed": (False, True),
    "state": (True, False),
    "record": RECORDS,
    "stride": (16, 48, 64),
}
SHORT = [Case(**row) for seed in (0, 1) for row in pairwise(AXES, seed)]
LONG = [
    Case(T=1000, decay="channel", B=1, H=1, dtype=torch.bfloat16, groups=2),
    Case(T=1000, decay="scalar", B=1, H=1, delta=True, direction="symmetric", record=RECORDS[3]),
    Case(T=1000, decay="head", direction="source", normalize="sum", packed=True),
]


@functools.lru_cache(4)
def gold(case):
    return whole(case, "reference", double=True)


@functools.lru_cache(4)
def eager(case):
    return whole(case, "eager")


def compare(case, backend):
    got = eager(case) if backend == "eager" else whole(case, backend)
    check(case, backend, got, eager(case), gold(case))


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("case", SHORT + LONG, ids=str)
def test_pairs_of_the_grid(case, backend):
    if takes(backend, case):
        compare(case, backend)
    else:
        assert backend != "eager" and case.dtype not in NARROW, f"{backend} refuses {case}"


@pytest.mark.parametrize("backend", [name for name in PRESENT if name not in ("eager", "reference")])
@pytest.mark.parametrize(
    ("decay", "delta"),
    [("none", False), ("head", True), ("scalar", False), ("channel", False), pytest.param("channel", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("direction", ["causal", "source"])
def test_a_long_row_of_one_head(decay, delta, direction, backend):
    """Where a kernel cuts one row into segments. Eager in float64 stands for the oracle, as `test_pairs_of_the_grid` allows."""
    torch.set_num_threads(4)  # below four threads to a head C++ does not cut the delta rule
    record = ("writes",) if backend == "cpu" else RECORDS[3]  # nor, ever, a walk that records boundaries
    case = Case(decay=decay, delta=delta, direction=direction, T=4099, B=1, H=1, widths=(16, 33), record=record, stride=64)
    check(case, backend, whole(case, backend), whole(case, "eager"), whole(case, "eager", double=True))


@pytest.mark.parametrize("isa", ["plain", "avx512"])
@pytest.mark.parametrize(("normalize", "heads"), [("none", 2), ("sum", 1), ("clamp", 2)])
def test_both_directions_without_decay_are_one_sum(normalize, heads, isa):
    """Of one row in segments, and of rows side by side."""
    case = Case(decay="none", direction="source", normalize=normalize, T=1100, B=1, H=heads, widths=(16, 32), groups=2, record=())
    with instruction_set(isa):
        check(case, "cpu", whole(case, "cpu"), whole(case, "eager"), whole(case, "eager", double=True))


LARGE = ["none", "scalar", "channel delta", "bidirectional"]


@pytest.mark.parametrize(("isa", "form"), [("plain", "none"), ("plain", "scalar"), *itertools.product(("avx2", "avx512"), LARGE)])
def test_calls_too_large_for_the_caches(form, isa):
    """From 2 Mi numbers on outputs are stored another way, and heads are walked side by side; one head alone is neither."""
    T, H = 8208, 4
    q, k, v = (torch.randn(1, T, H, 64) for _ in range(3))
    k, options = torch.nn.functional.normalize(k, dim=-1), {}
    given = [q, k, v] if form == "none" else [q, k, v, torch.full((1, T, H, 64) if form == "channel delta" else (1, T, H), -0.1)]
    if form == "channel delta":
        given.append(torch.rand(1, T, H))
    if form == "bidirectional":
        options = {"causal": False, "gating": "source"}
    grad = torch.randn(1, T, H, 64)

    def results(*tensors):
        tensors = [x.requires_grad_() for x in tensors]
        o, _ = linattn.linear_attention(*tensors, **options, backend="cpu")
        return o, *torch.autograd.grad(o, tensors, grad[:, :, : o.shape[2]])

    with instruction_set(isa):
        together = results(*given)
        alone = results(*(x[:, :, :1].detach().clone() for x in given))
    for all_of_it, part in zip(together, alone):
        torch.testing.assert_close(all_of_it[:, :, :1], part, rtol=1e-5, atol=1e-5 * part.abs().max().item())  # alone it may go by segments


@pytest.mark.parametrize("isa", ["plain", "avx2"])
@pytest.mark.parametrize("case", [case for case in SHORT[::2] if case.dtype in NARROW], ids=str)
def test_every_instruction_set(case, isa):
    with instruction_set(isa):
        compare(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "facts", list(itertools.product(DECAYS, (False, True), DIRECTIONS, NORMALIZERS)), ids=lambda facts: "-".join(map(str, facts))
)
def test_whole_grid(facts):
    decay, delta, direction, normalize = facts
    for T, dtype, groups in itertools.product((1, 37, 64, 257), NARROW, (1, 3)):
        case = Case(
            decay=decay, delta=delta, direction=direction, normalize=normalize, T=T, dtype=dtype, groups=groups, B=1,
            packed=T == 64, record=RECORDS[3], widths=(16, 16) if groups == 1 else (33, 48),
        )  # fmt: skip
        for backend in PRESENT:
            if backend != "reference" and takes(backend, case):  # the reference is the gold here
                compare(case, backend)

"""Every kernel against the float64 oracle, in the interpreter. Run by test_triton_kernels.py, which turns the interpreter on."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import DECAYS, DIRECTIONS, RECORDS, Case, call, check, pairwise, whole

import linattn
from bench.interpreter import widen_bfloat16
from linattn.ops import tiles
from linattn.ops.triton import passes

widen_bfloat16()
pytestmark = [  # of NumPy, inside the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # in lanes that are masked
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6
]

FORMS = [
    Case(decay=decay, delta=delta, direction=direction, B=1, H=1, T=40, widths=(8, 6))
    for decay, delta, direction in itertools.product(DECAYS, (False, True), DIRECTIONS)
    if decay in ("scalar", "channel") or direction in ("causal", "target")  # constant gates: the conventions are one
]
FEATURES = {
    "form": tuple((c.decay, c.delta, c.direction) for c in FORMS),
    "normalize": ("none", "sum", "clamp"),
    "groups": (1, 3),
    "T": (1, 15, 64, 65, 130, 257),
    "widths": ((16, 16), (20, 40), (40, 20), (96, 32), (32, 128)),
    "packed": (False, True),
    "state": (True, False),
    "final": (True, False),
    "record": RECORDS,
    "stride": (16, 48, 64),
    "programs": (1, 100),
}


def as_cases(rows):
    for row in rows:
        (decay, delta, direction), programs = row.pop("form"), row.pop("programs")
        yield Case(decay=decay, delta=delta, direction=direction, B=1, H=1, **row), programs


SMALL = {"T": (1, 15, 70), "widths": ((16, 16), (20, 40), (40, 20)), "form": FEATURES["form"][::7]}
MIXED = list(as_cases(pairwise(FEATURES | SMALL)))
ALL = list(as_cases(pairwise(FEATURES)))


def compare(case, programs=1):
    """`programs`: how many the tiles table is told to want; 1 leaves every sequence in one segment, many cut it into single chunks."""
    gold = whole(case, "reference", double=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "PROGRAMS", programs)
        patch.setattr(tiles, "LEAST", 1)
        patch.setattr(passes, "FEWEST", 2)
        got = whole(case, "triton")
    check(case, "triton", got, whole(case, "eager"), gold)
    for name, error in errors(got, gold).items():
        assert error < 1e-5, f"{name}: relative error {error:.2g}"


def errors(got, gold):
    """Relative errors in the L2 norm. The gate of a head gets a sum that cancels: its error is judged by the size of the terms."""
    size = lambda name, true: max(true.norm().item(), 4 * gold["o"].norm().item() if name == "dlog_decay" else 0.0)
    return {name: (got[name].double() - true).norm().item() / max(size(name, true), 1e-3) for name, true in gold.items() if true.numel()}


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_forms(case):
    compare(case)


@pytest.mark.parametrize(("case", "programs"), MIXED[:10], ids=str)
def test_features(case, programs):
    compare(case, programs)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "programs"), ALL, ids=str)
def test_pairs_of_all_features(case, programs):
    compare(case, programs)


SHORT = {
    "decay": ("none", "head", "scalar"),
    "direction": ("causal", "source", "target", "symmetric"),
    "normalize": ("none", "sum", "clamp"),
    "groups": (1, 2),
    "T": (1, 64, 70),
    "widths": ((16, 16), (20, 40)),
}
QUADRATIC = [Case(**row, B=1, H=1, state=False, final=False) for row in pairwise(SHORT)]


@pytest.mark.parametrize("case", QUADRATIC, ids=str)
def test_short_sequences(case, monkeypatch):
    """Without states and up to 256 tokens by the quadratic form, and by no other."""
    monkeypatch.setattr(passes, "seg_state", None)
    monkeypatch.setattr(passes, "output", None)
    compare(case)


@pytest.mark.slow
@pytest.mark.parametrize("groups", (1, 3))
@pytest.mark.parametrize("case", QUADRATIC[::2], ids=str)
def test_sequences_as_long_as_short_ones_may_be(case, groups, monkeypatch):
    monkeypatch.setattr(passes, "seg_state", None)
    compare(replace(case, T=256, groups=groups, B=2, H=2))


WAYS = [(decay, way) for decay in DECAYS for way in ("additive", "delta", "short") if (decay, way) != ("channel", "short")]


def in_bfloat16(decay, way, direction, width=16):
    states = {"state": way != "short", "final": way != "short"}
    case = Case(
        decay=decay, delta=way == "delta", direction=direction, B=1, H=1, T=70, widths=(width, width), dtype=torch.bfloat16, **states
    )
    for name, error in errors(whole(case, "triton"), whole(case, "reference", double=True)).items():
        assert error < 4e-3, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize(("decay", "way"), WAYS)
def test_bfloat16(decay, way):
    in_bfloat16(decay, way, ("causal", "symmetric")[WAYS.index((decay, way)) % 2])


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "way"), WAYS)
def test_bfloat16_from_the_other_side(decay, way):
    in_bfloat16(decay, way, ("symmetric", "causal")[WAYS.index((decay, way)) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_of_wide_heads_under_the_delta_rule(decay):
    """Where the gradients' products are rounded that are not in narrower ones, see delta.py."""
    in_bfloat16(decay, "delta", "symmetric" if decay == "none" else "causal", 128)


def test_delta_rule_in_segments():
    """A sequence cut in three, two of them packed: joined by products of what the segments do to a state."""
    compare(Case(decay="scalar", delta=True, B=1, H=1, T=70, groups=2, record=("boundaries", "writes"), stride=48), programs=100)
    compare(Case(decay="channel", delta=True, direction="source", B=1, H=1, T=100, normalize="sum", packed=True), programs=100)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("delta", (False, True))
def test_wide_heads(decay, delta):
    for widths in ((256, 16), (16, 256), (72, 200)):
        compare(Case(decay=decay, delta=delta, B=1, H=1, T=40, widths=widths))


def test_no_tokens():
    compare(Case(T=0, normalize="sum", decay="channel", direction="source"))
    compare(Case(T=0, packed=True))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("delta", (False, True))
def test_step(decay, delta):
    case = Case(decay=decay, delta=delta, T=1, groups=2, widths=(20, 40), normalize="sum")
    tensors, _ = case.inputs()
    q, k, v, log_decay, beta, kv, z = tensors.values()
    now = lambda x: x if x is None or x.ndim == 1 else x[:, 0]
    inputs = (now(q), now(k), now(v), now(log_decay), now(beta), kv, z)
    form = linattn.ops.form.Form(0.3, True, "target", "sum", 0.1, 0, False)
    got, wanted = (linattn.ops.backends.BY_NAME[name].step(*inputs, form) for name in ("triton", "eager"))
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_same_bits_twice():
    case = Case(decay="scalar", direction="source", normalize="sum", T=130, B=1, H=1, widths=(16, 16))
    a, b = whole(case, "triton"), whole(case, "triton")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_refusals():
    tensors, options = Case(dtype=torch.float64).inputs()
    with pytest.raises(ValueError, match="float64"):
        call(tensors, options, "triton")
    tensors, options = Case(widths=(300, 4)).inputs()
    with pytest.raises(ValueError, match="wider than 256"):
        call(tensors, options, "triton")

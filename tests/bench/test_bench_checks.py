"""Promises on crafted figures: what fails must fail, at the right place, and what was not measured is neither."""

from dataclasses import replace

import pytest

from bench.cases import CALLS, LENGTHS, STEPS, counted_flops
from bench.checks import memory_checks, operator_checks, step_checks
from bench.records import Cell, Check, Memory, Row


def row(peer, form, call, T, ms, *, threads=1, B=1, flops=None):
    return Row(
        peer=peer, form=form, call=call, B=B, T=T, H=8, K=64, V=64, dtype="float32", threads=threads,
        samples=5, p20=ms, p50=ms, p80=ms, flops=flops,
    )  # fmt: skip


def good_rows() -> dict[tuple, Row]:
    """A machine on which every promise is kept, though none by much: milliseconds per 1024 tokens are 1 forward, 3 backward."""
    rows = []
    for T in LENGTHS:
        unit = T / 1024
        for call, times in zip(CALLS, (1.0, 3.9)):
            flops = counted_flops(T) if call == "forward" else None
            for form, cost in (("scalar", 1.0), ("channel", 1.5), ("bidirectional", 1.6), ("bf16", 0.6)):
                rows.append(row("cpu", form, call, T, cost * times * unit, flops=flops))
                rows.append(row("eager", form, call, T, 6.5 * cost * times * unit))
            for form in ("causal", "bidirectional"):
                rows.append(row("sdpa", form, call, T, 10.4 * times * unit**2))
        rate = counted_flops(16384) / 16.0 / 0.8  # FLOPs per millisecond of which scalar reaches 0.8
        rows.append(row("mm", "", "product", T, 2 * 2048**3 / rate, flops=2 * 2048**3))
    return {(one.peer, one.form, one.call, one.T): one for one in rows}


def by_name(checks):
    return {(check.promise, check.form): check for check in checks}


def operator(rows, flags=("avx512_bf16",)):
    return by_name(operator_checks(list(rows.values()), flags))


def test_a_good_machine_keeps_every_promise():
    checks = operator(good_rows())
    assert {check.verdict for check in checks.values()} == {"pass"}
    assert len(checks) == 3 + 3 * 3 + 1 + 1 + 1 + 4 + 4
    rate = checks["FLOP rate as a part of torch.mm's, T = 16384", "scalar"]
    assert rate.worst.figure == pytest.approx(0.8)


BOTH = "forward+backward"
EAGER, SOFTMAX = "times faster than eager, T ≥ 1024", "times faster than softmax, "
SLOWER = [  # one time changed → the promise that breaks, and where
    (("eager", "scalar", "forward", 4096), 0.9, EAGER, "scalar", "T=4096 forward, 1 thread"),
    (("eager", "channel", BOTH, 65536), 0.9, EAGER, "channel", f"T=65536 {BOTH}, 1 thread"),
    (("sdpa", "causal", "forward", 256), 0.3, SOFTMAX + "every T", "scalar", "T=256 forward, 1 thread"),
    (("sdpa", "causal", "forward", 1024), 0.5, SOFTMAX + "T = 1024", "scalar", "T=1024 forward, 1 thread"),
    (("sdpa", "bidirectional", BOTH, 16384), 0.5, SOFTMAX + "T = 16384", "bidirectional", f"T=16384 {BOTH}, 1 thread"),
    (("mm", "", "product", 16384), 0.9, "FLOP rate as a part of torch.mm's, T = 16384", "scalar", "T=16384, 1 thread"),
    (("cpu", "bf16", BOTH, 1024), 1.1, "times faster than float32", "bf16", f"T=1024 {BOTH}, 1 thread"),
    (("cpu", "bidirectional", "forward", 256), 1.1, "forward beside the causal one", "bidirectional", "T=256, 1 thread"),
    (("cpu", "channel", "forward", 65536), 1.1, "time at T = 65536 beside 16384", "channel", "forward, 1 thread"),
    (("cpu", "scalar", BOTH, 4096), 1.05, "backward beside forward", "scalar", "T=4096, 1 thread"),
]


@pytest.mark.parametrize("key, factor, promise, form, where", SLOWER, ids=[case[2] + ", " + case[3] for case in SLOWER])
def test_a_figure_that_misses_its_target_fails(key, factor, promise, form, where):
    rows = good_rows()
    rows[key] = row(*key, rows[key].p50 * factor, flops=rows[key].flops)
    check = operator(rows)[promise, form]
    assert check.verdict == "fail"
    assert check.worst.where == where


def test_eager_is_not_asked_about_256_tokens():
    rows = good_rows()
    key = ("eager", "scalar", "forward", 256)
    rows[key] = row(*key, 1e-3)
    assert operator(rows)["times faster than eager, T ≥ 1024", "scalar"].verdict == "pass"


def test_the_worst_of_all_thread_counts_counts():
    one = good_rows()
    two = {(*key, 2): replace(row, threads=2) for key, row in one.items()}
    slow = ("eager", "scalar", "forward", 16384, 2)
    two[slow] = replace(two[slow], p50=1e-3)
    check = operator(one | two)["times faster than eager, T ≥ 1024", "scalar"]
    assert check.verdict == "fail" and check.worst.where == "T=16384 forward, 2 threads"
    assert len(check.cells) == 2 * 2 * 4


def test_what_was_not_measured_neither_passes_nor_fails():
    rows = {key: one for key, one in good_rows().items() if key[0] != "cpu"}
    for key, one in good_rows().items():
        if key[0] == "cpu":
            rows[key] = replace(one, samples=0, p20=None, p50=None, p80=None, skipped="the library is not built")
    checks = operator(rows)
    assert checks and {check.verdict for check in checks.values()} == {"not measured"}
    assert all("the library is not built" in missing for check in checks.values() for missing in check.missing)


def test_a_chip_without_bf16_is_not_held_to_it():
    check = operator(good_rows(), flags=("avx2",))["times faster than float32", "bf16"]
    assert check.verdict == "not measured" and check.missing == ("bf16: this chip has no AVX512-BF16",)


def test_softmax_too_long_to_time_is_not_asked_for():
    rows = {key: one for key, one in good_rows().items() if key[0] != "sdpa" or key[3] < 65536}
    for call in CALLS:
        gone = rows["cpu", "scalar", call, 65536]
        rows["sdpa", "causal", call, 65536] = replace(
            gone, peer="sdpa", form="causal", samples=0, p20=None, p50=None, p80=None, skipped="too long"
        )
    check = operator(rows)["times faster than softmax, every T", "scalar"]
    assert check.verdict == "pass" and not check.missing and len(check.cells) == 8


# -- step and memory ---------------------------------------------------------------------------------------------------------------------


def step_rows(ratio):
    return [
        one
        for size in STEPS
        for one in (row("cpu", "scalar", "step", 1, ratio * size, B=size // 8), row("copy", "", "step", 1, 1.0 * size, B=size // 8))
    ]


def step_memory(extra):
    return [Memory(form="scalar", call="step", B=64, T=1, H=8, K=64, V=64, threads=1, outputs=100, extra=extra)]


@pytest.mark.parametrize("ratio, extra, wanted", ((1.9, 0, ("pass", "pass")), (2.1, 0, ("fail", "pass")), (1.9, 4, ("pass", "fail"))))
def test_step_is_held_to_copying_and_to_no_allocation(ratio, extra, wanted):
    time, allocated = step_checks(step_rows(ratio), step_memory(extra))
    assert (time.verdict, allocated.verdict) == wanted
    assert [cell.where for cell in time.cells] == [f"B·H={size}, 1 thread" for size in STEPS]


@pytest.mark.parametrize(
    "call, mib, verdict",
    (("forward", 7, "pass"), ("forward", 9, "fail"), ("forward+backward", 135, "pass"), ("forward+backward", 137, "fail")),
)
def test_memory_is_bounded(call, mib, verdict):
    one = Memory(form="delta", call=call, B=1, T=65536, H=8, K=64, V=64, threads=2, inputs=1, outputs=1, extra=mib << 20)
    (check,) = memory_checks([one])
    assert check.verdict == verdict and check.worst == Cell("2 threads", mib)


def test_not_a_number_fails():
    nan = float("nan")
    for relation in (">=", "<="):
        check = Check(promise="p", form="scalar", relation=relation, target=1.0, cells=(Cell("a", 1.0), Cell("b", nan)))
        assert check.verdict == "fail" and check.worst.where == "b"


def test_a_check_has_one_of_two_relations():
    with pytest.raises(ValueError, match="relation must be '>=' or '<='; got '<'"):
        Check(promise="p", form="scalar", relation="<", target=1.0)

"""What a call launches, seen on tensors without memory: who waits for a GPU, or reads a number back from it, cannot be called on them."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from cases import DECAYS, DIRECTIONS, NORMALIZERS, RECORDS, Case, pairwise

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton import knobs
from triton.runtime.jit import JITFunction

from bench import host
from linattn.ops import tiles
from linattn.ops import triton as backend
from linattn.ops.form import Form
from linattn.ops.linear_attention import _backward, _forward
from linattn.ops.tiles import ARCHITECTURES
from linattn.ops.triton import direct, passes

AXES = {
    "decay": DECAYS,
    "delta": (False, True),
    "direction": DIRECTIONS,
    "normalize": NORMALIZERS,
    "groups": (1, 3),
    "T": (1, 200, 600),
    "packed": (False, True),
    "state": (False, True),
    "final": (False, True),
    "record": RECORDS,
    "dtype": (torch.float32, torch.bfloat16),
}


NUMBERS = ("N", "T", "H", "G", "family", "segments", "chunks", "every", "rows")
LIKES = {}  # what a kernel is compiled for → the tensors it was launched with: which are there, and their dtypes


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far, none of which runs."""
    names = []

    def launch(kernel, grid, tensors, numbers, fixed):
        like = [x if x is None else x.dtype for x in tensors]
        assert LIKES.setdefault(fixed, like) == like, kernel.__name__
        assert all(type(x) is float or (type(x) is int and x < 2**31) for x in numbers)
        direct.launch(kernel, grid, tensors, numbers, fixed)

    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: names.append(kernel.__name__))
    monkeypatch.setattr(passes, "architecture", lambda: "sm_90")
    monkeypatch.setattr(passes, "launch", launch)
    return names


def run(case, launched):
    """→ launches of the forward, launches of the backward."""
    tensors, options = case.inputs()
    q, k, v, log_decay, beta, kv, z = (None if x is None else x.to("meta") for x in tensors.values())
    if kv is not None:
        z = kv[..., 0] if z is None else z
        kv, z = (kv[None], z[None]) if case.causal else (kv, z)
    cu_seqlens = options["cu_seqlens"].to("meta") if case.packed else None
    inputs = (q, k, v, log_decay, beta, kv, z, cu_seqlens)
    stride = case.stride if "boundaries" in case.record else 0
    form = Form(1.0, case.causal, options["gating"] or "target", case.normalize, 0.1, stride, "writes" in case.record, case.final)
    o, last, _, d, bkv, bz, u = backend.forward(*inputs, form)
    forward = list(launched)
    launched.clear()
    states = (last, torch.empty_like(last[..., 0])) if case.final else (None, None)
    records = (bkv if stride else None, bz if stride and case.normalize != "none" else None, u if "writes" in case.record else None)
    backend.backward(torch.empty_like(o), *states, *records, *inputs, o, d, form)
    return forward, launched


@pytest.mark.parametrize("case", [Case(**row, widths=(64, 64)) for row in pairwise(AXES)], ids=str)
def test_the_host_waits_for_nothing(case, launched, monkeypatch):
    """And what tensors there are follows from what a kernel is compiled for (`LIKES`), in one segment or in many."""
    for programs in (tiles.PROGRAMS, 1):
        monkeypatch.setattr(tiles, "PROGRAMS", programs)
        forward, backward = run(case, launched)
        assert forward and backward
        launched.clear()


def test_a_kernel_specialises_on_no_number():
    for kernel in host.KERNELS:
        assert all(p.do_not_specialize for p in kernel.params if p.name in NUMBERS and not p.is_constexpr), kernel.__name__
        assert [p.is_constexpr for p in kernel.params] == sorted(p.is_constexpr for p in kernel.params), kernel.__name__  # they come last


of_39 = pytest.mark.skipif(version("triton") < "3.9", reason="the launcher that these look into is Triton 3.9's")


def both_ways(offset=0):
    """Tensors of a caller, and what reaches the driver of a forward and a backward: launched by Triton first, and then by ourselves."""
    form = (1.0, True, "target", "none", 1e-6, 0, False, False, "triton")
    q, k, v, do = (torch.zeros(300 * 64 + 8, dtype=torch.bfloat16)[offset : 300 * 64 + offset].view(1, 300, 1, 64) for _ in range(4))
    g = torch.zeros(1, 300, 1)
    with host.no_driver() as launched:
        sides = []
        for _ in range(2):
            o, _, _, d, *_ = _forward(q, k, v, g, *[None] * 4, *form)
            _backward(do, *[None] * 5, q, k, v, g, *[None] * 4, o, d, *form)
            sides.append(list(launched))
            launched.clear()
        return (q, k, v, do, g), *sides


@of_39
def test_the_second_launch_is_what_triton_would_launch():
    given, first, second = both_ways()
    known = {x.data_ptr() for x in given}
    assert [name for name, _ in first] == [name for name, _ in second] and len(first) == 7
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert a[:8] == b[:8] and a[11:15] == b[11:15]  # grid, stream, function, options
        for x, y in zip(a[15], b[15], strict=True):
            if isinstance(x, torch.Tensor):
                assert type(y) is int and (x.data_ptr() == y or x.data_ptr() not in known)
            else:
                assert x == y and type(x) is type(y)


@of_39
def test_tensors_off_16_bytes_are_left_to_triton():
    _, first, second = both_ways(offset=1)
    assert all(isinstance(values[15][1], torch.Tensor) for _, values in first + second)


@of_39
def test_launch_hooks_are_called():
    names = []
    hook = lambda metadata: names.append(metadata.get()["name"])
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        _, _, second = both_ways()
        for name, values in second:
            values[9](values[8])  # as the driver does
            assert names.pop() == name
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


PLAIN = dict(widths=(64, 64), state=False, final=False)
BY_FORM = {
    "causal": (Case(T=5000, **PLAIN), 3, 4),
    "bidirectional": (Case(T=5000, direction="target", **PLAIN), 3, 4),
    "normalised": (Case(T=5000, direction="target", normalize="sum", **PLAIN), 3, 4),
    "no decay": (Case(T=5000, decay="none", direction="target", **PLAIN), 3, 3),
    "delta, sequences that fill the chip": (Case(T=600, B=40, H=16, delta=True, **PLAIN | {"widths": (16, 16)}), 2, 3),
    "delta, one that is cut": (Case(T=5000, delta=True, **PLAIN), 3, 4),
    "delta from both sides, a call each": (Case(T=5000, delta=True, direction="target", **PLAIN), 6, 8),
    "short": (Case(T=197, **PLAIN), 1, 2),
    "short bidirectional": (Case(T=197, direction="target", normalize="sum", **PLAIN), 1, 2),
    "short, no decay": (Case(T=197, decay="none", direction="target", **PLAIN), 1, 1),
}


@pytest.mark.parametrize("name", BY_FORM)
def test_few_launches(name, launched):
    case, forward, backward = BY_FORM[name]
    assert [len(side) for side in run(case, launched)] == [forward, backward]


def test_no_length_and_no_number_of_sequences_is_compiled_for(launched, monkeypatch):
    """A kernel is compiled anew for constexprs and options alone; the same ones serve every length, batch and number of heads."""
    keys = []
    for T, B, H in ((300, 1, 1), (5000, 2, 3), (40000, 1, 1)):
        seen = set()
        note = lambda kernel, *_, seen=seen, grid=None, warmup=None, **named: seen.add(
            (kernel.__name__, str(sorted(named.items(), key=str)))
        )
        monkeypatch.setattr(JITFunction, "run", note)
        run(Case(T=T, B=B, H=H, **PLAIN), launched)
        keys.append({key for key in seen if key[0] != "seg_scan" and "'SCANNED', True" in key[1]})
    assert keys[1] == keys[2] and keys[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_tiles_for_what_it_takes(arch, launched, monkeypatch):
    from linattn.ops.form import Call

    monkeypatch.setattr(passes, "architecture", lambda: arch)
    monkeypatch.setattr(backend, "architecture", lambda: arch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    taken = 0
    for decay in DECAYS:
        for delta in (False, True):
            for direction in ("causal", "target"):
                for width in (16, 64, 128, 256):
                    call = Call("cuda", torch.bfloat16, decay, delta, direction == "causal", width, width)
                    if backend.why_not(call) is None:
                        taken += 1
                        for T in (100, 300):
                            run(
                                Case(
                                    decay=decay,
                                    delta=delta,
                                    direction=direction,
                                    T=T,
                                    dtype=torch.bfloat16,
                                    **PLAIN | {"widths": (width, width)},
                                ),
                                launched,
                            )
    assert taken

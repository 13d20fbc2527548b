"""What a call launches, seen on tensors without memory: who waits for a GPU, or reads a number back from it, cannot be called on them."""

from importlib.util import find_spec

import pytest
import torch
from cases import DECAYS, DIRECTIONS, NORMALIZERS, RECORDS, Case, pairwise

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime.jit import JITFunction

from linattn.ops import triton as backend
from linattn.ops.form import Form
from linattn.ops.tiles import ARCHITECTURES
from linattn.ops.triton import passes

AXES = {
    "decay": DECAYS,
    "delta": (False, True),
    "direction": DIRECTIONS,
    "normalize": NORMALIZERS,
    "groups": (1, 3),
    "T": (1, 200, 5000),
    "packed": (False, True),
    "state": (False, True),
    "final": (False, True),
    "record": RECORDS,
    "dtype": (torch.float32, torch.bfloat16),
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far, none of which runs."""
    names = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: names.append(kernel.__name__))
    monkeypatch.setattr(passes, "architecture", lambda: "sm_90")
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
def test_the_host_waits_for_nothing(case, launched):
    forward, backward = run(case, launched)
    assert forward and backward


PLAIN = dict(widths=(64, 64), state=False, final=False)
BY_FORM = {
    "causal": (Case(T=5000, **PLAIN), 3, 4),
    "bidirectional": (Case(T=5000, direction="target", **PLAIN), 3, 4),
    "normalised": (Case(T=5000, direction="target", normalize="sum", **PLAIN), 3, 4),
    "no decay": (Case(T=5000, decay="none", direction="target", **PLAIN), 3, 3),
    "delta, sequences that fill the chip": (Case(T=5000, B=40, H=16, delta=True, **PLAIN), 2, 4),
    "delta, one that is cut": (Case(T=5000, delta=True, **PLAIN), 4, 6),
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

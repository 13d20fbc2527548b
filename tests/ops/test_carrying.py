"""Cut anywhere, the operator is the same: one token at a time, two halves, many sequences in one row, none at all."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import (
    BACKEND,
    FLOOR,
    PRESENT,
    PROPERTY_AXES,
    Case,
    agree,
    all_agree,
    call,
    cotangent,
    instruction_set,
    pairwise,
    some,
    states,
    whole,
    widest,
)

import linattn
from linattn.ops.form import boundary_rows

AXES = {"direction": ("causal",), "widths": ((8, 6), (1, 1), (33, 48), (64, 64)), "dtype": (torch.float32, torch.bfloat16)}
CAUSAL = [Case(**row, T=19) for row in pairwise(PROPERTY_AXES | AXES)]


def tokens(tensors, at):
    """The tensors of a call cut down to the tokens `at`; states and what does not vary in time are kept."""
    timeless = lambda name, x: x is None or name in ("kv", "z") or x.ndim == 1
    return {name: x if timeless(name, x) else x[:, at] for name, x in tensors.items()}


def step_by_step(case, backend):
    """One token at a time beside the oracle, which has them all at once."""
    tensors, options = case.inputs()
    wanted = call(tensors, options, "reference")
    state, outs = linattn.State(tensors["kv"], tensors["z"]), []
    before = [None if x is None else x.clone() for x in state]
    for t in range(case.T):
        now = tokens(tensors, t)
        o, state = linattn.step(
            *(now[name] for name in ("q", "k", "v", "log_decay", "beta")),
            state=state, normalize=options["normalize"], eps=options["eps"], backend=backend,
        )  # fmt: skip
        outs.append(o)
    agree(torch.stack(outs, 1), wanted["o"], "o", slack=2 if case.dtype == torch.bfloat16 else FLOOR)
    all_agree({name: x for name, x in (("state.kv", state.kv), ("state.z", state.z)) if x is not None}, states(wanted))
    for x, y in zip(before, (tensors["kv"], tensors["z"]), strict=True):
        assert x is None or torch.equal(x, y)  # a step leaves the state it was given as it was


@pytest.mark.parametrize("backend", ["auto", *PRESENT])
@some(CAUSAL)
def test_step_is_the_operator(case, backend):
    step_by_step(case, backend)


@pytest.mark.parametrize("backend", [name for name in PRESENT if widest(name) == torch.float64])
@some(CAUSAL, dtype=torch.float64)
def test_step_is_the_operator_in_float64(case, backend):
    step_by_step(case, backend)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
@some(CAUSAL)
def test_step_in_every_instruction_set(case, isa):
    with instruction_set(isa):
        step_by_step(case, "cpu")


@some(CAUSAL[:4], T=1)
def test_step_has_the_operators_gradients(case):
    tensors, options = case.inputs()
    grads = []
    for one in (True, False):
        leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in tensors.items()}
        if one:
            now = tokens(leaves, 0)
            args = (now[name] for name in ("q", "k", "v", "log_decay", "beta"))
            state = linattn.State(leaves["kv"], leaves["z"])
            o, new = linattn.step(*args, state=state, normalize=options["normalize"], eps=options["eps"])
            o, kv = o[:, None], new.kv
        else:
            out = call(leaves, options, "auto")
            o, kv = out["o"], out["state.kv"]
        torch.autograd.backward([o, kv], [cotangent("o", o, case.dtype), cotangent("kv", kv, case.dtype)])
        grads.append({name: x.grad for name, x in leaves.items() if x is not None})
    all_agree(*grads)


@pytest.mark.parametrize("decay", ["none", "head", "scalar"])
def test_step_takes_offset_and_scale(decay):
    case = Case(decay=decay, T=9, state=False)
    tensors, options = case.inputs()
    offset = {"offset": 0.3, "scale": 0.7}
    wanted = call(tensors, options | offset, "reference")
    B, T, H, K = tensors["k"].shape
    state = linattn.State(torch.zeros(B, H, K + 1, tensors["v"].shape[-1]))  # one row more, for the constant
    for t in range(T):
        now = tokens(tensors, t)
        o, state = linattn.step(*(now[name] for name in ("q", "k", "v", "log_decay")), state=state, **offset)
        agree(o, wanted["o"][:, t], "o")
    agree(state.kv, wanted["state.kv"], "state.kv")


@BACKEND
@pytest.mark.parametrize("cut", [1, 16, 23])
@some()
def test_two_halves_make_the_whole(case, cut, backend):
    case = replace(case, dtype=widest(backend))
    tensors, options = case.inputs()
    wanted = call(tensors, options, backend)
    early, late = tokens(tensors, slice(0, cut)), tokens(tensors, slice(cut, None))
    first, second = call(early, options, backend), call(late, options, backend)
    if case.causal:
        final = second = call(late | {"kv": first["state.kv"], "z": first.get("state.z")}, options, backend)
    else:  # what comes from the left is carried to the right half, what comes from the right to the left half
        sides = lambda left, right: None if left is None else torch.stack((left[0], right[1]))
        seen_by_first = {"kv": sides(tensors["kv"], second["state.kv"]), "z": sides(tensors["z"], second.get("state.z"))}
        seen_by_second = {"kv": sides(first["state.kv"], tensors["kv"]), "z": sides(first.get("state.z"), tensors["z"])}
        first, second = call(early | seen_by_first, options, backend), call(late | seen_by_second, options, backend)
        final = {name: sides(second[name], first[name]) for name in states(first)}
    agree(torch.cat((first["o"], second["o"]), 1), wanted["o"], "o")
    all_agree(states(final), states(wanted))


@BACKEND
@some(packed=True, record=("boundaries", "writes"))
def test_packed_sequences_are_each_alone(case, backend):
    case = replace(case, dtype=widest(backend))
    tensors, options = case.inputs()
    ends = options.pop("cu_seqlens").tolist()
    row_axis = {"o": 1, "state.kv": -4, "state.z": -3, "writes": -3, "boundaries.kv": -4, "boundaries.z": -3}
    answers = []
    for packed in (True, False):
        leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in tensors.items()}
        if packed:
            out = call(leaves, options | {"cu_seqlens": torch.tensor(ends)}, backend)
        else:
            state_of = lambda n, leaves=leaves: {
                name: None if leaves[name] is None else leaves[name].narrow(axis, n, 1) for name, axis in (("kv", -4), ("z", -3))
            }
            alone = [call(tokens(leaves, slice(a, b)) | state_of(n), options, backend) for n, (a, b) in enumerate(itertools.pairwise(ends))]
            out = {}
            for name, axis in row_axis.items():
                parts = [x[name] for x in alone if name in x]
                if parts and name.startswith("boundaries"):  # sequence n from row start // stride + n on
                    shape = list(parts[0].shape)
                    shape[axis] = boundary_rows(case.T, len(parts), case.stride)
                    out[name] = parts[0].new_zeros(shape)
                    for n, part in enumerate(parts):
                        out[name].narrow(axis, ends[n] // case.stride + n, part.shape[axis]).copy_(part)
                elif parts:
                    out[name] = torch.cat(parts, axis)
        torch.autograd.backward(list(out.values()), [cotangent(name, x, case.dtype) for name, x in out.items()])
        answers.append(out | {f"d{name}": x.grad for name, x in leaves.items() if x is not None})
    assert answers[0].keys() == answers[1].keys()
    all_agree(*answers)


@BACKEND
@some(record=("boundaries", "writes"))
def test_no_sequence_at_all(case, backend):
    case = replace(case, B=0, dtype=widest(backend))
    wanted = whole(replace(case, B=1), backend)
    for name, x in whole(case, backend).items():
        if name == "dlog_decay" and case.decay == "head":
            assert torch.equal(x, torch.zeros_like(x))
        else:
            shape = list(wanted[name].shape)
            shape[0 if case.causal or name in ("o", "dq", "dk", "dv", "dlog_decay", "dbeta") else 1] = 0
            assert list(x.shape) == shape, name

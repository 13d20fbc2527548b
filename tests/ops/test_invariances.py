"""Calls that must give one answer: time turned round, constants, a decay of a richer kind, repeated heads, other dtypes and layouts."""

from dataclasses import replace

import pytest
import torch
from cases import BACKEND, DIRECTIONS, SOME, Case, agree, all_agree, call, cotangent, some, states, widest


def turned(x):
    """Time and, for a state, the two sides the other way round."""
    return {name: None if y is None else y.flip(0 if name in ("kv", "z") else 1) if y.ndim > 1 else y for name, y in x.items()}


@BACKEND
@some([case for case in SOME if not case.causal])
def test_flip_symmetry(case, backend):
    """Time reversed in, time reversed out, for the gate of the token left and of the token entered; not for the gate of the later one."""
    case = replace(case, dtype=widest(backend), state=case.direction != "symmetric")
    tensors, options = case.inputs()
    forth, back = call(tensors, options, backend), call(turned(tensors), options, backend)
    if case.direction == "symmetric" and case.decay in ("scalar", "channel"):
        assert (back["o"].flip(1) - forth["o"]).abs().max() > 1e-3 * forth["o"].abs().max()
        return
    agree(back["o"].flip(1), forth["o"], "o")
    if case.direction != "symmetric":
        all_agree({name: x.flip(0) for name, x in states(back).items()}, states(forth))


@BACKEND
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head"])
def test_gatings_differ_only_where_the_decay_varies(decay, delta, backend):
    outs = []
    for direction in DIRECTIONS[1:]:
        tensors, options = Case(decay=decay, delta=delta, direction=direction, state=False, dtype=widest(backend)).inputs()
        outs.append(call(tensors, options, backend)["o"])
        outs.append(call(tensors, options | {"gating": None}, backend)["o"])  # and none needs to be named
    for o in outs[1:]:
        agree(o, outs[0], "o")


@BACKEND
@some([case for case in SOME if case.normalize != "none" and not case.delta], state=False)
def test_normalised_constants_come_out_as_they_went_in(case, backend):
    tensors, options = replace(case, dtype=widest(backend)).inputs()
    tensors["q"] = tensors["q"].abs() + 0.1
    tensors["v"] = tensors["v"][:1, :1, :1].expand_as(tensors["v"])
    o = call(tensors, options | {"eps": 0.0}, backend)["o"]
    agree(o, tensors["v"][:, :, :1].expand_as(o), "o")


@BACKEND
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_decay_written_as_a_richer_kind_is_the_same_decay(direction, delta, backend):
    case = Case(decay="head", delta=delta, direction=direction, dtype=widest(backend))
    tensors, options = case.inputs()
    B, T, H, K = tensors["k"].shape
    scalar = tensors["log_decay"].expand(B, T, H)
    head = call(tensors, options, backend)
    all_agree(call(tensors | {"log_decay": scalar}, options, backend), head)
    all_agree(call(tensors | {"log_decay": scalar[..., None].expand(B, T, H, K)}, options, backend), head)
    all_agree(call(tensors | {"log_decay": 0 * scalar}, options, backend), call(tensors | {"log_decay": None}, options, backend))


@BACKEND
@some(groups=3)
def test_grouped_heads_are_repeated_heads(case, backend):
    case = replace(case, dtype=widest(backend))
    tensors, options = case.inputs()
    head_axis = {"k": 2, "v": 2, "beta": 2, "kv": -3, "z": -2, "log_decay": 0 if case.decay == "head" else 2}
    repeat = lambda name, x: x if x is None or name not in head_axis else x.repeat_interleave(3, head_axis[name])
    repeated = call({name: repeat(name, x) for name, x in tensors.items()}, options, backend)
    agree(call(tensors, options, backend)["o"], repeated["o"], "o")


@BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_decay_and_beta_of_any_floating_dtype(dtype, backend):
    case = Case(delta=True)
    tensors, options = case.inputs()
    narrow = {name: tensors[name].to(dtype).requires_grad_() for name in ("log_decay", "beta")}
    wide = {name: x.detach().float().requires_grad_() for name, x in narrow.items()}
    for given in (narrow, wide):
        call(tensors | given, options, backend)["o"].sum().backward()
    for name, x in narrow.items():
        assert x.grad.dtype == dtype
        agree(x.grad, wide[name].grad.to(dtype), name, slack=2 if dtype.itemsize == 2 else 1e10)


# -- layouts ----------------------------------------------------------------------------------------------------------------------------


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(x):
    big = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    big[..., ::2] = x
    return big[..., ::2]


def unaligned(x):
    return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)


def expanded(x):
    return x[..., :1].expand_as(x)


@BACKEND
@pytest.mark.parametrize("layout", [transposed, every_other, unaligned, expanded])
@pytest.mark.parametrize(
    "case",
    [Case(decay="channel", delta=True, groups=2, packed=True), Case(normalize="sum", direction="source"), Case(decay="head")],
    ids=str,
)
def test_any_layout_is_the_contiguous_one(case, layout, backend):
    tensors, options = case.inputs()
    answers = []
    for change in (layout, lambda x: layout(x).contiguous()):
        leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in tensors.items()}
        out = call({name: None if x is None else change(x) for name, x in leaves.items()}, options, backend)
        incoming = [change(cotangent(name, x, case.dtype)) for name, x in out.items()]
        torch.autograd.backward(list(out.values()), incoming)
        answers.append(out | {f"d{name}": x.grad for name, x in leaves.items() if x is not None})
    all_agree(*answers)


@BACKEND
def test_packed_ends_in_any_integer_layout(backend):
    tensors, options = Case(packed=True).inputs()
    ends = options["cu_seqlens"]
    wanted = call(tensors, options, backend)
    for other in (ends.int(), torch.stack((ends, ends), 1)[:, 0]):
        all_agree(call(tensors, options | {"cu_seqlens": other}, backend), wanted, slack=0)

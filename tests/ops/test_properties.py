"""What the operator owes its callers whatever the numbers: carrying, cutting, packing, turning round, infinities, NaN, layouts."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import DECAYS, DIRECTIONS, FLOOR, PRESENT, Case, agree, call, cotangent, pairwise, whole, widest

import linattn
from linattn.ops.form import boundary_rows

AXES = {"decay": DECAYS, "delta": (False, True), "direction": DIRECTIONS, "normalize": ("none", "sum", "clamp"), "groups": (1, 2)}
SOME = [Case(**row) for row in pairwise(AXES)]
CAUSAL = [case for row in pairwise(AXES | {"direction": ("causal",)}) if (case := Case(**row, T=19))]
BACKEND = pytest.mark.parametrize("backend", PRESENT)


def some(cases=SOME, **changes):
    return pytest.mark.parametrize("case", [replace(case, **changes) for case in cases], ids=str)


def tokens(tensors, at):
    """The tensors of a call cut down to the tokens `at`; states and what does not vary in time are kept."""
    timeless = lambda name, x: x is None or name in ("kv", "z") or x.ndim == 1
    return {name: x if timeless(name, x) else x[:, at] for name, x in tensors.items()}


def all_agree(some, other, slack=FLOOR):
    assert some.keys() == other.keys()
    for name in some:
        agree(some[name], other[name], name, slack)


def states(out):
    return {name: x for name, x in out.items() if name.startswith("state")}


def soil():
    """Leave NaN behind in the memory that the next allocations will get."""
    for n in (1, 8, 64, 512, 4096, 2**15, 2**18, 2**21):
        dirt = [torch.full((n,), torch.nan) for _ in range(8)]
        del dirt


# -- one token, two halves, many sequences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *PRESENT])
@some(CAUSAL)
def test_step_is_the_operator(case, backend):
    case = replace(case, dtype=torch.float32 if backend == "auto" else widest(backend))
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
    agree(torch.stack(outs, 1), wanted["o"], "o")
    all_agree({name: x for name, x in (("state.kv", state.kv), ("state.z", state.z)) if x is not None}, states(wanted))
    for x, y in zip(before, (tensors["kv"], tensors["z"]), strict=True):
        assert x is None or torch.equal(x, y)  # a step leaves the state it was given as it was


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
            alone = [
                call(tokens(leaves, slice(a, b)) | state_of(n), options, backend) for n, (a, b) in enumerate(itertools.pairwise(ends))
            ]
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


# -- turning round, constants, kinds, heads ---------------------------------------------------------------------------------------------


def turned(x, case):
    """Time and, for a state, the two sides the other way round."""
    return {
        name: None if y is None else y.flip(0 if name in ("kv", "z") else 1) if y.ndim > 1 else y for name, y in x.items()
    }


@BACKEND
@some([case for case in SOME if not case.causal])
def test_flip_symmetry(case, backend):
    """Time reversed in, time reversed out, for the gate of the token left and of the token entered; not for the gate of the later one."""
    case = replace(case, dtype=widest(backend), state=case.direction != "symmetric")
    tensors, options = case.inputs()
    forth, back = call(tensors, options, backend), call(turned(tensors, case), options, backend)
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


# -- the same bits, infinities, NaN -----------------------------------------------------------------------------------------------------


@BACKEND
@some(SOME + [Case(T=700, B=1, H=1, record=("boundaries", "writes")), Case(T=300, dtype=torch.bfloat16, packed=True)])
def test_same_bits_twice(case, backend):
    """Whatever lies in the memory that the second run is given."""
    first = whole(case, backend)
    soil()
    second = whole(case, backend)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("backend", [name for name in PRESENT if name != "reference"])
@some([Case(T=1000, B=1, H=1), Case(T=1000, B=1, H=1, decay="channel", delta=True), Case(T=1000, B=1, H=3, direction="source")])
def test_number_of_threads_changes_rounding_only(case, backend):
    threads, answers = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            answers.append(whole(case, backend))
    finally:
        torch.set_num_threads(threads)
    all_agree(answers[1], answers[0])
    all_agree(answers[2], answers[0])


@BACKEND
@pytest.mark.parametrize("strength", [30.0, 1e4, torch.inf])
@some([case for case in SOME if case.decay != "none"], T=70)
def test_strong_decays_forget_and_stay_finite(case, strength, backend):
    """Every third token forgets by `strength`, in a channel decay half of its channels; float32 clocks keep three digits beside it."""
    tensors, options = case.inputs()
    log_decay = tensors["log_decay"]
    strong = log_decay[1:] if case.decay == "head" else log_decay[:, ::3, :, ::2] if case.decay == "channel" else log_decay[:, ::3]
    strong.fill_(-strength)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}
    answers = []
    for name in (backend, "reference"):
        out = call(leaves, options, name)
        grads = torch.autograd.grad(
            [out["o"], out["state.kv"]], [x for x in leaves.values() if x is not None],
            [cotangent("o", out["o"], case.dtype), cotangent("kv", out["state.kv"], case.dtype)],
        )  # fmt: skip
        answers.append(out | {f"d{i}": grad for i, grad in enumerate(grads)})
    assert all(x.isfinite().all() for x in answers[1].values())
    all_agree(*answers, slack=1e4)


@BACKEND
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "log_decay", "beta"])
@pytest.mark.parametrize(
    "case",
    [
        Case(decay=decay, delta=delta, direction=direction, T=90, packed=packed, dtype=torch.float32)
        for decay, delta, direction, packed in (
            ("scalar", False, "causal", False), ("channel", True, "causal", False), ("channel", False, "causal", True),
            ("scalar", True, "target", False), ("channel", False, "source", True),
        )
    ],
    ids=str,
)  # fmt: skip
def test_nan_stays_in_its_sequence_and_head(case, poisoned, backend):
    """It passes through to its own token, and reaches no other sequence or head, nor (causal) a chunk before its own; nor do gradients."""
    tensors, options = case.inputs()
    if tensors[poisoned] is None:
        tensors["beta"] = torch.rand(tensors["k"].shape[:3])
    at = 70  # packed: in the third of six sequences, tokens 31 to 89
    spoilt = tensors | {poisoned: tensors[poisoned].clone()}
    spoilt[poisoned][0, at, 1] = torch.nan
    first = (31 if case.packed else 0) if not case.causal else at if backend == "reference" else 31 if case.packed else 64
    reached = torch.zeros(tensors["k"].shape[:3], dtype=torch.bool)
    reached[0, first:, 1] = True
    answers = []
    for given in (tensors, spoilt):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items() if name in "qkv"}
        out = call(given | leaves, options, backend)["o"]
        out.sum().backward()
        answers.append({"o": out.detach()} | {name: x.grad for name, x in leaves.items()})
    clean, dirty = answers
    assert dirty["o"][0, at : at + 2, 1].isnan().any()  # "source": the gate is paid by the token after
    assert torch.equal(clean["o"][~reached], dirty["o"][~reached])
    mine = torch.zeros_like(reached)  # a gradient comes from the tokens after, so all of the sequence is reached
    mine[0, 31 if case.packed else 0 :, 1] = True
    for name in ("q", "k", "v"):
        assert torch.equal(clean[name][~mine], dirty[name][~mine]), name


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

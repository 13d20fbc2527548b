"""The operator among torch's own tools: opcheck, compile, gradcheck, autocast, inference mode, meta tensors."""

from dataclasses import replace

import pytest
import torch
from cases import DECAYS, DIRECTIONS, PRESENT, RECORDS, Case, agree, call, cotangent, pairwise, takes
from torch._dynamo import lookup_backend
from torch.overrides import TorchFunctionMode

import linattn
from linattn.ops.form import NORMALIZERS, accumulator

REGISTERED = [name for name in PRESENT if name != "reference"]  # the reference is plain autograd, nothing to register
AXES = {
    "decay": DECAYS,
    "delta": (False, True),
    "direction": DIRECTIONS,
    "normalize": ("none", "sum"),
    "packed": (False, True),
    "record": RECORDS,
    "dtype": (torch.float32, torch.bfloat16),
    "state": (True, False),
    "final": (True, False),
}
SOME = [Case(**row, widths=(5, 3)) for row in pairwise(AXES)]
BACKEND = pytest.mark.parametrize("backend", REGISTERED)
some = lambda cases=SOME: pytest.mark.parametrize("case", cases, ids=str)
NAMES = ("q", "k", "v", "log_decay", "beta", "kv", "z")


def raw(case, backend):
    """Arguments of `torch.ops.linattn.forward` for `case`, all floating ones wanting a gradient."""
    tensors, options = case.inputs()
    q, k, v, log_decay, beta, kv, z = (None if (x := tensors[name]) is None else x.requires_grad_() for name in NAMES)
    if kv is not None:
        z = kv.detach()[..., 0].clone() if z is None else z
        kv, z = (x.detach()[None if case.causal else ...].requires_grad_() for x in (kv, z))
    inputs = (q, k, v, log_decay, beta, kv, z, options.get("cu_seqlens"))
    stride = case.stride if "boundaries" in case.record else 0
    form = (0.5, case.causal, options["gating"] or "target", case.normalize, 0.1, stride, "writes" in case.record, case.final)
    return (*inputs, *form, backend)


@BACKEND
@some(SOME[::3])
def test_opcheck_forward(case, backend):
    torch.library.opcheck(torch.ops.linattn.forward.default, raw(case, backend))


@BACKEND
@some(SOME[::3])
def test_opcheck_backward(case, backend):
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in raw(case, backend)]
    inputs, rest = args[:8], args[8:]
    o, kv, z, d, bkv, bz, writes = torch.ops.linattn.forward(*args)
    kv, z = (kv, torch.zeros_like(kv[..., 0])) if case.final else (None, None)
    record = (bkv if "boundaries" in case.record else None, bz if "boundaries" in case.record else None)
    incoming = (torch.randn_like(o), kv, z, *record, writes if "writes" in case.record else None)
    torch.library.opcheck(torch.ops.linattn.backward.default, (*incoming, *inputs, o, d, *rest))


@pytest.mark.skipif("cpu" not in PRESENT, reason="the C++ kernels are not built")
@some([case for case in SOME if case.causal and not case.packed])
def test_opcheck_step(case):
    tensors, _ = case.inputs()
    q, k, v, log_decay, beta, kv, z = (tensors[name] for name in NAMES)
    now = lambda x: x if x is None or x.ndim == 1 else x[:, 0].contiguous()
    args = (now(q), now(k), now(v), now(log_decay), now(beta), kv, z, 0.5, NORMALIZERS.index(case.normalize), 0.1)
    torch.library.opcheck(torch.ops.linattn.cpu_step.default, args)


# -- compile ----------------------------------------------------------------------------------------------------------------------------


def forward_and_backward(function, case, backend):
    """Outputs and gradients of `case` with `function` in the place of `cases.call`."""
    tensors, options = case.inputs()
    leaves = {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}
    out = function(leaves, options, backend)
    torch.autograd.backward(list(out.values()), [cotangent(name, x, case.dtype) for name, x in out.items()])
    return {name: x.detach() for name, x in out.items()} | {f"d{name}": x.grad for name, x in leaves.items() if x is not None}


@BACKEND
@some(SOME[1::3])
def test_compiles_whole(case, backend):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, wanted = forward_and_backward(compiled, case, backend), forward_and_backward(call, case, backend)
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        agree(got[name], x, name)


@BACKEND
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing inductor
def test_compiles_with_inductor(backend):
    torch.compiler.reset()
    case = Case(decay="channel", delta=True)
    got = forward_and_backward(torch.compile(call, fullgraph=True), case, backend)
    for name, x in forward_and_backward(call, case, backend).items():
        agree(got[name], x, name)


@BACKEND
@pytest.mark.parametrize("direction", ["causal", "source"])
def test_two_compilations_serve_every_length(direction, backend):
    """One for the first length, one for any other."""
    torch.compiler.reset()
    graphs = []
    counting = lambda graph, inputs: graphs.append(graph) or lookup_backend("aot_eager")(graph, inputs)
    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for T in (37, 5, 64, 130):
        case = Case(direction=direction, decay="channel", T=T)
        got = forward_and_backward(compiled, case, backend)
        for name, x in forward_and_backward(call, case, backend).items():
            agree(got[name], x, name)
    assert len(graphs) == 2


def test_step_compiles_whole():
    torch.compiler.reset()
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 6)
    state = linattn.State(torch.randn(2, 2, 8, 6))
    run = lambda state: linattn.step(q, k, v, state=state)
    o, new = torch.compile(run, fullgraph=True, backend="aot_eager")(state)
    wanted, wanted_state = run(state)
    agree(o, wanted, "o")
    agree(new.kv, wanted_state.kv, "kv")


def test_bad_input_is_the_same_error_when_compiled():
    torch.compiler.reset()
    compiled = torch.compile(linattn.linear_attention, backend="aot_eager")
    q = torch.randn(2, 7, 2, 4)
    with pytest.raises(Exception, match=r"v must be \[B T H V\]"):
        compiled(q, q, q[:, :5])


# -- autograd ---------------------------------------------------------------------------------------------------------------------------


def gradient_of(case, backend, check):
    """`check` (gradcheck or gradgradcheck) on `case`, from all outputs to all floating inputs."""
    tensors, options = case.inputs()
    given = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
    function = lambda *xs: tuple(call(dict.fromkeys(NAMES) | dict(zip(given, xs, strict=True)), options, backend).values())
    check(function, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("backend", [name for name in REGISTERED if takes(name, Case(dtype=torch.float64))])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("delta", "normalize"), [(False, "none"), (False, "sum"), (True, "none")])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(decay, delta, direction, normalize, backend):
    case = Case(decay=decay, delta=delta, direction=direction, normalize=normalize, T=18, B=1, widths=(3, 2), dtype=torch.float64)
    gradient_of(replace(case, record=RECORDS[3]), backend, torch.autograd.gradcheck)  # stride 16: T = 18 has two chunks


@BACKEND
def test_a_second_derivative_is_refused(backend):
    q = torch.randn(2, 7, 2, 4, requires_grad=True)
    o, _ = linattn.linear_attention(q, q, q, backend=backend)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative but with backend='reference'"):
        dq.sum().backward()


def test_the_reference_has_second_derivatives():
    gradient_of(Case(decay="scalar", delta=True, T=3, B=1, widths=(3, 2), dtype=torch.float64), "reference", torch.autograd.gradgradcheck)


@BACKEND
@some([Case(normalize="sum", record=RECORDS[3]), Case(decay="channel", delta=True, direction="source", record=RECORDS[3])])
def test_only_the_gradients_that_are_wanted(case, backend):
    """Any one input alone may want its gradient, and any one output alone may send it."""
    tensors, options = case.inputs()
    given = {name: x for name, x in tensors.items() if x is not None}
    whole = forward_and_backward(call, case, backend)
    for name, x in given.items():
        leaf = x.clone().requires_grad_()
        out = call(tensors | {name: leaf}, options, backend)
        reached = {other: y for other, y in out.items() if y.requires_grad}
        torch.autograd.backward(list(reached.values()), [cotangent(other, y, case.dtype) for other, y in reached.items()])
        agree(leaf.grad, whole[f"d{name}"], f"d{name}")
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    total = dict.fromkeys(given, 0)
    for other in call(tensors, options, backend):
        out = call(dict.fromkeys(NAMES) | leaves, options, backend)
        grads = torch.autograd.grad(
            out[other], list(leaves.values()), cotangent(other, out[other], case.dtype), allow_unused=True, materialize_grads=True
        )
        total = {name: total[name] + g.to(accumulator(case.dtype)) for name, g in zip(given, grads, strict=True)}
    for name in given:
        slack = 100 if case.dtype == torch.float32 else 4  # the sum of rounded parts beside the rounded sum
        agree(total[name].to(given[name].dtype), whole[f"d{name}"], f"d{name}", slack)


@pytest.mark.skipif("cpu" not in PRESENT, reason="the C++ kernels are not built")
def test_who_looks_on_sees_the_registered_operator():
    """An eager call on the CPU goes straight to the kernels; a mode, and a tracer, are shown the operator they know."""
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 20, 2, 16, requires_grad=True)
    run = lambda q: linattn.linear_attention(q, q, q, check_values=False)[0]
    straight = run(q)
    assert "_Direct" in type(straight.grad_fn).__name__
    with Seen():
        watched = run(q)
    assert torch.ops.linattn.forward in seen and "_Direct" not in type(watched.grad_fn).__name__
    assert torch.equal(straight, watched)
    for o in (straight, watched):
        o.sum().backward()
    assert torch.equal(q.grad, 2 * torch.autograd.grad(run(q).sum(), q)[0])


# -- modes ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PRESENT)
@some(SOME[:4])
def test_autocast_changes_nothing(case, backend):
    """The operator computes in the dtype of q, k, v, whatever autocast says: under it they come in bfloat16 from the layers before."""
    wanted = forward_and_backward(call, case, backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = forward_and_backward(call, case, backend)
        tensors, _ = Case(T=1).inputs()
        step = lambda: linattn.step(*(tensors[x][:, 0] for x in ("q", "k", "v")), state=linattn.State(tensors["kv"]))[0]
        stepped = step()
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name
    assert torch.equal(stepped, step())


@pytest.mark.parametrize("backend", PRESENT)
@some(SOME[:4])
def test_inference_mode(case, backend):
    tensors, options = case.inputs()
    wanted = call(tensors, options, backend)
    with torch.inference_mode():
        got = call(tensors, options, backend)
        step_tensors, _ = Case(T=1).inputs()
        o, state = linattn.step(*(step_tensors[x][:, 0] for x in ("q", "k", "v")), state=linattn.State(step_tensors["kv"]))
        o, state = linattn.step(*(step_tensors[x][:, 0] for x in ("q", "k", "v")), state=state)
    assert got["o"].is_inference() and o.isfinite().all() and state.kv.isfinite().all()
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name


@some()
def test_meta_tensors_know_their_shapes(case):
    """On the device "meta" a call costs nothing and has the shapes, dtypes and strides of the real one."""
    tensors, options = case.inputs()
    real = call(tensors, options, "eager")
    meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x
    out = call({name: meta(x) for name, x in tensors.items()}, {name: meta(x) for name, x in options.items()}, "auto")
    assert out.keys() == real.keys()
    for name, x in out.items():
        assert (x.shape, x.dtype, x.stride(), x.device.type) == (real[name].shape, real[name].dtype, real[name].stride(), "meta"), name

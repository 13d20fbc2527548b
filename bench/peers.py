"""The only place that calls what is measured: the operator on its backends, and what it is held against."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

import linattn

from .cases import FORMS, Inputs

MM = 2048  # side of the square matrices whose product is the yardstick
OWN_INPUTS = 4 << 20  # bytes of q up to which each side has inputs of its own, so that none finds them warm from its neighbour
RING = 32 << 20  # bytes of the states `step` goes through in turn, as the layers of a model would: more than a second-level cache


@dataclass(frozen=True)
class Side:
    """One thing to time."""

    peer: str  # cpu | eager | sdpa | copy | clone | mm
    form: str  # a name in FORMS; sdpa: causal | bidirectional; "" where there is only one
    call: str  # forward | forward+backward | step | copy | product
    run: Callable[[], object]
    growth: int = 1  # its time grows as T to this power; 0: not with T


def _operator(form: str, inputs: Inputs, backend: str) -> Callable[..., Tensor]:
    options = FORMS[form].options()
    return lambda *tensors: linattn.linear_attention(*tensors, **options, backend=backend)[0]


def _calls(peer: str, form: str, f: Callable[..., Tensor], tensors: tuple, do: Tensor, growth: int = 1) -> list[Side]:
    """Forward without a gradient wanted, and forward with the gradient of every input."""
    leaves = tuple(x if x is None else x.detach().requires_grad_() for x in tensors)
    wanted = [x for x in leaves if x is not None]
    do = do.to(tensors[0].dtype)
    return [
        Side(peer, form, "forward", lambda: f(*tensors), growth),
        Side(peer, form, "forward+backward", lambda: torch.autograd.grad(f(*leaves), wanted, do), growth),
    ]


def operator(form: str, inputs: Inputs, backend: str) -> list[Side]:
    """The operator, called as a user does: checks of values included."""
    inputs = _own(inputs)
    return _calls(backend, form, _operator(form, inputs, backend), inputs.of(FORMS[form]), inputs.do)


def sdpa(inputs: Inputs, *, causal: bool) -> list[Side]:
    """softmax attention of torch at its best: [B H T D] contiguous beforehand, its own choice of kernel."""
    inputs = _own(inputs)
    q, k, v, do = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.do))
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return _calls("sdpa", "causal" if causal else "bidirectional", f, (q, k, v), do, 2)


def copy(inputs: Inputs) -> list[Side]:
    """The bytes of a call and nothing else: as many tensors read, and as many written to fresh memory.

    forward reads q, k, v and writes o; backward reads q, k, v, do and writes dq, dk, dv.
    """
    q, k, v, do = (getattr(_own(inputs), name) for name in ("q", "k", "v", "do"))
    return [
        Side("copy", "", "forward", lambda: torch.addcmul(q, k, v)),
        Side(
            "copy", "", "forward+backward",
            lambda: (torch.addcmul(q, k, v), torch.addcmul(do, q, k), v.clone(), torch.ones_like(q)),
        ),
    ]  # fmt: skip


def mm() -> list[Side]:
    a, b = torch.randn(2, MM, MM, generator=torch.Generator().manual_seed(0)).unbind()
    return [Side("mm", "", "product", lambda: torch.mm(a, b), 0)]


def step(form: str, states: int, backend: str) -> list[Side]:
    """One token for `states` = B · H states, fresh outputs each time."""
    q, k, v, log_decay, beta, ring = _step_inputs(form, states)
    following = cycle(linattn.State(kv) for kv in ring)
    run = lambda: linattn.step(q, k, v, log_decay, beta, state=next(following), backend=backend)
    peer = "cpu" if backend == "auto" else backend
    return [Side(peer, form, "step", run, 0)]


def state_copies(states: int) -> list[Side]:
    """The states read once and written once: into memory that is there already (copy), and into fresh memory as `step` does (clone)."""
    ring = _step_inputs("none", states)[-1]
    into, left, right = torch.empty_like(ring[0]), cycle(ring), cycle(ring)
    return [
        Side("copy", "", "step", lambda: into.copy_(next(left)), 0),
        Side("clone", "", "step", lambda: next(right).clone(), 0),
    ]


def _step_inputs(form: str, states: int) -> tuple:
    inputs = Inputs.create(B=max(states // 8, 1), T=1, H=min(states, 8))
    q, k, v, log_decay, beta = inputs.of(FORMS[form])
    one = lambda x: x if x is None or x.ndim == 1 else x[:, 0].contiguous()
    shape = (*k.shape[0::2], k.shape[3], v.shape[3])  # [B H K V]
    count = max(2, -(-RING // (4 * torch.Size(shape).numel())))
    ring = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    return one(q), one(k), one(v), one(log_decay), one(beta), ring


def _own(inputs: Inputs) -> Inputs:
    if inputs.q.nbytes > OWN_INPUTS:
        return inputs
    return Inputs(**{name: x.clone() for name, x in vars(inputs).items()})

"""The linear map that a model is at one input: every input-dependent coefficient held still, so that output = J · input exactly."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Modules whose whole output is a coefficient: what q and k become are weights, the others open gates, by the names that models give them.
GATES = ("q_proj", "k_proj", "query", "key", "g_proj", "gate_proj", "decay", "second_decay", "router")
# x · (f(x) / x): the ratio is the coefficient.
RATIOS = {"abs", "celu", "elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu", "relu6", "selu", "silu", "softsign"}
# Every other function that is not linear gives a coefficient and nothing else.
COEFFICIENTS = {
    "atan", "clamp", "clamp_max", "clamp_min", "cos", "cosh", "erf", "exp", "expm1", "hardsigmoid", "log", "log1p", "log_softmax",
    "logsigmoid", "logsumexp", "norm", "pow", "prod", "rdiv", "reciprocal", "rpow", "rsqrt", "rtruediv", "sigmoid", "sin", "softmax",
    "softplus", "sqrt", "square", "std", "tan", "tanh", "var", "vector_norm",
}  # fmt: skip
PRODUCTS = {"mul", "rmul", "matmul", "rmatmul", "mm", "bmm", "mv", "dot", "outer", "einsum", "linear", "addcmul", "addmm", "baddbmm"}


def _ratio(f: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    still = x.detach()
    y = f(still.clone(), *args, **kwargs)  # which may be asked to work in place
    return x * torch.where(still == 0, 0.5, y / still)


def _rms_norm(_: Callable, x: Tensor, shape, weight=None, eps=None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(shape), 0))
    y = x * torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight


def _layer_norm(_: Callable, x: Tensor, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    y = (x - x.mean(dims, keepdim=True)) * torch.rsqrt(x.detach().var(dims, correction=0, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _normalize(_: Callable, x: Tensor, p=2.0, dim=1, eps=1e-12, out=None) -> Tensor:
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def _attention(f: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    return f(q.detach(), k.detach(), v, *args, **kwargs)


def _operator(f: Callable, q, k, v, log_decay, beta, *rest):
    still = lambda t: None if t is None else t.detach()
    return f(still(q), still(k), v, still(log_decay), still(beta), *rest)


def _glu(_: Callable, x: Tensor, dim=-1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.detach().sigmoid()


def _divide(f: Callable, x, y, *args, **kwargs):
    return f(x, y.detach() if isinstance(y, Tensor) else y, *args, **kwargs)


RULES: dict[str, Callable] = {
    "rms_norm": _rms_norm, "layer_norm": _layer_norm, "normalize": _normalize, "scaled_dot_product_attention": _attention,
    "glu": _glu, "div": _divide, "truediv": _divide, "true_divide": _divide,
} | dict.fromkeys(RATIOS, _ratio)  # fmt: skip


class _Frozen(TorchFunctionMode):
    """Sees every function that torch is asked for, and answers with the same value, linear in what has a gradient."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.linattn.forward:
            return _operator(func, *args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        name = name[1:] if name.startswith("i") and name[1:] in PRODUCTS | RULES.keys() else name  # x *= y
        if (rule := RULES.get(name)) is not None:
            return rule(func, *args, **kwargs)
        found = func(*args, **kwargs)
        if name in COEFFICIENTS:
            if found is args[0] and found.requires_grad:
                raise ValueError(f"model must not overwrite what depends on its input by something that is not linear in it; {name} does")
            return found.detach() if isinstance(found, Tensor) else found
        factors = args[:2] if name == "linear" else args[1:] if "add" in name else args  # what is added is none
        if name in PRODUCTS and sum(_live(factors)) > 1:
            raise ValueError(
                f"gates must name the module whose output is the coefficient: {name} multiplies two tensors that both depend on the input"
            )
        return found


def _live(args) -> list[bool]:
    """Which of the tensors, those in lists too, depend on the input."""
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return [isinstance(x, Tensor) and x.requires_grad for x in flat]


@contextmanager
def frozen_coefficients(model: nn.Module, *, gates: Sequence[str] = ()):
    """Inside the block `model` is linear in its input: its values stay what they are, to rounding, and every Jacobian is the detached one.

        with probes.frozen_coefficients(model):
            J, rest = probes.jacobian(f, x)       # f(x) = J x + rest, and rest is what biases add: 0 without them

    Held still are the statistics of norms, gates, β, decays, q and k (what attends to what, by softmax too), and of activations between two
    linear maps, as gelu's, the ratio f(x) / x. What is left is linear: v, the state, projections, the residual stream. arXiv:2505.24293.

    gates  further modules than `GATES`, fnmatch patterns of the last part of their names, whose output is a coefficient

    Parameters take no gradients inside the block: what has one depends on the input. It works on eager models, ours and foreign ones, and
    beside a probe. Raises ValueError for a pattern that matches no module and, in the forward, for a product of two tensors that both
    depend on the input, naming the operation: there is no telling which of the two is the coefficient. A function that is in none of the
    tables of this module is taken for linear; where it is not, the rest shows it.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in gates:
        if not any(fnmatchcase(name.rpartition(".")[2], pattern) for name in names):
            raise ValueError(f"gates must match the last part of a module's name in {type(model).__name__}; {pattern!r} matches nothing")
    still = lambda module, args, out: torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, out)
    known = (*GATES, *gates)
    handles = [
        module.register_forward_hook(still)
        for name, module in model.named_modules()
        if any(fnmatchcase(name.rpartition(".")[2], pattern) for pattern in known)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with _Frozen():
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for p in trained:
            p.requires_grad_(True)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """J [out in] and f(x) − J x [out] of f at x, both flattened; one backward pass per number of f(x). The rest is flattened too.

    Inside `frozen_coefficients` the rest is what biases add, and outside of it, what f is not linear by.
    """
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        y = f(x).flatten()
        rows = [torch.autograd.grad(one, x, retain_graph=True, allow_unused=True)[0] for one in y.unbind()]
    J = torch.stack([torch.zeros_like(x) if row is None else row for row in rows]).flatten(1)
    return J, y.detach() - J @ x.detach().flatten()

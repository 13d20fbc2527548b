"""The recurrent form against two others written here: the dense quadratic one (additive) and the product of transitions (delta)."""

import pytest
import torch
from cases import DECAYS, DIRECTIONS, PRESENT, Case, agree, call, widest

# Whose gates t are paid between a token j and the token i that reads it: earlier j (from the left), later j (from the right).
ENTERED = lambda i, j, t: ((j < t) & (t <= i)) | ((j > t) & (t >= i))
LEFT = lambda i, j, t: ((j <= t) & (t < i)) | ((j >= t) & (t > i))
LATER = lambda i, j, t: ((j < t) & (t <= i)) | ((j >= t) & (t > i))
PAID = {"causal": ENTERED, "source": LEFT, "target": ENTERED, "symmetric": LATER}


def dense(tensors, case, *, scale, offset=0.0, eps=0.1):
    """o_i = Σ_j e^(gates paid from j to i) (scale · q_i·k_j + offset) v_j, the sum over j ≤ i where causal; no states."""
    q, k, v, g = (tensors[name] for name in ("q", "k", "v", "log_decay"))
    (B, T, H, K), HQ = k.shape, q.shape[2]
    k, v = (x.repeat_interleave(HQ // H, 2) for x in (k, v))
    if g is None:
        g = q.new_zeros(H)
    g = g.expand(B, T, H)[..., None] if g.ndim < 4 else g  # [B T H 1|K]
    g = g.repeat_interleave(HQ // H, 2)
    i, j, t = torch.meshgrid(*[torch.arange(T)] * 3, indexing="ij")
    fade = torch.einsum("ijt,bthk->bijhk", PAID[case.direction](i, j, t).to(q.dtype), g).exp()
    P = scale * torch.einsum("bihk,bjhk,bijhk->bijh", q, k, fade.expand(B, T, T, HQ, K)) + offset * fade[..., 0]
    P = P.masked_fill((j > i)[None, :, :, 0, None], 0) if case.causal else P
    n, d = torch.einsum("bijh,bjhv->bihv", P, v), P.sum(2)[..., None]
    return {"none": n, "sum": n / (d + eps), "clamp": n / d.clamp(min=eps)}[case.normalize]


def both(case, backend, *, scale, **options):
    """The dense form and `backend` on the same tensors, and the gradients of all of them."""
    answers = []
    for form in ("dense", "backend"):
        tensors, rest = case.inputs()
        tensors = {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}
        if form == "dense":
            o = dense(tensors, case, scale=scale, **options)
        else:
            o = call(tensors, rest | {"scale": scale} | options, backend)["o"]
        o.backward(torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o))
        answers.append({"o": o.detach()} | {f"d{name}": x.grad for name, x in tensors.items() if x is not None})
    return answers


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("normalize", ["none", "sum", "clamp"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_recurrent_and_chunked_are_the_parallel_form(decay, direction, normalize, backend):
    case = Case(
        decay=decay, direction=direction, normalize=normalize, groups=2, T=70, widths=(5, 3), B=1, state=False, dtype=widest(backend)
    )
    parallel, other = both(case, backend, scale=0.7)
    for name in parallel:
        agree(other[name], parallel[name], name)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("normalize", ["none", "sum"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("decay", ["none", "head", "scalar"])
def test_offset_is_a_constant_in_the_similarity(decay, direction, normalize, backend):
    case = Case(decay=decay, direction=direction, normalize=normalize, T=20, widths=(5, 3), state=False, dtype=widest(backend))
    parallel, other = both(case, backend, scale=0.7, offset=0.3)
    for name in parallel:
        agree(other[name], parallel[name], name)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_is_a_product_of_transitions(decay, direction, backend):
    """What token j wrote, beta_j k_j v_jᵀ, reaches token i through a gate per step and I − beta k kᵀ per token in between and its own."""
    case = Case(decay=decay, delta=True, direction=direction, T=20, B=1, H=1, widths=(4, 3), state=False, dtype=widest(backend))
    tensors, options = case.inputs()
    q, k, v, beta = (tensors[name].double()[0, :, 0] for name in ("q", "k", "v", "beta"))
    g = torch.zeros(1) if decay == "none" else tensors["log_decay"].double()
    g = (g if g.ndim == 4 else g.expand(1, case.T, 1)[..., None])[0, :, 0].exp().expand(case.T, 4)  # [T K]
    eye = torch.eye(4, dtype=torch.float64)
    H = eye - beta[:, None, None] * k[:, :, None] * k[:, None, :]
    wanted = torch.zeros(case.T, 3, dtype=torch.float64)
    for i in range(case.T):
        for step in (1,) if case.causal else (1, -1):  # from the left, from the right
            own = 1.0 if case.causal else 0.5
            wanted[i] += own * beta[i] * (q[i] @ k[i]) * v[i]
            reads = q[i] @ (eye + own * (H[i] - eye))
            j = i
            while 0 <= j - step < case.T:  # from j back to its neighbour, over one gate
                paid = {"source": j - step, "symmetric": max(j, j - step)}.get(direction, j)
                reads, j = reads * g[paid], j - step
                wanted[i] += beta[j] * (reads @ k[j]) * v[j]
                reads = reads @ H[j]
    o = call(tensors, options | {"scale": 1.0}, backend)["o"][0, :, 0]
    agree(o, wanted.to(o.dtype), "o")

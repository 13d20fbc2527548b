"""Sparse State Expansion against its definition, partition by partition and token by token; state, packing, balance."""

import pytest
import torch
import torch.nn.functional as F

from linattn.layers.sse import Route, SparseStateExpansion, balance, route

DIM, H, W = 12, 2, 6


def make(active=1, partitions=4):
    torch.manual_seed(0)
    layer = SparseStateExpansion(DIM, H, partitions=partitions, active=active).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
    return layer


def definition(m, x):
    """y [T dim] of one sequence and its states: S ← e^g S + e k vᵀ where chosen, and nothing elsewhere."""
    heads = lambda t: t.unflatten(-1, (H, W))
    q, k, v = m.q_proj(x), m.k_proj(x), heads(F.silu(m.v_proj(x)))
    q1, k1 = heads(F.silu(q)), heads(k).softmax(-1)
    q2, k2 = heads(F.silu(q + m.q_routed(x))), heads(k + m.k_routed(x)).softmax(-1)
    g1, g2 = (torch.sigmoid(heads(d.up(d.down(x)))) ** (1 / 16) for d in (m.decay, m.decay_routed))
    e = m.router(x).softmax(-1)
    S, out = [torch.zeros(H, W, W, dtype=x.dtype) for _ in range(m.partitions + 1)], []
    for t in range(len(x)):
        S[0] = g1[t][..., None] * S[0] + k1[t][..., None] * v[t][:, None]
        o = torch.einsum("hk,hkv->hv", q1[t], S[0])
        for i in e[t].topk(m.active).indices.tolist():
            S[i + 1] = g2[t][..., None] * S[i + 1] + e[t, i] * k2[t][..., None] * v[t][:, None]
            o = o + e[t, i] * torch.einsum("hk,hkv->hv", q2[t], S[i + 1])
        out.append(o * W**-0.5)
    o = torch.stack(out)
    o = F.rms_norm(o, (W,), m.norm.weight, 1e-5).flatten(-2) * F.silu(m.g_proj(x))
    return m.o_proj(o), torch.stack(S)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_the_layer_is_its_definition(active):
    layer, x = make(active), torch.randn(2, 17, DIM, dtype=torch.float64, requires_grad=True)
    y, state = layer(x, return_state=True)
    wanted, states = zip(*(definition(layer, row) for row in x), strict=True)
    torch.testing.assert_close(y, torch.stack(wanted))
    torch.testing.assert_close(state, torch.stack(states))
    weight = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    grads = [torch.autograd.grad((o * weight).sum(), inputs) for o in (y, torch.stack(wanted))]
    for got, true in zip(*grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-8)
    assert all(grad.ne(0).any() for grad in grads[0])  # the router too


def test_chunks_and_steps_make_the_whole_and_packed_is_each_alone():
    layer, x = make(2), torch.randn(2, 13, DIM, dtype=torch.float64)
    whole, state, parts = layer(x)[0], None, []
    for part in x.split([6, 1, 0, 1, 5], 1):
        y, state = layer(part, state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    packed, after = layer(x.flatten(0, 1)[None], None, torch.tensor([0, 13, 13, 26]), return_state=True)
    torch.testing.assert_close(packed[0].unflatten(0, (2, 13)), whole)
    torch.testing.assert_close(after[[0, 2]], state)
    assert after[1].eq(0).all()


def test_partitions_that_are_not_chosen_rest():
    layer, x = make(1), torch.randn(1, 9, DIM, dtype=torch.float64)
    _, before = layer(x, return_state=True)
    one = torch.randn(1, 1, DIM, dtype=torch.float64)
    _, after = layer(one, before)
    chosen = route(layer.router(one)[0], 1).chosen[0]
    assert [torch.equal(before[0, i + 1], after[0, i + 1]) for i in range(4)] == (~chosen).tolist()


def test_balance_is_one_where_all_are_used_alike_and_most_at_collapse():
    even = Route(torch.full((8, 4), 0.25), F.one_hot(torch.arange(8) % 4, 4).bool())
    one = Route(F.one_hot(torch.zeros(8, dtype=torch.int64), 4).float(), F.one_hot(torch.zeros(8, dtype=torch.int64), 4).bool())
    assert balance(even) == 1 and balance(one) == 4
    layer = make()
    layer(torch.randn(1, 9, DIM, dtype=torch.float64))
    assert torch.autograd.grad(layer.balance_loss, layer.router.weight)[0].ne(0).any()
    assert route(torch.zeros(2, 4), 2).chosen.tolist() == [[True, True, False, False]] * 2  # ties: the first


def test_bad_arguments():
    for active in (0, 4):
        with pytest.raises(ValueError, match=f"active must be at least 1 and less than partitions; got {active} of 4"):
            SparseStateExpansion(DIM, H, active=active)
    with pytest.raises(ValueError, match=r"state must be \[B partitions\+1 H K V\] = \(1, 5, 2, 6, 6\); got \(1, 4, 2, 6, 6\)"):
        make()(torch.zeros(1, 3, DIM, dtype=torch.float64), torch.zeros(1, 4, 2, 6, 6))
    with pytest.raises(ValueError, match="x must be floating"):
        make()(torch.zeros(1, 3, 8))

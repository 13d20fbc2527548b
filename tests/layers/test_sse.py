"""Sparse State Expansion against its definition, partition by partition and token by token; state, packing, padding, balance."""

import pytest
import torch
import torch.nn.functional as F

from linattn import probe
from linattn.layers.sse import EXPANSIONS, ExpandedState, Route, SparseStateExpansion, balance, route

DIM, H, K, V = 12, 2, 6, 3
FORMS = {
    "gla": dict(variant="sse_gla"),
    "gla, conv": dict(variant="sse_gla", conv=3, active=2),
    "gla, ungated": dict(variant="sse_gla", gated=False),
    "gdn": dict(variant="sse_gdn"),
    "gdn, conv": dict(variant="sse_gdn", conv=3, active=2),
    "gdn, shared keys": dict(variant="sse_gdn", num_kv_heads=1, active=3),
    "gdn, ungated": dict(variant="sse_gdn", gated=False),
}
each = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def make(variant="sse_gla", **options):
    torch.manual_seed(0)
    layer = SparseStateExpansion(DIM, H, variant, expand_v=0.5, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(20 * parameter if parameter.ndim == 2 else parameter + torch.randn_like(parameter) / 4)
    return layer


def definition(m, x):
    """y [T dim] of one sequence and its states: written, and faded, where chosen, and nothing elsewhere."""
    heads = lambda t: t.unflatten(-1, (-1, K))
    unit = lambda t: t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k, v = m.q_proj(x), m.k_proj(x), F.silu(m.v_proj(x)).unflatten(-1, (-1, V))
    pairs = [(q, k), (q + m.q_routed(x), k + m.k_routed(x))]
    if m.conv is not None:
        filtered = lambda t, w: sum(F.pad(t, (0, 0, 2, 0))[j : j + len(t)] * w[:, j] for j in range(3))
        weights = m.conv.weight.split([q.shape[-1], k.shape[-1]])
        pairs[0] = (filtered(q, weights[0]), filtered(k, weights[1]))
    gdn, e, states, out = m.variant.delta, m.router(x).softmax(-1), [], 0
    for i in range(m.partitions + 1):
        mixer, (a, b) = (m.routed, pairs[1]) if i else (m.shared, pairs[0])
        a, b = (unit(F.silu(heads(a))), unit(F.silu(heads(b)))) if gdn else (F.silu(heads(a)), heads(b).softmax(-1))
        if gdn:
            step = mixer.decay.step
            g = torch.exp(-step.A_log.exp() * F.softplus(mixer.decay.proj(x) + step.dt_bias))[..., None, None]
            beta = torch.sigmoid(mixer.b_proj(x))[..., None]
        else:
            g = (torch.sigmoid(heads(mixer.decay.up(mixer.decay.down(x)))) ** (1 / 16))[..., None]
        S, reads = torch.zeros(m.num_kv_heads, K, V, dtype=x.dtype), []
        for t in range(len(x)):
            if i and i - 1 not in e[t].topk(m.active).indices.tolist():
                reads.append(torch.zeros(H, V, dtype=x.dtype))
                continue
            weight = e[t, i - 1] if i and m.gated else 1.0
            S = g[t] * S
            u = weight * (beta[t] * (v[t] - torch.einsum("hkv,hk->hv", S, b[t])) if gdn else v[t])
            S = S + b[t][..., None] * u[:, None]
            reads.append(weight * torch.einsum("hkv,hk->hv", S.repeat_interleave(H // len(S), 0), a[t]))
        states.append(S)
        out = out + torch.stack(reads) * K**-0.5
    o = F.rms_norm(out, (V,), m.norm.weight, 1e-5).flatten(-2) * F.silu(m.g_proj(x))
    return m.o_proj(o), torch.stack(states)


@each
def test_the_layer_is_its_definition(form):
    layer, x = make(**form), torch.randn(2, 13, DIM, dtype=torch.float64, requires_grad=True)
    y, state = layer(x, return_state=True)
    wanted, states = zip(*(definition(layer, row) for row in x), strict=True)
    torch.testing.assert_close(y, torch.stack(wanted))
    torch.testing.assert_close(state.kv, torch.stack(states))
    weight = torch.randn_like(y)
    inputs = {"x": x} | dict(layer.named_parameters())
    unused = dict(allow_unused=True, materialize_grads=True)
    grads = [torch.autograd.grad((o * weight).sum(), list(inputs.values()), **unused) for o in (y, torch.stack(wanted))]
    for name, got, true in zip(inputs, *grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-8)
        assert got.ne(0).any() == (layer.gated or name != "router.weight"), name  # the router learns by what it lets through


@each
def test_chunks_and_steps_make_the_whole_and_packed_is_each_alone(form):
    layer, x = make(**form), torch.randn(2, 13, DIM, dtype=torch.float64)
    whole, state, parts = layer(x)[0], None, []
    with torch.no_grad():  # a single token then takes the operator's step
        for part in x.split([6, 1, 0, 1, 5], 1):
            y, state = layer(part, state, return_state=True)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    packed, after = layer(x.flatten(0, 1)[None], None, torch.tensor([0, 13, 13, 26]), return_state=True)
    torch.testing.assert_close(packed[0].unflatten(0, (2, 13)), whole)
    torch.testing.assert_close(after.kv[[0, 2]], state.kv)
    assert after.kv[1].eq(0).all()
    assert layer(x[:0], return_state=True)[1].kv.shape == (0, 5, layer.num_kv_heads, K, V)


@each
def test_padding_in_front_is_not_there(form):
    layer, x = make(**form), torch.randn(2, 9, DIM, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[4], [0]])
    y, state = layer(x, mask=mask, return_state=True)
    hidden = layer.balance_loss
    for row in range(2):
        alone, after = layer(x[row : row + 1, mask[row]], return_state=True)
        torch.testing.assert_close(y[row, mask[row]], alone[0])
        torch.testing.assert_close(state.kv[row], after.kv[0])
    torch.testing.assert_close(hidden, balance(route(layer.router(x[mask]), layer.active)))


def test_partitions_that_are_not_chosen_rest():
    for variant in EXPANSIONS:
        layer, x = make(variant), torch.randn(1, 9, DIM, dtype=torch.float64)
        _, before = layer(x, return_state=True)
        one = torch.randn(1, 1, DIM, dtype=torch.float64)
        _, after = layer(one, before)
        (opened,) = route(layer.router(one)[0], 1).chosen[0].tolist()
        assert [torch.equal(before.kv[0, i + 1], after.kv[0, i + 1]) for i in range(4)] == [i != opened for i in range(4)]


def test_balance_is_one_where_all_are_used_alike_and_most_at_collapse():
    even = Route(torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4)
    one = Route(F.one_hot(torch.zeros(8, dtype=torch.int64), 4).float(), torch.zeros(8, 1, dtype=torch.int64))
    assert balance(even) == 1 and balance(one) == 4
    layer = make()
    layer(torch.randn(1, 9, DIM, dtype=torch.float64))
    assert torch.autograd.grad(layer.balance_loss, layer.router.weight)[0].ne(0).any()
    layer.eval()(torch.randn(1, 9, DIM, dtype=torch.float64))
    assert layer.balance_loss is None
    assert route(torch.zeros(2, 4), 2).chosen.tolist() == [[0, 1]] * 2  # ties: the first


@pytest.mark.parametrize("variant", EXPANSIONS)
def test_a_probe_sees_both_mixers_and_changes_nothing(variant):
    layer, x = make(variant, conv=3, active=2), torch.randn(1, 9, DIM, dtype=torch.float64)
    y, state = layer(x, return_state=True)
    with probe(layer, keep=("final", "writes", "reads")) as p:
        assert torch.equal(layer(x)[0], y)
    torch.testing.assert_close(p["shared"].final, state.kv[:, 0])
    torch.testing.assert_close(p["routed"].final, state.kv[0, 1:])


def test_it_compiles_whole():
    layer, x = make("sse_gdn", active=2).float(), torch.randn(2, 9, DIM)
    y = layer(x)[0]
    loss = layer.balance_loss
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], y)
    torch.testing.assert_close(layer.balance_loss, loss)


def test_bad_arguments():
    for active in (0, 4):
        with pytest.raises(ValueError, match=f"active must be at least 1 and less than partitions; got {active} of 4"):
            SparseStateExpansion(DIM, H, active=active)
    with pytest.raises(ValueError, match=r"variant must be one of \['sse_gla', 'sse_gdn'\]; got 'gla'"):
        SparseStateExpansion(DIM, H, "gla")
    with pytest.raises(ValueError, match="num_heads must be a positive multiple of num_kv_heads"):
        SparseStateExpansion(DIM, H, num_kv_heads=3)
    with pytest.raises(ValueError, match="width must be at least 2; got 1"):
        SparseStateExpansion(DIM, H, conv=1)
    x, kv = torch.zeros(1, 3, DIM, dtype=torch.float64), torch.zeros(1, 4, 2, 6, 3)
    with pytest.raises(ValueError, match=r"state.kv must be \[B partitions\+1 H K V\] = \(1, 5, 2, 6, 3\); got \(1, 4, 2, 6, 3\)"):
        make()(x, ExpandedState(kv, None))
    with pytest.raises(ValueError, match="state must be the ExpandedState this layer returned, without conv; got Tensor"):
        make()(x, kv)
    with pytest.raises(ValueError, match="this layer returned, with conv; got ExpandedState"):
        make(conv=3)(x, ExpandedState(kv, None))
    with pytest.raises(ValueError, match="x must be floating"):
        make()(torch.zeros(1, 3, 8))

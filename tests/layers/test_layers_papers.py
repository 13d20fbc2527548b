"""Every variant against its paper: the formulas once more, token by token in float64, with the layer's weights; and the inits."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hashes import fitted

from linattn.layers import VARIANTS, LinearAttention
from linattn.layers.decays import ChannelGate, ChannelStepGate, HeadDecay, Place, ScalarGate, lightning

DIM, HEADS, T = 24, 2, 11


def causal_conv(x, conv):
    """[T D]: Σ_j w_j x_{t-3+j}, one channel and token at a time."""
    rows = []
    for t in range(x.shape[0]):
        row = sum(conv.weight[:, j] * x[t - 3 + j] for j in range(4) if t - 3 + j >= 0)
        rows.append(row if conv.bias is None else row + conv.bias)
    return torch.stack(rows)


def heads(x):
    return x.unflatten(-1, (HEADS, -1))


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rotary(x):
    """[T H K]: channels (i, i + K/2) as a complex number, times exp(i t θ_i)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def recurrence(q, k, v, decay=None, beta=None):
    """S ← diag(decay) S;  S ← S + k (v or beta (v − Sᵀk))ᵀ;  o = Sᵀ q, for [T H ·]."""
    S, out = torch.zeros(HEADS, k.shape[-1], v.shape[-1], dtype=v.dtype), []
    for t in range(q.shape[0]):
        if decay is not None:
            S = decay[t].expand(HEADS, k.shape[-1])[..., None] * S
        u = v[t] if beta is None else beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][..., None] * u[:, None]
        out.append(torch.einsum("hkv,hk->hv", S, q[t]))
    return torch.stack(out)


def projections(m, x):
    return m.q_proj(x), m.k_proj(x), m.v_proj(x)


def convolved(m, x):
    q, k, v = F.silu(causal_conv(torch.cat(projections(m, x), -1), m.conv)).split(m.widths, -1)
    return q, k, v


def linear(m, x):
    q, k, v = map(heads, projections(m, x))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = []
    for t in range(T):
        weights = torch.einsum("hk,shk->hs", q[t], k[: t + 1])
        out.append(torch.einsum("hs,shv->hv", weights / weights.sum(-1, keepdim=True), v[: t + 1]))
    return torch.stack(out).flatten(-2)


def retnet(m, x):
    q, k, v = map(heads, projections(m, x))
    decay = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=x.dtype))
    o = recurrence(rotary(q), rotary(k) * m.key_dim**-0.5, v, decay[:, None].expand(T, HEADS, 1))
    return (rms(o) * m.norm.weight).flatten(-2) * F.silu(m.g_proj(x))


def lightning_attention(m, x):
    q, k, v = (heads(F.silu(t)) for t in projections(m, x))
    decay = torch.exp(-(8 / HEADS) * (1 - 1 / 4) * torch.arange(HEADS, dtype=x.dtype))  # layer 1 of 4
    o = recurrence(q * m.key_dim**-0.5, k, v, decay[:, None].expand(T, HEADS, 1))
    return rms(o.flatten(-2)) * m.norm.weight * torch.sigmoid(m.g_proj(x))


def mamba2(m, x):
    C, B, value = convolved(m, x)
    dt = F.softplus(m.mixer.decay.proj(x) + m.mixer.decay.step.dt_bias)
    decay = torch.exp(-torch.exp(m.mixer.decay.step.A_log) * dt)
    value, shared = heads(value), lambda t: t[:, None].expand(T, HEADS, -1)
    y = recurrence(shared(C), shared(B), dt[..., None] * value, decay[..., None]) + m.D[:, None] * value
    return rms(y.flatten(-2) * F.silu(m.g_proj(x))) * m.norm.weight


def gla(m, x):
    q, k, v = map(heads, projections(m, x))
    decay = torch.sigmoid(heads(m.mixer.decay.up(m.mixer.decay.down(x)))) ** (1 / 16)
    o = recurrence(q * m.key_dim**-0.5, k, v, decay)
    return (rms(o) * m.norm.weight).flatten(-2) * F.silu(m.g_proj(x))


def delta(m, x):
    q, k, v = map(heads, convolved(m, x))
    o = recurrence(unit(q) * m.key_dim**-0.5, unit(k), v, None, torch.sigmoid(m.mixer.b_proj(x)))
    return (rms(o) * m.norm.weight).flatten(-2)


def gated_delta(m, x):
    q, k, v = map(heads, convolved(m, x))
    decay = torch.exp(-torch.exp(m.mixer.decay.step.A_log) * F.softplus(m.mixer.decay.proj(x) + m.mixer.decay.step.dt_bias))
    o = recurrence(unit(q) * m.key_dim**-0.5, unit(k), v, decay[..., None], torch.sigmoid(m.mixer.b_proj(x)))
    return (rms(o) * m.norm.weight).flatten(-2) * F.silu(m.g_proj(x))


def kda(m, x):
    q, k, v = map(heads, convolved(m, x))
    dt = F.softplus(heads(m.mixer.decay.up(m.mixer.decay.down(x)) + m.mixer.decay.step.dt_bias))
    decay = torch.exp(-torch.exp(m.mixer.decay.step.A_log)[:, None] * dt)
    o = recurrence(unit(q) * m.key_dim**-0.5, unit(k), v, decay, torch.sigmoid(m.mixer.b_proj(x)))
    return (rms(o) * m.norm.weight).flatten(-2) * torch.sigmoid(m.g_proj[1](m.g_proj[0](x)))


PAPERS = {
    "linear": linear,
    "retnet": retnet,
    "lightning": lightning_attention,
    "mamba2": mamba2,
    "gla": gla,
    "delta": delta,
    "gated_delta": gated_delta,
    "kda": kda,
}


def test_every_variant_has_its_paper_here():
    elsewhere = {"taylorshift", "ecoformer", "molformer"}  # bidirectional too: test_taylor.py, test_hashing.py, test_random_features.py
    assert PAPERS.keys() == {name for name in VARIANTS if not name.startswith("lion_")} - elsewhere  # test_lion.py


@pytest.mark.parametrize("name", PAPERS)
def test_a_layer_is_its_paper(name):
    layer = LinearAttention(DIM, HEADS, name, layer_idx=1, num_layers=4, backend="eager").double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2 if parameter.ndim == 2 else parameter + torch.randn_like(parameter) / 4)
        x = torch.randn(T, DIM, dtype=torch.float64)
        wanted = layer.o_proj(PAPERS[name](layer, x))
        got = layer(x[None])[0][0]
    # the operator's normaliser has an epsilon of 1e-6, which the paper's fraction has not
    assert (got - wanted).abs().max() <= (1e-5 if name == "linear" else 1e-12) * wanted.abs().max()


# -- where the gates and decays start ----------------------------------------------------------------------------------------------------

X = torch.zeros(1, 1, 64)


def test_retnet_decays():
    log_decay, write = HeadDecay(Place(64, 5, 8))(X)
    torch.testing.assert_close(log_decay.exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256, 1 - 1 / 512]))
    assert write is None


def test_lightning_decays():
    log_decay, _ = HeadDecay(Place(64, 4, 8, 3, 12), rule=lightning)(X)
    torch.testing.assert_close(log_decay, torch.tensor([-0.0, -1.5, -3.0, -4.5]))  # (8/4)(1 - 3/12) = 1.5


@pytest.mark.parametrize("rule", [None, lightning])
def test_a_trainable_head_decay_starts_at_its_rule_and_learns(rule):
    options = {} if rule is None else dict(rule=rule)
    fixed, learnt = HeadDecay(Place(64, 4, 8), **options), HeadDecay(Place(64, 4, 8), trainable=True, **options)
    log_decay, _ = learnt(X)
    torch.testing.assert_close(log_decay, fixed(X)[0].clamp(max=-1e-4), rtol=2e-3, atol=1e-7)
    log_decay.sum().backward()
    assert (learnt.a.grad > 0).all() and learnt.a._no_weight_decay
    assert not list(fixed.parameters()) and not list(fixed.buffers())


def test_fixed_decays_are_not_rounded_by_bfloat16():
    layer = LinearAttention(64, 4, "retnet").bfloat16()
    assert torch.equal(layer.mixer.decay(X.bfloat16())[0], HeadDecay(Place(64, 4, 8))(X)[0])


@pytest.mark.parametrize("gate", [ScalarGate, ChannelStepGate, partial(ScalarGate, a_range=(0.0, 16.0))])
def test_time_steps_start_as_mamba2s(gate):
    module = gate(Place(64, 400, 2))
    A, dt = module.step.A_log.exp(), F.softplus(module.step.dt_bias)
    low = 0.0 if isinstance(gate, partial) else 1.0
    assert low < A.min() < low + 0.5 and 15.5 < A.max() <= 16.001
    assert 1e-3 * 0.999 <= dt.min() < 1.2e-3 and 0.08 < dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.15  # log-uniform
    assert module.step.A_log._no_weight_decay and module.step.dt_bias._no_weight_decay


def test_a_time_step_without_decay_is_floored():
    assert ScalarGate(Place(64, 3, 2), a_range=(0.0, 0.0)).step.A_log.isfinite().all()


def test_gla_gates_start_near_a_half_in_sixteen_tokens():
    module = ChannelGate(Place(64, 4, 8))
    log_decay, _ = module(torch.randn(8, 16, 64))
    assert log_decay.shape == (8, 16, 4, 8)
    torch.testing.assert_close(log_decay, torch.full_like(log_decay, math.log(0.5) / 16), rtol=0.1, atol=0)
    assert module.down.weight.shape == (16, 64)


def test_no_gate_opens_beyond_one_or_overflows():
    for gate in (ScalarGate, ChannelGate, ChannelStepGate):
        for size in (1e4, -1e4):
            module = gate(Place(4, 2, 2))
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.ndim == 2:
                        parameter.fill_(size)
            log_decay, _ = module(torch.ones(1, 3, 4))
            assert log_decay.isfinite().all() and (log_decay <= 0).all()


def test_what_must_not_decay_is_marked():
    marked = {name: {n for n, p in LinearAttention(32, 2, name).named_parameters() if hasattr(p, "_no_weight_decay")} for name in VARIANTS}
    times = {"mixer.decay.step.A_log", "mixer.decay.step.dt_bias"}
    lions = {name: {"mixer.decay.a"} for name in ("lion_d", "lion_d_mlm")}
    assert marked == {name: set() for name in VARIANTS} | {"mamba2": times | {"D"}, "gated_delta": times, "kda": times} | lions


def test_projections_start_as_gpt2s():
    layer = LinearAttention(256, 4, "gla", layer_idx=0, num_layers=8)
    assert abs(layer.q_proj.weight.std() - 0.02) < 1e-3 and layer.q_proj.bias is None
    assert abs(layer.o_proj.weight.std() - 0.02 / 4) < 3e-4  # 0.02 / √(2·8)


WIDTHS = {  # per head, of dim 64 and 4 heads: as the papers have it
    "linear": (16, 16),
    "retnet": (16, 32),
    "lightning": (16, 16),
    "mamba2": (32, 32),
    "gla": (8, 16),
    "delta": (16, 16),
    "gated_delta": (12, 24),
    "kda": (16, 16),
    "taylorshift": (17 * 18 // 2, 16),
    "ecoformer": (17, 16),
    "molformer": (8, 16),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_widths(name):
    layer = fitted(LinearAttention(64, 4, name))
    _, state = layer(torch.zeros(3, 5, 64), return_state=True)
    assert state.recurrent.kv.shape == (3, 4, *WIDTHS.get(name, (16, 16)))
    assert (state.conv is not None) == (name in ("mamba2", "delta", "gated_delta", "kda"))
    assert state.conv is None or state.conv.shape == (3, sum(layer.widths), 3)
    wide = fitted(LinearAttention(64, 4, name, expand_k=0.25, expand_v=3))
    assert (wide.key_dim, wide.value_dim) == (4, 48) and wide(torch.zeros(1, 2, 64))[0].shape == (1, 2, 64)

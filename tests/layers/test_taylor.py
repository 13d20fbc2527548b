"""TaylorShift: both forms against the paper's direct formula, the crossovers, and what never lives in memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from linattn.layers import LinearAttention, taylor
from linattn.layers.decays import Place
from linattn.layers.taylor import TaylorShift, crossover, measured_crossover, memory_crossover, taylor_attention, taylor_features

FORMS = ("direct", "linear")


def paper(q, k, v, tau, causal=False, output_norm=True):
    """[B H N d]: T-SM(q̄ k̄ᵀ) v, all N² weights at once."""
    N, d = q.shape[-2:]
    x = (tau * F.normalize(q, dim=-1)) @ F.normalize(k, dim=-1).mT
    w = x * x / 2 + x + 1
    w = w.tril() if causal else w
    seen = torch.arange(1, N + 1, dtype=q.dtype)[:, None] if causal else N
    y = (w / w.sum(-1, keepdim=True)) @ v
    return y * (seen / d) ** 0.5 if output_norm else y


def heads(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "d"), [(1, 1), (5, 4), (64, 8), (300, 16)])
def test_both_forms_are_the_paper(N, d, form, causal):
    q, k, v = heads(2, N, 3, d)
    tau = torch.tensor([1.0, 0.3, -1.7], dtype=torch.float64, requires_grad=True)
    first = lambda x: x.transpose(1, 2)
    wanted = first(paper(first(q), first(k), first(v), tau[:, None, None], causal))
    got = taylor_attention(q, k, v, tau, causal=causal, form=form)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((o * weight).sum(), (q, k, v, tau), retain_graph=True) for o in (got, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_features_have_the_polynomial_as_inner_product():
    x, y = torch.randn(2, 50, 6, dtype=torch.float64)
    s = (x * y).sum(-1)
    assert taylor_features(x).shape == (50, 7 * 8 // 2)
    torch.testing.assert_close((taylor_features(x) * taylor_features(y)).sum(-1), 1 + s + s * s / 2)


@pytest.mark.parametrize("form", FORMS)
def test_padding_counts_for_nothing_not_even_the_constant(form):
    q, k, v = heads(2, 20, 2, 4)
    mask = torch.rand(2, 20) < 0.6
    hidden = [torch.where(mask[..., None, None], x, torch.nan) for x in (q, k, v)]
    o = taylor_attention(*hidden, mask=mask, form=form)
    for b in range(2):
        real = lambda x, b=b: x[b : b + 1, mask[b]]
        torch.testing.assert_close(real(o), taylor_attention(real(q), real(k), real(v), form=form))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_each_alone(causal):
    q, k, v = heads(1, 20, 2, 4)
    ends = [0, 3, 3, 20]
    o = taylor_attention(q, k, v, causal=causal, cu_seqlens=torch.tensor(ends))
    for a, b in ((0, 3), (3, 20)):
        alone = taylor_attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=causal, form="direct")
        torch.testing.assert_close(o[:, a:b], alone)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_has_the_size_of_all_features_or_of_all_weights():
    N, d = 1024, 16  # float32, so that the CPU kernel is taken where there is one; eager would show its own chunks
    q, k, v = (x.detach().float().requires_grad_() for x in heads(1, N, 1, d))
    for form, limit in (("linear", N * 5 * d), ("direct", taylor.ROWS * N)):
        with Largest() as largest:
            taylor_attention(q, k, v, form=form, backend="auto").sum().backward()
        assert largest.elements <= limit, form
    assert N * d * d > N * 5 * d and N * N > taylor.ROWS * N


def test_crossovers():
    table = {8: (73, 47), 16: (273, 159), 32: (1057, 574), 64: (4161, 2174), 128: (16513, 8446)}  # the first N where linear is the cheaper
    for d, (fewer_operations, fewer_numbers) in table.items():
        assert math.floor(crossover(d, symmetric=False)) + 1 == fewer_operations
        assert math.floor(memory_crossover(d)) + 1 == fewer_numbers
        assert 0.4 < crossover(d) / crossover(d, symmetric=False) < 0.7


def test_auto_takes_the_form_that_the_crossover_says(monkeypatch):
    taken = []
    for name in ("_direct", "_linear"):
        form = getattr(taylor, name)
        monkeypatch.setattr(taylor, name, lambda *a, name=name, form=form, **o: (taken.append(name), form(*a, **o))[1])
    q, k, v = heads(1, 60, 1, 8)  # 47.4 by the formula
    taylor_attention(q, k, v)
    taylor_attention(q[:, :40], k[:, :40], v[:, :40])
    taylor_attention(q, k, v, crossover=60)
    taylor_attention(q[:, :40], k[:, :40], v[:, :40], crossover=39.5)
    assert taken == ["_linear", "_direct", "_direct", "_linear"]


def test_a_measured_crossover_is_a_length():
    assert measured_crossover(4, longest=100) in (64, 96, 100)


def test_a_layer_is_the_direct_form_with_a_norm_per_head():
    layer = LinearAttention(24, 3, "taylorshift", causal=False).double()
    with torch.no_grad():
        layer.mixer.feature.temperature.copy_(torch.tensor([1.0, -0.5, 3.0]))
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(-1, (3, 8)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = paper(q, k, v, layer.mixer.feature.temperature[:, None, None], output_norm=False).transpose(1, 2)
    wanted = layer.o_proj(F.rms_norm(o, (8,), layer.norm.weight, 1e-5).flatten(-2))
    for form in FORMS:
        layer.mixer.feature.form = form
        torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-5, atol=1e-8)  # the operator's eps of 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_stays_in_range(form):
    q, k, v = (x.detach().half() for x in heads(1, 600, 1, 8))
    o = taylor_attention(q, k, v, form=form, output_norm=False)
    wanted = taylor_attention(q.double(), k.double(), v.double(), form="direct", output_norm=False)
    assert o.dtype == torch.float16 and (o - wanted).abs().max() < 5e-3


def test_bad_arguments():
    q, k, v = heads(1, 6, 2, 4)
    for call, message in (
        (lambda: taylor_attention(q, k, v, form="fast"), r"form must be one of \['auto', 'direct', 'linear'\]; got 'fast'"),
        (lambda: taylor_attention(q, k[:, :5], v), r"q, k, v must be \[B T HQ d\]"),
        (lambda: taylor_attention(q[:, :, :1], k, v), "q must have a multiple of the 2 heads"),
        (lambda: taylor_attention(q, k, v, mask=torch.ones(1, 6)), r"mask must be bool \[B T\] = \(1, 6\)"),
        (lambda: taylor_attention(q, k, v, mask=torch.ones(1, 6).bool(), cu_seqlens=torch.tensor([0, 6])), "must not both be given"),
        (lambda: taylor_attention(q, k, v, form="direct", cu_seqlens=torch.tensor([0, 6])), "'linear' or 'auto' for packed sequences"),
        (lambda: taylor_attention(q, k, v, form="linear", cu_seqlens=torch.tensor([0, 7])), "cu_seqlens must run from 0 to T = 6"),
        (lambda: TaylorShift(Place(8, 2, 4), form="quick"), "form must be one of"),
        (lambda: crossover(0), "d must be a whole number, the width of a head"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

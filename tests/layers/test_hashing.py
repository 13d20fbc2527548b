"""EcoFormer: codes, fit and attention against formulas written out, the straight-through gradient, and the energy of whole networks."""

import os
import socket

import pytest
import torch
import torch.nn.functional as F

from linattn.layers import LinearAttention
from linattn.layers.decays import Place
from linattn.layers.hashing import KernelHash, Stage, attention_operations, pyramid_operations

B, T, H, K = 2, 40, 2, 6


def data(seed=0, T=T):
    """Queries in clusters, [B T H K]."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, H, K, generator=draw, dtype=torch.float64)
    return centres[torch.randint(4, (B, T), generator=draw)] + 0.5 * torch.randn(B, T, H, K, generator=draw, dtype=torch.float64)


def make(**options):
    torch.manual_seed(0)
    return KernelHash(Place(H * K, H, K), **{"anchors": 12, **options}).double()


def kernel(x, anchors, spread):
    """exp(−|x − p|² / 2s), every difference written out; unit x [B T H K] → [B T H m]."""
    return torch.exp(-(x[..., None, :] - anchors).square().sum(-1) / (2 * spread))


def labels_of(x, l):
    sim = x @ x.mT
    S = torch.zeros_like(sim)
    for row in range(S.shape[-2]):
        order = sim[..., row, :].argsort(-1)
        S[..., row, :].scatter_(-1, order[..., -l:], 1.0)
        S[..., row, :].scatter_(-1, order[..., :l], -1.0)
    return S


@pytest.mark.parametrize("bandwidth", ["frozen", "input"])
def test_codes_are_signs_of_kernel_sums(bandwidth):
    hashing, x = make(bandwidth=bandwidth), data()
    hashing.fit(x, steps=3)
    z = data(1)
    unit = F.normalize(z, dim=-1)
    distances = (unit[..., None, :] - hashing.anchors).square().sum(-1)
    spread = hashing.spread[:, None] if bandwidth == "frozen" else distances.mean((1, 3), keepdim=True)
    g = torch.einsum("bthm,hrm->bthr", kernel(unit, hashing.anchors, spread) - hashing.mean, hashing.weight)
    assert torch.equal(hashing.codes(z), torch.where(g >= 0, 1.0, -1.0).double())
    assert set(hashing.codes(z).unique().tolist()) == {-1.0, 1.0}


def test_the_fit_is_the_greedy_one():
    """Bit by bit, on the residual of the labels, from the same random start."""
    hashing, x, bits = make(bits=5, bandwidth="input"), data(), 5
    residuals = hashing.fit(x, neighbours=4, steps=20, lr=0.1)
    draw = torch.Generator().manual_seed(0)
    unit = F.normalize(x, dim=-1)
    at = torch.randperm(T, generator=draw)[:12]
    assert torch.equal(hashing.anchors, unit[0, at].transpose(0, 1))
    D = (unit[..., None, :] - hashing.anchors).square().sum(-1)
    kappa = torch.exp(-D / (2 * D.mean((1, 3), keepdim=True)))
    kappa = (kappa - kappa.mean((0, 1))).transpose(1, 2)
    start = torch.randn(H, bits, 12, generator=draw, dtype=torch.float64)
    S = bits * labels_of(unit.transpose(1, 2), 4)
    cost = lambda y, S: -(y[..., None, :] @ S @ y[..., None]).mean() / (T * bits)
    wanted = []
    for r in range(bits):
        w, speed = start[:, r].clone().requires_grad_(), 0.0
        for _ in range(20):
            y = 2 * torch.sigmoid((kappa * w[:, None]).sum(-1)) - 1
            (grad,) = torch.autograd.grad(cost(y, S), w)
            speed = 0.9 * speed + grad  # Nesterov
            w = (w - 0.1 * (grad + 0.9 * speed)).detach().requires_grad_()
        sign = lambda w: torch.where((kappa * w[:, None]).sum(-1) >= 0, 1.0, -1.0).double()
        best = w.detach() if cost(sign(w), S) < cost(sign(start[:, r]), S) else start[:, r]
        torch.testing.assert_close(hashing.weight[:, r], best)
        S = S - sign(best)[..., :, None] * sign(best)[..., None, :]
        wanted.append(S.square().mean().item())
    assert residuals == pytest.approx(wanted)


def test_fitted_codes_agree_where_queries_do():
    hashing, x = make(), data()
    residuals = hashing.fit(x)
    assert residuals[-1] < residuals[0]
    h, unit = hashing.codes(x).transpose(1, 2), F.normalize(x, dim=-1).transpose(1, 2)
    codes, cosine = (h @ h.mT).flatten(), (unit @ unit.mT).flatten()
    assert torch.corrcoef(torch.stack([codes, cosine]))[0, 1] > 0.6


def test_the_same_seed_gives_the_same_hash():
    one, two, other = make(), make(), make(seed=1)
    for hashing in (one, two, other):
        torch.randn(3)  # torch's own random state plays no part
        hashing.fit(data(), steps=3)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.anchors, two.anchors)
    assert not torch.equal(one.anchors, other.anchors)


def test_gradients_pass_the_sign_where_it_is_close():
    hashing, x = make(), data().requires_grad_()
    hashing.fit(x, steps=3)
    weight = torch.randn(B, T, H, 16, dtype=torch.float64)
    (got,) = torch.autograd.grad((hashing.codes(x) * weight).sum(), x)
    unit = F.normalize(x, dim=-1)
    g = torch.einsum("bthm,hrm->bthr", kernel(unit, hashing.anchors, hashing.spread[:, None]) - hashing.mean, hashing.weight)
    (wanted,) = torch.autograd.grad((g * weight * (g.abs() < 1)).sum(), x)
    torch.testing.assert_close(got, wanted)
    assert got.ne(0).any() and (g.abs() >= 1).any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["all", "self"])
def test_attention_is_the_hamming_affinity(mode, masked):
    hashing, x, v = make(bias_mode=mode, bias=20.0), data(), torch.randn(B, T, H, 3, dtype=torch.float64)
    hashing.fit(x, steps=3)
    real = torch.rand(B, T) < 0.7 if masked else torch.ones(B, T, dtype=torch.bool)
    o, _ = hashing.attend(x, x, v, None, real if masked else None, causal=False, cu_seqlens=None, return_state=False, backend="auto")
    h = hashing.codes(x).transpose(1, 2)
    hamming = (h[..., :, None, :] != h[..., None, :, :]).sum(-1)
    W = (16 - 2 * hamming + 20.0).double() * real[:, None, None]
    if mode == "all":
        wanted = (W / W.sum(-1, keepdim=True)) @ v.transpose(1, 2)
    else:
        own = (W - 20.0 * real[:, None, None]) @ v.transpose(1, 2) + 20.0 * v.transpose(1, 2) * real[:, None, :, None]
        wanted = own / W.sum(-1, keepdim=True)
    at = real[:, :, None, None].expand_as(o)
    torch.testing.assert_close(o[at], wanted.transpose(1, 2)[at], rtol=1e-6, atol=1e-8)


def test_constants_in_constants_out_but_for_the_released_numerator():
    x, ones = data(), torch.ones(B, T, H, 1, dtype=torch.float64)
    for mode, lowest in (("all", 1 - 1e-6), ("self", -0.5)):
        hashing = make(bias_mode=mode)
        hashing.fit(x, steps=3)
        o, _ = hashing.attend(x, x, ones, None, None, causal=False, cu_seqlens=None, return_state=False, backend="auto")
        assert o.min() >= lowest and (o.max() <= 1 + 1e-6)
        assert (mode == "all") == bool((o > 0.9).all())


def test_the_layer_is_tied_and_fits_itself_when_it_is_trained():
    torch.manual_seed(0)
    layer, x = LinearAttention(16, 2, "ecoformer", causal=False), torch.randn(2, 32, 16)
    assert layer.k_proj is None
    layer.eval()
    with pytest.raises(ValueError, match="the hash is not fitted: call fit"):
        layer(x)
    layer.train()
    first = layer(x)[0]
    layer.eval()
    assert torch.equal(layer(x)[0], first) and layer.mixer.feature.fitted
    again = LinearAttention(16, 2, "ecoformer", causal=False).eval()
    again.load_state_dict(layer.state_dict())  # the fit comes with the weights: nothing is fitted again
    assert torch.equal(again(x)[0], first)
    again.load_state_dict(LinearAttention(16, 2, "ecoformer").state_dict())
    with pytest.raises(ValueError, match="not fitted"):
        again(x)


def _rank(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    hashing = make()
    hashing.fit(data(seed=rank), steps=2)
    queue.put((rank, hashing.weight.tolist(), hashing.anchors.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_process_has_the_first_ones_hash():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: rest for rank, *rest in (queue.get() for _ in workers)}
    for worker in workers:
        worker.join()
    alone = make()
    alone.fit(data(seed=0), steps=2)
    assert found[0] == found[1] == [alone.weight.tolist(), alone.anchors.tolist()]


PVT = {  # arXiv:2209.09004, README: dims, depths, multiplications, additions, energy in 10⁹ (pJ)
    "B0": ((32, 64, 160, 256), (2, 2, 2, 2), 0.54, 0.56, 2.5),
    "B1": ((64, 128, 320, 512), (2, 2, 2, 2), 2.03, 2.09, 9.4),
    "B2": ((64, 128, 320, 512), (3, 4, 6, 3), 3.85, 3.97, 17.8),
    "B3": ((64, 128, 320, 512), (3, 4, 18, 3), 6.54, 6.75, 30.25),
    "B4": ((64, 128, 320, 512), (3, 8, 27, 3), 9.57, 9.82, 44.25),
}


def pvt(name, kind):
    """PVTv2 at 224²; the last stage keeps softmax."""
    dims, depths, *_ = PVT[name]
    rows = zip((kind,) * 3 + ("softmax",), (56, 28, 14, 7), dims, depths, (1, 2, 5, 8), (8, 8, 4, 4), (7, 3, 3, 3), strict=True)
    return pyramid_operations([Stage(*row) for row in rows])


def twins():
    """Twins-SVT-S: every attention global, the last stage's softmax."""
    kinds, sides, dims, depths = ("ecoformer",) * 3 + ("softmax",), (56, 28, 14, 7), (64, 128, 256, 512), (2, 2, 10, 4)
    rows = zip(kinds, sides, dims, depths, (2, 4, 8, 16), (4,) * 4, (4, 2, 2, 2), strict=True)
    return pyramid_operations([Stage(*row, convolved="stage") for row in rows])


@pytest.mark.parametrize("name", [*PVT, "Twins-SVT-S"])
def test_energy_is_that_of_the_papers_table(name):
    *_, multiplications, additions, energy = PVT.get(name, (2.72, 2.81, 12.6))
    total = pvt(name, "ecoformer") if name in PVT else twins()
    assert total.multiplications / 1e9 == pytest.approx(multiplications, rel=0.01)
    assert total.additions / 1e9 == pytest.approx(additions, rel=0.01)
    assert total.picojoule / 1e9 == pytest.approx(energy, rel=0.005)


def test_energy_falls_by_what_the_abstract_says():
    assert 1 - pvt("B0", "ecoformer").picojoule / pvt("B0", "softmax").picojoule == pytest.approx(0.73, abs=0.005)
    small, large = (attention_operations("ecoformer", n, 64, 4).multiplications for n in (100, 200))
    assert large == 2 * small  # linear


def test_bad_arguments():
    x = data()
    attend = dict(causal=False, cu_seqlens=None, return_state=False, backend="auto")
    for call, message in (
        (lambda: make(bias_mode="none"), r"bias_mode must be one of \['all', 'self'\]; got 'none'"),
        (lambda: make(bandwidth="global"), r"bandwidth must be one of \['frozen', 'input'\]; got 'global'"),
        (lambda: make(bias=16), "bias must be above bits = 16, or weights could be negative; got 16"),
        (lambda: make(bits=0), "bits and anchors must be at least 1; got 0 and 12"),
        (lambda: make().eval().codes(x), "the hash is not fitted"),
        (lambda: make().fit(x[:, :11]), r"the fit takes its 12 anchors from the tokens of one sequence; got x \(2, 11, 2, 6\)"),
        (lambda: make().fit(x[0]), r"x must be \[B T H K\] with H K = \(2, 6\)"),
        (lambda: make(bias_mode="self").attend(x, x, x, None, None, **{**attend, "causal": True}), "bias_mode='self' needs causal=False"),
        (lambda: make(bandwidth="input").attend(x, x, x, None, None, **{**attend, "causal": True}), "bandwidth='input' depends on every"),
        (lambda: attention_operations("flash", 10, 8, 2), "kind must be 'softmax' or 'ecoformer'; got 'flash'"),
        (lambda: attention_operations("softmax", 10, 8, 3), "heads must divide dim; got heads=3, dim=8"),
        (lambda: LinearAttention(16, 4, "ecoformer", num_kv_heads=2), r"num_kv_heads must be None where one key .* is the query \(tied\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

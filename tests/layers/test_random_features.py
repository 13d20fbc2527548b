"""MoLFormer's random features: the formula, directions without a preferred side, and when they are drawn."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linattn.layers import LinearAttention, Variant
from linattn.layers.decays import Place
from linattn.layers.random_features import RandomFeatures, haar, orthogonal_features
from linattn.models import Encoder


def rope(x):
    """[B T H d], angles t · 10000^(−2i/d), halves as pairs."""
    T, d = x.shape[1], x.shape[-1]
    angle = torch.arange(T, dtype=x.dtype)[:, None] * 10000 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_rotates_and_then_maps(masked):
    layer = LinearAttention(24, 3, "molformer", causal=False).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    x, real = torch.randn(2, 9, 24, dtype=torch.float64), torch.rand(2, 9) < 0.7 if masked else torch.ones(2, 9, dtype=torch.bool)
    q, k, v = (proj(x).unflatten(-1, (3, 8)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    omega = layer.mixer.feature.omega
    assert omega.shape == (8, 4)
    W = torch.einsum("bthm,bshm->bhts", (rope(q) @ omega).relu(), (rope(k) @ omega).relu()) * real[:, None, None]
    o = torch.einsum("bhts,bshd->bthd", W / (W.sum(-1, keepdim=True) + 1e-6), v)
    torch.testing.assert_close(layer(x, mask=real if masked else None)[0], layer.o_proj(o.flatten(-2)))


def test_features_are_orthogonal_in_runs_and_as_long_as_gaussian_vectors():
    torch.manual_seed(0)
    omega = orthogonal_features(16, 40)
    assert omega.shape == (16, 40)
    for run in omega.split(16, 1):
        gram = run.T @ run
        torch.testing.assert_close(gram, gram.diagonal().diag())
    lengths = torch.cat([orthogonal_features(16, 16).square().sum(0) for _ in range(200)])
    assert abs(lengths.mean() - 16) < 0.5 and abs(lengths.var() - 32) < 4  # χ² of 16 degrees of freedom


def test_directions_lean_to_no_side():
    """Columns of a plain QR do: their i-th component is nearly always negative."""
    torch.manual_seed(0)
    draws = torch.stack([haar(8) for _ in range(2000)])
    plain = torch.stack([torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(200)])
    assert (plain[:, 0, 0] < 0).double().mean() > 0.95
    assert draws.mean(0).abs().max() < 4 / (8 * 2000) ** 0.5  # within four of its own deviations


def test_the_kernel_is_the_arc_cosine_one():
    """E relu(ω·a) relu(ω·b) = |a||b| (sin θ + (π − θ) cos θ) / 2π, Cho and Saul 2009."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, dtype=torch.float64)
    mean = torch.stack([((a @ w).relu() * (b @ w).relu()).mean() for w in (orthogonal_features(8, 8) for _ in range(4000))]).mean()
    theta = torch.arccos(a @ b / (a.norm() * b.norm()))
    wanted = a.norm() * b.norm() * (theta.sin() + (torch.pi - theta) * theta.cos()) / (2 * torch.pi)
    assert abs(mean / wanted - 1) < 0.03


def test_drawing_policies():
    q = torch.randn(1, 5, 2, 8)
    fixed, redrawn = RandomFeatures(Place(16, 2, 8)), RandomFeatures(Place(16, 2, 8), redraw="training")
    assert torch.equal(fixed(q, q)[0], fixed(q, q)[0])
    assert not torch.equal(redrawn(q, q)[0], redrawn(q, q)[0])
    redrawn.eval()
    assert torch.equal(redrawn(q, q)[0], redrawn(q, q)[0])
    fixed.load_state_dict(redrawn.state_dict())
    assert torch.equal(fixed(q, q)[0], redrawn(q, q)[0])
    before = fixed(q, q)[0]
    fixed.draw()
    assert not torch.equal(fixed(q, q)[0], before)


def test_a_checkpointed_block_draws_the_same_again():
    torch.manual_seed(0)
    redrawn = RandomFeatures(Place(16, 2, 8), features=6, redraw="training")
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    f, _ = checkpoint(redrawn, q, q, use_reentrant=False)
    omega = redrawn.omega.clone()
    (grad,) = torch.autograd.grad(f.sum(), q)
    torch.testing.assert_close(grad, ((q @ omega > 0).float() @ omega.T))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"redraw must be one of \['never', 'training'\]; got 'always'"):
        RandomFeatures(Place(16, 2, 8), redraw="always")
    with pytest.raises(ValueError, match="features must be at least 1; got 0"):
        RandomFeatures(Place(16, 2, 8), features=0)
    with pytest.raises(ValueError, match="rotary positions turn pairs of channels: the head width must be even; got 5"):
        LinearAttention(10, 2, "molformer", causal=False)
    assert isinstance(LinearAttention(16, 2, "molformer").variant, Variant)


def test_the_encoder_of_molformer():
    """Post-norm, feed-forward as wide as the model, a norm at the end alone, a head of its own: the paper's 46.8 M weights."""
    with torch.device("meta"):
        model = Encoder.create("molformer", vocab_size=2362, variant="molformer")
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - 46.8) < 0.05
    assert model.config.post_norm and model.blocks[0].attention.mixer.feature.key_dim == 32

"""Measures say what is known beforehand of states and activations that were made by hand."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from linattn import linear_attention, probes
from linattn.probes.plan import Piece
from linattn.probes.trace import Trace


def made(k, v, beta=None, log_decay=None, q=None):
    """The trace of one call of the operator."""
    q = k if q is None else q
    how = dict(causal=True, gating=None, normalize=False, scale=1.0, offset=0.0, backend="auto")
    o, final, found = linear_attention(q, k, v, log_decay, beta, return_state=True, record=("boundaries", "writes"), **how)
    piece = Piece(0, k.shape[1], None, None, None, final, found.boundaries, q, k, v, log_decay, beta, found.writes, o, None)
    return Trace("made", ("final", "boundaries", "writes", "reads"), 64, [piece], how)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("beta", "works"), [(2.0, True), (1.0, False)])
def test_parity_by_reflection(beta, works):
    """T17: with beta = 2 the state's sign is the parity of the bits; with beta = 1 the first bit wipes it out."""
    bits = torch.randint(0, 2, (200,))
    k, v, b = torch.zeros(1, 201, 1, 4).double(), torch.zeros(1, 201, 1, 4).double(), torch.zeros(1, 201, 1).double()
    k[..., 0], v[0, 0, 0, 0], b[0, 0, 0], b[0, 1:, 0] = 1, 1, 1, beta * bits
    trace = made(k, v, b)
    seen = torch.stack([trace.state(t)[0, 0, 0, 0] for t in range(1, 201)])
    right = ((seen < 0).long() == bits.cumsum(0) % 2).double().mean()
    assert (right == 1 and (seen.abs() - 1).abs().max() < 1e-10) == works
    assert probes.transition(trace).negative.item() == pytest.approx(bits.sum().item() / 201 if works else 0)


def test_survival_and_half_life():
    """T18: a key written again is gone under the delta rule and fades under plain decay."""
    k = normalize(randn(1, 40, 1, 8), dim=-1)
    k[:, 20] = k[:, 5]
    v, g = randn(1, 40, 1, 4), torch.full((1, 40, 1), math.log(0.99), dtype=torch.float64)
    delta, decay = made(k, v, torch.ones(1, 40, 1).double(), g), made(k, v, None, g)
    assert probes.survival(delta, 5, [5, 20, 39])[0, 0, 0] == 1 and probes.survival(delta, 5, [20]).abs().item() < 1e-10
    assert probes.survival(decay, 5, [20]).item() == pytest.approx(0.99**15, abs=1e-10)
    assert probes.half_life(decay).item() == pytest.approx(68.9676, abs=1e-3)


def test_a_delta_rule_learns_linear_maps_and_is_less_surprised():
    """T19: with unit keys and beta = 1 the state is Kaczmarz' iterate. The median of eight problems."""
    w, X = randn(8, 16, 1), randn(8, 256, 16)
    n = X.norm(dim=-1, keepdim=True)
    trace = made((X / n)[:, :, None], (X @ w / n)[:, :, None], torch.ones(8, 256, 1).double())
    errors = [float(((trace.state(t)[:, 0] - w).norm(dim=(1, 2)) / w.norm(dim=(1, 2))).median()) for t in (15, 63, 127, 255)]
    assert errors == sorted(errors, reverse=True) and errors[-1] <= 1e-3
    surprise = probes.surprise(trace)[..., 0]
    assert surprise[:, 0].allclose(torch.ones(8).double())
    assert (surprise[:, :16].mean(1) / surprise[:, -16:].median(1).values).median() >= 100


def test_ranks_and_interference_of_known_memories():
    S = torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    assert all(rank.item() == pytest.approx(4, rel=1e-4) for rank in probes.ranks(S))
    assert all(not rank.any() for rank in probes.ranks(torch.zeros(3, 4, 4)))
    trace = made(torch.eye(8).double()[None, :, None], randn(1, 8, 1, 4))
    seen = [probes.ranks(trace.state(t)).numeric.item() for t in range(4)]
    assert seen == [1, 2, 3, 4]
    assert probes.interference(trace, [7], [7]).snr.item() > 1e6  # orthogonal keys do not disturb each other
    same = made(torch.ones(1, 4, 1, 2).double(), torch.ones(1, 4, 1, 3).double())
    found = probes.interference(same, [3], [1])
    assert found.snr.item() == pytest.approx(1 / math.sqrt(3)) and found.cosine.item() == pytest.approx(1)
    # a key written again under the delta rule: the first value is gone from what is read, though its token did write it
    again = made(torch.eye(2).double()[[0, 1, 0]][None, :, None], torch.eye(3).double()[None, :, None], torch.ones(1, 3, 1).double())
    found = probes.interference(again, [2], torch.tensor([[0]]))
    assert not found.signal.any() and not found.cosine.any() and probes.interference(again, [2], [2]).cosine.item() == pytest.approx(1)
    with pytest.raises(ValueError, match="tokens must lie in"):
        probes.interference(same, [3], [4])


def test_trajectory_and_offsets():
    still = made(torch.ones(1, 9, 1, 2).double(), torch.ones(1, 9, 1, 3).double())
    found = probes.trajectory(still, [1, 3, 5, 7])
    assert found.angle.max() < 1e-6 and found.speed[0, 0, 0] == pytest.approx(0.5)
    trace = made(torch.eye(8).double()[None, :, None], randn(1, 8, 1, 4))
    share = probes.offsets(trace, [6], torch.tensor([[5]]), reach=2)
    assert share.tolist() == [0, 0, 0, 1, 0]  # token 6 reads itself, one behind 5
    with pytest.raises(ValueError, match="at must be three positions"):
        probes.trajectory(still, [1, 2])


def test_cka_knows_rotations_and_strangers():
    X, Q = randn(512, 8), torch.linalg.qr(randn(8, 8))[0]
    Y = randn(512, 8)
    assert probes.cka(X, 3 * X @ Q).item() == pytest.approx(1) and probes.cka(X, Y) < 0.1
    batches = probes.MinibatchCKA()
    for a, b in zip(X.split(256), Y.split(256)):
        batches.update(a, b)
    assert abs(batches.result() - probes.cka(X, Y).item()) <= 0.03  # T21
    whole = probes.MinibatchCKA()
    whole.update(X, X @ Q)
    assert whole.result() == pytest.approx(1)
    with pytest.raises(ValueError, match="same samples"):
        probes.cka(X, Y[:5])


def test_dimensions_directions_and_maps():
    low = randn(200, 3) @ randn(3, 16)
    assert probes.rankme(low) < 3.1 < probes.rankme(randn(200, 16))
    centres = 10 * randn(50, 1, 4) @ torch.eye(4, 12).double()
    assert 3 < probes.lidar(centres + 0.1 * randn(50, 20, 12)) < 4.5
    with pytest.raises(ValueError, match="classes views d"):
        probes.lidar(randn(5, 4))
    d = normalize(randn(16), dim=0)
    positive = torch.rand(2000) > 0.5
    assert probes.difference_of_means(randn(2000, 16) + 4 * positive[:, None] * d, positive) @ d > 0.95
    with pytest.raises(ValueError, match="positive must be bool"):
        probes.difference_of_means(low, torch.ones(200, dtype=torch.bool))


def test_alignment_and_uniformity_of_points_on_a_circle():
    X = torch.tensor([[1.0, 0], [0, 3.0]])
    assert probes.alignment(X, 2 * X) == 0 and probes.alignment(X, -X).item() == pytest.approx(4)
    assert probes.alignment(X, X.flip(0)).item() == pytest.approx(2)
    assert probes.uniformity(torch.tensor([[1.0, 0], [-2.0, 0]])).item() == pytest.approx(-8)
    assert probes.uniformity(torch.ones(5, 3)).abs().item() < 1e-5
    with pytest.raises(ValueError, match="one width"):
        probes.alignment(X, randn(2, 3))
    with pytest.raises(ValueError, match="two rows or more"):
        probes.uniformity(X[:1])


def test_the_causal_inner_product_knows_no_basis():
    """Words and directions in another basis, γ M, give the same products, and plain ones do not. Of a white vocabulary it is plain."""
    words, U, V, M = randn(300, 6), randn(2, 6), randn(3, 6), randn(6, 6)
    found = probes.causal_inner_product(U, V, words)
    assert torch.allclose(found, probes.causal_inner_product(U @ M, V @ M, words @ M)) and not torch.allclose(U @ V.mT, U @ M @ (V @ M).mT)
    assert torch.allclose(found, U @ torch.linalg.inv(words.mT.cov()) @ V.mT)
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).double() * math.sqrt(2.5)  # covariance 1
    assert torch.allclose(probes.causal_inner_product(U[:, :3], V[:, :3], axes), U[:, :3] @ V[:, :3].mT)
    with pytest.raises(ValueError, match="shrinkage must lie in"):
        probes.causal_inner_product(U, V, words[:5])
    assert probes.causal_inner_product(U, V, words[:5], 0.5).isfinite().all()
    with pytest.raises(ValueError, match="vocab d"):
        probes.causal_inner_product(U, V, words[:, :4])


def test_ideal_words_of_a_sum_and_of_what_is_no_sum():
    a, b = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), torch.tensor([[0, 1.0, 0], [0, 2.0, 0], [0, -3.0, 0]])
    factors = torch.cartesian_prod(torch.tensor([7, 9]), torch.arange(3))
    X = 5 + a[(factors[:, 0] == 9).long()] + b[factors[:, 1]]
    found = probes.ideal_words(X, factors)
    assert found.explained == pytest.approx(1) and torch.allclose(found.mean, torch.tensor(5.0)) and found.levels[0].tolist() == [7, 9]
    assert torch.allclose(found.words[0], a, atol=1e-5) and torch.allclose(found.words[1], b, atol=1e-5)
    kept = torch.tensor([0, 0, 1, 2, 3, 5])  # not balanced: still a sum
    assert probes.ideal_words(X[kept], factors[kept]).explained == pytest.approx(1)
    parity = torch.tensor([[1.0], [-1], [-1], [1]])
    assert probes.ideal_words(parity, torch.cartesian_prod(torch.arange(2), torch.arange(2))).explained == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="whole numbers"):
        probes.ideal_words(X, factors.float())

"""Fitters find what was planted, by closed form where there is one; their controls find nothing, and bad input is named."""

import pytest
import torch
from torch.nn.functional import normalize

from linattn import Decoder, linear_attention, probes


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# -- controls ----------------------------------------------------------------------------------------------------------------------------


def test_a_figure_prints_its_controls_or_that_it_has_none():
    X = randn(100, 6)
    found = probes.controlled(probes.cka, X, 2 * X, shuffled=True, against={"another": (X, randn(100, 6, seed=1))})
    assert found.value == pytest.approx(1) and max(found.controls.values()) < 0.2 and list(found.controls) == ["shuffled rows", "another"]
    assert str(found).startswith("cka 1 (controls: shuffled rows 0.") and float(found) == found.value
    assert "no control" in str(probes.controlled(probes.rankme, X))
    with pytest.raises(ValueError, match="measure must give one number"):
        probes.controlled(lambda X: X, X)


def test_an_untrained_model_is_another_draw_of_the_same():
    model = Decoder.create("tiny", vocab_size=9, dim=16, num_layers=1, num_heads=1).double().eval()
    state = torch.random.get_rng_state()
    fresh = probes.untrained(model, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state) and not fresh.training
    assert fresh.embedding.weight.dtype == torch.float64 and not torch.equal(fresh.embedding.weight, model.embedding.weight)
    assert torch.equal(fresh.embedding.weight, probes.untrained(model, seed=5).embedding.weight)
    with pytest.raises(ValueError, match="make an untrained one yourself"):
        probes.untrained(torch.nn.Linear(2, 2))


# -- bilinear ----------------------------------------------------------------------------------------------------------------------------


def test_a_bilinear_probe_finds_the_reader_and_a_flat_one_cannot():
    """y = aᵀ S b of 12 × 12 states from fewer of them than entries."""
    S, a, b = randn(140, 12, 12), normalize(randn(12), dim=0), randn(12, seed=1)
    y = torch.einsum("nkv,k,v->n", S, a, b)
    found = probes.BilinearProbe(ridge=1e-9).fit(S, y)
    assert found.score > 1 - 1e-9 and (found.readers[0] @ a).abs() > 1 - 1e-9 and found.controls["shuffled labels"] < 0.3
    assert torch.allclose(found.weight[..., 0], a[:, None] * b, atol=1e-6) and torch.allclose(found.predict(S)[:, 0], y, atol=1e-6)
    assert torch.allclose(torch.einsum("rk,rvc->kvc", found.readers, found.values), found.weight)
    assert probes.LinearProbe(ridge=1e-9).fit(S.flatten(1), y).score < 0.9


def test_a_bilinear_probe_of_classes_reads_one_pair_among_others():
    """States of four pairs under orthogonal keys: the class is the value under the first, and one reader for all classes is its key."""
    keys, words = torch.linalg.qr(randn(16, 16)).Q[:4], randn(6, 8, seed=1)
    values = drawn(6, 500, 4)
    S = torch.einsum("pk,npv->nkv", keys, words[values])
    found = probes.BilinearProbe().fit(S, values[:, 0], against={"other states": S.roll(1, 0)})
    assert found.score == 1 and (found.readers[0] @ keys[0]).abs() > 0.999 and max(found.controls.values()) < 0.35
    assert probes.BilinearProbe(rank=3).fit(S, values[:, 0], against={"two keys": S[:, :2]}).score == 1  # of which no three are orthonormal
    flat = probes.BilinearProbe(rank=16, ridge=1e-2).fit(S, values[:, 0])
    wide = probes.BilinearProbe(rank=1).fit(S, values[:, 0], controls=())
    assert (
        flat.score == 1 and torch.allclose(flat.readers @ flat.readers.mT, torch.eye(16).double(), atol=1e-6) and "no control" in str(wide)
    )


# -- maps --------------------------------------------------------------------------------------------------------------------------------


def test_a_linear_map_and_its_controls():
    X, A = randn(300, 8), randn(8, 5, seed=1)
    found = probes.LinearMap().fit(X, X @ A)
    assert torch.allclose(found.weight, A) and found.r2 == pytest.approx(1) and found.precision == 1 and not found.bias.any()
    assert list(found.controls) == ["shuffled rows"] and found.controls["shuffled rows"][0] < 0.1 > found.controls["shuffled rows"][1]
    assert torch.allclose(found(X), X @ A) and "precision@1 1.000" in str(found) and "90 rows held out" in str(found)
    moved = probes.LinearMap(intercept=True).fit(X, X @ A + 3, decode=lambda Y: Y, against={"another": randn(300, 4, seed=2)})
    assert torch.allclose(moved.bias, torch.tensor(3.0).double()) and moved.precision == 1 and moved.controls["another"][0] < 0.1
    same = probes.LinearMap().fit(X, X + 0.1 * randn(300, 8, seed=3))
    assert same.controls["identity"][1] == 1 and same.controls["identity"][0] > 0.98
    half = probes.LinearMap(ridge=1.0 / 210).fit(X, X @ A)  # ridge · mean diagonal ≈ n / n: barely shrunk
    assert 0.95 < (half.weight.norm() / A.norm()).item() < 1


def test_a_relation_is_the_state_for_a_layer_that_reads_it():
    """o = scale · Sᵀ q: the Jacobian by q is the state, with β = 1 the map is exact, and objects' concepts are the keys they lie under."""
    K, V = 8, 6
    keys, values = torch.linalg.qr(randn(K, K)).Q[:4], randn(4, V, seed=1)
    _, state = linear_attention(keys[None, :, None], keys[None, :, None], values[None, :, None], return_state=True)

    def f(q):
        o, _ = linear_attention(q[:, None, None], q[:, None, None] * 0, values.new_zeros(len(q), 1, 1, V), initial_state=type(state)(
            state.kv.expand(len(q), -1, -1, -1), None))  # fmt: skip
        return o[:, 0, 0]

    subject = drawn(4, 60)
    S = keys[subject] + 0.1 * randn(60, K, seed=2)
    decode = lambda o: o @ values.mT - (K**-0.5) * values.square().sum(-1) / 2
    found = probes.LinearRelation().fit(f, S, decode)
    assert torch.allclose(found.J, state.kv[0, 0].mT * K**-0.5) and found.bias.abs().max() < 1e-12 and found.faithfulness == 1
    assert max(found.controls.values()) < 0.6 and "52 subjects held out" in str(found) and torch.allclose(found(S), f(S))
    concepts = found.concepts(f(keys), rank=4)
    assert torch.allclose((concepts * keys).sum(-1), torch.ones(4).double()) and (S @ concepts.mT).argmax(-1).eq(subject).all()
    with pytest.raises(ValueError, match="rank must lie in"):
        found.concepts(values, 9)
    with pytest.raises(ValueError, match="objects must be"):
        found.concepts(keys, 1)


def test_ablation_leaves_the_mean_and_nothing_else_along_a_direction():
    X, d, mean = randn(50, 7), randn(7, seed=1), randn(7, seed=2)
    unit = normalize(d, dim=0)
    assert (probes.ablated(X, d) @ unit).abs().max() < 1e-12
    kept = probes.ablated(X, d, mean)
    assert torch.allclose(kept @ unit, mean @ unit) and torch.allclose(kept - X, ((kept - X) @ unit)[:, None] * unit)
    with pytest.raises(ValueError, match="direction must be"):
        probes.ablated(X, X)


# -- onions ------------------------------------------------------------------------------------------------------------------------------


def test_an_onion_is_peeled_and_no_linear_probe_reads_it():
    """Five tokens of six in two numbers: layers shrink by 0.3, and codes lie on a circle."""
    angle = torch.arange(6).double() * torch.pi / 3
    codes, scales = torch.stack([angle.cos(), angle.sin()], 1), 0.3 ** torch.arange(5).double()
    tokens = drawn(6, 3000, 5)
    X = torch.einsum("nld,l->nd", codes[tokens], scales) + torch.tensor([1.0, -2.0])
    found = probes.OnionProbe().fit(X, tokens + 10)
    assert found.peeled.min() > 0.99 and found.linear[2:].max() < 0.4 and found.controls["shuffled labels"] < 0.25
    assert torch.allclose(found.scales, scales, atol=1e-3) and torch.allclose(found.codes, codes, atol=1e-2)
    assert (
        (found.peel(X) == tokens + 10).double().mean() > 0.99 and "peeled" in str(found) and found.classes.tolist() == list(range(10, 16))
    )
    assert "no control" in str(probes.OnionProbe().fit(X, tokens, controls=()))


# -- dissection --------------------------------------------------------------------------------------------------------------------------


def test_dissection_of_units_that_are_a_concept_and_of_noise():
    masks = torch.zeros(40, 2, 16, 16, dtype=torch.bool)
    for image, (row, column) in enumerate(drawn(4, 40, 2).tolist()):
        masks[image, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
        masks[image, 1, :, 8:] = image % 2 == 0
    noise = randn(40, 1, 16, 16)
    maps = torch.cat([masks[:, :1].double() + 0.01 * noise, masks[:, 1:].double() + 0.01 * noise, noise], 1)
    found = probes.dissect(maps, masks, quantile=1 / 16, floor=0.2, against={"noise": noise})
    assert found.iou[0, 0] > 0.98 and found.detectors[0][0] == 0 and found.controls["noise"] == 0 and 2 not in found.detectors
    assert found.iou[1, 1] == pytest.approx(1 / 4, abs=0.02)  # a quarter of all pixels is the concept, and 1/16 of them are above T
    assert probes.dissect(maps[:, :1], masks[:, :1], quantile=1 / 16, floor=0.2).controls == {"shuffled images": 0}
    assert "units detect 2 of 2 concepts" in str(found) and "no control" in str(probes.dissect(maps, masks, shuffled=False))
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3)
    assert probes.unit_maps(tokens, (2, 3), prefix=1)[1, 2].tolist() == [[26, 29, 32], [35, 38, 41]]


# -- sparse autoencoders -----------------------------------------------------------------------------------------------------------------


def planted(n=2000, atoms=24, d=16, seed=0):
    D = normalize(randn(atoms, d, seed=seed), dim=1).float()
    on = torch.rand(n, atoms, generator=torch.Generator().manual_seed(seed + 1)).argsort(1)[:, :2]
    z = torch.zeros(n, atoms).scatter(1, on, 1 + torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 2)))
    return z @ D, D, z


def test_a_sparse_autoencoder_finds_the_dictionary():
    X, D, _ = planted()
    found = probes.SparseAutoencoder(atoms=32, k=2, steps=300, batch=128, lr=1e-2).fit(X)
    best = (found.atoms @ D.mT).amax(0)
    assert found.explained > 0.9 and found.active <= 2 and (best > 0.95).float().mean() > 0.8
    assert max(found.controls.values()) < 0.5 and torch.allclose(found.atoms.norm(dim=1), torch.ones(32))
    z = found.encode(X)
    assert (z >= 0).all() and (z > 0).sum(1).max() == 2 and probes.measures.sparse._explained(X, found.decode(z)) > 0.9
    assert "atoms a row" in str(found) and "principal directions explained" in str(found)


def test_adaptive_k_spends_atoms_where_rows_are_complex():
    X, D, z = planted()
    more = torch.arange(len(X)) % 2 == 0
    X = torch.where(more[:, None], X + (z.roll(1, 0) + z.roll(2, 0)) @ D + 3, X)  # twice as many atoms, and a direction that says so
    found = probes.SparseAutoencoder(atoms=32, k=(1, 8), steps=300, batch=256).fit(X, more.float() + 0.01 * torch.rand(len(X)), controls=())
    counts = found.counts(X)
    assert counts[more].float().mean() > counts[~more].float().mean() + 3 and counts.min() >= 1 and counts.max() <= 8
    assert ((found.encode(X) > 0).sum(1) <= counts).all() and "no control" in str(found) and "complexity R²" in str(found)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda X, y: probes.BilinearProbe(rank=0), "rank must be a whole number"),
        (lambda X, y: probes.BilinearProbe(ridge=0), "ridge must be above 0"),
        (lambda X, y: probes.BilinearProbe(rank=7).fit(X[..., None], y), "rank must be at most the 6 keys"),
        (lambda X, y: probes.BilinearProbe().fit(X, y), r"X and y must be \[n K V\]"),
        (lambda X, y: probes.BilinearProbe().fit(X[..., None], y, against={"flat": X}), r"against\['flat'\] must be \[n K V\]"),
        (lambda X, y: probes.LinearMap(ridge=-1), "ridge must be at least 0"),
        (lambda X, y: probes.LinearMap(k=0), "k must be a whole number"),
        (lambda X, y: probes.LinearMap().fit(X, X[:5]), "same samples"),
        (lambda X, y: probes.LinearMap().fit(X, X / 0), "Y must be"),
        (lambda X, y: probes.LinearMap().fit(X, X, against={"other": X[:3]}), "other must be"),
        (lambda X, y: probes.LinearRelation(examples=40).fit(lambda S: S, X, lambda o: o), "more rows than examples=40"),
        (lambda X, y: probes.LinearRelation().fit(lambda S: S[0], X, lambda o: o), "f must give objects"),
        (lambda X, y: probes.OnionProbe(ridge=0), "ridge must be above 0"),
        (lambda X, y: probes.OnionProbe().fit(X, y), "X and tokens must be"),
        (lambda X, y: probes.OnionProbe().fit(X, torch.arange(80).view(40, 2)), "more rows than 2 positions of 80 classes"),
        (lambda X, y: probes.OnionProbe().fit(X, y[:, None], controls=("random labels",)), "controls must be of"),
        (lambda X, y: probes.dissect(X[..., None, None], y), "masks must be bool"),
        (lambda X, y: probes.dissect(X, torch.ones(40, 1, 2, 2) > 0), "maps must be"),
        (lambda X, y: probes.dissect(X, X, quantile=0), "quantile must lie in"),
        (lambda X, y: probes.unit_maps(X, (2, 3)), "tokens must be"),
        (lambda X, y: probes.SparseAutoencoder(k=9, atoms=4), "k must be at most the number of atoms"),
        (lambda X, y: probes.SparseAutoencoder(steps=0), "steps must be a whole number"),
        (lambda X, y: probes.SparseAutoencoder(lr=0), "lr must be above 0"),
        (lambda X, y: probes.SparseAutoencoder(k=(1, 2)).fit(X), "complexity must be"),
        (lambda X, y: probes.SparseAutoencoder().fit(X, y), "complexity must be"),
        (lambda X, y: probes.SparseAutoencoder().fit(X / 0), "X must be"),
        (lambda X, y: probes.SparseAutoencoder().fit(X, controls=("noise",)), "controls must be of"),
        (lambda X, y: probes.between(torch.nn.Linear(2, 2), lambda: 0, "a", "b", at=0, to=0), "source must be the name of a module"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make(randn(40, 6), drawn(3, 40))

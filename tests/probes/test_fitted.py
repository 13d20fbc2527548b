"""Fitted measures find what was put there by hand, find nothing in their controls, and say which controls they had."""

import pytest
import torch
from torch.nn.functional import one_hot

import linattn
from linattn import probes
from linattn.probes import LinearProbe

KIND = pytest.mark.parametrize("kind", ["ridge", "logistic"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(n=600, d=12, classes=4):
    """y, and X whose columns 3 … 6 hold it."""
    y = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(1))
    X = randn(n, d)
    X[:, 3 : 3 + classes] += 6 * one_hot(y, classes)
    return X, y


@KIND
def test_a_linear_probe_finds_what_is_there_and_its_controls_do_not(kind):
    X, y = labelled()
    found = LinearProbe(kind).fit(X, y * 10, controls=("shuffled labels", "random labels"), against={"noise": randn(600, 5, seed=2)})
    assert found.score > 0.98 and found.held_out == 180 and found.classes.tolist() == [0, 10, 20, 30]
    assert list(found.controls) == ["shuffled labels", "random labels", "noise"] and max(found.controls.values()) < 0.4
    assert found.selectivity == pytest.approx(found.score - max(found.controls.values()))
    assert (found.predict(X) == y * 10).double().mean() > 0.98
    assert "shuffled labels 0." in str(found) and "noise 0." in str(found) and "chance 0." in str(found)


def test_a_result_says_that_it_has_no_control():
    found = LinearProbe().fit(*labelled(), controls=())
    assert "no control" in str(found) and found.selectivity is None


def test_two_classes_and_bool_labels():
    X, y = labelled(classes=2)
    for kind in ("ridge", "logistic"):
        found = LinearProbe(kind).fit(X, y == 1)
        assert found.score > 0.98 and (found.predict(X) == (y == 1)).double().mean() > 0.98


@KIND
@pytest.mark.parametrize("classes", [2, 3])
def test_a_control_may_be_left_with_fewer_classes(kind, classes):
    """Two types have at most two labels, and here and there only one."""
    X, y = labelled(300, classes=classes)
    for seed in range(6):
        found = LinearProbe(kind, seed=seed).fit(X, y, controls=("random labels",), types=(X[:, 0] > 0).long())
        assert found.score > 0.95 and 0.6 < found.controls["random labels"] <= 1


def test_numbers_are_fitted_by_the_closed_form_of_ridge():
    """y = X w + 2 exactly: R² → 1 and the map → w as the ridge goes; a strong one shrinks it by 1 / (1 + ridge) on white columns."""
    X, w = randn(5000, 6), randn(6, 2, seed=3)
    found = LinearProbe(ridge=1e-9).fit(X, X @ w + 2)
    assert (
        found.score == pytest.approx(1)
        and torch.allclose(found.weight, w, atol=1e-6)
        and torch.allclose(found.bias, torch.tensor(2.0).double())
    )
    assert torch.allclose(found.predict(X), X @ w + 2, atol=1e-6) and "R² 1.000" in str(found) and found.controls["shuffled labels"] < 0.01
    shrunk = LinearProbe(ridge=1.0).fit(X, X @ w)
    assert (shrunk.weight.norm() / w.norm()).item() == pytest.approx(0.5, abs=0.02)


@KIND
def test_a_sparse_probe_names_the_columns(kind):
    X, y = labelled()
    found = LinearProbe(kind, k=4).fit(X, y)
    assert sorted(found.features.tolist()) == [3, 4, 5, 6] and found.score > 0.98
    assert not found.weight[[0, 1, 2, 7, 8, 9, 10, 11]].any()
    number = LinearProbe(k=1, ridge=1e-6).fit(X, 3 * X[:, 9])
    assert number.features.tolist() == [9] and number.weight[9].item() == pytest.approx(3, abs=1e-4)


def test_a_constant_column_is_no_trouble():
    X, y = labelled()
    X[:, 0] = 0.1
    for dtype in (torch.float64, torch.float32):
        found = LinearProbe().fit(X.to(dtype), y)
        assert found.score > 0.98 and not found.weight[0].any() and found.weight.isfinite().all()


def test_groups_are_held_out_together_and_what_is_known_by_heart_shows():
    """Rows of one group share an accidental code: a split through groups tells their labels by it, one around them does not."""
    groups = torch.arange(200).repeat_interleave(3)
    X = randn(200, 150)[groups] + 0.01 * randn(600, 150, seed=4)
    y = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(5))[groups]
    probe = LinearProbe(ridge=1e-3)
    assert probe.fit(X, y).score > 0.85 and probe.fit(X, y, groups=groups).score < 0.7
    by_heart = probe.fit(X, y, controls=("shuffled labels", "random labels"), types=groups)
    assert by_heart.controls["random labels"] > 0.85 > 0.7 > by_heart.controls["shuffled labels"]
    assert by_heart.selectivity < 0.1  # and so the score says nothing


def test_a_layer_curve_with_an_untrained_control():
    X, y = labelled()
    layers = {"0": randn(600, 12, seed=6), "1": X, "2": randn(600, 12, seed=7) + 0.2 * X}
    nothing = {name: randn(600, 12, seed=8) for name in layers}
    curve = probes.layer_curve(layers, y, untrained=nothing)
    assert curve.best == "1" and curve.results["0"].score < 0.4 < curve.results["2"].score < curve.results["1"].score
    assert len(str(curve).splitlines()) == 3 and str(curve).count("untrained model 0.") == 3
    with pytest.raises(ValueError, match="untrained model must have the same layers"):
        probes.layer_curve(layers, y, untrained={"0": X})
    with pytest.raises(ValueError, match="at least one layer"):
        probes.layer_curve({}, y)


def test_random_keys_read_nothing():
    """Values under orthogonal keys are read out exactly with those keys; with random ones of the same norms hardly."""
    n, K, values = 200, 32, 8
    y = torch.randint(0, values, (n, 4), generator=torch.Generator().manual_seed(9))
    keys = torch.linalg.qr(randn(n, K, 4)).Q.mT * 3  # [n 4 K]
    S = keys.mT @ one_hot(y, values).double()
    other = probes.random_keys(keys)
    assert torch.allclose(other.norm(dim=-1), keys.norm(dim=-1)) and not torch.allclose(other, keys)
    sequence = torch.arange(n).repeat_interleave(4)
    found = LinearProbe().fit((keys @ S).flatten(0, 1), y.flatten(), groups=sequence, against={"random key": (other @ S).flatten(0, 1)})
    assert found.score == 1 and found.controls["random key"] < 0.35


def test_leace_takes_a_label_away_and_little_else():
    X, y = labelled(3000)
    eraser = probes.leace(X[:2000], y[:2000])
    erased = eraser(X)
    assert LinearProbe().fit(X, y).score > 0.98 and LinearProbe().fit(erased, y).score < 0.35
    assert (erased[:, :3] - X[:, :3]).norm() < 0.1 * X[:, :3].norm()  # columns that say nothing of y
    inside = erased[:2000] - erased[:2000].mean(0)
    assert (inside.mT @ one_hot(y[:2000], 4).double() / 2000).abs().max() < 0.02 * X.std()
    linear = probes.leace(X, y, affine=False)
    S, keys = randn(5, 12), randn(7, 5)
    assert torch.allclose(keys @ (S @ linear.P.mT), linear(keys @ S))  # on a state: before or after reading
    number = probes.leace(X, X[:, 0])
    assert LinearProbe().fit(number(X), X[:, 0]).score < 0.01


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda X, y: LinearProbe("tree"), "kind must be 'ridge' or 'logistic'; got 'tree'"),
        (lambda X, y: LinearProbe(ridge=0), "ridge must be above 0; got 0"),
        (lambda X, y: LinearProbe(k=0), "k must be a number of columns"),
        (lambda X, y: LinearProbe(held_out=1.0), "held_out must lie in"),
        (lambda X, y: LinearProbe(held_out=1e-6).fit(X, y), "held_out must leave something on both sides of 600 rows"),
        (lambda X, y: LinearProbe(k=13).fit(X, y), "k must be at most the 12 columns"),
        (lambda X, y: LinearProbe("logistic").fit(X, X), "y must be classes"),
        (lambda X, y: LinearProbe().fit(X[None], y), "same samples"),
        (lambda X, y: LinearProbe().fit(X, y[:-1]), "same samples"),
        (lambda X, y: LinearProbe().fit(X, y[:, None]), r"y must be \[n\] where it holds classes"),
        (lambda X, y: LinearProbe().fit(X, y * 0), "two classes or more"),
        (lambda X, y: LinearProbe().fit(X / 0, y), "X must be finite"),
        (lambda X, y: LinearProbe().fit(X, X[:, 0] / 0), "y must be finite"),
        (lambda X, y: LinearProbe().fit(X, X[:, 0] * 0), "y must differ"),
        (lambda X, y: LinearProbe().fit(X, y, against={"other": X / 0}), "finite, of the same 600"),
        (lambda X, y: LinearProbe().fit(X, y, controls=("none",)), "controls must be of"),
        (lambda X, y: LinearProbe().fit(X, y, against={"other": X[:5]}), r"against\['other'\]"),
        (lambda X, y: LinearProbe().fit(X, y, groups=y[:3]), "groups must be"),
        (lambda X, y: LinearProbe().fit(X, torch.arange(600)), "every class among the fitted rows"),
        (lambda X, y: probes.leace(X, y, svd_tol=0), "svd_tol must be above 0"),
        (lambda X, y: probes.cka(X, X, rbf=-1.0), "rbf must be above 0"),
        (lambda X, y: probes.cka(X * 0, X, rbf=1.0), "rows that differ"),
        (lambda X, y: probes.rsa(X[:2], X[:2]), "at least 3 rows"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make(*labelled())


def test_cka_by_a_kernel_and_rsa_know_rotations_and_strangers():
    X, Q, Y = randn(300, 8), torch.linalg.qr(randn(8, 8, seed=1)).Q, randn(300, 8, seed=2)
    assert probes.cka(X, 3 * X @ Q + 1, rbf=0.5).item() == pytest.approx(1)
    whole = probes.MinibatchCKA(rbf=0.5)
    whole.update(X, 2 * X @ Q)
    assert whole.result() == pytest.approx(1)
    strangers = probes.MinibatchCKA(rbf=0.5)
    strangers.update(X, Y)
    assert abs(strangers.result()) < 0.05
    assert probes.rsa(X, 3 * X @ Q + 1, "euclidean") == pytest.approx(1) and abs(probes.rsa(X, Y, "euclidean")) < 0.1
    assert probes.rsa(X, 2 * X + 1) == pytest.approx(1)  # rows' own mean and scale are no matter to a correlation
    angle = torch.linspace(0, 6, 50).double()[:, None]
    ring = torch.cat([angle.cos(), angle.sin()], 1)
    assert probes.cka(angle, ring, rbf=0.2) > probes.cka(angle, ring) + 0.2  # neighbours are the same, the line is bent


def test_rbf_cka_of_three_points_by_hand():
    """Rows at 0, 1, 3: distances 1, 3, 2, median 2; with σ = 2 the Gram matrix is exp(−d² / 8)."""
    K = probes.measures.geometry.gram(torch.tensor([[0.0], [1.0], [3.0]]), 1.0)
    wanted = torch.exp(-torch.tensor([[0.0, 1, 9], [1, 0, 4], [9, 4, 0]]) / 8)
    assert torch.allclose(K, wanted)
    assert probes.rsa(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [9.0]]), "euclidean") == pytest.approx(1)


def test_the_state_lens_is_what_the_layer_adds_where_the_token_itself_writes_nothing(decoder, tokens):
    model, t = decoder("gla", num_layers=1), 80
    seen = []
    handle = model.blocks[0].attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        with linattn.probe(model, keep=("writes", "reads", "inputs")) as p:
            model(tokens)
        with linattn.probe(model, keep=()) as silent:
            silent.knockout(0, tokens=[t])
            model(tokens)
        handle.remove()
        x = model.embedding(tokens)[:, [t]]
        found = probes.lens(model, p[0], [t], at=t - 1, residual=x)
        wanted = model.logits(model.norm(x + seen[1][:, [t]]))
        assert found.shape == (2, 1, 32) and torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(found, model.logits(model.norm(x + seen[0][:, [t]])), atol=1e-3)
        added = probes.lens(model, p[0], [t], at=t - 1, decode=lambda y: y)
        assert torch.allclose(added, seen[1][:, [t]], atol=1e-5)
        with linattn.probe(model, keep=("writes", "reads")) as without:
            model(tokens)
        with pytest.raises(ValueError, match="keep must name 'inputs'"):
            probes.lens(model, without[0], [t], at=t - 1)
        with pytest.raises(ValueError, match="no layer"):
            probes.lens(torch.nn.Linear(2, 2), p[0], [t], at=t - 1)
        with pytest.raises(ValueError, match="residual must be"):
            probes.lens(model, p[0], [t], at=t - 1, residual=x[:, 0])
        with linattn.probe(model, keep=("writes", "reads", "inputs"), heads=[0]) as one:
            model(tokens)
        with pytest.raises(ValueError, match="all heads"):
            probes.lens(model, one[0], [t], at=t - 1)

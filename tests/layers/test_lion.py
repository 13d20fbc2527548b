"""LION against its quadratic form, written out with a mask in float64: every variant, both curves, and every way to compute it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hashes import fitted

from linattn.layers import VARIANTS, LinearAttention, snake, snakes
from linattn.layers.decays import HeadDecay, Place, lion

DIM, HEADS, GRID = 16, 2, (3, 4)
T = 1 + GRID[0] * GRID[1]  # a CLS token, then the patches
LIONS = [name for name in VARIANTS if name.startswith("lion_")]
CURVED = [name for name in VARIANTS if name in ("lion_d", "lion_s", "lion_d_mlm", "lion_s_mlm", "gla", "retnet", "gated_delta", "mamba2")]


def make(name, **options):
    """A layer with gates, biases and norms that matter, in float64."""
    layer = LinearAttention(DIM, HEADS, name, causal=False, layer_idx=1, num_layers=4, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2 if parameter.ndim == 2 else parameter + torch.randn_like(parameter) / 4)
    return fitted(layer)


def gates(layer, decay, x, cls):
    """λ [H T] of one set of gates, straight from their parameters."""
    if hasattr(decay, "a"):
        return torch.sigmoid(decay.a)[:, None].expand(HEADS, x.shape[0])
    value = torch.sigmoid(decay.proj(x)).T if hasattr(decay, "proj") else torch.ones(HEADS, x.shape[0], dtype=x.dtype)
    return torch.cat([torch.ones(HEADS, cls, dtype=x.dtype), value[:, cls:]], 1)


def mask(gate):
    """λ [H T] → M [H T T]: from key j to query i, the gates of j and of all between, and never the query's own."""
    M = torch.eye(gate.shape[1], dtype=gate.dtype).repeat(HEADS, 1, 1)
    for i in range(gate.shape[1]):
        for j in range(gate.shape[1]):
            between = gate[:, j:i] if j < i else gate[:, i + 1 : j + 1]
            M[:, i, j] = between.prod(-1)
    return M


def paper(layer, x, cls=0, order=None):
    """x [T dim] → [T dim] by scores, mask and rows."""
    heads = lambda t: t.unflatten(-1, (HEADS, -1)).transpose(0, 1)  # [H T K]
    q, k, v = (heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.variant.feature == "silu_norm":
        q, k = (F.normalize(F.silu(t) + 0.5, dim=-1) for t in (q, k))
    if order is None:
        M = mask(gates(layer, layer.mixer.decay, x, cls))
    else:
        M = 0
        for decay, curve in zip((layer.mixer.decay, layer.mixer.second_decay), order, strict=True):
            inverse = curve.argsort()
            M = M + mask(gates(layer, decay, x, cls)[:, curve])[:, inverse][..., inverse] / 2
    A = (q @ k.mT) * M / layer.key_dim**0.5
    if layer.variant.normalize:
        A = A / (A.sum(-1, keepdim=True) + 1e-6)
    o = (A @ v).transpose(0, 1).flatten(1)
    if layer.variant.norm == "layer":
        o = F.layer_norm(o, o.shape[-1:], layer.norm.weight, layer.norm.bias, layer.norm.eps)
    return layer.o_proj(o)


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("name", LIONS)
def test_a_layer_is_the_masked_quadratic_form(name, cls):
    layer, x = make(name, prefix=cls), torch.randn(2, T, DIM, dtype=torch.float64)
    for backend in ("eager", "reference"):
        layer.mixer.backend = backend
        for row, y in zip(x, layer(x)[0], strict=True):
            torch.testing.assert_close(y, paper(layer, row, cls), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lion_d", "lion_s", "lion_s_mlm"])
def test_two_curves_share_one_normaliser(name):
    layer, x = make(name, prefix=1, curves=2), torch.randn(2, T, DIM, dtype=torch.float64)
    order = snakes([GRID], prefix=1)
    for row, y in zip(x, layer(x, curves=order)[0], strict=True):
        torch.testing.assert_close(y, paper(layer, row, 1, order), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CURVED)
def test_one_curve_twice_is_one_curve(name):
    """With the same gates, and the order of the sequence as both curves."""
    plain, both = make(name, prefix=1), make(name, prefix=1, curves=2)
    state = plain.state_dict()
    both.load_state_dict(state | {key.replace("mixer.decay", "mixer.second_decay"): t for key, t in state.items() if "mixer.decay" in key})
    x, straight = torch.randn(1, T, DIM, dtype=torch.float64), torch.arange(T).expand(2, -1)
    torch.testing.assert_close(both(x, curves=straight)[0], plain(x)[0], rtol=1e-9, atol=1e-11)


def test_packed_images_are_each_alone():
    layer, grids = make("lion_s", prefix=1, curves=2), [(2, 3), (1, 1), (4, 2)]
    sizes = [1 + h * w for h, w in grids]
    x = torch.randn(1, sum(sizes), DIM, dtype=torch.float64)
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    packed = layer(x, None, ends, curves=snakes(grids, prefix=1))[0]
    for grid, part, y in zip(grids, x.split(sizes, 1), packed.split(sizes, 1), strict=True):
        torch.testing.assert_close(layer(part, curves=snakes([grid], prefix=1))[0], y)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.conv])
def test_segments_of_any_length_give_the_same(name):
    layer, x = make(name, prefix=2), torch.randn(2, T, DIM, dtype=torch.float64)
    whole = layer(x)[0]
    for segment in (1, 5, T, 100):  # the recurrent form, chunks with a ragged end, all at once
        with torch.no_grad():
            torch.testing.assert_close(layer(x, segment=segment)[0], whole, rtol=1e-9, atol=1e-11)
    real = torch.arange(T) < torch.tensor([[T], [7]])
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask=real, segment=4)[0][real], layer(x, mask=real)[0][real], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in CURVED if not VARIANTS[name].conv])
def test_segments_of_two_curves_give_the_same(name):
    layer, x, order = make(name, prefix=1, curves=2), torch.randn(2, T, DIM, dtype=torch.float64), snakes([GRID], prefix=1)
    real = torch.rand(2, T) < 0.7
    for mask in (None, real):
        whole = layer(x, mask=mask, curves=order)[0]
        for segment in (1, 5, 100):
            with torch.no_grad():
                y = layer(x, mask=mask, curves=order, segment=segment)[0]
            torch.testing.assert_close(y, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("curves", [1, 2])
@pytest.mark.parametrize("name", [name for name in LIONS if "lit" not in name])
def test_gates_learn(name, curves):
    """LION-S's gates as released are cut off from their gradient; the paper's are learnt."""
    layer, x = LinearAttention(DIM, HEADS, name, causal=False, curves=curves, prefix=1), torch.randn(2, T, DIM)
    y = layer(x, curves=snakes([GRID], prefix=1) if curves == 2 else None)[0]
    (y * torch.randn_like(y)).sum().backward()
    found = {key: p.grad for key, p in layer.named_parameters() if "decay" in key}
    assert len(found) == curves * (1 if "_d" in name else 2)
    assert all(grad is not None and grad.ne(0).any() and grad.isfinite().all() for grad in found.values())


def test_what_must_hold_of_any_mask():
    x = torch.randn(1, T, DIM, dtype=torch.float64)
    for name in ("lion_lit", "lion_d", "lion_s"):
        layer = make(name, curves=1)
        with torch.no_grad():
            layer.v_proj.weight.zero_()  # one value for all tokens is what every token gets
            constant = layer.o_proj(layer.v_proj.bias)
            torch.testing.assert_close(layer(x)[0], constant.expand_as(x), rtol=0, atol=1e-4)  # up to the normaliser's epsilon
    lit, shuffled = make("lion_lit"), torch.randperm(T)
    torch.testing.assert_close(lit(x[:, shuffled])[0], lit(x)[0][:, shuffled])
    flipped = make("lion_s")
    torch.testing.assert_close(flipped(x.flip(1))[0].flip(1), flipped(x)[0])


def test_saturated_gates_stay_finite():
    layer = make("lion_s")
    with torch.no_grad():
        layer.mixer.decay.proj.bias.fill_(-1e4)
    x = torch.randn(1, T, DIM, dtype=torch.float64, requires_grad=True)
    y = layer(x)[0]
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_lion_d_starts_at_sigmoid_of_a_normal():
    decay = HeadDecay(Place(8, 4000, 4), rule=lion, trainable=True)
    assert abs(decay.a.mean()) < 0.06 and abs(decay.a.std() - 1) < 0.05


def test_snakes():
    assert snake(2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert snake(2, 3, by="column").tolist() == [0, 3, 4, 1, 2, 5]
    both = snakes([(2, 2), (1, 2)], prefix=1)
    assert both.tolist() == [[0, 1, 2, 4, 3, 5, 6, 7], [0, 1, 3, 4, 2, 5, 6, 7]]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"at least one row and one column of patches; got 0 × 3"):
        snakes([(2, 2), (0, 3)])
    layer, x = make("lion_d", curves=2, prefix=1), torch.zeros(1, T, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"curves must be int64 \[2 T\] = \(2, 13\).*; got None"):
        layer(x)
    with pytest.raises(ValueError, match=r"\(2, 13\).*; got torch.int64 \(2, 10\)"):
        layer(x, curves=snakes([(3, 3)], prefix=1))
    with pytest.raises(ValueError, match="curves=2 needs a variant with a decay"):
        make("lion_lit", curves=2)
    with pytest.raises(ValueError, match="curves must be 1 or 2; got 3"):
        make("lion_d", curves=3)
    with pytest.raises(ValueError, match="prefix must be at least 0; got -1"):
        make("lion_d", prefix=-1)
    for options in ({"curves": 2}, {"prefix": 1}, {"gating": "source"}):
        with pytest.raises(ValueError, match="gating, curves and prefix need causal=False"):
            LinearAttention(DIM, HEADS, "lion_d", **options)
    with pytest.raises(ValueError, match="segment must be a whole number of tokens, at least 1; got 0"):
        make("lion_d")(x, segment=0)
    with pytest.raises(ValueError, match=r"curves must be int64 \[2 T\] = \(2, 13\).*; got None"):
        layer(x, segment=4)
    with pytest.raises(ValueError, match="no short convolution"):
        make("kda")(x, segment=4)
    with pytest.raises(ValueError, match="segment needs causal=False"):
        LinearAttention(DIM, HEADS, replace(VARIANTS["lion_d"]))(x.float(), segment=2)

"""Every bad argument of the attention layers gives a ValueError that names it, what was wanted and what came."""

import pytest
import torch

from linattn.layers import VARIANTS, LinearAttention, SoftmaxAttention, Variant

LAYERS = {
    "gla": lambda: LinearAttention(16, 2, "gla"),
    "kda": lambda: LinearAttention(16, 2, "kda"),
    "softmax": lambda: SoftmaxAttention(16, 2),
}
X = torch.zeros(1, 6, 16)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("x", "cu_seqlens", "message"),
    [
        (torch.zeros(6, 16), None, r"x must be floating, \[B T dim\] with dim=16; got torch.float32 \(6, 16\)"),
        (torch.zeros(1, 6, 8), None, r"dim=16; got torch.float32 \(1, 6, 8\)"),
        (torch.zeros(1, 6, 16, dtype=torch.int64), None, "x must be floating"),
        (X, torch.tensor([0, 7]), "cu_seqlens must run from 0 to T = 6; got 0 to 7"),
        (X, torch.tensor([1, 6]), "cu_seqlens must run from 0 to T = 6; got 1 to 6"),
        (X, torch.tensor([0, 4, 3, 6]), r"cu_seqlens must not decrease; got \[0, 4, 3, 6\]"),
        (X, torch.tensor([0.0, 6.0]), r"cu_seqlens must be \[N\+1\] int32 or int64 with N >= 1; got torch.float32 \(2,\)"),
        (X, torch.tensor([0]), "with N >= 1"),
        (torch.zeros(2, 6, 16), torch.tensor([0, 6]), r"packed into one row, B = 1; got x \(2, 6, 16\)"),
    ],
)
def test_inputs(make, x, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        make()(x, None, cu_seqlens)


def test_states_of_another_kind():
    gla, kda, retnet, softmax = (*(LinearAttention(16, 2, name) for name in ("gla", "kda", "retnet")), SoftmaxAttention(16, 2))
    states = {layer: layer(X, return_state=True)[1] for layer in (gla, kda, retnet, softmax)}
    with pytest.raises(ValueError, match="state must be the LayerState this layer returned; got SoftmaxState"):
        gla(X, states[softmax])
    with pytest.raises(ValueError, match="state must be the SoftmaxState this layer returned; got LayerState"):
        softmax(X, states[gla])
    with pytest.raises(ValueError, match="state is of another variant: its conv must be None"):
        gla(X, states[kda])
    with pytest.raises(ValueError, match="state is of another variant: its seen must be given"):
        retnet(X, states[gla])


@pytest.mark.parametrize("make", [*LAYERS.values(), lambda: LinearAttention(16, 2, "retnet")], ids=[*LAYERS, "retnet"])
def test_states_of_another_batch(make):
    layer = make()
    _, state = layer(X, return_state=True)
    for T in (1, 3):
        with torch.no_grad(), pytest.raises(ValueError, match="state"):
            layer(torch.zeros(2, T, 16), state)


def test_sizes():
    with pytest.raises(ValueError, match=r"dim · expand_k / num_heads must be whole.* 20 · 0.5 / 4 = 2.5"):
        LinearAttention(20, 4, "gla")
    with pytest.raises(ValueError, match=r"expand_v .* 0.01"):
        LinearAttention(16, 2, "gla", expand_v=0.01)
    with pytest.raises(ValueError, match="num_heads must be a positive multiple of num_kv_heads; got num_heads=4, num_kv_heads=3"):
        LinearAttention(16, 4, "linear", num_kv_heads=3)
    with pytest.raises(ValueError, match="num_heads=0"):
        SoftmaxAttention(16, 0)
    with pytest.raises(ValueError, match="num_kv_heads must be None where one key serves all values"):
        LinearAttention(16, 2, "mamba2", num_kv_heads=1)
    with pytest.raises(ValueError, match=r"layer_idx must lie in \[0, num_layers=2\); got 2"):
        LinearAttention(16, 2, "lightning", layer_idx=2, num_layers=2)
    with pytest.raises(ValueError, match="head width must be even; got 3"):
        LinearAttention(6, 2, "retnet")(torch.zeros(1, 2, 6))


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"variant must be .* one of .*'retnet'.*'kda'.*; got 'gal'") as error:
        LinearAttention(16, 2, "gal")
    assert all(name in str(error.value) for name in VARIANTS)
    with pytest.raises(ValueError, match=r"feature must be one of \['identity', .*\]; got 'gelu'"):
        Variant(source="", feature="gelu")
    with pytest.raises(ValueError, match=r"gate must be one of .*; got 'tanh'"):
        Variant(source="", gate="tanh")
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*; got 'cudnn'"):
        LinearAttention(16, 2, "gla", backend="cudnn")(X)


def test_a_variant_of_ones_own():
    layer = LinearAttention(16, 2, Variant(source="here", feature="relu", normalize="clamp", norm=None))
    assert layer(torch.randn(1, 6, 16))[0].shape == (1, 6, 16)
    assert "here" in repr(layer)


def test_nan_passes_through():
    for make in LAYERS.values():
        x = torch.randn(1, 6, 16)
        x[0, 3] = torch.nan
        y, _ = make()(x)
        assert y[0, 3:].isnan().all()  # and, where a chunk is one matrix product, the tokens before it in its chunk: 0 · NaN


def test_masks_of_the_wrong_kind():
    for layer in (make() for make in LAYERS.values()):
        for mask in (torch.ones(1, 6), torch.ones(1, 5, dtype=torch.bool)):
            with pytest.raises(ValueError, match=r"mask must be bool \[B T\] = \(1, 6\)"):
                layer(X, mask=mask)
        with pytest.raises(ValueError, match="and no cu_seqlens, which have no padding"):
            layer(X, None, torch.tensor([0, 6]), torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask cannot go with a state of softmax attention"):
        SoftmaxAttention(16, 2)(X, mask=torch.ones(1, 6, dtype=torch.bool), return_state=True)

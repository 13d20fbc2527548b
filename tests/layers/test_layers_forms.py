"""What holds for every attention layer: one map however the tokens are cut, packed or stepped, and a gradient for every parameter."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hashes import fitted

from linattn.layers import VARIANTS, LinearAttention, SoftmaxAttention

NAMES = [*VARIANTS, "softmax"]
DIM, HEADS = 16, 2
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-9}


def make(name, dtype=torch.float32, **options):
    """A layer whose weights are large enough for gates, norms and positions to matter."""
    if name == "softmax":
        layer = SoftmaxAttention(DIM, HEADS, layer_idx=1, num_layers=4, **options)
    else:
        layer = LinearAttention(DIM, HEADS, name, layer_idx=1, num_layers=4, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return fitted(layer).to(dtype)


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_steps_make_the_whole(name, dtype):
    layer, x = make(name, dtype), torch.randn(2, 23, DIM, dtype=dtype)
    whole, none = layer(x)
    assert none is None
    for sizes, gradients in (([9, 1, 2, 11], True), ([9, 1, 2, 11], False), ([1] * 23, False), ([0, 20, 0, 3], False)):
        with torch.set_grad_enabled(gradients):
            state, parts = None, []
            for part in x.split(sizes, 1):
                y, state = layer(part, state, return_state=state is None)
                parts.append(y)
        close(torch.cat(parts, 1), whole, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_each_alone(name, dtype):
    layer, tolerance = make(name, dtype), DTYPES[dtype]
    ends = [0, 0, 5, 5, 16, 17, 23, 23]
    x, cu_seqlens = torch.randn(1, 23, DIM, dtype=dtype), torch.tensor(ends)
    spans = list(pairwise(ends))
    alone = [layer(x[:, a:b], return_state=True) for a, b in spans]
    close(layer(x, None, cu_seqlens)[0], torch.cat([y for y, _ in alone], 1), tolerance)
    packed, state = layer(x, None, cu_seqlens, return_state=True)
    close(packed, torch.cat([y for y, _ in alone], 1), tolerance)

    # what follows: as a batch of steps, as a batch of chunks, and packed once more
    more = torch.randn(len(spans), 3, DIM, dtype=dtype)
    wanted = torch.cat([layer(row[None], s)[0] for row, (_, s) in zip(more, alone, strict=True)])
    close(layer(more, state)[0], wanted, tolerance)
    again = layer(more.flatten(0, 1)[None], state, torch.arange(len(spans) + 1, dtype=torch.int32) * 3)[0]
    close(again[0].unflatten(0, (-1, 3)), wanted, tolerance)
    with torch.no_grad():
        parts = []
        for t in range(3):
            y, state = layer(more[:, t : t + 1], state)
            parts.append(y)
    close(torch.cat(parts, 1), wanted, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_packing_blocks_gradients_between_sequences(name):
    layer, x = make(name), torch.randn(1, 12, DIM, requires_grad=True)
    y, _ = layer(x, None, torch.tensor([0, 5, 12]))
    y[:, :5].sum().backward(retain_graph=True)
    assert x.grad[:, :5].ne(0).any() and x.grad[:, 5:].eq(0).all()
    x.grad = None
    y[:, 5:].sum().backward()
    assert x.grad[:, :5].eq(0).all() and x.grad[:, 5:].ne(0).any()


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_the_future(name):
    layer, x = make(name, torch.float64), torch.randn(1, 9, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.equal(layer(x)[0][:, :6], layer(changed)[0][:, :6])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_are_finite(name, zero):
    layer = make(name)
    x = torch.zeros(2, 7, DIM) if zero else torch.randn(2, 7, DIM)
    x.requires_grad_()
    (layer(x)[0] * torch.randn(2, 7, DIM)).sum().backward()
    assert x.grad.isfinite().all()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert zero or parameter.grad.ne(0).any(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_the_state(name):
    layer, x = make(name, torch.float64), torch.randn(1, 8, DIM, dtype=torch.float64)
    weight = torch.randn(1, 8, DIM, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    (layer(whole)[0] * weight).sum().backward()
    halves = x.clone().requires_grad_()
    first, state = layer(halves[:, :3], return_state=True)
    second, _ = layer(halves[:, 3:], state)
    (torch.cat([first, second], 1) * weight).sum().backward()
    close(halves.grad, whole.grad, 1e-10)


def tensors(state):
    return [t for part in state for t in (part if isinstance(part, tuple) else [part]) if t is not None]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_state_does_not_grow(name):
    layer = make(name)
    sizes = {T: [t.shape for t in tensors(layer(torch.randn(2, T, DIM), return_state=True)[1])] for T in (1, 7, 40)}
    assert sizes[1] == sizes[7] == sizes[40]
    for tensor in tensors(layer(torch.randn(2, 40, DIM), return_state=True)[1]):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # no view of something larger


@pytest.mark.parametrize("name", NAMES)
def test_a_state_can_be_continued_twice(name):
    layer, x = make(name), torch.randn(1, 6, DIM)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        one, two = torch.randn(2, 1, 1, DIM)
        first, after = layer(one, state)
        layer(two, state)  # another branch, from the same state
        assert torch.equal(layer(one, state)[0], first)
        close(layer(two, after)[0], layer(torch.cat([x, one, two], 1))[0][:, -1:], 1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name == "softmax" or not (VARIANTS[name].multi_value or VARIANTS[name].tied)])
def test_grouped_heads_are_repeated_heads(name):
    """Two query heads on one k/v head give what two heads with the same k/v weights give."""
    grouped, plain = make(name, torch.float64, num_kv_heads=1), make(name, torch.float64)
    theirs = grouped.state_dict()
    if getattr(grouped, "conv", None) is not None:
        q, k, _ = grouped.widths
        weight = theirs["conv.weight"]
        theirs["conv.weight"] = torch.cat([weight[:q], weight[q : q + k].repeat(2, 1), weight[q + k :].repeat(2, 1)])
    for key, parameter in plain.state_dict().items():
        if theirs[key].shape != parameter.shape:
            theirs[key] = theirs[key].repeat(2, *[1] * (parameter.ndim - 1))
    if name in ("retnet", "lightning"):  # the rules give two heads two decays
        plain.mixer.decay = plain.variant.decay(grouped.mixer.decay.place._replace(heads=1))
        plain.mixer.decay.forward = lambda x: (grouped.mixer.decay(x)[0].repeat(2), None)
    plain.load_state_dict(theirs)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    close(grouped(x)[0], plain(x)[0], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_empty_inputs(name):
    layer = make(name)
    for shape in ((0, 5, DIM), (2, 0, DIM)):
        y, state = layer(torch.zeros(shape), return_state=True)
        assert y.shape == shape
        assert layer(torch.zeros(shape), state)[0].shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_autocast(name):
    layer, x = make(name), torch.randn(2, 9, DIM)
    wanted = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, state = layer(x[:, :8], return_state=True)
        last, _ = layer(x[:, 8:], state)
    half = layer.bfloat16()(x.bfloat16())[0]
    for got in (torch.cat([y, last], 1), half):
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", NAMES)
def test_bidirectional_layers_see_the_future(name):
    layer = make(name, causal=False) if name == "softmax" else make(name, causal=False, gating="target")
    x = torch.randn(1, 6, DIM)
    changed = x.clone()
    changed[:, 5] += 1
    assert (layer(x)[0][:, 0] - layer(changed)[0][:, 0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="a state needs causal=True"):
        layer(x, return_state=True)


@pytest.mark.parametrize("name", ["mamba2", pytest.param("retnet", marks=pytest.mark.slow)])
def test_fullgraph_compile(name):
    layer, x = make(name), torch.randn(2, 9, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x)[0], layer(x)[0], 1e-6)
    cu_seqlens = torch.tensor([0, 4, 9])
    close(compiled(x[:1], None, cu_seqlens)[0], layer(x[:1], None, cu_seqlens)[0], 1e-6)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_there(name, causal):
    """Padding first, and garbage in it: what is real is as if alone, its state too."""
    options = {} if name == "softmax" or causal else {"gating": "target"}
    layer = make(name, torch.float64, causal=causal, **options)
    x, pads = torch.randn(3, 11, DIM, dtype=torch.float64), torch.tensor([0, 4, 10])
    mask = torch.arange(11) >= pads[:, None]
    padded = torch.where(mask[..., None], x, 1e3)
    keep = causal and name != "softmax"
    y, state = layer(padded, mask=mask, return_state=keep)
    for b, pad in enumerate(pads):
        alone, own = layer(x[b : b + 1, pad:], return_state=keep)
        if name != "molformer" or not pad:  # random features of rotated keys see where a token stands, not distance alone
            close(y[b, pad:], alone[0], 1e-9)
        if keep and not layer.variant.rope:  # rotary positions count padding
            close(state.recurrent.kv[b], own.recurrent.kv[0], 1e-9)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.conv and not variant.rope])
def test_padding_may_stand_anywhere(name):
    """But for short convolutions, which see it, and rotary positions, which count it."""
    layer = make(name, torch.float64, causal=False, gating="target")
    x, mask = torch.randn(1, 9, DIM, dtype=torch.float64), torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]]).bool()
    close(layer(x, mask=mask)[0][:, mask[0]], layer(x[:, mask[0]])[0], 1e-9)


class Wider(torch.nn.Module):
    """(q, k) → (|q| and q, |k| and k): a feature map that makes keys wider."""

    def __init__(self, place):
        super().__init__()
        self.key_dim = 2 * place.key_dim

    def forward(self, q, k):
        return torch.cat([q.abs(), q], -1), torch.cat([k.abs(), k], -1)


def test_a_feature_map_may_be_a_module_and_widen_keys():
    layer = LinearAttention(DIM, HEADS, replace(VARIANTS["gla"], feature=Wider))
    x = torch.randn(2, 12, DIM)
    whole, state = layer(x, return_state=True)
    assert state.recurrent.kv.shape[-2] == 2 * layer.key_dim
    first, state = layer(x[:, :7], return_state=True)
    close(torch.cat([first, layer(x[:, 7:], state)[0]], 1), whole, 1e-5)


def test_padding_has_no_constant_key():
    """Where the similarity has an offset, every real token, and no other, adds to the normaliser."""
    layer = make(replace(VARIANTS["linear"], offset=2.0), torch.float64, causal=False)
    x, mask = torch.randn(1, 9, DIM, dtype=torch.float64), torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]]).bool()
    close(layer(x, mask=mask)[0][:, mask[0]], layer(x[:, mask[0]])[0], 1e-9)

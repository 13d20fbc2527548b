"""Hosts besides transformers: torch's own encoder, whose fused path must not pass swapped attention by, and timm's attention."""

import sys
import types

import pytest
import torch
from torch import nn

import linattn


def encoder(batch_first=True, layers=2, **how):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first, **how)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first).eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_the_encoder_of_torch_calls_swapped_attention(batch_first, grad):
    model, calls = encoder(batch_first), []
    x = torch.randn(3, 7, 16)
    mine = lambda: (x if batch_first else x.transpose(0, 1),)
    back = lambda y: y if batch_first else y.transpose(0, 1)
    with torch.set_grad_enabled(grad):
        before, names = model(*mine()), set(model.state_dict())
        report = linattn.swap_attention(model, "hedgehog")
        for name in report.swapped:
            model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        after = model(*mine())
        assert len(calls) == 2 and not torch.allclose(after, before, atol=1e-4)
        assert names <= set(model.state_dict())
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1, 4:] = True
        padded = back(model(*mine(), src_key_padding_mask=padding))
        alone = back(model(x[1:2, :4] if batch_first else x[1:2, :4].transpose(0, 1)))
        torch.testing.assert_close(padded[1:2, :4], alone)
        report.undo()
        assert torch.equal(model(*mine()), before)


def test_the_weights_of_torch_are_read_right():
    """Beside one query there is one key: softmax and linear attention are both its value, through the same output projection."""
    model, x = encoder(layers=1), torch.randn(5, 1, 16)
    before = model(x)
    linattn.swap_attention(model, "linear")
    torch.testing.assert_close(model(x), before)
    (attention,) = (m for m in model.modules() if isinstance(m, linattn.swap.SwappedAttention))
    x = torch.randn(2, 6, 16)
    q, k, v = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, 4, 4)).unbind(2)
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    weights = torch.einsum("bthk,bshk->bhts", q, k)
    wanted = torch.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdim=True), v).flatten(-2)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], attention.out_proj(wanted))


def test_transfer_modes_in_torch():
    model, x = encoder(), torch.randn(3, 7, 16)
    before = model(x)
    report = linattn.swap_attention(model, "hedgehog")
    with linattn.swap.mode(model, "transfer"):
        torch.testing.assert_close(model(x), before)
        assert all(0 < float(model.get_submodule(name).error.detach()) < 2 for name in report.swapped)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x, mask=torch.zeros(7, 7)), "attn_mask, is_causal: swapped as attention that sees both sides"),
        (lambda m, x: m.layers[0].self_attn(x, x + 1, x), "query, key and value must be one tensor"),
        (lambda m, x: m.layers[0].self_attn(x, x, x), "need_weights=True: linear attention has no attention weights"),
    ],
)
def test_calls_that_cannot_be(call, message):
    model = encoder()
    linattn.swap_attention(model, "linear")
    with pytest.raises(ValueError, match=message):
        call(model, torch.randn(2, 7, 16))


def test_torch_attention_elsewhere_is_refused():
    message = r"multihead_attn \(MultiheadAttention\) cannot be swapped: .* inside torch.nn.TransformerEncoderLayer only"
    decoder = nn.TransformerDecoderLayer(16, 4, 32)
    with pytest.raises(ValueError, match=message.replace("multihead_attn", "self_attn")):
        linattn.swap_attention(decoder, "linear")
    both = nn.ModuleDict(dict(decoder=decoder, encoder=encoder()))
    report = linattn.swap_attention(both, "linear", on_unsupported="keep")
    assert report.swapped == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert set(report.kept) == {"decoder.self_attn", "decoder.multihead_attn"}


# -- timm, by `make timm`, in an environment of its own: the torchvision it needs breaks a CPU torch ---------------------------------------


def timm():
    if torch.version.cuda is None:  # torchvision's wheel is for CUDA, and asks for an operator that a CPU torch has not
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    return pytest.importorskip("timm", exc_type=ImportError)


SIZE = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "how", [dict(), dict(qk_norm=True), dict(class_token=False, global_pool="avg")], ids=["plain", "qk_norm", "pooled"]
)
def test_timm(how):
    model = timm().models.VisionTransformer(**SIZE, **how).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    report = linattn.swap_attention(model, "lion_s")
    assert report.swapped == ["blocks.0.attn", "blocks.1.attn"]
    assert model(x).shape == before.shape and not torch.allclose(model(x), before, atol=1e-5)
    with linattn.swap.mode(model, "transfer"):
        torch.testing.assert_close(model(x), before)
    report.undo()
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timm_reads_its_weights_right_and_refuses_what_only_shares_the_name():
    package = timm()
    from timm.layers.attention import Attention
    from timm.models.pvt_v2 import Attention as Other

    model, x = nn.Sequential(Attention(16, 4, qkv_bias=True)), torch.randn(5, 1, 16)
    before = model(x)
    linattn.swap_attention(model, "linear")
    torch.testing.assert_close(model(x), before)
    with pytest.raises(ValueError, match="cannot be swapped: it attends to fewer keys than there are tokens"):
        linattn.swap_attention(nn.Sequential(Other(16)), "linear")
    swin = package.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    with pytest.raises(ValueError, match="cannot be swapped: it is windowed, with relative positions"):
        linattn.swap_attention(swin, "linear")

"""L²ViT: its attention against the quadratic form, the paper's parameters and multiplications, and what must hold of the pyramid."""

import pytest
import torch
from torch import nn

from linattn.models.l2vit import HEAD, L2VITS, GlobalAttention, L2ViT, L2ViTConfig, WindowAttention

SMALL = L2ViTConfig(depths=(2, 2), dims=(32, 64), num_classes=5, in_chans=2)


@pytest.mark.parametrize("size", [0.3, 10.0])
def test_global_attention_is_the_clamped_quadratic_form(size):
    layer, x = GlobalAttention(64).double(), size * torch.randn(2, 5, 7, 64, dtype=torch.float64)
    with torch.no_grad():
        layer.qkv.weight.mul_(10)
        layer.temperature.copy_(torch.tensor([0.5, 2.0]))
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, HEAD)).permute(2, 0, 3, 1, 4)
    weights = q.relu() @ k.relu().mT
    total = weights.sum(-1, keepdim=True)
    assert (total < 100).any() if size < 1 else (total > 100).all()
    wanted = layer.proj((layer.temperature[:, None, None] * (weights / total.clamp(min=100)) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x).flatten(1, 2), wanted, rtol=1e-9, atol=1e-11)


def test_windows_see_themselves_alone_and_padding_takes_part():
    layer, x = WindowAttention(32, 4), torch.randn(1, 8, 6, 32)
    y, changed = layer(x), x.clone()
    changed[:, 5, 1] += 1
    moved = (layer(changed) - y).abs().amax(-1)[0] > 0
    assert moved[4:, :4].all() and not moved[:4].any() and not moved[:, 4:].any()
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2))
    torch.testing.assert_close(layer(padded)[:, :, :6], y)


PAPER = {"l2vit_tiny": (28.60, 4.69), "l2vit_small": (50.20, 8.98), "l2vit_base": (88.58, 15.81)}  # M parameters, G multiplications at 224²


@pytest.mark.parametrize("name", L2VITS)
def test_sizes_of_the_paper(name):
    count = 0
    with torch.device("meta"):
        model, x = L2ViT.create(name).eval(), torch.zeros(1, 3, 224, 224)

    def multiplications(module, inputs, output):
        nonlocal count
        if isinstance(module, nn.Linear):
            count += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            count += output.numel() * module.weight[0].numel()
        elif isinstance(module, GlobalAttention):
            count += 2 * output.numel() * HEAD
        else:
            filled = [-(-side // module.window) * module.window for side in output.shape[1:3]]
            count += 2 * filled[0] * filled[1] * output.shape[-1] * module.window**2

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, GlobalAttention, WindowAttention)):
            module.register_forward_hook(multiplications)
    with torch.no_grad():
        model(x)
    assert (round(sum(p.numel() for p in model.parameters()) / 1e6, 2), round(count / 1e9, 2)) == PAPER[name]


def test_the_pyramid():
    model, x = L2ViT(SMALL).eval(), torch.randn(2, 2, 30, 17)
    last, (first, second) = model.forward_intermediates(x)
    assert first.shape == (2, 32, 8, 6) and second.shape == (2, 64, 4, 3) and model(x).shape == (2, 5)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    assert torch.equal(last, model.forward_features(x))
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(normed, last.permute(0, 3, 1, 2))
    early, (only,) = model.forward_intermediates(x, [0], stop_early=True)
    assert torch.equal(only, first) and torch.equal(early.permute(0, 3, 1, 2), first)
    found = model.forward_intermediates(x, output_dict=True)
    assert found.keys() == {"image_features", "image_intermediates"} and torch.equal(found["image_features"], last)


def test_the_classifier_can_be_reset():
    model, x = L2ViT(SMALL).eval(), torch.randn(2, 2, 32, 32)
    torch.testing.assert_close(model.get_classifier()(model.forward_head(model.forward_features(x), pre_logits=True)), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.config.num_classes == 3
    model.reset_classifier(0, "mean")
    assert model(x).shape == (2, 64) and isinstance(model.get_classifier(), nn.Identity)


def test_checkpointing_gives_the_same_gradients_and_running_statistics():
    torch.manual_seed(0)
    model, x = L2ViT(SMALL).train(), torch.randn(2, 2, 32, 32)
    state, found = {name: t.clone() for name, t in model.state_dict().items()}, []
    for enabled in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_start_at_the_papers_width():
    model = L2ViT.create("l2vit_tiny", depths=(2, 2), dims=(96, 192), window=12)
    assert model.config.window == 12
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and weight.numel() > 5000:
            assert abs(weight.std() / 0.02 - 1) < 0.05, name


def test_gradients_reach_every_parameter():
    model = L2ViT(L2ViTConfig(depths=(2, 2), dims=(32, 64), num_classes=5, in_chans=2, drop_path=0.2)).train()
    (model(torch.randn(4, 2, 32, 32)) * torch.randn(4, 5)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_saved_model_is_the_same_model(tmp_path):
    model, x = L2ViT(SMALL), torch.randn(2, 2, 16, 16)
    model(x)  # moves the running statistics, which are saved too
    model.save_pretrained(tmp_path)
    again = L2ViT.from_pretrained(tmp_path).eval()
    assert again.config == SMALL and torch.equal(again(x), model.eval()(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"name must be one of \['l2vit_tiny', .*; got 'l2vit_huge'"):
        L2ViT.create("l2vit_huge")
    with pytest.raises(ValueError, match="the config of L²ViT has no field 'img_size'"):
        L2ViT.create("l2vit_tiny", img_size=384)  # it takes any size
    with pytest.raises(ValueError, match="global_pool must be 'mean' or None; got 'max'"):
        L2ViT(SMALL).reset_classifier(3, "max")
    with pytest.raises(ValueError, match="indices must name some of 2 stages; got"):
        L2ViT(SMALL).forward_intermediates(torch.zeros(1, 2, 32, 32), [2])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'; got 'NLC'"):
        L2ViT(SMALL).forward_intermediates(torch.zeros(1, 2, 32, 32), output_fmt="NLC")
    with pytest.raises(ValueError, match="dims multiples of 32; got"):
        L2ViTConfig(dims=(90, 192, 384, 768))
    for images in (torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 0, 32), torch.zeros(2, 32, 32)):
        with pytest.raises(ValueError, match=r"images must be floating, \[B 2 h w\], not empty; got"):
            L2ViT(SMALL)(images)

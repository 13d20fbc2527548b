"""The vision transformer: every variant, any size of image, packs, timm's methods and blocks, sizes of the papers, and bad images."""

import warnings

import pytest
import torch
from hashes import fitted

from linattn.layers import VARIANTS
from linattn.models import ImageAttention, VisionConfig, VisionTransformer
from linattn.models.bidirectional import DropPath
from linattn.models.vision_config import VARIANTS_OF_IMAGES

SMALL = dict(img_size=16, patch_size=4, in_chans=2, num_classes=5, dim=24, num_heads=2, num_layers=2)


def make(name="vit_tiny_lion_s", **options):
    model = VisionTransformer.create(name, **SMALL | options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # for gates and positions to matter
    return fitted(model).double().eval()


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


NAMES = [f"vit_tiny_{variant}" for variant in VARIANTS_OF_IMAGES] + ["vit_tiny_lion_s_natural", "vit_tiny_gla_natural"]


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_classifies_images_of_one_size_and_of_many(name):
    model, images = make(name), [image(2, 16, 16), image(2, 4, 12), image(2, 8, 24)]
    alone = torch.cat([model(one[None]) for one in images])
    assert alone.shape == (3, 5)
    close(model(images), alone)
    close(model(torch.stack(images[:1] * 2)), alone[[0, 0]])


@pytest.mark.parametrize("name", ["vit_tiny_lion_d_natural", "vit_tiny_delta", "vit_tiny_softmax"])
def test_gradients_reach_every_parameter(name):
    model = make(name, registers=2, layer_scale=1e-2, drop_path=0.5, pool="patches").train()
    (model(image(4, 2, 16, 16)) * image(4, 5)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.ne(0).any(), key


@pytest.mark.parametrize("pool", ["mean", "patches", "token"])
def test_pools(pool):
    model, x = make(pool=pool, registers=2), image(3, 2, 16, 16)
    tokens = model.forward_features(x)
    assert tokens.shape == (3, 3 + 16, 24)
    wanted = {"mean": tokens.mean(1), "patches": tokens[:, 3:].mean(1), "token": tokens[:, 0]}[pool]
    close(model.forward_head(tokens, pre_logits=True), wanted)
    close(model(x), model.get_classifier()(wanted))
    close(model.forward_head(model.forward_features(list(x))), model(x))


def test_a_patch_is_its_pixels_through_the_map():
    model, x = make(), image(1, 2, 8, 12)
    weight, bias = model.patches.proj.weight, model.patches.proj.bias
    wanted = torch.nn.functional.conv2d(x, weight.view(24, 2, 4, 4), bias, stride=4).flatten(2).mT
    close(model.patches(x), wanted)


def test_positions_are_interpolated():
    model = make("vit_tiny_gla")
    with torch.no_grad():
        model.positions.weight.fill_(3.0)
    close(model.positions((7, 5)), torch.full((35, 24), 3.0, dtype=torch.float64))
    ramp = torch.arange(4.0, dtype=torch.float64)[:, None, None].expand(4, 4, 24)
    with torch.no_grad():
        model.positions.weight.copy_(ramp)
    wide = model.positions((8, 4)).view(8, 4, 24)
    assert (wide.diff(dim=0) > 0).all() and torch.allclose(wide[:, :1], wide)  # still a ramp, along the same axis
    before, x = model(image(1, 2, 32, 16)), image(1, 2, 32, 16)
    model.set_input_size((32, 16))
    assert model.positions.weight.shape == (8, 4, 24) and model.config.grid == (8, 4) and before.shape == (1, 5)
    model.set_input_size(16)
    assert model(x).shape == (1, 5) and model.positions.weight.requires_grad


def test_padding_fills_the_last_patches_with_zeros():
    model, x = make(pad=True), image(2, 2, 14, 9)
    close(model(x), model(torch.nn.functional.pad(x, (0, 3, 0, 2))))
    assert VisionConfig(img_size=(14, 9), patch_size=4, pad=True).grid == (4, 3)


@pytest.mark.parametrize("name", ["vit_tiny_lion_s", "vit_tiny_lion_lit", "vit_tiny_gla", "vit_tiny_lion_d_natural"])
def test_segments_give_the_same_logits(name):
    model, x = make(name), image(2, 2, 16, 16)
    with torch.no_grad():
        for segment in (1, 6, 100):
            close(model(x, segment=segment), model(x))


def test_checkpointing_gives_the_same_gradients():
    model, x = make(drop_path=0.3).train(), image(2, 2, 16, 16)
    grads = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    drop = DropPath(0.5)
    y = drop(torch.ones(4000, 3, 2))
    assert set(y.unique().tolist()) == {0.0, 2.0} and (y == y[:, :1, :1]).all() and abs(y.mean() - 1) < 0.1
    assert torch.equal(drop.eval()(y), y)
    packed = drop.train()(torch.ones(1, 6, 2), torch.tensor([0, 2, 6]))
    assert (packed[:, :2] == packed[:, :1]).all() and (packed[:, 2:] == packed[:, 2:3]).all()


def test_forward_intermediates():
    model, x = make(num_layers=3, registers=1), image(2, 2, 8, 12)
    last, maps = model.forward_intermediates(x)
    assert [m.shape for m in maps] == [(2, 24, 2, 3)] * 3
    close(last, model.forward_features(x))
    (final,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NLC")
    close(final, last[:, 2:])
    pairs = model.forward_intermediates(x, indices=[0, -1], return_prefix_tokens=True, intermediates_only=True, stop_early=True)
    assert [(a.shape, b.shape) for a, b in pairs] == [((2, 24, 2, 3), (2, 2, 24))] * 2
    close(pairs[0][0], maps[0])
    close(model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)[0], maps[0])
    named = model.forward_intermediates(x, 2, return_prefix_tokens=True, output_dict=True)
    assert list(named) == ["image_intermediates", "image_intermediates_prefix", "image_features"]
    close(named["image_features"], last)
    assert [len(named[name]) for name in list(named)[:2]] == [2, 2] and named["image_intermediates_prefix"][0].shape == (2, 2, 24)


def test_the_classifier_can_be_reset():
    model, x = make(), image(2, 2, 16, 16)
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7) and model.num_classes == 7 and model.config.pool == "token" == model.global_pool
    model.reset_classifier(0)
    assert model(x).shape == (2, 24) and isinstance(model.get_classifier(), torch.nn.Identity)


@pytest.mark.parametrize("name", ["vit_tiny_lion_d_natural", "vit_tiny_softmax"])
def test_a_saved_model_is_the_same_model(name, tmp_path):
    model, x = make(name, img_size=(16, 8), registers=1), image(2, 2, 16, 16)
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    again = VisionTransformer.from_pretrained(tmp_path).eval()
    assert again.config == model.config and torch.equal(again(x), model(x))


def test_parameters_of_the_paper():
    """LION, in millions, with a head of 1000 classes and without positions."""
    counts = {}
    for size in ("tiny", "small", "base"):
        for variant in ("lion_d", "lion_s", "lion_s_natural"):
            with torch.device("meta"):
                model = VisionTransformer.create(f"vit_{size}_{variant}")
            counts[size, variant] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert list(counts.values()) == [5.68, 5.69, 5.69, 21.98, 22.00, 22.03, 86.42, 86.53, 86.64]


@pytest.mark.parametrize("variant", ["lion_s", "gla", "kda"])
def test_attention_stands_in_for_timms(variant):
    """timm's own Block where it is installed; else one that calls its attention as timm's does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vit = pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    block = vit.Block(24, 2)
    block.attn = ImageAttention(24, 2, variant)
    x = torch.randn(2, 17, 24, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape == x.shape and all(p.grad is not None for p in block.parameters())


def test_image_attention_calls():
    attention, x = ImageAttention(24, 2, "lion_d", curves=2, grid=(2, 3)), torch.randn(2, 7, 24)
    assert attention(x, attn_mask=None, is_causal=False).shape == x.shape
    with pytest.raises(ValueError, match=r"x must have 1 tokens and a grid of \(2, 3\) patches; got 9 tokens"):
        attention(torch.randn(2, 9, 24))
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        attention(x, attn_mask=torch.ones(7, 7))
    with pytest.raises(ValueError, match="grid, rows and columns of patches, is for curves=2, which needs it; got grid=None, curves=2"):
        ImageAttention(24, 2, "lion_d", curves=2)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 2, 14, 16), "images must be a multiple of the patch, 4 pixels, or the model made with pad=True; got 14 × 16"),
        (torch.zeros(1, 3, 16, 16), r"in_chans=2 channels; got torch.float32 \(1, 3, 16, 16\)"),
        (torch.zeros(1, 2, 16, 16, dtype=torch.uint8), "images must be floating"),
        (torch.zeros(2, 16, 16), r"images must be \[B C h w\], or a list of \[C h w\]; got \(2, 16, 16\)"),
        (torch.zeros(1, 2, 0, 16), "images must not be empty; got one of 0 × 16 pixels"),
        ([], "a pack must hold at least one image; got an empty list"),
        ([torch.zeros(2, 4, 4), torch.zeros(2, 4, 0)], "images must not be empty; got one of 4 × 0 pixels"),
        ([torch.zeros(1, 2, 4, 4)], r"each image of a pack must be \[C h w\]; got \(1, 2, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_lion_d_natural", "vit_tiny_softmax"])
def test_bad_images(name, images, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer.create(name, **SMALL)(images)


def test_bad_arguments():
    for name in ("vit_huge_gla", "tiny_gla", "vit_tiny_gal", "vit_tiny", "resnet50"):
        with pytest.raises(ValueError, match=r"name must be vit_SIZE_VARIANT with SIZE in .*; got "):
            VisionTransformer.create(name)
    with pytest.raises(ValueError, match=r"img_size must be a multiple of patch_size=16, or pad=True; got 230"):
        VisionTransformer.create("vit_tiny_gla", img_size=230)
    with pytest.raises(ValueError, match="pool='token' needs class_token=True"):
        VisionTransformer.create("vit_tiny_gla", pool="token", class_token=False)
    with pytest.raises(ValueError, match=r"has no field 'depht'; there are \['variant'"):
        VisionTransformer.create("vit_tiny_gla", depht=3)
    with pytest.raises(ValueError, match="curves=2 needs a variant with a decay"):
        VisionTransformer.create("vit_tiny_softmax_natural")
    with pytest.raises(ValueError, match=r"drop_path must lie in \[0, 1\); got 1"):
        VisionConfig(drop_path=1)
    with pytest.raises(ValueError, match="head width must be even; got 3"):
        VisionTransformer.create("vit_tiny_retnet", **SMALL | dict(dim=6))
    model = VisionTransformer.create("vit_tiny_gla", **SMALL)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="indices must name some of 2 blocks; got range"):
        model.forward_intermediates(torch.zeros(1, 2, 16, 16), 3)
    with pytest.raises(ValueError, match="needs images of one size"):
        model.forward_intermediates([torch.zeros(2, 16, 16)])
    with pytest.raises(ValueError, match="segment needs images of one size and a linear variant"):
        model([torch.zeros(2, 16, 16)], segment=3)


def test_every_variant_is_a_preset():
    assert set(VARIANTS_OF_IMAGES) == {*VARIANTS, "softmax"}

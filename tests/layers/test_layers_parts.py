"""The parts beside the attention layers: feature maps, the short convolution, rotary positions, norms."""

import pytest
import torch
import torch.nn.functional as F

from linattn.layers import FEATURES, ShortConvolution, SwiGLU
from linattn.layers.norm import GatedRMSNorm
from linattn.layers.position import rotate, rotation


@pytest.mark.parametrize("name", FEATURES)
def test_features_keep_dtype_shape_and_finite_gradients(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for x in (torch.randn(3, 5, dtype=dtype), torch.zeros(3, 5, dtype=dtype), torch.full((3, 5), 100.0, dtype=dtype)):
            x.requires_grad_()
            y = FEATURES[name](x)
            y.square().sum().backward()
            assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all() and x.grad.isfinite().all()


def test_features_are_what_they_are_called():
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(FEATURES["elu1"](x), torch.where(x > 0, x + 1, x.exp()))
    torch.testing.assert_close(FEATURES["softmax"](x).sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(FEATURES["l2norm"](x), F.normalize(x, dim=-1), rtol=1e-5, atol=0)
    assert FEATURES["l2norm"](torch.zeros(2, 6)).eq(0).all()
    torch.testing.assert_close(FEATURES["silu"](x), x * torch.sigmoid(x))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_is_conv1d_with_left_padding(width, bias):
    conv, x = ShortConvolution(6, width, bias=bias), torch.randn(2, 9, 6)
    padded = F.pad(x.mT, (width - 1, 0))
    torch.testing.assert_close(conv(x)[0], F.conv1d(padded, conv.weight[:, None], conv.bias, groups=6).mT)


def test_the_convolutions_state_is_its_last_inputs():
    conv, x = ShortConvolution(6, 4), torch.randn(2, 9, 6)
    assert torch.equal(conv(x, return_state=True)[1], x[:, -3:].mT)
    short = conv(x[:, :2], return_state=True)[1]
    assert torch.equal(short, F.pad(x[:, :2].mT, (1, 0)))
    assert torch.equal(conv(x[:, 2:4], short, return_state=True)[1], x[:, 1:4].mT)


def test_the_convolution_names_what_is_wrong():
    conv = ShortConvolution(6, 4)
    with pytest.raises(ValueError, match=r"state must be \[B dim width-1\] = \(2, 6, 3\); got \(1, 6, 3\)"):
        conv(torch.zeros(2, 5, 6), torch.zeros(1, 6, 3))
    with pytest.raises(ValueError, match="width must be at least 2; got 1"):
        ShortConvolution(6, 1)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turn = lambda x, at: rotate(x, rotation(torch.tensor([at]), 8, dtype=torch.float64))
    for distance in (0, 3, 1000):
        near = (turn(q, 5 + distance) * turn(k, 5)).sum()
        far = (turn(q, 777 + distance) * turn(k, 777)).sum()
        torch.testing.assert_close(near, far)
    assert torch.equal(turn(q, 0), q)
    with pytest.raises(ValueError, match="must be even; got 7"):
        rotation(torch.arange(3), 7)


def test_gated_norms():
    o, gate = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 20)
    by_head = F.rms_norm(o, (5,), eps=1e-5).flatten(-2)
    torch.testing.assert_close(GatedRMSNorm(4, 5, across="head", gate="silu")(o, gate), by_head * F.silu(gate))
    torch.testing.assert_close(GatedRMSNorm(4, 5, across="head", gate=None)(o), by_head)
    by_all = F.rms_norm(o.flatten(-2) * F.silu(gate), (20,), eps=1e-5)
    torch.testing.assert_close(GatedRMSNorm(4, 5, across="all", gate="silu", gate_first=True)(o, gate), by_all)
    assert torch.equal(GatedRMSNorm(4, 5, across=None, gate=None)(o), o.flatten(-2))


def test_swiglu():
    mlp, x = SwiGLU(6, 10, num_layers=2), torch.randn(2, 3, 6)
    torch.testing.assert_close(mlp(x), (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)

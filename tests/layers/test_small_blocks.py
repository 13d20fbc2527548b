"""RecNeXt's attention and ByteNet's block against their formulas, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from linattn.layers.bytenet import ByteNetBlock
from linattn.layers.recattn import RecAttention


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_recnexts_attention(size):
    module = RecAttention(12, 3).double().eval()
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    half = module.down(x)
    assert half.shape[2:] == tuple((s + 1) // 2 for s in size)
    heads = lambda t: t.flatten(2).unflatten(1, (3, 4)).mT  # [B h n d]
    conv, norm = module.qk
    first, second = half.chunk(2, 1)  # q sees the first half of the channels, k the second
    q = F.conv2d(first, conv.weight[:12])
    k = F.conv2d(second, conv.weight[12:])
    q, k = (F.elu(heads(t)) + 1 for t in norm(torch.cat([q, k], 1)).chunk(2, 1))
    v, n = heads(half), half.shape[2] * half.shape[3]
    o = q @ ((k.mT * n**-0.5) @ (v * n**-0.5)) / (q @ k.mean(2)[..., None] + 1e-6)
    o = o.mT.flatten(1, 2).unflatten(-1, half.shape[2:]) + module.local(half)
    wanted = module.out(x + F.interpolate(o, size=size, mode="nearest"))
    torch.testing.assert_close(module(x), wanted)
    module.train()(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.ne(0).any() for p in module.parameters())


def test_recnexts_attention_refuses():
    with pytest.raises(ValueError, match=r"x must be \[B C H W\] with C = 12; got \(2, 8, 4, 4\)"):
        RecAttention(12, 3)(torch.zeros(2, 8, 4, 4))
    with pytest.raises(ValueError, match="dim must be even and a multiple of num_heads; got dim=12, num_heads=5"):
        RecAttention(12, 5)


def stack(causal=True):
    return [ByteNetBlock(6, dilation=d, causal=causal).double() for d in (1, 2, 4)]


def run(blocks, x, states=None, mask=None):
    after = []
    for block, state in zip(blocks, states or [None] * len(blocks), strict=True):
        x, state = block(x, state, mask)
        after.append(state)
    return x, after


def test_bytenets_block_is_its_formula():
    (block,) = stack()[1:2]
    x, norm = torch.randn(1, 9, 6, dtype=torch.float64), lambda y: F.layer_norm(y, y.shape[-1:])
    y = norm(block.down(norm(x).relu())).relu()[0]
    taps = [torch.stack([y[t - 2 * (2 - j)] if t >= 2 * (2 - j) else torch.zeros_like(y[0]) for t in range(9)]) for j in range(3)]
    z = sum(tap @ block.conv.weight[..., j].T for j, tap in enumerate(taps)) + block.conv.bias
    torch.testing.assert_close(block(x)[0][0], x[0] + block.up(norm(z).relu()))


def test_bytenet_sees_as_far_back_as_it_says_and_no_future():
    blocks, x = stack(), torch.randn(1, 40, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(run(blocks, x)[0][0, 30].square().sum(), x)
    seen = grad[0].abs().sum(-1).nonzero()[:, 0]
    assert seen.min() == 30 - 2 * (1 + 2 + 4) and seen.max() == 30
    (grad,) = torch.autograd.grad(run(stack(causal=False), x)[0][0, 20].square().sum(), x)
    assert grad[0].abs().sum(-1).nonzero()[:, 0].aminmax() == (20 - 7, 20 + 7)


def test_bytenet_in_chunks_and_steps():
    blocks, x = stack(), torch.randn(2, 13, 6, dtype=torch.float64)
    whole, _ = run(blocks, x)
    states, parts = None, []
    for part in x.split([5, 1, 0, 1, 6], 1):
        y, states = run(blocks, part, states)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_bytenet_does_not_see_padding():
    blocks, x = stack(causal=False), torch.randn(1, 9, 6, dtype=torch.float64)
    mask = torch.arange(9)[None] < 6
    torch.testing.assert_close(run(blocks, torch.where(mask[..., None], x, 50.0), mask=mask)[0][:, :6], run(blocks, x[:, :6])[0])


def test_bytenet_refuses():
    for call, message in (
        (lambda: ByteNetBlock(5), "dim must be even, at least 2; got 5"),
        (lambda: ByteNetBlock(6, width=2, causal=False), "width odd where causal=False; got 2 and 1"),
        (lambda: ByteNetBlock(6)(torch.zeros(1, 3, 8)), r"x must be \[B T dim\] with dim=6; got \(1, 3, 8\)"),
        (lambda: ByteNetBlock(6)(torch.zeros(1, 3, 6), torch.zeros(1, 3, 4)), r"state must be \(1, 3, 2\); got \(1, 3, 4\)"),
        (lambda: ByteNetBlock(6)(torch.zeros(1, 3, 6), None, torch.ones(1, 3)), r"mask must be bool \[B T\] = \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

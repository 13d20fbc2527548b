"""ScatterFormer: segments against each window alone, the closed-form backward, the sparse convolution against a dense one, the block."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from linattn.layers.scatter import (
    ScatterFormerBlock,
    SubmanifoldDepthwise,
    WindowInteraction,
    neighbours,
    segment_linear_attention,
    windows,
)  # fmt: skip

OFFSETS = torch.tensor([0, 3, 3, 4, 21, 21, 40])


def rows(n=40, H=2, d=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, H, d, generator=draw, dtype=torch.float64) for _ in range(3))
    return q.relu(), k.relu(), v


def by_window(q, k, v, offsets, eps=1e-6):
    """All weights of each window at once."""
    out = torch.zeros_like(v)
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        A = torch.einsum("nhd,mhd->hnm", q[a:b], k[a:b])
        out[a:b] = torch.einsum("hnm,mhd->nhd", A / (A.sum(-1, keepdim=True) + eps), v[a:b])
    return out


def by_hand(do, q, k, v, offsets, eps=1e-6):
    """Closed-form backward: y = qS/z, z = q·s + eps."""
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        Q, K, V, G = q[a:b], k[a:b], v[a:b], do[a:b]
        S, s = torch.einsum("nhd,nhe->hde", K, V), K.sum(0)
        z = (Q * s).sum(-1, keepdim=True) + eps
        G = G / z
        c = (G * torch.einsum("nhd,hde->nhe", Q, S) / z).sum(-1, keepdim=True)
        dS, ds = torch.einsum("nhd,nhe->hde", Q, G), -(Q * c).sum(0)
        grads[0][a:b] = torch.einsum("nhe,hde->nhd", G, S) - c * s
        grads[1][a:b] = torch.einsum("nhe,hde->nhd", V, dS) + ds
        grads[2][a:b] = torch.einsum("nhd,hde->nhe", K, dS)
    return grads


def test_segments_are_windows_by_themselves():
    inputs = [x.requires_grad_() for x in rows()]
    o = segment_linear_attention(*inputs, OFFSETS)
    torch.testing.assert_close(o, by_window(*inputs, OFFSETS))
    do = torch.randn_like(o)
    for got, wanted in zip(torch.autograd.grad(o, inputs, do), by_hand(do, *inputs, OFFSETS), strict=True):
        torch.testing.assert_close(got, wanted)


def test_windows_are_isolated_and_have_no_order_inside():
    q, k, v = rows()
    o = segment_linear_attention(q, k, v, OFFSETS)
    changed = v.clone()
    changed[4:21] += 1
    other = segment_linear_attention(q, k, changed, OFFSETS)
    assert torch.equal(o[:4], other[:4]) and torch.equal(o[21:], other[21:]) and not torch.equal(o[4:21], other[4:21])
    order = torch.cat([torch.arange(4), 4 + torch.randperm(17), torch.arange(21, 40)])
    torch.testing.assert_close(segment_linear_attention(q[order], k[order], v[order], OFFSETS), o[order])


def test_a_crowded_window_is_like_any_other():
    """Its heads go to several threads and it is begun first, wherever it stands."""
    q, k, v = (x.float().requires_grad_() for x in rows(n=900, H=4))
    for offsets in ([0, 5, 9, 900], [0, 800, 850, 900], [0, 900]):
        o = segment_linear_attention(q, k, v, torch.tensor(offsets))
        parts = [segment_linear_attention(q[a:b], k[a:b], v[a:b], torch.tensor([0, b - a])) for a, b in pairwise(offsets)]
        torch.testing.assert_close(o, torch.cat(parts))
        do = torch.randn_like(o)
        for mine, theirs in zip(*(torch.autograd.grad(y, (q, k, v), do) for y in (o, torch.cat(parts))), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_same_bits_twice():
    inputs = [x.float().requires_grad_() for x in rows(n=300)]
    offsets = torch.tensor([0, 1, 290, 300])
    runs = []
    for _ in range(2):
        o = segment_linear_attention(*inputs, offsets)
        runs.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def cloud(n=60, seed=0, size=(2, 4, 9, 9)):
    """n different points (batch, z, y, x), some coordinates below 0."""
    draw = torch.Generator().manual_seed(seed)
    cells = torch.randperm(size[0] * size[1] * size[2] * size[3], generator=draw)[:n]
    return torch.stack(torch.unravel_index(cells, size), 1) - torch.tensor([0, 1, 4, 4])


def test_windows_hold_the_points_of_their_square():
    coords = cloud()
    where = windows(coords, 4)
    assert torch.equal(coords[where.order], where.coords) and torch.equal(where.coords[where.inverse], coords)
    found = set()
    for a, b in zip(where.offsets[:-1].tolist(), where.offsets[1:].tolist(), strict=True):
        squares = {(c[0], c[2] // 4, c[3] // 4) for c in where.coords[a:b].tolist()}
        assert len(squares) == 1 and not squares & found
        found |= squares
        assert torch.equal(where.order[a:b], where.order[a:b].sort().values)  # stable


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 13), (1, 13, 1)])
def test_the_sparse_convolution_is_a_dense_one_read_at_the_points(kernel):
    coords, C = cloud(), 3
    x = torch.randn(len(coords), C, dtype=torch.float64, requires_grad=True)
    conv = SubmanifoldDepthwise(C, kernel).double()
    at = (coords - coords.amin(0)).unbind(1)
    dense = torch.zeros(2, 4, 9, 9, C, dtype=torch.float64).index_put(at, x)
    weight = conv.weight.T.reshape(C, 1, *kernel)
    wanted = F.conv3d(dense.movedim(-1, 1), weight, padding=tuple(s // 2 for s in kernel), groups=C).movedim(1, -1)[at]
    got = conv(x, neighbours(coords, kernel))
    torch.testing.assert_close(got, wanted)
    do = torch.randn_like(got)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, conv.weight), do, retain_graph=True) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("released", [False, True])
def test_the_block_is_its_formula(released):
    torch.manual_seed(0)
    block = ScatterFormerBlock(16, 2, 4, released=released).double()
    where = windows(cloud(), 4)
    x = torch.randn(60, 16, dtype=torch.float64)
    norm = lambda y: (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-3).sqrt()
    q, k, v = block.qkv_proj(norm(x)).unflatten(-1, (3, 2, 8)).unbind(1)
    y = x + block.o_proj(by_window(q.relu(), k.relu(), v, where.offsets).flatten(1))
    mixed = norm(y)
    base = mixed if released else y
    parts = list(mixed.chunk(4, -1))
    for i, conv in enumerate(block.interaction.convs):
        parts[i] = conv(parts[i], neighbours(where.coords, conv.kernel))
    y = base + torch.cat(parts, -1)
    torch.testing.assert_close(block(x, where), y + block.mlp(norm(y)))
    assert [conv.kernel for conv in block.interaction.convs] == [(3, 3, 3), (1, 1, 5), (1, 5, 1)]
    assert abs(block.interaction.convs[0].weight.std() - (1.0 if released else 27**-0.5)) < 0.2


def test_gradients_reach_every_parameter():
    block, where = ScatterFormerBlock(16, 2, 4), windows(cloud(), 4)
    (block(torch.randn(60, 16), where) * torch.randn(60, 16)).sum().backward()
    assert all(p.grad.ne(0).any() and p.grad.isfinite().all() for p in block.parameters())


def test_no_points():
    block = ScatterFormerBlock(16, 2, 4).eval()
    assert block(torch.zeros(0, 16), windows(torch.zeros(0, 4, dtype=torch.int64), 4)).shape == (0, 16)


def test_bad_arguments():
    q, k, v = rows()
    where = windows(cloud(), 4)
    for call, message in (
        (lambda: segment_linear_attention(q[0], k, v, OFFSETS), r"q must be \[n H K\], of 3 dimensions; got shape \(2, 8\)"),
        (lambda: segment_linear_attention(q, k[:3], v, OFFSETS), "k must be"),
        (lambda: segment_linear_attention(q, k, v, OFFSETS.float()), r"offsets must be \[M\+1\] int32 or int64"),
        (lambda: segment_linear_attention(q, k, v, OFFSETS[:-1]), "offsets must run from 0 to n = 40; got 0 to 21"),
        (lambda: segment_linear_attention(q, k, v, torch.tensor([0, 20, 10, 40])), "offsets must not decrease"),  # windows unsorted
        (lambda: segment_linear_attention(q, k, v, torch.tensor([1, 20, 40])), "offsets must run from 0 to n = 40; got 1 to 40"),
        (lambda: segment_linear_attention(q, k, v, torch.tensor([40])), r"offsets must be \[M\+1\] int32 or int64 with M >= 1"),
        (lambda: windows(cloud().float(), 4), r"coords must be whole numbers \[n 4\]"),
        (lambda: windows(cloud()[:, :3], 4), r"coords must be whole numbers \[n 4\]"),
        (lambda: windows(cloud(), 5), "window must be even and at least 2: it is crossed by window \\+ 1 taps; got 5"),
        (lambda: windows(torch.cat([cloud(), cloud()[:1]]), 4), "coords must hold no point twice"),
        (lambda: neighbours(cloud(), (2, 3, 3)), r"kernel must be of odd sizes \(kz, ky, kx\); got \(2, 3, 3\)"),
        (lambda: ScatterFormerBlock(16, 2, 4)(torch.zeros(59, 16), where), r"x must be \[n dim\] with n = 60 points"),
        (lambda: ScatterFormerBlock(16, 2, 6)(torch.zeros(60, 16), where), "where must be of windows of 6; got 4"),
        (lambda: ScatterFormerBlock(16, 3, 4), "num_heads must divide dim; got num_heads=3, dim=16"),
        (lambda: WindowInteraction(18, 4), "dim must be a multiple of 4; got 18"),
        (lambda: SubmanifoldDepthwise(4, (3, 3, 3))(torch.zeros(60, 4), where.tables[1]), r"table must be \[taps n\] = \(27, 60\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

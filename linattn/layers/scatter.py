"""ScatterFormer, arXiv:2401.00912: attention inside windows of any number of points, and sparse convolutions that join the windows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_attention
from .linear import Linear


def segment_linear_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """o_i = Σ_j (q_i·k_j) v_j / (Σ_j q_i·k_j + eps) over all j of i's segment: points of a window, nodes of a graph, words of a document.

    q, k [n H K], after a feature map ≥ 0; v [n H V]
    offsets       [M+1] int32 or int64, from 0 to n without decreasing: segment m is rows offsets[m] … offsets[m+1]−1, and may be empty

    Returns o [n H V]. O(n K V) whatever the lengths; a state [K V] per segment, head and side. On the CPU the longest segments are begun
    first, heads of a crowded one on several threads, the rest by whichever is free; with the operator's closed-form backward, and the same
    bits every time. ValueError for shapes and offsets that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [n H {'V' if name == 'v' else 'K'}], of 3 dimensions; got shape {tuple(x.shape)}")
    check_offsets(offsets, q.shape[0])
    o, _ = linear_attention(
        q[None], k[None], v[None], causal=False, normalize=True, eps=eps, scale=1.0, cu_seqlens=offsets, backend=backend
    )
    return o[0]


def check_offsets(offsets: Tensor, n: int) -> None:
    """ValueError unless offsets is [M+1] int32 or int64, M ≥ 1, from 0 to n without decreasing; values are looked at on the CPU alone."""
    if offsets.ndim != 1 or offsets.shape[0] < 2 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be [M+1] int32 or int64 with M >= 1; got {offsets.dtype} {tuple(offsets.shape)}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        if offsets[0] != 0 or offsets[-1] != n:
            raise ValueError(f"offsets must run from 0 to n = {n}; got {int(offsets[0])} to {int(offsets[-1])}")
        if bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must not decrease")


class Windows(NamedTuple):
    """Points in the order of their windows, and who is whose neighbour there: made once, used by every layer of a stage."""

    order: Tensor  # [n] int64: row i of what layers see is point order[i]
    inverse: Tensor  # [n] int64: back again
    offsets: Tensor  # [M+1] int64, of windows that hold at least one point
    coords: Tensor  # [n 4] int64, ordered
    window: int
    tables: tuple[Tensor, ...]  # neighbours of WindowInteraction's three kernels


def windows(coords: Tensor, window: int) -> Windows:
    """Sort points by window, and find their neighbours.

    coords  [n 4] of whole numbers (batch, z, y, x), no two alike; a window is `window` × `window` in y and x and all of z
    ValueError for coords of another shape or dtype, doubles, and a window that is not even: it is crossed by window + 1 taps.
    """
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point() or coords.dtype == torch.bool:
        raise ValueError(f"coords must be whole numbers [n 4], (batch, z, y, x); got {coords.dtype} {tuple(coords.shape)}")
    if not isinstance(window, int) or window < 2 or window % 2:
        raise ValueError(f"window must be even and at least 2: it is crossed by window + 1 taps; got {window!r}")
    coords = coords.long()
    place = coords[:, [0, 2, 3]].div(torch.tensor([1, window, window], device=coords.device), rounding_mode="floor")
    _, of, counts = torch.unique(place, dim=0, return_inverse=True, return_counts=True)
    order = torch.argsort(of, stable=True)
    offsets = F.pad(counts.cumsum(0), (1, 0)) if len(counts) else torch.zeros(2, dtype=torch.int64, device=coords.device)
    ordered = coords[order]
    tables = tuple(neighbours(ordered, kernel) for kernel in WindowInteraction.kernels(window))
    return Windows(order, order.argsort(), offsets, ordered, window, tables)


def neighbours(coords: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """[taps n] int64: the row of the point that stands where tap t of `kernel` (kz, ky, kx) lies from point i; n where none does.

    Taps run over z, y, x, the last fastest. ValueError for even kernels and for two points in one place.
    """
    if any(size < 1 or size % 2 == 0 for size in kernel):
        raise ValueError(f"kernel must be of odd sizes (kz, ky, kx); got {kernel}")
    n = coords.shape[0]
    reach = torch.tensor([0, *(size // 2 for size in kernel)], device=coords.device)
    if n == 0:
        return coords.new_zeros(kernel[0] * kernel[1] * kernel[2], 0)
    shifted = coords - coords.amin(0) + reach  # room for a kernel on both sides, so that no tap wraps around
    size = shifted.amax(0) + 1 + reach
    stride = size.flip(0).cumprod(0).flip(0).roll(-1)
    stride[-1] = 1
    keys = (shifted * stride).sum(1)
    known, row = keys.sort()
    if bool((known.diff() == 0).any()):
        raise ValueError("coords must hold no point twice")
    steps = torch.cartesian_prod(*(torch.arange(-(s // 2), s // 2 + 1, device=coords.device) for s in kernel))
    wanted = keys + (steps * stride[1:]).sum(1, keepdim=True)
    at = torch.searchsorted(known, wanted).clamp(max=n - 1)
    return torch.where(known[at] == wanted, row[at], n)


class _DepthwiseSum(torch.autograd.Function):
    """out_i = Σ_t weight[t] x[table[t, i]]. A point's neighbour at tap t has it at the mirrored tap: the backward pass gathers too, and
    nothing is added in an order that could change."""

    @staticmethod
    def forward(ctx, x, weight, table):
        ctx.save_for_backward(x, weight, table)
        return _gathered(x, weight, table)

    @staticmethod
    def backward(ctx, grad):
        x, weight, table = ctx.saved_tensors
        dx = _gathered(grad, weight, table.flip(0)) if ctx.needs_input_grad[0] else None
        padded = F.pad(x, (0, 0, 0, 1))
        dweight = torch.stack([(padded[at] * grad).sum(0) for at in table]) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


def _gathered(x, weight, table):
    padded, out = F.pad(x, (0, 0, 0, 1)), torch.zeros_like(x)
    for tap, at in zip(weight, table, strict=True):
        out = torch.addcmul(out, padded[at], tap)
    return out


class SubmanifoldDepthwise(nn.Module):
    """A depthwise convolution with values at points only: y_i = Σ_t weight[t] · x of the point at tap t from i, where there is one.

    x [n dim], table [taps n] of `neighbours` → [n dim]. Starts from normal(0, std); None: 1 / √taps.
    """

    def __init__(self, dim: int, kernel: tuple[int, int, int], *, std: float | None = None):
        super().__init__()
        taps = kernel[0] * kernel[1] * kernel[2]
        self.kernel, self.std = kernel, taps**-0.5 if std is None else std
        self.weight = nn.Parameter(torch.empty(taps, dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, kernel={self.kernel}"

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        if table.shape != (self.weight.shape[0], x.shape[0]):
            raise ValueError(f"table must be [taps n] = {(self.weight.shape[0], x.shape[0])}; got {tuple(table.shape)}")
        return _DepthwiseSum.apply(x, self.weight.to(x.dtype), table)


class WindowInteraction(nn.Module):
    """What joins windows: a quarter of the channels under 3×3×3, one along x and one along y across window + 1, one as it is."""

    def __init__(self, dim: int, window: int, *, std: float | None = None):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4; got {dim}")
        self.convs = nn.ModuleList(SubmanifoldDepthwise(dim // 4, kernel, std=std) for kernel in self.kernels(window))

    @staticmethod
    def kernels(window: int) -> list[tuple[int, int, int]]:
        return [(3, 3, 3), (1, 1, window + 1), (1, window + 1, 1)]

    def forward(self, x: Tensor, where: Windows) -> Tensor:
        """x [n dim], ordered as `where` → [n dim]."""
        *parts, rest = x.chunk(4, -1)
        return torch.cat([conv(part, table) for conv, part, table in zip(self.convs, parts, where.tables, strict=True)] + [rest], -1)


class ScatterFormerBlock(nn.Module):
    """Attention inside windows, interaction across them, and a feed-forward layer, each a residual branch after a BatchNorm.

        where = windows(coords, 12)                     # once for a stage
        x = block(x[where.order], where)                # x [n dim]; x[where.inverse] puts the points back

    released  the order of the released code, which its weights need: x + attention(norm1(x)), then x becomes norm2(x) itself, then
              x + interaction(x), then x + mlp(norm3(x)), and the interaction's weights start from normal(0, 1)
    """

    def __init__(self, dim: int = 128, num_heads: int = 4, window: int = 12, *, released: bool = False, backend: str = "auto"):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got num_heads={num_heads}, dim={dim}")
        self.num_heads, self.window, self.released, self.backend = num_heads, window, released, backend
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm1d(dim, eps=1e-3, momentum=0.01) for _ in range(3))
        self.qkv_proj, self.o_proj = Linear(dim, 3 * dim), Linear(dim, dim, bias=True)
        self.interaction = WindowInteraction(dim, window, std=1.0 if released else None)
        self.mlp = nn.Sequential(Linear(dim, 2 * dim, bias=True), nn.ReLU(), Linear(2 * dim, dim, bias=True))

    def forward(self, x: Tensor, where: Windows) -> Tensor:
        """x [n dim] in the order of `where` → the same. ValueError for another number of points or another window."""
        if x.ndim != 2 or x.shape[0] != where.order.shape[0]:
            raise ValueError(f"x must be [n dim] with n = {where.order.shape[0]} points, ordered as `where`; got {tuple(x.shape)}")
        if where.window != self.window:
            raise ValueError(f"where must be of windows of {self.window}; got {where.window}")
        x = x + self._attend(self.norm1(x), where)
        if self.released:
            x = self.norm2(x)
            x = x + self.interaction(x, where)
        else:
            x = x + self.interaction(self.norm2(x), where)
        return x + self.mlp(self.norm3(x))

    def _attend(self, x, where):
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return self.o_proj(segment_linear_attention(q.relu(), k.relu(), v, where.offsets, backend=self.backend).flatten(1))

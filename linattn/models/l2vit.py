"""L²ViT, arXiv:2501.16182: a pyramid of blocks with window attention and global linear attention by turns."""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import MLP, Mixer, Variant
from ..layers.decays import Place
from ..layers.linear import Linear, without_weight_decay
from .bidirectional import DropPath
from .config import check_fields
from .features import classifier, handed_out, taken
from .storage import Storable

HEAD = 32  # channels of every head
# max(q·Σk, 100), the paper's clamp, in its mean form: the operator divides by max(scale · q·Σk, 1e-6), so a scale of 1e-6 / 100 makes it
# 100, and no sum leaves float32
GLOBAL = Variant(source="arXiv:2501.16182", feature="relu", normalize="clamp", scale=1e-8, norm=None)


@dataclass(frozen=True, kw_only=True)
class L2ViTConfig:
    """ValueError for sizes below 1 and widths that are no multiple of a head's 32 channels."""

    MODEL_TYPE: ClassVar[str] = "linattn_l2vit"

    depths: tuple[int, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    window: int = 7
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, pooled features
    drop_path: float = 0.0

    def __post_init__(self):
        for name in ("depths", "dims"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.depths or len(self.depths) != len(self.dims) or min(self.depths) < 1 or any(d < HEAD or d % HEAD for d in self.dims):
            raise ValueError(f"depths and dims must be as many, dims multiples of {HEAD}; got {self.depths} and {self.dims}")
        if self.window < 1 or self.in_chans < 1 or self.num_classes < 0 or not 0 <= self.drop_path < 1:
            raise ValueError(f"window and in_chans must be at least 1, num_classes at least 0, drop_path in [0, 1); got {self}")


L2VITS: dict[str, dict[str, Any]] = {
    "l2vit_tiny": dict(),
    "l2vit_small": dict(depths=(2, 2, 18, 2)),
    "l2vit_base": dict(depths=(2, 2, 18, 2), dims=(128, 256, 512, 1024)),
}


class GlobalAttention(nn.Module):
    """T_h · relu(q)ᵀ Σ relu(k) vᵀ / max(relu(q) · Σ relu(k), 100) over all places of [B h w dim]; T_h per head, from 32^−½."""

    def __init__(self, dim: int, *, backend: str = "auto"):
        super().__init__()
        heads = dim // HEAD
        self.qkv, self.proj = Linear(dim, 3 * dim, bias=True), Linear(dim, dim, bias=True)
        self.mixer = Mixer(GLOBAL, Place(dim, heads, HEAD), causal=False, backend=backend)
        self.temperature = without_weight_decay(nn.Parameter(torch.full((heads,), HEAD**-0.5)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, -1, HEAD)).unbind(2)
        o, _ = self.mixer(tokens, q, k, v)
        return self.proj((o * self.temperature[:, None].to(o.dtype)).flatten(-2)).view_as(x)


class WindowAttention(nn.Module):
    """Softmax attention inside windows of [B h w dim], filled up with zeros at the right and bottom, which take part, as released."""

    def __init__(self, dim: int, window: int):
        super().__init__()
        self.window = window
        self.qkv, self.proj = Linear(dim, 3 * dim, bias=True), Linear(dim, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        (h, w), n = x.shape[1:3], self.window
        x = F.pad(x, (0, 0, 0, -w % n, 0, -h % n))
        cut = x.unflatten(2, (-1, n)).unflatten(1, (-1, n)).transpose(2, 3)  # [B rows columns n n dim]
        q, k, v = self.qkv(cut.flatten(3, 4).flatten(0, 2)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        o = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)).view_as(cut)
        return o.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]


class Depthwise(nn.Conv2d):
    """One filter of size² per channel, its output as large as its input: [B h w dim] → the same."""

    def __init__(self, dim: int, size: int):
        super().__init__(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalConcentration(nn.Module):
    """Depthwise 7 × 7, GELU, BatchNorm, depthwise 7 × 7."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.norm, self.conv2 = Depthwise(dim, 7), nn.BatchNorm2d(dim), Depthwise(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.gelu(self.conv1(x)).permute(0, 3, 1, 2))
        return self.conv2(y.permute(0, 2, 3, 1))


class L2Block(nn.Module):
    """Position by a depthwise 3 × 3, attention, then local concentration (global) or a second position (window), then MLP; all residual."""

    def __init__(self, dim: int, *, window: int | None, drop_path: float, backend: str):
        super().__init__()
        self.position, self.norm1, self.norm2 = Depthwise(dim, 3), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = GlobalAttention(dim, backend=backend) if window is None else WindowAttention(dim, window)
        self.norm3 = nn.LayerNorm(dim) if window is None else nn.Identity()
        self.local = LocalConcentration(dim) if window is None else Depthwise(dim, 3)
        self.mlp, self.drop_path, self.is_global = MLP(dim, 4 * dim), _DropImage(drop_path), window is None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        x = x + (self.drop_path(self.local(self.norm3(x))) if self.is_global else self.local(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@contextmanager
def _at_rest(block: nn.Module):
    """What a checkpointed block computes again has moved its running statistics once already."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


class _DropImage(DropPath):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(1, 2)).view_as(x)


class Down(nn.Module):
    """LayerNorm and a 2 × 2 convolution of stride 2: [B h w dim] → [B h/2 w/2 wider]."""

    def __init__(self, dim: int, wider: int):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv2d(dim, wider, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class L2ViT(Storable):
    """Images [B C h w] of any size → logits; `l2vit_{tiny,small,base}` by `create`. Sides that are no multiple of 32 get zeros behind them.

    The names and signatures of timm's pyramids hold for forward_features, forward_head, forward_intermediates, get_classifier,
    reset_classifier and set_grad_checkpointing.
    """

    CONFIG_KIND = L2ViTConfig

    def __init__(self, config: L2ViTConfig, *, backend: str = "auto"):
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.dims[-1]
        self.grad_checkpointing = False
        half, first, depth = c.dims[0] // 2, c.dims[0], sum(c.depths)
        self.stem = nn.Sequential(
            nn.Conv2d(c.in_chans, half, 3, 2, 1), nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, first, 3, 2, 1), nn.BatchNorm2d(first)
        )
        self.stem_norm = nn.LayerNorm(first)
        rates = iter(c.drop_path * i / max(1, depth - 1) for i in range(depth))
        self.stages, self.downs = nn.ModuleList(), nn.ModuleList()
        for stage, (dim, blocks) in enumerate(zip(c.dims, c.depths, strict=True)):
            if stage:
                self.downs.append(Down(c.dims[stage - 1], dim))
            windows = [None if i % 2 else c.window for i in range(blocks)]
            self.stages.append(nn.Sequential(*(L2Block(dim, window=window, drop_path=next(rates), backend=backend) for window in windows)))
        self.norm = nn.LayerNorm(c.dims[-1])
        self.head = classifier(c.dims[-1], c.num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @classmethod
    def create(cls, name: str, *, in_chans: int = 3, num_classes: int = 1000, backend: str = "auto", **overrides) -> "L2ViT":
        """`l2vit_{tiny,small,base}`, other fields of `L2ViTConfig` by `overrides`, such as the paper's window=12 at 384².

        ValueError lists the known names and fields.
        """
        if name not in L2VITS:
            raise ValueError(f"name must be one of {list(L2VITS)}; got {name!r}")
        check_fields(overrides, "the config of L²ViT", L2ViTConfig)
        fields: dict[str, Any] = L2VITS[name] | dict(in_chans=in_chans, num_classes=num_classes) | overrides
        return cls(L2ViTConfig(**fields), backend=backend)

    def forward(self, images: Tensor) -> Tensor:
        """images [B C h w] → logits [B num_classes], or pooled features where there is no head."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """[B h/32 w/32 dim] after the last norm."""
        return self.norm(self._stages(images)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features gave → logits, or with pre_logits what the head would read."""
        pooled = x.mean((1, 2))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ):
        """The pyramid as timm hands it out: features after the stages `indices`, [B dim rows columns], of strides 4, 8, 16 and 32.

        (features as of forward_features, list), or the list alone; with stop_early the features are those of the last stage that was run.
        norm: the last norm on the last stage. ValueError for another format than "NCHW" and stages that are not there.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}")
        wanted, last = taken(indices, len(self.stages), "stages"), len(self.stages) - 1
        stages = self._stages(x, max(wanted) + 1 if stop_early else None)
        final = self.norm(stages[-1]) if len(stages) > last else stages[-1]
        maps = [(final if norm and i == last else y).permute(0, 3, 1, 2) for i, y in enumerate(stages) if i in wanted]
        return handed_out(None if intermediates_only else final, maps, None, as_dict=output_dict)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, drawn anew; 0: none. global_pool: "mean" or None, which is the same."""
        if global_pool not in (None, "mean"):
            raise ValueError(f"global_pool must be 'mean' or None; got {global_pool!r}")
        self.config = replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.head = classifier(self.num_features, num_classes).to(self.norm.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def _stages(self, images: Tensor, count: int | None = None) -> list[Tensor]:
        """[B h w dim] after each of the first `count` stages, None: all."""
        if images.ndim != 4 or images.shape[1] != self.config.in_chans or not images.numel() or not images.is_floating_point():
            wanted = f"[B {self.config.in_chans} h w], not empty"
            raise ValueError(f"images must be floating, {wanted}; got {images.dtype} {tuple(images.shape)}")
        step = 4 * 2 ** (len(self.stages) - 1)
        x = F.pad(images, (0, -images.shape[3] % step, 0, -images.shape[2] % step))
        x, outputs = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)), []
        for i, stage in enumerate(self.stages[:count]):
            if i:
                x = self.downs[i - 1](x)
            for block in stage:  # type: ignore[attr-defined]
                again = self.grad_checkpointing and torch.is_grad_enabled()
                how: Any = dict(use_reentrant=False, context_fn=lambda block=block: (nullcontext(), _at_rest(block)))
                x = checkpoint(block, x, **how) if again else block(x)
            outputs.append(x)
        return outputs

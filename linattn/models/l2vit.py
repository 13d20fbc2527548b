"""L²ViT, arXiv:2501.16182: a pyramid of blocks with window attention and global linear attention by turns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MLP, Mixer, Variant
from ..layers.decays import Place
from ..layers.linear import Linear, without_weight_decay
from . import storage
from .bidirectional import DropPath

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


L2VITS = {
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

    def __init__(self, dim: int, *, window: int | None, num_layers: int, drop_path: float, backend: str):
        super().__init__()
        self.position, self.norm1, self.norm2 = Depthwise(dim, 3), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = GlobalAttention(dim, backend=backend) if window is None else WindowAttention(dim, window)
        self.norm3 = nn.LayerNorm(dim) if window is None else nn.Identity()
        self.local = LocalConcentration(dim) if window is None else Depthwise(dim, 3)
        self.mlp, self.drop_path, self.is_global = MLP(dim, 4 * dim, num_layers=num_layers), _DropImage(drop_path), window is None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        x = x + (self.drop_path(self.local(self.norm3(x))) if self.is_global else self.local(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


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


class L2ViT(nn.Module):
    """Images [B C h w] → logits; `l2vit_{tiny,small,base}` by `create`. Sides that are no multiple of 32 are filled up with zeros.

    forward_features gives [B h/32 w/32 dim]; forward_intermediates the pyramid, one [B dim rows columns] per stage.
    """

    def __init__(self, config: L2ViTConfig, *, backend: str = "auto"):
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.dims[-1]
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
            how: dict[str, Any] = dict(num_layers=depth, backend=backend)
            self.stages.append(nn.Sequential(*(L2Block(dim, window=window, drop_path=next(rates), **how) for window in windows)))
        self.norm = nn.LayerNorm(c.dims[-1])
        self.head: nn.Module = Linear(c.dims[-1], c.num_classes, bias=True) if c.num_classes else nn.Identity()
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    @classmethod
    def create(cls, name: str, *, in_chans: int = 3, num_classes: int = 1000, drop_path: float = 0.0, backend: str = "auto") -> "L2ViT":
        """ValueError lists the known names."""
        if name not in L2VITS:
            raise ValueError(f"name must be one of {list(L2VITS)}; got {name!r}")
        sizes: dict = L2VITS[name]
        return cls(L2ViTConfig(in_chans=in_chans, num_classes=num_classes, drop_path=drop_path, **sizes), backend=backend)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean((1, 2)))

    def forward_features(self, images: Tensor) -> Tensor:
        return self.norm(self._stages(images)[-1])

    def forward_intermediates(self, images: Tensor) -> list[Tensor]:
        return [x.permute(0, 3, 1, 2) for x in self._stages(images)]

    def get_classifier(self) -> nn.Module:
        return self.head

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; see `linattn.models.storage.save`."""
        storage.save(self, self.config, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, backend: str = "auto") -> "L2ViT":
        """The model saved in `folder`. ValueError or FileNotFoundError says what is wrong with it."""
        config = storage.read_config(Path(folder), L2ViTConfig)
        with torch.random.fork_rng(devices=()):
            model = cls(config, backend=backend)
        storage.load(model, config, Path(folder))
        return model

    def _stages(self, images: Tensor) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != self.config.in_chans or not images.numel() or not images.is_floating_point():
            wanted = f"[B {self.config.in_chans} h w], not empty"
            raise ValueError(f"images must be floating, {wanted}; got {images.dtype} {tuple(images.shape)}")
        step = 4 * 2 ** (len(self.stages) - 1)
        x = F.pad(images, (0, -images.shape[3] % step, 0, -images.shape[2] % step))
        x, outputs = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)), []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downs[i - 1](x)
            x = stage(x)
            outputs.append(x)
        return outputs

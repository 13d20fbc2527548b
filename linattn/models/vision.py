"""The vision transformer: images of one size or of many → classes or features, over any of the attention layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import LinearAttention, snakes
from ..layers.linear import Linear, without_weight_decay
from ..layers.variants import Gating, Variant
from .bidirectional import make_block
from .config import check_fields
from .features import classifier, handed_out, taken
from .patches import Grid, Patches, Positions, as_list
from .storage import Storable
from .vision_config import POOLS, VisionConfig, preset

Images = Tensor | Sequence[Tensor]


class VisionTransformer(Storable):
    """Patches, class token and registers, blocks, LayerNorm, and a linear head on what `pool` says: ViT, arXiv:2010.11929.

        model = VisionTransformer.create("vit_tiny_lion_d", img_size=224, num_classes=10)
        logits = model(images)                                   # [B C h w] of any size → [B num_classes]
        logits = model([image1, image2])                         # a pack: images [C h w] of different sizes, each as if alone

    The names and signatures of timm's `VisionTransformer` hold for forward_features, forward_head, forward_intermediates, get_classifier,
    reset_classifier, set_input_size and set_grad_checkpointing; poolings are named as in `VisionConfig`.
    Variants that have a short convolution keep it as it is: causal, along the rows of the image.
    backend as in `linattn.linear_attention`.
    """

    CONFIG_KIND = VisionConfig

    def __init__(self, config: VisionConfig, *, backend: str = "auto"):
        super().__init__()
        self.config = c = config
        self.num_classes, self.global_pool = c.num_classes, c.pool
        self.num_features = self.embed_dim = c.dim
        self.num_prefix_tokens = c.prefix
        self.grad_checkpointing = False
        self.patches = Patches(c.patch_size, c.in_chans, c.dim, pad=c.pad)
        self.prefix = without_weight_decay(nn.Parameter(torch.randn(c.prefix, c.dim) * 0.02)) if c.prefix else None
        self.positions = Positions(c.grid, c.dim, std=c.position_std) if c.positions else None
        self.blocks = nn.ModuleList(
            make_block(
                c.variant, c.dim, c.num_heads, int(c.dim * c.mlp_ratio), causal=c.causal, curves=c.curves, gating=c.gating,
                prefix=0 if c.causal else c.prefix, expand_k=c.expand_k, expand_v=c.expand_v, layer_idx=i, num_layers=c.num_layers,
                norm_eps=c.norm_eps, layer_scale=c.layer_scale, drop_path=c.drop_path * i / max(1, c.num_layers - 1), backend=backend,
            )
            for i in range(c.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.head = classifier(c.dim, c.num_classes)
        with torch.no_grad():
            for linear in (module for module in self.modules() if c.init_scale != 1 and isinstance(module, Linear)):
                linear.weight.mul_(c.init_scale)

    @classmethod
    def create(
        cls,
        name: str,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        backend: str = "auto",
        **overrides,
    ) -> "VisionTransformer":
        """`vit_{tiny,small,base}_{variant}`, two-scan with `_natural` behind it, other fields of `VisionConfig` by `overrides`."""
        check_fields(overrides, "the config of a vision transformer", VisionConfig)
        fields = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes)
        return cls(VisionConfig(**preset(name) | fields | overrides), backend=backend)

    def forward(self, images: Images, *, segment: int | None = None) -> Tensor:
        """images [B C h w], or a pack of N images [C h w] → logits [B or N num_classes], or pooled features where there is no head.

        segment: inference in less memory, so many tokens at a time, as in `LinearAttention`; not with a pack.
        """
        return self.forward_head(self.forward_features(images, segment=segment))

    def forward_features(self, images: Images, *, segment: int | None = None) -> Tensor | list[Tensor]:
        """All tokens after the last norm, the prefix first: [B T dim], or of a pack a list of N [T dim]."""
        x, grids, cu_seqlens, curves = self._tokens(images)
        if segment is not None and (self.config.variant == "softmax" or cu_seqlens is not None):
            raise ValueError("segment needs images of one size and a linear variant")
        for block in self.blocks:
            x = self._run(block, x, cu_seqlens, None, curves, segment)
        x = self.norm(x)
        return x if cu_seqlens is None else list(x[0].split(self._lengths(grids)))

    def forward_head(self, x: Tensor | Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """What forward_features gave → logits, or with pre_logits what the head would read."""
        pooled = self._pool(x) if isinstance(x, Tensor) else torch.cat([self._pool(one[None]) for one in x])
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ):
        """Features after the blocks `indices` (None: all; n: the last n; negative: from the end), as timm's of that name.

        x [B C h w] → (features [B T dim] after the last norm, list), or the list alone. Its entries are [B dim rows columns], or with
        output_fmt="NLC" [B patches dim]; with return_prefix_tokens pairs of that and the prefix [B prefix dim]. norm: the last norm on
        each. stop_early: blocks after the last index are not run. output_dict: a dict of image_features, image_intermediates and
        image_intermediates_prefix.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        wanted = taken(indices, len(self.blocks))
        x, grids, cu_seqlens, curves = self._tokens(x)
        if cu_seqlens is not None:
            raise ValueError("forward_intermediates needs images of one size, [B C h w]; got a pack")
        found = []
        for i, block in enumerate(self.blocks[: max(wanted) + 1] if stop_early else self.blocks):
            x = self._run(block, x, None, None, curves, None)
            if i in wanted:
                found.append(self.norm(x) if norm else x)
        maps = [y[:, self.num_prefix_tokens :] for y in found]
        maps = [y.mT.unflatten(2, grids[0]) for y in maps] if output_fmt == "NCHW" else maps
        prefixes = [y[:, : self.num_prefix_tokens] for y in found] if return_prefix_tokens else None
        return handed_out(None if intermediates_only else self.norm(x), maps, prefixes, as_dict=output_dict)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, drawn anew; 0: none. global_pool: a name in `POOLS`, or None for what it was."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS:
            raise ValueError(f"global_pool must be one of {list(POOLS)}; got {pool!r}")
        self.config = replace(self.config, num_classes=num_classes, pool=pool)
        self.num_classes, self.global_pool = num_classes, pool
        self.head = classifier(self.embed_dim, num_classes).to(self.norm.weight)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Learn positions at another size from now on: those there are are interpolated once. Other sizes are taken without this too."""
        self.config = replace(self.config, img_size=img_size)
        if self.positions is not None:
            resized = self.positions.resized(self.config.grid).detach().clone()
            self.positions.weight = without_weight_decay(nn.Parameter(resized))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def _tokens(self, images: Images) -> tuple[Tensor, list[Grid], Tensor | None, Tensor | None]:
        """Tokens [B T dim], or [1 T dim] of a pack, with their grids, cu_seqlens (None: no pack) and curves (None: one)."""
        packed = not isinstance(images, Tensor)
        each = [images] if isinstance(images, Tensor) else [image[None] for image in as_list(images)]
        if each[0].ndim != 4:
            raise ValueError(f"images must be [B C h w], or a list of [C h w]; got {tuple(each[0].shape)}")
        grids = [self.patches.grid(image) for image in each]
        parts = [self._embed(image, grid) for image, grid in zip(each, grids, strict=True)]
        x = torch.cat(parts, 1) if packed else parts[0]
        ends = [0, *torch.tensor(self._lengths(grids)).cumsum(0).tolist()]
        cu_seqlens = torch.tensor(ends, device=x.device) if packed else None
        curves = snakes(grids, prefix=self.num_prefix_tokens, device=x.device) if self.config.curves == 2 else None
        return x, grids, cu_seqlens, curves

    def _embed(self, images: Tensor, grid: Grid) -> Tensor:
        x = self.patches(images)
        if self.positions is not None:
            x = x + self.positions(grid)
        return x if self.prefix is None else torch.cat([self.prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)

    def _lengths(self, grids: list[Grid]) -> list[int]:
        return [self.num_prefix_tokens + rows * columns for rows, columns in grids]

    def _run(self, block: nn.Module, *args) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return x[:, 0]
        return (x if self.global_pool == "mean" else x[:, self.num_prefix_tokens :]).mean(1)


class ImageAttention(nn.Module):
    """`LinearAttention` for images as other libraries' blocks call theirs, x → y alone: `block.attn = ImageAttention(192, 3, "lion_s")`.

    grid    rows and columns of patches; needed for curves=2, and then images are of that size
    prefix  tokens before the patches: the class token of timm's models
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        variant: str | Variant = "lion_s",
        *,
        gating: Gating = None,
        curves: int = 1,
        grid: Grid | None = None,
        prefix: int = 1,
        layer_idx: int = 0,
        num_layers: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        if (grid is None) != (curves == 1):
            raise ValueError(f"grid, rows and columns of patches, is for curves=2, which needs it; got grid={grid}, curves={curves}")
        self.layer = LinearAttention(
            dim, num_heads, variant, causal=False, gating=gating, curves=curves, prefix=prefix, layer_idx=layer_idx,
            num_layers=num_layers, backend=backend,
        )  # fmt: skip
        self.grid, self.prefix = grid, prefix

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B T dim] → y [B T dim]. ValueError for a mask of scores, which are never formed, and for another grid than the one given."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are of scores, which linear attention does not form; got one of them")
        if self.grid is None:
            return self.layer(x)[0]
        if x.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise ValueError(f"x must have {self.prefix} tokens and a grid of {self.grid} patches; got {x.shape[1]} tokens")
        return self.layer(x, curves=snakes([self.grid], prefix=self.prefix, device=x.device))[0]

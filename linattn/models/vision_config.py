"""The only place that knows what a vision transformer can be told, and the names of its sizes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..layers import VARIANTS
from ..layers.variants import Gating

VARIANTS_OF_IMAGES = (*VARIANTS, "softmax")
POOLS = ("mean", "patches", "token")
SIZES = {  # dim, layers and heads: of DeiT, arXiv:2012.12877, and one for small images on a CPU
    "micro": (64, 4, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
NATURAL = "_natural"  # LION's ♮
WITHOUT_POSITIONS = ("lion_d", "lion_s")  # the paper's have none: the decay knows where a token is


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes of a vision transformer. ValueError for sizes below 1, for names that are not known, and for a pool without its token."""

    MODEL_TYPE: ClassVar[str] = "linattn_vision_transformer"

    variant: str = "lion_s"  # a name in linattn.VARIANTS, or "softmax"
    img_size: int | tuple[int, int] = 224  # height and width that the positions are learnt at; others are taken too
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, pooled features
    dim: int = 192
    num_layers: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    curves: int = 1  # 2: the decay reads along the row snake and the column snake
    causal: bool = False  # True: a token sees those before it alone, for comparison
    gating: Gating = None  # None: the variant's
    expand_k: float | None = None  # None: the variant's
    expand_v: float | None = None
    class_token: bool = True
    registers: int = 0  # further tokens without a place, arXiv:2309.16588
    positions: bool = True  # learnt, per patch
    position_std: float = 0.02  # their start; 0.02 is lost in small models of few steps, where a patch's own part may be 20 times that
    pool: str = "mean"  # what the head reads: the mean of all tokens (as LION), of the patches alone, or the class token
    pad: bool = False  # images that are no multiple of the patch: filled up with zeros, not refused
    layer_scale: float | None = None  # its start; None: none
    drop_path: float = 0.0  # of the last block; those before rise to it
    norm_eps: float = 1e-6
    init_scale: float = 1.0  # the start of all linear maps, against std 0.02: a width of 64 learns faster from 4

    def __post_init__(self):
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        for name, known in (("variant", VARIANTS_OF_IMAGES), ("pool", POOLS), ("curves", (1, 2))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}; got {getattr(self, name)!r}")
        one = dict(patch_size=1, in_chans=1, num_classes=0, dim=1, num_layers=1, num_heads=1, registers=0)
        for name, least in one.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, at least {least}; got {value!r}")
        for side in self.size:
            if not isinstance(side, int) or side < 1 or (side % self.patch_size and not self.pad):
                wanted = f"a multiple of patch_size={self.patch_size}, or pad=True" if not self.pad else "at least 1"
                raise ValueError(f"img_size must be {wanted}; got {self.img_size!r}")
        if self.pool == "token" and self.causal:
            raise ValueError("pool='token' needs causal=False: the class token stands first and would see nothing")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool='token' needs class_token=True")
        for field in ("init_scale", "position_std"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0; got {getattr(self, field)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1); got {self.drop_path}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0; got {self.mlp_ratio}")

    @property
    def size(self) -> tuple[int, int]:
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.size
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers


def preset(name: str) -> dict[str, Any]:
    """The fields that `vit_{tiny,small,base}_{variant}` stands for; `…_natural` has two curves. ValueError says how names are made."""
    head, _, rest = name.partition("_")
    size, _, variant = rest.partition("_")
    curves = 2 if variant.endswith(NATURAL) else 1
    variant = variant.removesuffix(NATURAL)
    if head != "vit" or size not in SIZES or variant not in VARIANTS_OF_IMAGES:
        raise ValueError(
            f"name must be vit_SIZE_VARIANT with SIZE in {list(SIZES)} and VARIANT in {list(VARIANTS_OF_IMAGES)}, "
            f"with {NATURAL} behind it for two curves; got {name!r}"
        )
    dim, layers, heads = SIZES[size]
    scale, std = (4.0, 0.4) if size == "micro" else (1.0, 0.02)
    return dict(
        init_scale=scale,
        position_std=std,
        variant=variant,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        curves=curves,
        positions=variant not in WITHOUT_POSITIONS,
    )

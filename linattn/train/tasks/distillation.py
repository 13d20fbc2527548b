"""The only place that knows how an image classifier learns from another one: its softened answers, and its features, beside the labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import VisionTransformer
from ...swap.losses import four, hide, vit_linearizer
from .. import checkpoint
from ..config import Config
from ..data import derive
from .image import ImageOptions, ImageTask, classifier
from .task import Batch


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(ImageOptions):
    """Those of images, and the teacher's."""

    teacher: str = ""  # folder of a run or of a saved VisionTransformer or L2ViT
    temperature: float = 2.0
    weight: float = 0.7  # of the teacher's answers; the labels have the rest
    masked: float = 0.0  # above 0: ViT-Linearizer's two losses too, from a second look at the image with that share of its patches hidden

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher must be the folder of a run or of a saved image model; got none")
        if self.temperature <= 0 or not 0 <= self.weight <= 1:
            raise ValueError(f"temperature must be above 0 and weight lie in [0, 1]; got {self.temperature} and {self.weight}")
        if not 0 <= self.masked < 1:
            raise ValueError(f"masked is a share of the patches and must lie in [0, 1); got {self.masked}")


class DistillationTask(ImageTask):
    """(1 − weight) · cross-entropy + weight · T² · KL(teacher ‖ student), both softened by the temperature T: arXiv:1503.02531.

    With `masked` a batch shows the student each image twice, the second time with patches at 0, from which it is to tell the teacher's
    features of the whole image: activation matching and masked prediction of `linattn.swap.losses` are added, arXiv:2504.00037, whose
    authors hide 0.75 and learn a token for a hidden patch. Both models are then VisionTransformers of one width and one grid.
    """

    options_kind = DistillationOptions

    def __init__(self, config: Config, saved: Path | None):
        super().__init__(config, saved)
        folder = checkpoint.find(Path(self.options.teacher), say=lambda message: None)
        self.teacher = classifier(folder, backend=config.backend).eval().requires_grad_(False)
        if self.teacher.num_classes != self.data.classes:
            raise ValueError(f"teacher must know {self.data.classes} classes; got one of {self.teacher.num_classes}")
        if self.options.masked:
            self._check_features()

    def _check_features(self) -> None:
        (height, width), patch = self.sizes["img_size"], self.sizes["patch_size"]
        self.hidden = round(self.options.masked * self.tokens_per_row)
        if not 0 < self.hidden < self.tokens_per_row or height % patch or width % patch:
            raise ValueError(
                f"masked must hide some of the patches and not all of them, in images that patches of {patch} divide; got "
                f"{self.hidden} of {self.tokens_per_row} patches of {height} × {width} pixels"
            )
        if self.config.compile:
            raise ValueError("masked needs compile = False: features are read from between the blocks")

    def create(self) -> nn.Module:
        return self._beside_teacher(super().create())

    def load(self, folder: Path) -> nn.Module:
        return self._beside_teacher(super().load(folder))

    def _beside_teacher(self, student: nn.Module) -> nn.Module:
        of = lambda model: (model.patches.size, model.embed_dim) if isinstance(model, VisionTransformer) else type(model).__name__
        if self.options.masked and not (isinstance(student, VisionTransformer) and of(student) == of(self.teacher)):
            raise ValueError(
                "masked needs a teacher and a student that are VisionTransformers of one size of patches and one width; got "
                f"{of(self.teacher)} and {of(student)}"
            )
        return student

    def batch(self, step: int, rows: range) -> Batch:
        seen = super().batch(step, rows)
        if not self.options.masked:
            return seen
        draw = lambda row: torch.Generator().manual_seed(derive("hide", self.config.seed, step, row))
        places = [torch.randperm(self.tokens_per_row, generator=draw(row)) for row in rows]
        return seen | {"masked": torch.stack(places) < self.hidden}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        pixels, labels, T = batch["images"], batch["labels"], self.options.temperature
        self.teacher.to(pixels.device)
        added: Tensor | float = 0.0
        if self.options.masked:
            with torch.no_grad():
                features, told_after = self.teacher.forward_intermediates(pixels, output_fmt="NLC")
                answer = self.teacher.forward_head(features)
            with after_blocks(model) as seen_after:
                logits = model(torch.cat([pixels, hide(pixels, batch["masked"], self.sizes["patch_size"])]))[: len(pixels)].float()
            added = sum(vit_linearizer([y[len(pixels) :] for y in four(seen_after)], four(told_after), batch["masked"]))
        else:
            with torch.no_grad():
                answer = self.teacher(pixels)
            logits = model(pixels).float()
        told = F.log_softmax(answer.float() / T, -1)
        learnt = F.kl_div(F.log_softmax(logits / T, -1), told, reduction="none", log_target=True).sum(-1) * T**2
        known = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.options.smoothing)
        return (1 - self.options.weight) * known + self.options.weight * learnt + added  # to the mean it is added once


@contextmanager
def after_blocks(model: nn.Module) -> Iterator[list[Tensor]]:
    """The patch tokens [B L dim] after each block of the VisionTransformer in `model`, as its next call makes them."""
    student, found = next(module for module in model.modules() if isinstance(module, VisionTransformer)), []
    keep = lambda block, inputs, y: found.append(y[:, student.num_prefix_tokens :])
    hooks = [block.register_forward_hook(keep) for block in student.blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

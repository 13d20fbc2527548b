"""The only place that knows how an image classifier learns from another one: its softened answers beside the labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..config import Config
from .image import ImageOptions, ImageTask, classifier
from .task import Batch


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(ImageOptions):
    """Those of images, and the teacher's."""

    teacher: str = ""  # folder of a run or of a saved VisionTransformer or L2ViT
    temperature: float = 2.0
    weight: float = 0.7  # of the teacher's answers; the labels have the rest

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher must be the folder of a run or of a saved image model; got none")
        if self.temperature <= 0 or not 0 <= self.weight <= 1:
            raise ValueError(f"temperature must be above 0 and weight lie in [0, 1]; got {self.temperature} and {self.weight}")


class DistillationTask(ImageTask):
    """(1 − weight) · cross-entropy + weight · T² · KL(teacher ‖ student), both softened by the temperature T: arXiv:1503.02531."""

    options_kind = DistillationOptions

    def __init__(self, config: Config, saved: Path | None):
        super().__init__(config, saved)
        folder = checkpoint.find(Path(self.options.teacher), say=lambda message: None)
        self.teacher = classifier(folder, backend=config.backend).eval().requires_grad_(False)
        if self.teacher.num_classes != self.data.classes:
            raise ValueError(f"teacher must know {self.data.classes} classes; got one of {self.teacher.num_classes}")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        pixels, T = batch["images"], self.options.temperature
        self.teacher.to(pixels.device)
        with torch.no_grad():
            told = F.log_softmax(self.teacher(pixels).float() / T, -1)
        logits = model(pixels).float()
        learnt = F.kl_div(F.log_softmax(logits / T, -1), told, reduction="none", log_target=True).sum(-1) * T**2
        labels = F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=self.options.smoothing)
        return (1 - self.options.weight) * labels + self.options.weight * learnt

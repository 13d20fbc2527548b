"""The only place that knows how an image classifier is trained: cross-entropy, judged by the share of images it gets right."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...models import L2ViT, L2ViTConfig, VisionTransformer
from ...models.l2vit import L2VITS
from ...models.storage import model_type
from .. import images
from ..config import Config
from . import options
from .task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What the task can be told besides the config. ValueError for what is out of range."""

    dataset: str = "digits"  # a name in images.DATASETS; or `data`, an .npz file or a folder of a folder for each class
    size: int = 224  # of the images of a folder, which are scaled to it
    shift: int = 1  # pixels by which a training image may be moved, each way
    smoothing: float = 0.0  # of labels

    def __post_init__(self):
        if self.shift < 0 or not 0 <= self.smoothing < 1:
            raise ValueError(f"shift must be at least 0 and smoothing lie in [0, 1); got {self.shift} and {self.smoothing}")


def classifier(folder: Path, *, backend: str) -> Any:
    """The image model saved in `folder`, of either kind."""
    kind = L2ViT if model_type(folder) == L2ViTConfig.MODEL_TYPE else VisionTransformer
    return kind.from_pretrained(folder, backend=backend)  # which says what is wrong with a folder of neither


class ImageTask(Task):
    """Rows are images; the model is `vit_{preset}_{variant}`, or `preset` itself of L²ViT, with as many classes as there are labels."""

    metric = "accuracy"
    options_kind: type = ImageOptions

    def __init__(self, config: Config, saved: Path | None):
        super().__init__(config, saved)
        self.options: Any = options.read(self.options_kind, config.options, config.task)
        self.data = images.load(self.options.dataset, config.data, config.held_out, self.options.size)
        self.fingerprint, self.source = self.data.fingerprint, self.data.source
        height, width = self.data.train[0].shape[-2:]
        patch: Any = config.overrides.get("patch_size") or (16 if config.data else images.DATASETS[self.options.dataset][1])
        self.sizes: dict[str, Any] = dict(
            img_size=(height, width), patch_size=patch, in_chans=self.data.train[0].shape[1], num_classes=self.data.classes
        )
        self.tokens_per_row = -(-height // patch) * -(-width // patch)

    def create(self) -> nn.Module:
        sizes, preset = dict(self.sizes), self.config.preset
        if preset in L2VITS:  # of one patch, and of no size
            return L2ViT.create(
                preset, backend=self.config.backend, in_chans=sizes["in_chans"], num_classes=sizes["num_classes"], **self.config.overrides
            )
        return VisionTransformer.create(f"vit_{preset}_{self.config.variant}", backend=self.config.backend, **sizes | self.config.overrides)

    def load(self, folder: Path) -> nn.Module:
        return classifier(folder, backend=self.config.backend)

    def batch(self, step: int, rows: range) -> Batch:
        pixels, labels = images.batch(
            self.data.train, of=self.config.batch, rows=rows, seed=self.config.seed, step=step, shift=self.options.shift
        )
        return {"images": pixels, "labels": labels}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["images"]).float()
        return F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=self.options.smoothing)

    def evaluation(self) -> Iterator[Batch]:
        pixels, labels = self.data.held_out
        for start in range(0, len(labels), 256):
            rows = list(range(start, min(start + 256, len(labels))))
            yield {"images": images.scaled(pixels, rows), "labels": labels[rows]}

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Right answers, and images."""
        return (model(batch["images"]).argmax(-1) == batch["labels"]).sum(), len(batch["labels"])

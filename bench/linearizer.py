"""ViT-Linearizer on real images: linear students told by one softmax teacher, beside the same students told by labels alone.

python -m bench.linearizer        # 5000 MNIST digits, three seeds; writes bench/results/linearizer.json
"""

import json
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from linattn.models import VisionTransformer
from linattn.swap.losses import hide, vit_linearizer
from linattn.train import images, optimizer
from linattn.train.schedule import learning_rate

from .machine import facts, git, versions

TEACHER, STUDENT, DATASET, PATCH = "vit_micro_softmax", "vit_micro_linear", "mnist5k", 7
SIZES = dict(img_size=28, patch_size=PATCH, in_chans=1, num_classes=10, num_layers=2)
STEPS, TEACHING, BATCH, LR, WEIGHT, MASKED, SEEDS = 200, 1500, 32, 3e-3, 1.0, 0.5, (0, 1, 2)


def hidden(pixels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Which patches [B patches] of images [B 1 h w] are hidden: a share MASKED of each."""
    patches = (pixels.shape[-2] // PATCH) * (pixels.shape[-1] // PATCH)
    return torch.rand(len(pixels), patches, generator=draw).argsort(1) < patches * MASKED


def stages(model: VisionTransformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Patch tokens [B patches dim] after each block."""
    return model.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")


def fit(name: str, seed: int, data: images.Images, steps: int, teacher: VisionTransformer | None = None) -> VisionTransformer:
    """`steps` steps on cross-entropy; with a teacher each also sees the batch with patches hidden, and adds the paper's two losses."""
    torch.manual_seed(seed)
    model, draw = VisionTransformer.create(name, **SIZES), torch.Generator().manual_seed(seed)
    optimiser = optimizer.make(model, lr=LR, betas=(0.9, 0.999), weight_decay=0.05)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps=steps, lr=LR, min_lr=0.01, warmup=steps // 10, schedule="cosine", cooldown=0)
        pixels, labels = images.batch(data.train, of=BATCH, rows=range(BATCH), seed=seed, step=step, shift=1)
        loss = F.cross_entropy(model(pixels), labels)
        if teacher is not None:
            away = hidden(pixels, draw)
            with torch.no_grad():
                told = stages(teacher, pixels)
            loss = loss + WEIGHT * sum(vit_linearizer(stages(model, hide(pixels, away, PATCH)), told, away))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{name}, seed {seed}: the loss is {loss.item()}")
    return model.eval()


@torch.no_grad()
def accuracy(model: VisionTransformer, data: images.Images) -> float:
    pixels, labels = data.held_out
    answers = model(images.scaled(pixels, list(range(len(labels))))).argmax(-1)
    return (answers == labels).double().mean().item()


def main() -> None:
    """Print and record the share of the held-out digits that each is right about."""
    torch.set_num_threads(1)
    data = images.load(DATASET, (), 0.2)
    teacher = fit(TEACHER, 0, data, TEACHING)
    print("teacher", accuracy(teacher, data), flush=True)
    rows = []
    for seed in SEEDS:
        students = {"labels": fit(STUDENT, seed, data, STEPS), "distilled": fit(STUDENT, seed, data, STEPS, teacher)}
        rows.append({"seed": seed} | {name: accuracy(model, data) for name, model in students.items()})
        print(rows[-1], flush=True)
    mean = {name: statistics.mean(row[name] for row in rows) for name in students}
    print("mean", mean)
    how = dict(
        dataset=DATASET,
        teacher=TEACHER,
        student=STUDENT,
        steps=STEPS,
        teacher_steps=TEACHING,
        batch=BATCH,
        lr=LR,
        weight=WEIGHT,
        masked=MASKED,
    )
    record = {"command": "python -m bench.linearizer", "machine": facts() | versions() | git()}
    record |= {"settings": SIZES | how, "teacher": accuracy(teacher, data), "accuracy": rows, "mean": mean}
    Path(__file__).parent.joinpath("results", "linearizer.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""ViT-Linearizer on real images: a linear student told by a softmax teacher, beside the same student told by labels alone.

python -m bench.linearizer        # scikit-learn's 1797 digits, three seeds, two minutes; writes bench/results/linearizer.json
"""

import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from linattn.models import VisionTransformer
from linattn.swap.losses import vit_linearizer

from .machine import facts, git, versions

TEACHER, STUDENT = "vit_tiny_softmax", "vit_tiny_linear"
SIZES = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, dim=48, num_layers=4, num_heads=3)
STEPS, TEACHING, BATCH, LR, MASKED, SEEDS, TRAINED_ON = 300, 300, 64, 2e-3, 0.5, (0, 1, 2), 1297


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797 1 8 8] in [−1, 1] and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def hide(images: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with half of their 2×2 patches at 0, and which [B 16]."""
    away = torch.rand(len(images), 16, generator=draw).argsort(1) < 16 * MASKED
    pixels = away.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return images.masked_fill(pixels, 0.0), away


def stages(model: VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """Patch tokens [B 16 dim] after each block."""
    return [f.flatten(2).mT for f in model.forward_intermediates(images, intermediates_only=True)]


def fit(name: str, seed: int, images, labels, teacher=None, steps: int = STEPS) -> VisionTransformer:
    """`steps` steps of AdamW on cross-entropy; with a teacher each step also sees the batch half hidden and adds its two losses."""
    torch.manual_seed(seed)
    model, draw = VisionTransformer.create(name, **SIZES), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(len(labels), (BATCH,), generator=draw)
        loss = F.cross_entropy(model(images[at]), labels[at])
        if teacher is not None:
            hidden, away = hide(images[at], draw)
            with torch.no_grad():
                told = stages(teacher, images[at])
            loss = loss + sum(vit_linearizer(stages(model, hidden), told, away))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    """Print and record the share of the held-out 500 digits that each is right about."""
    torch.set_num_threads(1)
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:TRAINED_ON], order[TRAINED_ON:]
    rows = []
    for seed in SEEDS:
        teacher = fit(TEACHER, seed, images[train], labels[train], steps=TEACHING)
        models = {"teacher": teacher, "labels": fit(STUDENT, seed, images[train], labels[train])}
        models["distilled"] = fit(STUDENT, seed, images[train], labels[train], teacher)
        with torch.no_grad():
            right = {name: (model(images[held]).argmax(-1) == labels[held]).double().mean().item() for name, model in models.items()}
        rows.append({"seed": seed} | right)
        print(rows[-1], flush=True)
    mean = {name: statistics.mean(row[name] for row in rows) for name in ("teacher", "labels", "distilled")}
    print("mean", mean)
    how = dict(teacher=TEACHER, student=STUDENT, steps=STEPS, teacher_steps=TEACHING, batch=BATCH, lr=LR, masked=MASKED, train=TRAINED_ON)
    record = {"command": "python -m bench.linearizer", "machine": facts() | versions() | git()}
    record |= {"settings": SIZES | how, "accuracy": rows, "mean": mean}
    Path(__file__).parent.joinpath("results", "linearizer.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Recipes: functions that return a full Config. What a preset needs of rate, window and batch stands here and nowhere else."""

from dataclasses import replace

from .config import Config

OF_PRESET = {  # context, batch, steps, lr: rates fall with width as in GPT-3's table 2.1, arXiv:2005.14165, raised for short runs
    "tiny": (512, 4, 2000, 2e-3),  # at 3e-3 gla ends 5 % higher in 500 steps, softmax the same
    "small": (1024, 16, 5000, 1e-3),
    "base": (2048, 32, 20000, 6e-4),
    "350m": (2048, 128, 50000, 3e-4),
    "1b": (4096, 128, 100000, 2e-4),
}
DEMO_STEPS = 500


def pretrain(preset: str = "tiny", variant: str = "gla", *, steps: int | None = None) -> Config:
    """A decoder of `preset` from nothing, on byte-level text, in `steps` steps or the preset's. ValueError lists the presets."""
    if preset not in OF_PRESET:
        raise ValueError(f"preset must be one of {list(OF_PRESET)}; got {preset!r}")
    context, batch, usual, lr = OF_PRESET[preset]
    steps = usual if steps is None else steps
    tenth = max(1, steps // 10)
    return Config(
        preset=preset, variant=variant, context=context, batch=batch, steps=steps, lr=lr, warmup=min(tenth, 1000),
        eval_every=min(tenth, 500), save_every=min(tenth, 500),
    )  # fmt: skip


def masked(preset: str = "tiny", variant: str = "lion_s_mlm", *, steps: int | None = None) -> Config:
    """An encoder of `preset` from nothing, on byte-level text with masked bytes: the optimizer of LION, arXiv:2502.16249."""
    steps = 2000 if steps is None else steps
    tenth = max(1, steps // 10)
    return Config(
        task="masked", preset=preset, variant=variant, context=128, batch=16, steps=steps, lr=8e-4, min_lr=0.02, schedule="linear",
        warmup=max(1, steps * 6 // 100), betas=(0.9, 0.98), weight_decay=1e-5, eval_every=tenth, save_every=tenth,
    )  # fmt: skip


def image(preset: str = "micro", variant: str = "lion_s", *, steps: int | None = None) -> Config:
    """A `vit_{preset}_{variant}` from nothing, on small digits: DeiT's schedule and weight decay, arXiv:2012.12877, for small batches."""
    steps = 600 if steps is None else steps
    tenth = max(1, steps // 10)
    return Config(
        task="image", preset=preset, variant=variant, held_out=0.2, batch=64, steps=steps, lr=3e-3, min_lr=0.01, warmup=tenth,
        betas=(0.9, 0.999), weight_decay=0.05, eval_every=tenth, save_every=tenth,
    )  # fmt: skip


def distillation(preset: str = "micro", variant: str = "lion_s", *, steps: int | None = None) -> Config:
    """As `image`, from a teacher too: `--option teacher=FOLDER`."""
    return replace(image(preset, variant, steps=steps), task="distillation")


def transformers(preset: str = "tiny", variant: str = "gla", *, steps: int | None = None) -> Config:
    """A causal language model in a folder of transformers, on text: `--option model=FOLDER`, and `--option swap=VARIANT` to make it linear.

    preset and variant are not asked: the model is what its folder says.
    """
    return replace(pretrain(steps=1000 if steps is None else steps), task="transformers", lr=3e-4)


RECIPES = {
    "decoder": pretrain,
    "masked": masked,
    "image": image,
    "distillation": distillation,
    "transformers": transformers,
}  # (preset, variant, *, steps) -> Config, with defaults for both names


def make(recipe: str | None, preset: str | None, variant: str | None, *, steps: int | None) -> Config:
    """What `linattn train --recipe` starts from; None: the decoder's, and what a recipe itself prefers. ValueError lists the recipes."""
    if (recipe or "decoder") not in RECIPES:
        raise ValueError(f"recipe must be one of {list(RECIPES)}; got {recipe!r}")
    names = {name: value for name, value in (("preset", preset), ("variant", variant)) if value is not None}
    return RECIPES[recipe or "decoder"](**names, steps=steps)


def demo(variant: str, *, steps: int | None = None) -> Config:
    """About a minute on two cores: the same numbers for every variant, so that the curves can be compared."""
    return pretrain("tiny", variant, steps=steps or DEMO_STEPS)

"""The order of the stages that turn a softmax model into a linear one, in a folder that remembers which are done: `linattn swap`."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import linearise
from .find import swapped_of
from .storage import from_pretrained
from .swap import swap_attention, undo

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is made of a model. A stage of 0 steps is left out."""

    variant: str = "hedgehog"
    window: int = 0  # softmax over the last tokens, beside the linear attention
    softmax: int = 0  # layers that keep their softmax: those whose KL importance is largest after the transfer
    replace_sliding: bool = False
    transfer: int = 200  # steps of attention transfer
    distill: int = 400  # steps of distillation by the model as it was
    lora: int = 0  # steps of low-rank finetuning on the text itself
    chain: int = 0  # of these adapters: factors between their two, LinChain; 0: LoRA
    lr_transfer: float = 1e-2
    lr: float = 1e-3  # of distillation
    lr_lora: float = 1e-4
    hidden: float = 0.0  # weight of the hidden states in distillation

    def __post_init__(self):
        for name in ("window", "softmax", "transfer", "distill", "lora", "chain"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number, at least 0; got {value!r}")
        for name in ("lr_transfer", "lr", "lr_lora"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")

    @property
    def stages(self) -> list[str]:
        wanted = dict(softmax=True, swap=True, transfer=self.transfer, keep=self.softmax, distill=self.distill, lora=self.lora)
        return [stage for stage, steps in wanted.items() if steps]


def linearise_model(
    load: Callable[[], nn.Module],
    recipe: Recipe,
    batches: linearise.Batches,
    judge: Callable[[nn.Module], float],
    out: Path,
    *,
    source: str,
    say: Callable[[str], None],
    told: Callable[[str, int, int, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Swap and train the model that `load` returns, stage by stage, judged after each; what is done already in `out` is not done again.

    batches   of the step: input_ids and labels
    judge     model → a figure that is better the lower it is, such as bits per byte
    source    what the model and the text are: `out` must be of the same
    told      called with stage, step, steps and loss

    Leaves in `out` the finished model (for `linattn.from_pretrained`), and report.json: a row for each stage with its value, and the error
    of every layer before and after the transfer. ValueError if `out` holds another run, and before any work if the model cannot be swapped.
    """
    report, rows = {"recipe": asdict(recipe), "source": source}, []
    path = out / REPORT
    if path.exists():
        before = json.loads(path.read_text())
        rows = before.pop("rows")
        if differing := [name for name in report if before.get(name) != report[name]]:
            raise ValueError(f"{out} holds a run of another {' and '.join(differing)}: choose another folder, or ask for the same")
    done = [row["stage"] for row in rows]
    if done:
        say(f"done already in {out}: {', '.join(done)}")
    plain = lambda step: {name: value for name, value in batches(step).items() if name != "labels"} | dict(use_cache=False)
    full = lambda step: batches(step) | dict(use_cache=False)
    swap: dict[str, Any] = dict(
        variant=recipe.variant, window=recipe.window, replace_sliding=recipe.replace_sliding, causal=True, on_unsupported="keep"
    )
    if done[1:]:
        model = from_pretrained(out / f"after-{done[-1]}")
    else:
        model = load()
        if (layers := len(swap_attention(model, **swap, dry_run=True).swapped)) <= recipe.softmax:
            raise ValueError(f"softmax must be below {layers}, the number of layers that can be swapped; got {recipe.softmax}")
    for stage in recipe.stages:
        if stage in done:
            continue
        began, more = time.monotonic(), {}
        how: dict[str, Any] = dict(checkpoint=out / f"{stage}.pt")
        if told:
            how["told"] = lambda step, loss, stage=stage: told(stage, step, getattr(recipe, stage), loss)
        if stage == "swap":
            say(str(swap_attention(model, **swap)))
            more = dict(errors=linearise.errors(model, [plain(recipe.transfer)]))
        elif stage == "transfer" and not any(module.added() for module in swapped_of(model).values()):
            say(f"transfer is left out: {recipe.variant} adds no parameters that it could train")
        elif stage == "transfer":
            more = dict(errors=linearise.transfer(model, plain, steps=recipe.transfer, lr=recipe.lr_transfer, **how))
        elif stage == "keep":
            worth = linearise.importance(model, [plain(step) for step in range(2)])
            undo(model, list(worth)[: recipe.softmax])
            more = dict(importance=worth, softmax=list(worth)[: recipe.softmax])
        elif stage == "distill":
            linearise.distill(
                model, load(), plain, steps=recipe.distill, lr=recipe.lr, lr_added=recipe.lr_transfer / 3, hidden=recipe.hidden, **how
            )
        elif stage == "lora":
            low_rank = linearise.with_lora(model, chain=recipe.chain)
            linearise.finetune(low_rank, full, steps=recipe.lora, lr=recipe.lr_lora, **how)
            model = low_rank.merge_and_unload()
        rows.append(dict(stage=stage, value=judge(model), seconds=round(time.monotonic() - began, 1), **more))
        say(f"after {stage}: {rows[-1]['value']:.4f}")
        _keep(model, out, stage, report | dict(rows=rows))
    final = out / f"after-{recipe.stages[-1]}"
    if final.exists():
        for file in final.iterdir():
            shutil.copy(file, out / file.name)
    return rows


def _keep(model: Any, out: Path, stage: str, report: dict[str, Any]) -> None:
    """The model, then the report that counts the stage as done: a run cut off between the two does the stage again."""
    out.mkdir(parents=True, exist_ok=True)
    if stage != "softmax":
        model.save_pretrained(out / f"after-{stage}")
    beside = out / f".{REPORT}.partial"
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, out / REPORT)
    (out / f"{stage}.pt").unlink(missing_ok=True)
    for old in out.glob("after-*"):
        if old.name != f"after-{stage}":
            shutil.rmtree(old)

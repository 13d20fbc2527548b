"""Decoders of 350 M parameters in training on a GPU: linear attention beside softmax with flash attention, and fla's GLA of the same size.

A step is forward, loss, backward, clipping and AdamW, in bfloat16 by autocast over float32 weights, on random tokens. A side that cannot
run (no fla, out of memory) is a row that says why. Rehearsed on a CPU: the same at tiny sizes, which is no measurement.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from linattn.models import Decoder
from linattn.train import estimate, optimizer

from . import machine


@dataclass(frozen=True, kw_only=True)
class Stage:
    device: str
    preset: str
    vocab_size: int
    lengths: tuple[int, ...]  # T
    tokens: int  # of a step: B = tokens / T
    steps: int
    backend: str


GPU = Stage(device="cuda", preset="350m", vocab_size=32000, lengths=(4096, 32768), tokens=32768, steps=20, backend="triton")
REHEARSAL = Stage(device="cpu", preset="tiny", vocab_size=257, lengths=(64, 128), tokens=128, steps=2, backend="auto")
WARM = 3  # steps before the clock: compilation and the first allocations
PROMISES = (("fla gla", 1.3), ("softmax, flash attention", 2.0))  # what gla is to exceed, and by what, at the longest T


def run(out: Path | None, *, rehearse: bool, command: str, say: Callable[[str], None]) -> int:
    """Measure, print, and write pretrain-gpu.json to `out` (None: do not); 1 if a promise was not kept."""
    stage = REHEARSAL if rehearse else GPU
    rows = []
    for T in stage.lengths:
        for name, make in SIDES.items():
            try:
                row = {"side": name, "T": T, **measure(stage, *make(stage), T)}
                say(f"T = {T:>6}  {name}: {row['tokens_per_s']:,.0f} tokens/s" + (f", MFU {row['mfu']:.1%}" if row["mfu"] else ""))
            except (ImportError, RuntimeError, ValueError, torch.OutOfMemoryError) as error:
                row = {"side": name, "T": T, "skipped": f"{type(error).__name__}: {str(error)[:200]}"}
                say(f"T = {T:>6}  {name}: {row['skipped']}")
            rows.append(row)
            if stage.device == "cuda":
                torch.cuda.empty_cache()
    rate = {row["side"]: row.get("tokens_per_s") for row in rows if row["T"] == max(stage.lengths)}
    checks = [
        {"than": name, "wanted": times, "got": rate["gla"] / rate[name] if rate["gla"] and rate[name] else None} for name, times in PROMISES
    ]
    for check in checks:
        got = "not measured" if check["got"] is None else f"{check['got']:.2f}"
        say(f"gla / {check['than']} at T = {max(stage.lengths)}: {got} ({check['wanted']} wanted)")
    if out is not None:
        gpu = {"name": torch.cuda.get_device_name(), "peak_flops": estimate.peak(torch.device("cuda"))}
        record = {
            "command": command,
            **machine.git(),
            "machine": machine.facts(),
            "gpu": gpu,
            "versions": machine.versions(),
            "rows": rows,
            "checks": checks,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "pretrain-gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if rehearse or all(check["got"] and check["got"] >= check["wanted"] for check in checks) else 1


def measure(stage: Stage, model: nn.Module, loss_of: Callable[[Tensor], Tensor], flops: Callable[[int], float], T: int) -> dict[str, Any]:
    """tokens/s over `steps` steps; MFU = FLOPs the model needs a token · tokens/s / peak, as `linattn.train` says it."""
    device = torch.device(stage.device)
    made = optimizer.make(model, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    batches = [torch.randint(stage.vocab_size, (stage.tokens // T, T + 1), device=device) for _ in range(4)]

    def step(tokens: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        made.zero_grad(set_to_none=True)

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for tokens in batches[:WARM]:
        step(tokens)
    began = finish()
    for i in range(stage.steps):
        step(batches[i % len(batches)])
    rate, best = stage.steps * stage.tokens / (finish() - began), estimate.peak(device)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    parameters = sum(p.numel() for p in model.parameters())
    return {"tokens_per_s": rate, "mfu": best and flops(T) * rate / best, "parameters": parameters, "peak_bytes": memory}


def _decoder(stage: Stage, variant: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder.create(stage.preset, variant=variant, vocab_size=stage.vocab_size, backend=stage.backend).to(stage.device)


def ours(stage: Stage, variant: str):
    model = _decoder(stage, variant)
    flash = variant == "softmax" and stage.device == "cuda"

    def loss_of(tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
            logits, _ = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss_of, model.flops_per_token


def fla(stage: Stage):
    """fla's own model with its own fused loss, of our decoder's width, depth, heads and key width."""
    if stage.device != "cuda":
        raise ValueError("fla's kernels need a GPU")
    from fla.models import GLAConfig, GLAForCausalLM

    like = _decoder(stage, "gla")
    sizes = like.config
    model = GLAForCausalLM(
        GLAConfig(
            hidden_size=sizes.dim, num_hidden_layers=sizes.num_layers, num_heads=sizes.num_heads, vocab_size=sizes.vocab_size, expand_k=0.5,
            expand_v=1, intermediate_size=sizes.hidden, tie_word_embeddings=True, use_cache=False,
        )
    ).to(stage.device)  # fmt: skip
    matrices = lambda model: 6.0 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    states, weights = like.flops_per_token(1) - matrices(like), matrices(model)
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss, lambda T: weights + states


SIDES: dict[str, Callable[[Stage], tuple]] = {
    "gla": lambda stage: ours(stage, "gla"),
    "mamba2": lambda stage: ours(stage, "mamba2"),
    "gated_delta": lambda stage: ours(stage, "gated_delta"),
    "softmax, flash attention": lambda stage: ours(stage, "softmax"),
    "fla gla": fla,
}

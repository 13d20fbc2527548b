"""The only place that measures decoders against the number of tokens: each point in a process of its own, so that its memory is its own."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..models import Decoder, decode, next_token_loss, prefill
from . import memory
from .engine import pick_device

VOCABULARY = 257
DECODED = 64  # tokens per figure of generation
COLUMNS = {  # field of a row: title, factor, format
    "train_tokens_per_s": ("forward + backward\ntokens/s", 1, ",.0f"),
    "train_peak_bytes": ("peak memory\nMB", 1e-6, ",.1f"),
    "prefill_tokens_per_s": ("prefill\ntokens/s", 1, ",.0f"),
    "decode_tokens_per_s": ("generation\ntokens/s", 1, ",.0f"),
    "state_bytes": ("state or cache\nMB", 1e-6, ",.3f"),
}


def table(
    preset: str, variants: list[str], lengths: list[int], *, seconds: float, threads: int, device: str, backend: str, console: Console
) -> list[dict]:
    """Measure every variant at every number of tokens, B = 1, variants taking turns; print the table; return the rows of `measure`."""
    for variant in variants:  # a wrong name is said here, before anything runs
        with torch.device("meta"):
            Decoder.create(preset, variant=variant, vocab_size=VOCABULARY)
    rows = []
    with console.status("") as status:
        for T in sorted(lengths):
            for variant in variants:
                status.update(f"measuring {variant} at {T:,} tokens")
                point = dict(preset=preset, variant=variant, T=T, seconds=seconds, threads=threads, device=device, backend=backend)
                rows.append(_in_its_own_process(point))
    console.print(_render(preset, rows))
    return rows


def measure(*, preset: str, variant: str, T: int, seconds: float, threads: int, device: str, backend: str) -> dict:
    """One point: medians of repeated runs, about `seconds` for each figure after one run to warm up, which alone counts if it took longer.

    train     tokens/s of loss and gradients on one window of T tokens; train_peak_bytes is what that needs beyond the model
    prefill   tokens/s of T tokens, by chunks
    decode    tokens/s of one token at a time after T of them; state_bytes is what they left to keep
    """
    if threads:
        torch.set_num_threads(threads)
    place = pick_device(device)
    torch.manual_seed(0)
    model = Decoder.create(preset, variant=variant, vocab_size=VOCABULARY, backend=backend).to(place)
    tokens = torch.randint(VOCABULARY, (1, T), device=place)

    def train(tokens: Tensor = tokens) -> None:
        loss = next_token_loss(model(tokens)[0], tokens)
        loss.backward()
        model.zero_grad(set_to_none=True)

    def read() -> tuple:
        return prefill(model, tokens)[1]

    train(tokens[:, :16])  # what libraries keep from their first call on is not the model's
    with memory.Peak(place) as peak:
        train()
        _finish(place)
    train_s = _median_time(train, seconds, place)
    state = read()
    read_s = _median_time(read, seconds, place)
    kept, token, step_times = memory.held(state), tokens[:, -1], []
    for _ in range(DECODED):
        began = time.perf_counter()
        _, state = decode(model, token, state)
        _finish(place)
        step_times.append(time.perf_counter() - began)
    return {
        "preset": preset, "variant": variant, "T": T, "parameters": sum(p.numel() for p in model.parameters()), "device": str(place),
        "threads": torch.get_num_threads(), "train_tokens_per_s": T / train_s, "train_peak_bytes": peak.bytes, "memory_method": peak.method,
        "prefill_tokens_per_s": T / read_s, "decode_tokens_per_s": 1 / statistics.median(step_times), "state_bytes": kept,
    }  # fmt: skip


def save(path: Path, rows: list[dict], **facts) -> None:
    """A JSON record of `rows` and the facts they were measured under."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def _in_its_own_process(point: dict) -> dict:
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(point)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{point['variant']} at T = {point['T']} failed: {last}")
    return json.loads(done.stdout)


def _median_time(call, seconds: float, device: torch.device) -> float:
    times: list[float] = []
    while not times or sum(times) < seconds:
        began = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _render(preset: str, rows: list[dict]) -> Table:
    shown = Table(title=f"{preset} decoder, B = 1, {rows[0]['device']}, {rows[0]['threads']} threads; memory: {rows[0]['memory_method']}")
    for name in ("tokens T", "variant", *(title for title, _, _ in COLUMNS.values())):
        shown.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        shown.add_row(f"{row['T']:,}", row["variant"], *(format(row[name] * factor, spec) for name, (_, factor, spec) in COLUMNS.items()))
    return shown


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

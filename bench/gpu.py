"""The operator on a GPU: every row correct first, then timed beside fla, softmax attention, its flipped twin and a copy of its bytes.

`python -m bench.gpu` needs torch, Triton and linattn alone. Inputs rotate, the second-level cache is flushed before every call, times
are medians of CUDA events, and what fails its check is not timed. What cannot run (no fla, a shape a peer refuses) is a row that says why.
`--rehearse` goes through all of it on a CPU, at tiny sizes in Triton's interpreter: what it writes are no measurements.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

import linattn

from . import machine
from .gpu_peers import CALLS, FORMS, GPU, REHEARSAL, Stage, copy_of, floor_bytes, inputs, ours, peers, run_of
from .gpu_report import checks, markdown
from .records import RESULTS, Record, Row, spread

CORRECT = 1e-2  # relative error of outputs and gradients in bfloat16
METHOD = (
    "correctness before speed, on the row's own shape: outputs and gradients against eager in float32, same bits twice; red is not timed",
    "median of CUDA events, inputs rotate, 256 MiB written before every call",
    "copy: a device copy that reads and writes as many bytes as the call has to",
)


class Watch:
    """A CUDA event's part in a rehearsal."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Watch") -> float:
        return 1e3 * (end.at - self.at)


def measure(stage: Stage, calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds per call."""
    flush = torch.empty(stage.flush, dtype=torch.int8, device=stage.device)
    for call in calls:
        call()
    stage.wait()
    begin = time.perf_counter()
    calls[0]()
    stage.wait()
    cost = time.perf_counter() - begin
    events = []
    for i in range(min(200, max(5 if stage.seconds else 1, int(stage.seconds / max(cost, 1e-4))))):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) if stage.device == "cuda" else Watch() for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        end.record()
        events.append((start, end))
    stage.wait()
    return [start.elapsed_time(end) for start, end in events]


def correct(stage: Stage, name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a form at a shape, or None."""
    form = FORMS[name]
    *tensors, do = inputs(stage, form, *shape)
    results = []
    for backend, cast in (("triton", lambda x: x), ("triton", lambda x: x), ("eager", lambda x: x.float())):
        xs = [x if x is None else cast(x).detach().requires_grad_() for x in tensors]
        o = ours(form, backend)(*xs)
        results.append([o.detach(), *torch.autograd.grad(o, [x for x in xs if x is not None], do.to(o.dtype))])
        del o, xs
    mine, again, gold = results
    if any(not torch.equal(a, b) for a, b in zip(mine, again, strict=True)):
        return "two runs differ in their bits"
    given = [part for part, x in zip(("dq", "dk", "dv", "dlog_decay", "dbeta"), tensors, strict=True) if x is not None]
    for part, a, b in zip(("o", *given), mine, gold, strict=True):
        # a head's gate is one sum of terms that cancel: its error is judged by the size of the terms
        size = b.float().norm() if b.ndim > 1 else gold[0].float().norm()
        error = ((a.float() - b.float()).norm() / size).item()
        if not error < CORRECT:
            return f"relative error {error:.2g} in {part}"
    return None


def facts_of(stage: Stage, name: str, shape: tuple, call: str) -> dict:
    B, T, H, D = shape
    dtype = str(stage.dtype).removeprefix("torch.")
    return {"form": name, "call": call, "B": B, "T": T, "H": H, "K": D, "V": D, "dtype": dtype, "threads": 0}


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:160]}"


def time_case(stage: Stage, name: str, shape: tuple, call: str, red: str | None) -> list[Row]:
    form, facts = FORMS[name], facts_of(stage, name, shape, call)
    sets = [inputs(stage, form, *shape, seed=i) for i in range(2)]
    rows = []
    for peer, make in peers(name, shape).items():
        if peer == "triton" and red:
            rows.append(Row(peer=peer, **facts, skipped=red))
            continue
        try:
            rows.append(Row(peer=peer, **facts, **spread(measure(stage, run_of(make(), call, sets)))))
        except Exception as error:  # a peer's refusal, of whatever kind, is the row
            rows.append(Row(peer=peer, **facts, skipped=in_words(error)))
        torch.cuda.empty_cache()
    rows.append(Row(peer="copy", **facts, **spread(measure(stage, copy_of(stage, floor_bytes(form, call, *shape))))))
    return rows


FIRST = """
import sys, time, torch, linattn
if sys.argv[1] == "cpu":
    from bench.interpreter import widen_bfloat16
    widen_bfloat16()
device, T, H, D, dtype = sys.argv[1], *map(int, sys.argv[2:5]), getattr(torch, sys.argv[5])
q, k, v = torch.randn(3, 1, T, H, D, device=device, dtype=dtype).requires_grad_().unbind()
g = torch.nn.functional.logsigmoid(torch.randn(1, T, H, device=device))
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
wait(); begin = time.perf_counter()
linattn.linear_attention(q, k, v, g, backend="triton", check_values=False)[0].sum().backward()
wait(); print(time.perf_counter() - begin)
"""


def first_calls(stage: Stage, told: Callable[[str], None]) -> dict[str, float]:
    """Seconds of a process's first forward and backward: with an empty cache of kernels, and with a full one."""
    _, T, H, D = stage.long[0]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(machine.ROOT)}
        words = [stage.device, min(T, 4096), H, D, str(stage.dtype).removeprefix("torch.")]
        command = [sys.executable, "-c", FIRST, *map(str, words)]
        once = lambda: float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        try:
            return {"cold": once(), "warm": once()}
        except subprocess.CalledProcessError as error:  # what else was measured is not lost for it
            told(f"first call: {error.stderr[-500:]}")
            return {}


def card_of(stage: Stage) -> dict:
    if stage.device == "cpu":
        return {"gpu": "none: a rehearsal in Triton's interpreter"}
    card = torch.cuda.get_device_properties()
    return {"gpu": card.name, "multiprocessors": card.multi_processor_count, "memory_gib": round(card.total_memory / 2**30, 1)}


def run(stage: Stage, minutes: float = 10.0, only: tuple[str, ...] = (), told: Callable[[str], None] = print) -> Record:
    """Everything within `minutes`, the promised cases first; what time does not allow is a row that says so."""
    import triton

    begin, rows, red = time.perf_counter(), [], {}
    names = [name for name in FORMS if not only or name in only]
    both = [name for name in names if not FORMS[name].causal]
    plan = [(name, shape) for shape in stage.long for name in names]
    plan += [(name, shape) for shape in stage.vision + stage.crossing for name in both]
    plan += [(name, shape) for shape in stage.longer for name in names]
    for name, shape in plan:
        if time.perf_counter() - begin > 60 * minutes:
            rows += [Row(peer="triton", **facts_of(stage, name, shape, call), skipped="out of time") for call in CALLS]
            continue
        try:
            red[name, shape] = correct(stage, name, shape)
        except Exception as error:  # a kernel that does not compile or launch is red
            red[name, shape] = in_words(error)
        told(f"{name} {shape}: {red[name, shape] or 'correct'}")
        for call in CALLS:
            new = time_case(stage, name, shape, call, red[name, shape])
            rows += new
            told(f"{name} {shape} {call}: " + ", ".join(f"{r.peer} {r.p50:.3f} ms" if r.p50 else f"{r.peer} –" for r in new))
    first = first_calls(stage, told)
    told(f"first call: {first}")
    return Record(
        kind="gpu" if stage is GPU else "rehearsal", date=datetime.now(timezone.utc).isoformat(timespec="seconds"), git=machine.git(),
        command=shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]), machine=card_of(stage),
        versions={"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "linattn": linattn.__version__},
        options={"minutes": minutes, "only": list(only), "correct": {f"{n} {shape}": text for (n, shape), text in red.items()}},
        method=METHOD, rows=tuple(rows), checks=tuple(checks(rows, first, stage)), seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="stop timing new cases after this long")
    parser.add_argument("--only", action="append", default=[], choices=list(FORMS), help="only this form; repeat for more")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, in Triton's interpreter: no measurement")
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    if arguments.rehearse:
        if arguments.out == RESULTS:
            parser.error("--rehearse measures nothing, and its record does not belong among the results: give --out")
        if os.environ.get("TRITON_INTERPRET") != "1":  # it has to be on before Triton is imported
            again = [sys.executable, "-m", "bench.gpu", *words]
            return subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    elif not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on a GPU; --rehearse goes through it on a CPU")
    if arguments.rehearse:
        from .interpreter import widen_bfloat16

        widen_bfloat16()
    stage = REHEARSAL if arguments.rehearse else GPU
    record = run(stage, arguments.minutes, tuple(arguments.only), lambda line: print(line, flush=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = record.write(arguments.out)
    path.with_suffix(".md").write_text(markdown(record))
    print(f"written: {path} and .md")
    failed = stage is GPU and any(check.verdict == "fail" for check in record.checks)
    return int(failed or any(record.options["correct"].values()))


if __name__ == "__main__":
    sys.exit(main())

"""The operator on a GPU: every row correct first, then timed beside fla, softmax attention, its flipped twin and a copy of its bytes.

`python -m bench.gpu` needs torch, Triton and linattn alone, and fits one call on a bare machine: kernels are compiled in parallel first,
the promised rows come first, every question goes to a process of its own with a limit on its time, and the record is on disk after every
case. What cannot run (no fla, a shape a peer refuses), what crashed, and what time did not allow is a row that says why.
`--rehearse` goes through all of it on a CPU, at tiny sizes in Triton's interpreter: what it writes are no measurements.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import torch

import linattn

from . import machine
from .gpu_peers import CALLS, FORMS, GPU, REHEARSAL, Stage, peers
from .gpu_report import checks, markdown
from .gpu_worker import Question, Worker
from .records import RESULTS, Record, Row

LONGEST = 75.0  # seconds that one question may take: fla tunes hundreds of configurations in its first call
METHOD = (
    "correctness before speed, on the row's own shape: outputs and gradients against eager in float32, same bits twice; red is not timed",
    "median of CUDA events, inputs rotate, 256 MiB written before every call",
    "copy: a device copy that reads and writes as many bytes as the call has to",
)


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
        paths = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": paths}
        words = [stage.device, min(T, 4096), H, D, str(stage.dtype).removeprefix("torch.")]
        command = [sys.executable, "-c", FIRST, *map(str, words)]
        once = lambda: float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=LONGEST).stdout)
        try:
            return {"cold": once(), "warm": once()}
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:  # what else is measured is not lost for it
            told(f"first call: {(error.stderr or str(error))[-500:]}")
            return {}


def card_of(stage: Stage) -> dict:
    if stage.device == "cpu":
        return {"gpu": "none: a rehearsal in Triton's interpreter"}
    card = torch.cuda.get_device_properties()
    return {"gpu": card.name, "multiprocessors": card.multi_processor_count, "memory_gib": round(card.total_memory / 2**30, 1)}


def facts_of(stage: Stage, name: str, shape: tuple, call: str) -> dict:
    B, T, H, D = shape
    dtype = str(stage.dtype).removeprefix("torch.")
    return {"form": name, "call": call, "B": B, "T": T, "H": H, "K": D, "V": D, "dtype": dtype, "threads": 0}


def plan_of(stage: Stage, only: tuple[str, ...]) -> list[tuple[str, tuple]]:
    """Forms and shapes, the promised ones first."""
    names = [name for name in FORMS if not only or name in only]
    promised = [name for name in ("scalar", "bidirectional scalar", "bidirectional none") if name in names]
    both = [name for name in names if not FORMS[name].causal]
    plan = [(name, shape) for name in promised for shape in stage.long]
    plan += [(name, shape) for shape in stage.crossing + stage.vision[:1] for name in both]
    plan += [(name, shape) for shape in stage.long for name in names]
    plan += [(name, shape) for shape in stage.vision for name in both]
    plan += [(name, shape) for shape in stage.longer for name in names]
    return list(dict.fromkeys(plan))


def compile_all(stage: Stage, plan: list[tuple[str, tuple]], workers: int, seconds: float, told: Callable[[str], None]) -> None:
    """Every form at every width, ours and fla's, forward and backward once, in parallel: fills the caches of kernels that all share."""
    until = time.perf_counter() + seconds
    shapes = {(name, shape[3], shape in stage.vision): shape for name, shape in reversed(plan)}  # the first shape of each kind
    questions = [Question(name, shape, peer, "compile") for (name, _, _), shape in shapes.items() for peer in ("triton", "fla")]

    def some(mine: Iterable[Question]) -> list[str]:
        worker, found = Worker(stage is REHEARSAL), []
        for question in mine:
            left = until - time.perf_counter()
            reason, failed = worker.ask(question, left) if left > 0 else ("out of time", True)
            found += [f"{question.peer} {question.name} {question.shape}: {reason}"] if failed else []
        worker.stop()
        return found

    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(some, (questions[i::workers] for i in range(workers))):
            for line in found:
                told(f"compile {line}")


def run(
    stage: Stage, minutes: float = 9.0, only: tuple[str, ...] = (), told: Callable[[str], None] = print,
    kept: Callable[[Record], object] = lambda record: None,
) -> Record:  # fmt: skip
    """Everything within `minutes`, the promised cases first; what time does not allow is a row that says so. `kept` gets it as it grows."""
    import triton

    begin, rows, red, first = time.perf_counter(), [], {}, {}
    date, git = datetime.now(timezone.utc).isoformat(timespec="seconds"), machine.git()
    left = lambda: 60 * minutes - (time.perf_counter() - begin)
    plan = plan_of(stage, only)

    def record() -> Record:
        return Record(
            kind="gpu" if stage is GPU else "rehearsal", date=date, git=git,
            command=shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]), machine=card_of(stage),
            versions={"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "linattn": linattn.__version__},
            options={"minutes": minutes, "only": list(only), "correct": {f"{n} {shape}": text for (n, shape), text in red.items()}},
            method=METHOD, rows=tuple(rows), checks=tuple(checks(rows, first, stage)), seconds=round(time.perf_counter() - begin, 1),
        )  # fmt: skip

    kept(record())
    compile_all(stage, plan, 1 if stage is REHEARSAL else max(1, (os.cpu_count() or 2) // 2), left() / 3, told)
    told(f"compiled: {left():.0f} s left")
    first |= first_calls(stage, told)
    told(f"first call: {first}")
    worker = Worker(stage is REHEARSAL)
    try:
        for name, shape in plan:
            ask = lambda peer="triton", call="", name=name, shape=shape: worker.ask(
                Question(name, shape, peer, call), max(1.0, min(LONGEST, left()))
            )
            if left() > 0:
                red[name, shape], _ = ask()
                told(f"{name} {shape}: {red[name, shape] or 'correct'}")
            for call in CALLS:
                facts, new = facts_of(stage, name, shape, call), []
                for peer in (*peers(name, shape), "copy"):
                    found, failed = ("out of time", True) if left() <= 0 else (None, False)
                    if not failed and peer == "triton" and red[name, shape]:
                        found, failed = red[name, shape], True
                    elif not failed:
                        found, failed = ask(peer, call)
                    new.append(Row(peer=peer, **facts, skipped=found) if failed else Row(peer=peer, **facts, **found))
                rows += new
                if left() > 0:
                    times = ", ".join(f"{r.peer} {r.p50:.3f} ms" if r.p50 is not None else f"{r.peer} – ({r.skipped[:60]})" for r in new)
                    told(f"{name} {shape} {call}: {times}")
            kept(record())
    finally:
        worker.stop()
    return record()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it ends after this long")
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
    stage = REHEARSAL if arguments.rehearse else GPU
    arguments.out.mkdir(parents=True, exist_ok=True)

    def keep(record: Record) -> Path:
        path = record.write(arguments.out)
        path.with_suffix(".md").write_text(markdown(record))
        return path

    record = run(stage, arguments.minutes, tuple(arguments.only), lambda line: print(line, flush=True), keep)
    print(f"written: {keep(record)} and .md")
    failed = stage is GPU and any(check.verdict == "fail" for check in record.checks)
    return int(failed or any(record.options["correct"].values()))


if __name__ == "__main__":
    sys.exit(main())

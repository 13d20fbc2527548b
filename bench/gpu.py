"""The operator on a GPU: every form correct first, then timed beside fla, softmax attention, its flipped twin and a copy of its bytes.

`python -m bench.gpu` needs torch, Triton and linattn alone. Inputs rotate, the second-level cache is flushed before every call, times
are medians of CUDA events, and what fails its check is not timed. What cannot run (no fla, a shape a peer refuses) is a row that says why.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import linattn

from . import machine
from .records import RESULTS, Cell, Check, Record, Row, spread

FLUSH = 256 << 20  # bytes written between calls: several second-level caches
SECONDS = 0.4  # per side
CORRECT = 1e-2  # relative error of outputs and gradients in bfloat16
METHOD = (
    "correctness before speed: outputs and gradients against eager in float32, the same bits twice; a red form is not timed",
    "median of CUDA events, inputs rotate, 256 MiB written before every call",
    "copy: a device copy that reads and writes as many bytes as the call has to",
)


@dataclass(frozen=True, kw_only=True)
class Form:
    decay: str
    delta: bool = False
    causal: bool = True
    normalize: bool = False

    @property
    def options(self) -> dict:
        gating = "target" if not self.causal and self.decay in ("scalar", "channel") else None
        return {"causal": self.causal, "gating": gating, "normalize": self.normalize, "check_values": False}


FORMS = {
    "scalar": Form(decay="scalar"),
    "none": Form(decay="none"),
    "head": Form(decay="head"),
    "channel": Form(decay="channel"),
    "delta": Form(decay="scalar", delta=True),
    "bidirectional none": Form(decay="none", causal=False, normalize=True),
    "bidirectional scalar": Form(decay="scalar", causal=False),
}
LONG = [(1, 32768, 16, D) for D in (64, 128)] + [(4, 32768, 16, D) for D in (64, 128)] + [(1, 131072, 16, D) for D in (64, 128)]
VISION = [(65536 // T, T, 16, 64) for T in (197, 1024, 4096)]
CROSSING = [(32768 // T, T, 16, D) for T, D in ((768, 64), (1024, 128))]
CALLS = ("forward", "forward+backward")


def inputs(form: Form, B: int, T: int, H: int, D: int, dtype=torch.bfloat16, seed: int = 0) -> list[Tensor | None]:
    """q, k, v, log_decay, beta, do."""
    draw = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, device="cuda")
    q, k = (F.normalize(normal(B, T, H, D), dim=-1) for _ in range(2))
    if form.normalize:
        q, k = q.abs(), k.abs()
    decays = {
        "none": lambda: None,
        "head": lambda: torch.log1p(-(2.0 ** (-5 - torch.arange(H, device="cuda", dtype=torch.float32)))),
        "scalar": lambda: F.logsigmoid(normal(B, T, H)) / 16,
        "channel": lambda: F.logsigmoid(normal(B, T, H, D)) / 16,
    }
    beta = torch.sigmoid(normal(B, T, H)) if form.delta else None
    return [q.to(dtype), k.to(dtype), normal(B, T, H, D).to(dtype), decays[form.decay](), beta, normal(B, T, H, D).to(dtype)]


def ours(form: Form, backend: str = "triton") -> Callable[..., Tensor]:
    return lambda q, k, v, g, b: linattn.linear_attention(q, k, v, g, b, **form.options, backend=backend)[0]


def flipped(causal: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Both sides by a causal kernel on the sequence and on its flip."""

    def both(q, k, v, g, b):
        turned = [None if x is None else x.flip(1) if x.ndim > 1 else x for x in (q, k, v, g, b)]
        return causal(q, k, v, g, b) + causal(*turned).flip(1)

    return both


def fla(form: Form) -> Callable[..., Tensor]:
    """fla's kernel for the form; bidirectional forms by its causal kernel, flipped. Raises what fla raises."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if form.delta:
        return lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b)[0]
    if form.decay == "channel":
        return lambda q, k, v, g, b: chunk_gla(q, k, v, g)[0]
    if form.decay == "head":
        simple = lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g_gamma=g)[0]
    else:
        simple = lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g)[0]
    return simple if form.causal else flipped(simple)


def softmax(backend: str, causal: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q, k, v, g, b):
        with sdpa_kernel(SDPBackend[backend]):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)

    return run


def floor_bytes(form: Form, call: str, B: int, T: int, H: int, D: int) -> int:
    """Every input read once, every output written once: forward 4 rows, backward 7 more, and the gates."""
    gate = {"none": 0, "head": 0, "scalar": 4, "channel": 4 * D}[form.decay] + 4 * form.delta
    rows = 2 * D
    return B * T * H * ((4 * rows + gate) + (call != "forward") * (7 * rows + 2 * gate))


def run_of(f: Callable[..., Tensor], call: str, sets: list[list]) -> list[Callable[[], object]]:
    """The call on each set of inputs."""

    def one(tensors, do):
        if call == "forward":
            return lambda: f(*tensors)
        leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
        wanted = [x for x in leaves if x is not None]
        return lambda: torch.autograd.grad(f(*leaves), wanted, do, allow_unused=True)

    return [one(tensors, do) for *tensors, do in sets]


def measure(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds per call."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    cost = time.perf_counter() - begin
    events = []
    for i in range(min(200, max(5, int(SECONDS / max(cost, 1e-4))))):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[i % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def copy_of(size: int) -> list[Callable[[], object]]:
    """Reads and writes of `size` bytes in all."""
    source, into = torch.empty(2, size // 2, dtype=torch.int8, device="cuda").unbind()
    return [lambda: into.copy_(source)]


def correct(name: str, D: int) -> str | None:
    """What is wrong with a form at width D, or None."""
    form = FORMS[name]
    *tensors, do = inputs(form, 2, 1000, 4, D)
    leaves = lambda cast: [x if x is None else cast(x).detach().requires_grad_() for x in tensors]
    results = []
    for backend, cast in (("triton", lambda x: x), ("triton", lambda x: x), ("eager", lambda x: x.float())):
        xs = leaves(cast)
        o = ours(form, backend)(*xs)
        grads = torch.autograd.grad(o, [x for x in xs if x is not None], do.to(o.dtype))
        results.append([o.detach(), *grads])
    mine, again, gold = results
    if any(not torch.equal(a, b) for a, b in zip(mine, again, strict=True)):
        return "two runs differ in their bits"
    for i, (a, b) in enumerate(zip(mine, gold, strict=True)):
        # a head's gate is one sum of terms that cancel: its error is judged by the size of the terms
        size = b.float().norm() if b.ndim > 1 else gold[0].float().norm()
        error = ((a.float() - b.float()).norm() / size).item()
        if not error < CORRECT:
            return f"relative error {error:.2g} in {('o', 'dq', 'dk', 'dv', 'dlog_decay', 'dbeta')[i]}"
    return None


def peers(name: str, shape: tuple) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    form, T = FORMS[name], shape[1]
    found = {"triton": lambda: ours(form), "fla": lambda: fla(form)}
    if not form.causal:
        found["flipped twice"] = lambda: flipped(ours(Form(decay=form.decay)))
    if T <= 32768 and name in ("scalar", "bidirectional none"):
        found |= {backend: lambda backend=backend: softmax(backend, form.causal) for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION")}
    return found


def time_case(name: str, shape: tuple, call: str, red: str | None) -> list[Row]:
    form, (B, T, H, D) = FORMS[name], shape
    facts = {"form": name, "call": call, "B": B, "T": T, "H": H, "K": D, "V": D, "dtype": "bfloat16", "threads": 0}
    sets = [inputs(form, *shape, seed=i) for i in range(2)]
    rows = []
    for peer, make in peers(name, shape).items():
        if peer == "triton" and red:
            rows.append(Row(peer=peer, **facts, skipped=red))
            continue
        try:
            rows.append(Row(peer=peer, **facts, **spread(measure(run_of(make(), call, sets)))))
        except Exception as error:  # a peer's refusal, of whatever kind, is the row
            rows.append(Row(peer=peer, **facts, skipped=f"{type(error).__name__}: {str(error)[:160]}"))
        torch.cuda.empty_cache()
    rows.append(Row(peer="copy", **facts, **spread(measure(copy_of(floor_bytes(form, call, *shape))))))
    return rows


FIRST = """
import time, torch, linattn
q, k, v = torch.randn(3, 1, 4096, 16, 64, device="cuda", dtype=torch.bfloat16).requires_grad_().unbind()
g = torch.nn.functional.logsigmoid(torch.randn(1, 4096, 16, device="cuda"))
torch.cuda.synchronize(); begin = time.perf_counter()
linattn.linear_attention(q, k, v, g, backend="triton", check_values=False)[0].sum().backward()
torch.cuda.synchronize(); print(time.perf_counter() - begin)
"""


def first_calls() -> dict[str, float]:
    """Seconds of a process's first forward and backward: with an empty cache of kernels, and with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(machine.ROOT)}
        command = [sys.executable, "-c", FIRST]
        once = lambda: float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        return {"cold": once(), "warm": once()}


def checks(rows: list[Row], first: dict[str, float]) -> list[Check]:
    """The promises, as ratios within this run."""
    at = {(r.peer, r.form, r.call, r.B, r.T, r.K): r.p50 for r in rows}
    found = []

    def promise(text, form, call, shapes, over, relation, target):
        """over: the peer divided by us ('>=') or we by it ('<=')."""
        cells, missing = [], []
        for B, T, _, D in shapes:
            mine, its = at.get(("triton", form, call, B, T, D)), at.get((over, form, call, B, T, D))
            where = f"{form} {call} B{B} T{T} D{D}"
            if mine is None or its is None:
                missing.append(f"{where}: {'triton' if mine is None else over} was not timed")
            else:
                cells.append(Cell(where, its / mine if relation == ">=" else mine / its))
        found.append(Check(promise=text, form=form, relation=relation, target=target, cells=tuple(cells), missing=tuple(missing)))

    long = LONG[:2]
    promise("forward over the bytes' floor", "scalar", "forward", long, "copy", "<=", 2.3)
    promise("faster than fla", "scalar", "forward", long, "fla", ">=", 2.5)
    promise("forward+backward over the floor", "scalar", "forward+backward", long, "copy", "<=", 3.6)
    promise("faster than fla", "scalar", "forward+backward", long, "fla", ">=", 2.5)
    promise("forward over the floor, D=64", "bidirectional scalar", "forward", long[:1], "copy", "<=", 2.6)
    promise("forward over the floor, D=128", "bidirectional scalar", "forward", long[1:], "copy", "<=", 3.3)
    promise("faster than fla flipped twice", "bidirectional scalar", "forward", long, "fla", ">=", 4.0)
    promise("forward over the floor", "bidirectional none", "forward", long, "copy", "<=", 1.3)
    promise("faster than flash attention", "bidirectional none", "forward", CROSSING, "FLASH_ATTENTION", ">=", 1.0)
    promise("no slower than flash attention", "bidirectional none", "forward+backward", VISION[:1], "FLASH_ATTENTION", ">=", 1.0)
    for name, limit in (("warm", 0.5), ("cold", 10.0)):
        cells = (Cell(f"{name} cache", first[name]),) if name in first else ()
        found.append(Check(promise="first call", form=f"{name} cache", relation="<=", target=limit, unit="s", cells=cells))
    return found


def markdown(record: Record) -> str:
    lines = [f"# {record.name}", "", f"`{record.command}`", "", str(record.machine), "", str(record.versions), ""]
    lines += ["| form | call | B | T | D | peer | median ms | of the copy |", "|---|---|---|---|---|---|---|---|"]
    copies = {(r.form, r.call, r.B, r.T, r.K): r.p50 for r in record.rows if r.peer == "copy"}
    for r in record.rows:
        base = copies.get((r.form, r.call, r.B, r.T, r.K))
        figures = f"{r.p50:.3f} | {r.p50 / base:.2f}" if r.p50 and base else f"– | {r.skipped}"
        lines.append(f"| {r.form} | {r.call} | {r.B} | {r.T} | {r.K} | {r.peer} | {figures} |")
    lines += ["", "| promise | form | target | worst | verdict |", "|---|---|---|---|---|"]
    for c in record.checks:
        worst = "–" if c.worst is None else f"{c.worst.figure:.2f} {c.unit} at {c.worst.where}"
        lines.append(f"| {c.promise} | {c.form} | {c.relation} {c.target} {c.unit} | {worst} | {c.verdict} |")
    return "\n".join([*lines, ""])


def run(minutes: float = 10.0, only: tuple[str, ...] = (), told: Callable[[str], None] = print) -> Record:
    """Everything within `minutes`, the promised cases first; what time does not allow is a row that says so."""
    begin, rows = time.perf_counter(), []
    names = [name for name in FORMS if not only or name in only]
    red = {}
    for name in names:
        for D in (64, 128):
            try:
                red[name, D] = correct(name, D)
            except Exception as error:  # a kernel that does not compile or launch is red
                red[name, D] = f"{type(error).__name__}: {str(error)[:160]}"
            told(f"{name} D={D}: {red[name, D] or 'correct'}")
    plan = [(name, shape, call) for shape in LONG[:2] for name in names for call in CALLS]
    plan += [(name, shape, call) for shape in VISION + CROSSING for name in names if not FORMS[name].causal for call in CALLS]
    plan += [(name, shape, call) for shape in LONG[2:] for name in names for call in CALLS]
    for name, shape, call in plan:
        if time.perf_counter() - begin > 60 * minutes:
            B, T, H, D = shape
            facts = {"form": name, "call": call, "B": B, "T": T, "H": H, "K": D, "V": D, "dtype": "bfloat16", "threads": 0}
            rows.append(Row(peer="triton", **facts, skipped="out of time"))
            continue
        new = time_case(name, shape, call, red[name, shape[3]])
        rows += new
        told(f"{name} {call} {shape}: " + ", ".join(f"{r.peer} {r.p50:.3f} ms" if r.p50 else f"{r.peer} –" for r in new))
    first = first_calls()
    told(f"first call: {first}")
    import triton

    card = torch.cuda.get_device_properties()
    return Record(
        kind="gpu", date=datetime.now(timezone.utc).isoformat(timespec="seconds"), git=machine.git(),
        command=shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        machine={"gpu": card.name, "multiprocessors": card.multi_processor_count, "memory_gib": round(card.total_memory / 2**30, 1)},
        versions={"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "linattn": linattn.__version__},
        options={"minutes": minutes, "only": list(only), "correct": {f"{n} {D}": text for (n, D), text in red.items()}},
        method=METHOD, rows=tuple(rows), checks=tuple(checks(rows, first)), seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="stop timing new cases after this long")
    parser.add_argument("--only", action="append", default=[], choices=list(FORMS), help="only this form; repeat for more")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on a GPU")
    record = run(arguments.minutes, tuple(arguments.only), lambda line: print(line, flush=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = record.write(arguments.out)
    path.with_suffix(".md").write_text(markdown(record))
    print(f"written: {path} and .md")
    return int(any(check.verdict == "fail" for check in record.checks) or any(record.options["correct"].values()))


if __name__ == "__main__":
    sys.exit(main())

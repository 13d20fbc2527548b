"""The Triton kernels compiled ahead of time: tiles and what the assembler says. Long, for launches, assembly and table are one gate.

A call on tensors without memory ("meta") gives the list of launches; each is compiled for its target. Read back are registers, spills,
shared memory, matrix instructions, asynchronous copies and traps, and bytes and FLOPs per token and head are counted from the launches.
Over 300 lines, because compiling, reading back and judging are one table's row.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from linattn.ops import tiles
from linattn.ops.tiles import ARCHITECTURES, WIDTHS

SPILLS = 16  # bytes of spill stores that are tolerated
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma|\bmma\.sync",
    "gfx942": r"\bv_mfma",
}
TOO_OLD = "Unsupported .version"  # how an assembler says it
WITHOUT_MATRIX = ("seg_scan", "seg_sum", "short_gates", "step")
FORMS = {  # name → decay, delta, causal, normalize: the heaviest call of each kind of row, and the ones without decay
    "scalar": ("scalar", False, True, "none"),
    "bidirectional": ("scalar", False, False, "sum"),
    "nodecay": ("none", False, False, "sum"),
    "channel": ("channel", False, True, "none"),
    "channel bidirectional": ("channel", False, False, "none"),
    "delta": ("scalar", True, True, "none"),
    "channel delta": ("channel", True, True, "none"),
    "short": ("scalar", False, True, "none"),
    "short bidirectional": ("scalar", False, False, "sum"),
}
TOKENS, LENGTHS, H = 32768, {"short": 256, "short bidirectional": 256}, 16  # one sequence of all tokens, or many of that length
# Bytes per token and head, (forward, backward): what the design moves, the states of segments included, and a few percent. The design has
# no figure for channel decays, the delta rule and heads of 256: there it is what the launches move, and a few percent.
BUDGET = {
    ("scalar", 64): (860, 2830), ("scalar", 128): (1700, 6900),
    ("bidirectional", 64): (1190, 3950), ("bidirectional", 128): (2830, 10500),
    ("nodecay", 64): (580, 1700), ("nodecay", 128): (1150, 3400),
    ("short", 64): (530, 960), ("short", 128): (1050, 1890),
    ("short bidirectional", 64): (535, 1100), ("short bidirectional", 128): (1060, 2150),
    ("channel", 64): (1360, 6500), ("channel", 128): (2720, 18200),
    ("channel bidirectional", 64): (2480, 9400), ("channel bidirectional", 128): (7100, 29200),
    ("delta", 64): (1430, 5460), ("delta", 128): (2370, 13600),
    ("channel delta", 64): (2020, 8270), ("channel delta", 128): (3760, 22600),
    ("scalar", 256): (3330, 29600), ("bidirectional", 256): (12000, 52200), ("nodecay", 256): (2230, 6060),
    ("channel", 256): (5450, 57700), ("channel bidirectional", 256): (22700, 101000),
    ("delta", 256): (2800, 43800), ("channel delta", 256): (4930, 48300),
}  # fmt: skip
BUDGET_32 = BUDGET | {  # with chunks of 32 tokens, twice the states
    ("scalar", 64): (860, 3500), ("scalar", 128): (1700, 9600),
    ("bidirectional", 64): (1460, 5350), ("bidirectional", 128): (3850, 15900),
}  # fmt: skip
# FLOPs of matrix products likewise, and a few percent: one tile of V more would form the scores once more.
FLOPS = {
    ("scalar", 64): (43_000, 95_000), ("scalar", 128): (190_000, 330_000),
    ("bidirectional", 64): (69_000, 165_000), ("bidirectional", 128): (330_000, 535_000),
    ("nodecay", 64): (17_000, 43_000), ("nodecay", 128): (69_000, 172_000),
    ("short", 64): (43_000, 150_000), ("short", 128): (86_000, 300_000),
    ("short bidirectional", 64): (69_000, 240_000), ("short bidirectional", 128): (138_000, 480_000),
    ("channel", 64): (32_000, 55_500), ("channel", 128): (123_500, 209_000),
    ("channel bidirectional", 64): (49_000, 102_500), ("channel bidirectional", 128): (192_000, 388_000),
    ("delta", 64): (42_600, 76_700), ("delta", 128): (179_000, 272_700),
    ("channel delta", 64): (40_500, 68_200), ("channel delta", 128): (157_500, 255_600),
    ("scalar", 256): (562_000, 903_000), ("bidirectional", 256): (835_000, 1_620_000), ("nodecay", 256): (272_000, 681_000),
    ("channel", 256): (485_000, 792_000), ("channel bidirectional", 256): (758_000, 1_490_000),
    ("delta", 256): (349_000, 579_000), ("channel delta", 256): (349_000, 579_000),
}  # fmt: skip
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
READ = {"bwd_dq": 1 / 2}  # the share of the stored states that a kernel needs


@dataclass(frozen=True, kw_only=True)
class Launch:
    kernel: object  # triton.JITFunction
    arguments: dict
    options: dict
    grid: tuple[int, ...]
    backward: bool

    @property
    def constexprs(self) -> str:
        """What makes it another binary of the same kernel."""
        fixed = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        return str(sorted((fixed | self.options).items()))

    @property
    def tile(self) -> str:
        size, options = lambda name: self.arguments.get(name, "-"), self.options
        turn = f" TK{size('TK')}" if size("TK") != "-" and size("TK") < size("BK") else ""
        return f"C{size('C')} BV{size('BV')}{turn} w{options.get('num_warps', 4)} s{options.get('num_stages', '-')}"

    @property
    def bytes(self) -> int:
        """Of every tensor once: what is read again comes from the cache."""
        seen = {}
        for name, x in self.arguments.items():
            if isinstance(x, torch.Tensor) and x.numel() * x.element_size() >= TOKENS * H:  # per token, not per sequence
                share = READ.get(self.kernel.__name__, 1) if name == "states" else 1
                seen[id(x)] = int(share * x.numel() * x.element_size())
        return sum(seen.values())

    @property
    def flops(self) -> float:
        """Of the matrix products, per token and head, as the sources have them; those of channel decays and `wy` are not counted."""
        x = self.arguments.get
        name, K, V, C, D = self.kernel.__name__, x("K", 0), x("V", 0), x("C", 0), 2 if x("BOTH") else 1
        again = -(-V // x("BV", 1))  # tiles of V, each of which forms the scores
        turns = -(-K // x("TK", K or 1))  # over K, each of which forms their gradient
        if name == "seg_state":
            families = self.grid[0] // again
            return 2 * K * V * families
        if name == "short" or name == "short_bwd":
            blocks = -(-x("T") // C)
            seen = C * ((blocks + 1) / 2 if x("CAUSAL") else blocks)
            share = 2 * K if x("DECAY") != "none" else 0
            return seen * (2 * (K + V) if name == "short" else 6 * (K + V) + share)
        return {
            "output": 2 * C * (K * again + V) + 2 * K * V * (1 + D),
            "bwd_dq": 2 * C * (V + D * K) + 2 * K * V * D,
            "bwd_dkv": 2 * C * (V * turns + D * K) + 2 * K * V * D + 2 * C * (K if x("DELTA") else K * again + V) + 2 * K * V * D,
            "nodecay_out": 2 * K * V,
            "nodecay_bwd": 6 * K * V,
        }.get(name, 0)


@dataclass(frozen=True, kw_only=True)
class Row:
    arch: str
    form: str
    width: int
    kernel: str
    backward: bool
    tile: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: int = 0
    copies: int = 0
    traps: int = 0
    per_sm: int = 0  # programs on one multiprocessor
    bytes: float = 0.0  # per token and head
    assembler: str = ""
    error: str = ""
    faults: tuple[str, ...] = field(default=())


def _has_tiles(arch: str, form: str, width: int) -> bool:
    decay, delta, causal, _ = FORMS[form]
    if form in LENGTHS and tiles.pick_short(arch, False, tiles.row(decay, delta, not causal, width, width, 2), width) is None:
        return False
    return all(tiles.row(decay, delta, both, width, width, 2) in tiles.TABLE[arch] for both in (False, not causal))


def launches(form: str, width: int, arch: str) -> list[Launch]:
    """What one forward and backward of `form` would launch on `arch`."""
    from triton.runtime.jit import JITFunction

    from linattn.ops import triton as backend
    from linattn.ops.form import Form
    from linattn.ops.triton import passes

    decay, delta, causal, normalize = FORMS[form]
    meta = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    T = LENGTHS.get(form, TOKENS)
    B = TOKENS // T
    q, k, v, do = (meta(B, T, H, width, dtype=torch.bfloat16) for _ in range(4))
    log_decay = {"none": None, "scalar": meta(B, T, H), "channel": meta(B, T, H, width)}[decay]
    inputs = (q, k, v, log_decay, meta(B, T, H) if delta else None, None, None, None)
    options = Form(width**-0.5, causal, "target", normalize, 1e-6, 0, False, False)
    found: list[Launch] = []
    backward = False

    def note(kernel, *values, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, values, strict=False)) | {n: x for n, x in named.items() if n in kernel.arg_names}
        rest = {n: x for n, x in named.items() if n not in kernel.arg_names}
        found.append(Launch(kernel=kernel, arguments=arguments, options=rest, grid=grid, backward=backward))

    with _replaced(JITFunction, "run", note), _replaced(passes, "architecture", lambda: arch):
        o, _, _, d, *_ = backend.forward(*inputs, options)
        backward = True
        backend.backward(do, None, None, None, None, None, *inputs, o, d, options)
    return found


@contextlib.contextmanager
def _replaced(owner, name, value):
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def compiled(launch: Launch, arch: str):
    import triton
    from triton.backends.compiler import GPUTarget

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        x = launch.arguments[parameter.name]
        if parameter.is_constexpr or x is None:
            signature[parameter.name], constants[i,] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[parameter.name], attributes[i,] = TYPES[x.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(x, float) else "i32"
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def assemblers(arch: str) -> list[Path | None]:
    """The assemblers that Triton ships for `arch`."""
    import triton

    if arch.startswith("gfx"):
        return [None]
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    return [folder / name for name in ("ptxas", "ptxas-blackwell") if (folder / name).exists()]


def examine(launch: Launch, arch: str, form: str, width: int) -> Iterator[Row]:
    """One row per assembler."""
    facts = {"arch": arch, "form": form, "width": width, "kernel": launch.kernel.__name__, "backward": launch.backward, "tile": launch.tile}
    facts["bytes"] = round(launch.bytes / (TOKENS * H), 1)
    try:
        binary = compiled(launch, arch)
    except Exception as error:  # whatever the compiler raises is this row's finding
        yield Row(**facts, error=f"{type(error).__name__}: {str(error)[-200:]}", faults=("does not compile",))
        return
    text = binary.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    warps = launch.options.get("num_warps", 4)
    facts |= {"shared": binary.metadata.shared, "matrix": len(re.findall(MATRIX[arch], text)), "traps": len(re.findall(r"\btrap;", text))}
    facts["copies"] = len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk|global_load_lds|buffer_load\w* .* lds", text))
    done = [(assembler, *(_amd(text) if assembler is None else _assemble(assembler, text))) for assembler in assemblers(arch)]
    able = [one for one in done if TOO_OLD not in one[3]]  # Triton takes the newer one where the older cannot read what it writes
    for assembler, registers, spills, error in able or done:
        found = facts | {"registers": registers, "spills": spills, "error": error, "assembler": assembler.name if assembler else "llvm"}
        if not arch.startswith("gfx"):
            by_registers = 65536 // max(1, (registers + 7) // 8 * 8 * warps * 32)
            by_shared = (SHARED[arch] + 1024) // (found["shared"] + 1024)
            found["per_sm"] = min(by_registers, by_shared, 64 // warps)
        yield Row(**found, faults=tuple(_faults(found)))


def _assemble(assembler: Path, ptx: str) -> tuple[int, int, str]:
    """Registers, bytes spilled, error. Kept in Triton's cache, beside what it compiled, so that a second run assembles what changed."""
    import triton

    name = hashlib.sha256(f"{assembler.name} {assembler.stat().st_size} {_flags()} {ptx}".encode()).hexdigest()
    kept = Path(triton.knobs.cache.dir, "assembled", name)
    if kept.exists():
        return tuple(json.loads(kept.read_text()))
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [assembler, "-v", *_flags(), f"--gpu-name={target}", source, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    registers, spills = re.search(r"Used (\d+) registers", done.stderr), re.search(r"(\d+) bytes spill stores", done.stderr)
    if done.returncode or not registers or not spills:
        found = 0, 0, TOO_OLD if TOO_OLD in done.stderr else done.stderr.strip()[-200:]
    else:
        found = int(registers[1]), int(spills[1]), ""
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


@cache
def _flags() -> list[str]:
    """What Triton tells the assembler, as far as it bears on registers: since 3.7 it goes around a fault of ptxas 13 so."""
    from triton.backends.nvidia import compiler

    known = "--regAllocOptLevel=2"
    return ["-lineinfo", *([known] if known in Path(compiler.__file__).read_text() else [])]


def _amd(text: str) -> tuple[int, int, str]:
    number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
    return number("vgpr_count"), 4 * number("vgpr_spill_count"), ""


def _faults(row: dict) -> Iterator[str]:
    if row["error"]:
        yield "does not assemble"
    if row["spills"] > SPILLS:
        yield f"spills {row['spills']} B"
    if row["traps"]:
        yield "trap"
    if row["shared"] > SHARED[row["arch"]]:
        yield f"shared memory {row['shared']} B"
    if not row["matrix"] and row["kernel"] not in WITHOUT_MATRIX:
        yield "no matrix instruction"
    if row["registers"] <= 16 and row["kernel"] not in WITHOUT_MATRIX:
        yield "too few registers to be the kernel"


def totals(arch: str, form: str, width: int) -> tuple[list[float], list[str]]:
    """Per token and head, of the forward and the backward: bytes of both, FLOPs of both; and what is over budget."""
    found = launches(form, width, arch)
    sides = [[x for x in found if x.backward is backward] for backward in (False, True)]
    moved = [sum(x.bytes for x in side) / (TOKENS * H) for side in sides]
    counted = [sum(x.flops for x in side) for side in sides]
    names = [f"{side}: {{:.0f}} {unit} per token and head" for unit in ("bytes", "FLOPs") for side in ("forward", "backward")]
    decay, delta, causal, _ = FORMS[form]
    at = tiles.row(decay, delta, not causal and form != "nodecay", width, width, 2)
    budget = BUDGET_32 if tiles.TABLE[arch][at][0][0] == 32 else BUDGET
    allowed = [*budget.get((form, width), (float("inf"),) * 2), *FLOPS.get((form, width), (float("inf"),) * 2)]
    figures = zip(names, moved + counted, allowed, strict=True)
    return moved + counted, [f"{form} {width} {name.format(a)} > {b}" for name, a, b in figures if a > b]


def run(archs=ARCHITECTURES, widths=WIDTHS[:3], forms=tuple(FORMS), told=lambda row: None) -> tuple[list[Row], list[str]]:
    """All rows, and all faults in words."""
    rows, faults, seen = [], [], set()
    for arch in archs:
        for width in widths:
            for form in forms:
                if not _has_tiles(arch, form, width):
                    continue
                for launch in launches(form, width, arch):
                    key = (arch, width, form, launch.kernel.__name__, launch.constexprs)
                    if key in seen:
                        continue
                    seen.add(key)
                    for row in examine(launch, arch, form, width):
                        rows.append(row)
                        faults += [f"{arch} {form} {width} {row.kernel} ({row.assembler}): {fault}" for fault in row.faults]
                        told(row)
                faults += [f"{arch} {text}" for text in totals(arch, form, width)[1]]
    return rows, faults


def markdown(rows: list[Row], faults: list[str]) -> str:
    """The table that is committed."""
    names = ("arch", "form", "width", "kernel", "tile", "assembler", "registers", "spills", "shared", "per_sm", "matrix", "copies", "bytes")
    lines = ["| " + " | ".join((*names, "verdict")) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        kernel = row.kernel + (" (backward)" if row.backward and not row.kernel.startswith("bwd") else "")
        cells = asdict(row) | {"kernel": kernel}
        lines.append("| " + " | ".join([*(str(cells[name]) for name in names), "; ".join(row.faults) or "pass"]) + " |")
    moved = ["", "| arch | form | width | bytes per token and head, forward | backward | FLOPs, forward | backward |", "|" + "---|" * 7]
    for arch, form, width in dict.fromkeys((row.arch, row.form, row.width) for row in rows):
        figures = " | ".join(f"{figure:.0f}" for figure in totals(arch, form, width)[0])
        moved.append(f"| {arch} | {form} | {width} | {figures} |")
    ending = ["", f"{len(faults)} faults"] + [f"- {fault}" for fault in faults]
    heading = [
        "# Triton kernels, ahead of time",
        "",
        f"`python -m bench kernels`, Triton {importlib.metadata.version('triton')}. Under the delta rule",
    ]
    heading[-1] += " `seg_state` is there twice in a backward: for what segments do to any state, then for the states."
    return "\n".join([*heading, "", *lines, *moved, *ending, ""])

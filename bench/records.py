"""What a run leaves behind: rows, memory figures, checks and the circumstances, as JSON that reads back to the same objects."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .timing import quantile

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times of one side on one size. Either `samples` and the quantiles are there, or `skipped` says why not."""

    peer: str
    form: str
    call: str
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str
    threads: int
    samples: int = 0
    p20: float | None = None  # milliseconds
    p50: float | None = None
    p80: float | None = None
    flops: int | None = None  # counted, where the count is agreed on
    skipped: str | None = None
    ratios: dict[str, float] = field(default_factory=dict)  # peer → its median / this median

    def __post_init__(self):
        if (self.p50 is None) == (self.skipped is None):
            raise ValueError(f"a row must have times or a reason for having none; got p50={self.p50}, skipped={self.skipped!r}")

    @property
    def gflops(self) -> float | None:
        """GFLOP/s at the median."""
        return None if self.p50 is None or self.flops is None else self.flops / self.p50 / 1e6


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one call in a process of its own."""

    form: str
    call: str
    B: int
    T: int
    H: int
    K: int
    V: int
    threads: int
    inputs: int | None = None
    outputs: int | None = None
    extra: int | None = None  # forward, forward+backward: most ever resident beyond inputs and outputs; step: allocated beyond outputs
    skipped: str | None = None


@dataclass(frozen=True)
class Cell:
    """One figure of a check."""

    where: str
    figure: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """A promise and every figure it was held to; it is kept if the worst one keeps it."""

    promise: str
    form: str  # a name in cases.FORMS
    relation: str  # ">=" | "<="
    target: float
    unit: str = "×"
    cells: tuple[Cell, ...] = ()
    missing: tuple[str, ...] = ()  # what should have been measured and was not, with the reason

    def __post_init__(self):
        if self.relation not in (">=", "<="):
            raise ValueError(f"relation must be '>=' or '<='; got {self.relation!r}")

    def keeps(self, cell: Cell) -> bool:
        return cell.figure >= self.target if self.relation == ">=" else cell.figure <= self.target

    @property
    def worst(self) -> Cell | None:
        if not self.cells:
            return None
        bad = [cell for cell in self.cells if cell.figure != cell.figure]  # NaN is the worst of all
        pick = min if self.relation == ">=" else max
        return bad[0] if bad else pick(self.cells, key=lambda cell: cell.figure)

    @property
    def verdict(self) -> str:
        """pass | fail | not measured"""
        return "not measured" if self.worst is None else "pass" if self.keeps(self.worst) else "fail"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run."""

    kind: str  # cpu | cpu-quick | …
    date: str  # ISO, UTC
    command: str
    git: dict
    machine: dict
    versions: dict
    options: dict
    method: tuple[str, ...]
    rows: tuple[Row, ...]
    memory: tuple[Memory, ...] = ()
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0  # the run took

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.date[:10]}-{(self.git['commit'] or 'unversioned')[:7]}"

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.json"
        checks = [asdict(check) | {"verdict": check.verdict, "worst": check.worst and asdict(check.worst)} for check in self.checks]
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self), "checks": checks}, indent=1, ensure_ascii=False) + "\n")
        return path


def read(path: Path) -> Record:
    data = json.loads(path.read_text())
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"path must be a record of schema {SCHEMA}; got {path}")
    return Record(
        method=tuple(data.pop("method")),
        rows=tuple(Row(**row) for row in data.pop("rows")),
        memory=tuple(Memory(**one) for one in data.pop("memory")),
        checks=tuple(_check(check) for check in data.pop("checks")),
        **data,
    )


def _check(data: dict) -> Check:
    cells, missing = tuple(Cell(**cell) for cell in data["cells"]), tuple(data["missing"])
    rest = {name: data[name] for name in ("promise", "form", "relation", "target", "unit")}
    return Check(**rest, cells=cells, missing=missing)


def spread(samples: list[float]) -> dict:
    """The fields of a Row that come from its samples."""
    return {"samples": len(samples), **{f"p{p}": quantile(samples, p / 100) for p in (20, 50, 80)}}

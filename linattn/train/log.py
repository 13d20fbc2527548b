"""The only place that reports a run as it goes: log.csv always, and a progress bar or plain lines on the console."""

import csv
import hashlib
import io
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = ("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "skipped")  # and last the metric of the task


class Log:
    """Rows of COLUMNS and `metric`, one per step; the metric is the held-out figure after that many steps, where one was taken.

    Without a path none are kept. `report` takes each row as well, as a dict without empty cells.
    """

    def __init__(
        self, path: Path | None, console: Console, *, start: int, steps: int, title: str, metric: str,
        report: Callable[[int, dict], None] = lambda step, values: None,
    ):  # fmt: skip
        self.path, self.console, self.steps, self.metric, self.report = path, console, steps, metric, report
        self.broken = False
        before = [row for row in read(path) if row["step"] <= start] if path and start else []  # later steps come again
        self.skipped = sum(row["skipped"] for row in before)
        if path:
            _rewrite(path, (*COLUMNS, metric), before)
        self.file = path.open("a", newline="") if path else io.StringIO()
        self.writer = csv.writer(self.file)
        self.quiet_until = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=steps, completed=start, figures="")

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()
        self.file.close()

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def row(
        self, step: int, *, tokens: int, loss="", grad_norm="", lr="", tokens_per_s="", skipped=0, metric="", extra: dict | None = None
    ) -> None:
        self._write((step, tokens, loss, grad_norm, lr, tokens_per_s, skipped, metric))
        named = {"tokens": tokens, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_s": tokens_per_s, self.metric: metric}
        self.report(step, {name: value for name, value in {**named, **(extra or {})}.items() if value not in ("", None)})
        if loss == "":
            return
        self.skipped += skipped
        figures = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s" + _figures(extra or {})
        figures += f"  {self.skipped} skipped" if self.skipped else ""
        self.bar.update(self.task, completed=step, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now >= self.quiet_until or step == self.steps):
            self.quiet_until = now + 10
            left = timedelta(seconds=round((self.steps - step) * tokens / step / tokens_per_s))
            self.say(f"step {step}/{self.steps}  {figures}  {left} left")

    def _write(self, row: tuple) -> None:
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:  # a full disk must not end a run that may outlive it
            if not self.broken:
                self.say(f"cannot write {self.path}: {error}; the run goes on without those rows")
            self.broken = True


def reporters(names: tuple[str, ...], out: Path, config: dict) -> Callable[[int, dict], None]:
    """What takes a step's figures to TensorBoard (files in out/tensorboard) and W&B (project linattn), as far as `names` has them."""
    writer = run = None
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))
    if "wandb" in names:
        import wandb

        name = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()  # a resumed run goes on in the same curves
        run = wandb.init(project="linattn", name=out.name, id=name, resume="allow", dir=str(out), config=config)

    def report(step: int, values: dict) -> None:
        if writer:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        if run:
            run.log(values, step=step)

    return report


def _figures(extra: dict) -> str:
    mfu, memory = extra.get("mfu"), extra.get("memory_gb")
    return ("" if mfu is None else f"  MFU {mfu:.1%}") + ("" if memory is None else f"  {memory:.1f} GB")


def read(path: Path) -> list[dict]:
    """The rows of a log.csv with numbers as numbers, empty cells as None; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        names, *rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS) + 1] or [[]]
    integers = {"step", "tokens", "skipped"}
    number = lambda name, cell: None if cell == "" else int(cell) if name in integers else float(cell)
    return [{name: number(name, cell) for name, cell in zip(names, row, strict=True)} for row in rows]


def _rewrite(path: Path, names: tuple[str, ...], rows: list[dict]) -> None:
    beside = path.with_suffix(".tmp")
    try:
        with beside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(["" if row[name] is None else row[name] for name in names] for row in rows)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error

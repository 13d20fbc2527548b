"""The only place that reports a run as it goes: log.csv always, and a progress bar or plain lines on the console."""

import csv
import io
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = ("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "skipped")  # and last the metric of the task


class Log:
    """Rows of COLUMNS and `metric`, one per step; the metric is the held-out figure after that many steps, where one was taken.

    Without a path none are kept.
    """

    def __init__(self, path: Path | None, console: Console, *, start: int, steps: int, title: str, metric: str):
        self.path, self.console, self.steps = path, console, steps
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

    def row(self, step: int, *, tokens: int, loss="", grad_norm="", lr="", tokens_per_s="", skipped=0, metric="") -> None:
        self._write((step, tokens, loss, grad_norm, lr, tokens_per_s, skipped, metric))
        if loss == "":
            return
        self.skipped += skipped
        figures = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s" + (f"  {self.skipped} skipped" if self.skipped else "")
        self.bar.update(self.task, completed=step, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now >= self.quiet_until or step == self.steps):
            self.quiet_until = now + 10
            self.say(f"step {step}/{self.steps}  {figures}")

    def _write(self, row: tuple) -> None:
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:  # a full disk must not end a run that may outlive it
            if not self.broken:
                self.say(f"cannot write {self.path}: {error}; the run goes on without those rows")
            self.broken = True


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

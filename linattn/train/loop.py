"""The training loop: data, engine, schedule, log and checkpoints meet here and nowhere else."""

import importlib.util
import json
import shlex
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from . import checkpoint, data, estimate, memory, schedule
from .config import Config
from .ds_config import stage_of
from .engine import Engine, pick_device
from .log import Log, read, reporters
from .stop import FILE as STOP_FILE
from .stop import Stop
from .tasks import TASKS
from .world import World

CONFIG, LOG, DEEPSPEED = "run.json", "log.csv", "deepspeed.json"
PATIENCE = 20  # steps in a row without a finite gradient before a run is given up: weights that overflow do not come back


class Run(NamedTuple):
    """What came of a run."""

    out: Path
    step: int
    rows: list[dict]  # of log.csv, in the first process
    checkpoint: Path
    stopped_by: signal.Signals | None


def train(config: Config, out: Path, *, resume: str = "auto", command: str | None = None, console: Console | None = None) -> Run:
    """Train what `config` says, in folder `out`.

    resume   "auto": go on from the newest complete checkpoint of `out`, if there is one; "never": `out` must hold none
    command  what to type to go on after a stop. None: `linattn train --out OUT --resume auto`

    ValueError: a run of another config or other data is in `out`; or as `Config`, the task and its model say.
    SaveError: the last checkpoint could not be written. FloatingPointError: PATIENCE steps in a row were not finite.
    """
    world = World.join(config.device, alone=stage_of(config) is not None)
    console = Console(quiet=True) if not world.first else console or Console()
    say = lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True)
    engine, last = _open(config, out, resume, world, say)
    if world.first:
        _write_down(engine, config, out)
    save = lambda step: _save(out, step, engine)
    step, bad, asked = last.step if last else 0, 0, None
    lines = Log(
        out / LOG if world.first else None, console, start=step, steps=config.steps, title=engine.task.title, metric=engine.task.metric,
        report=reporters(config.report if world.first else (), out, asdict(config)),
    )  # fmt: skip
    with Stop() as stop, lines as log:
        if step == 0:
            engine.prepare()
            log.row(step=0, tokens=0, metric=engine.evaluate())
        while step < config.steps and not asked:
            row = _step(engine, config, step)
            step, asked = row["step"], stop.agreed(world, out)
            log.row(**row)
            bad = bad + 1 if row["skipped"] else 0
            if bad == PATIENCE:
                raise FloatingPointError(
                    f"{bad} steps in a row up to step {step} had a loss or gradient that is not finite; try a lower lr than {config.lr}"
                )
            if step % config.save_every == 0 and step < config.steps and not asked:
                try:
                    last = save(step)
                except checkpoint.SaveError as error:  # there may be room again by the next one
                    log.say(f"{error}; the run goes on")
        if last is None or last.step < step:
            last = save(step)
    if world.first:
        (out / STOP_FILE).unlink(missing_ok=True)  # it has done its work, and would stop the next run too
    stopped_by = asked if step < config.steps else None
    if stopped_by:
        say(f"stopped by {stopped_by.name} at step {step} of {config.steps}; saved {last.path}")
        say(f"to go on: {command or f'linattn train --out {shlex.quote(str(out))} --resume auto'}")
    return Run(out, step, read(out / LOG) if world.first else [], last.path, stopped_by)


def _open(config: Config, out: Path, resume: str, world: World, say) -> tuple[Engine, checkpoint.Checkpoint | None]:
    """Engine as they were at the newest checkpoint of `out`, or at the start. Writes nothing."""
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be 'auto' or 'never'; got {resume!r}")
    if config.task not in TASKS:
        raise ValueError(f"task must be one of {list(TASKS)}; got {config.task!r}")
    for name in config.report:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report {name!r} needs the package {name}: pip install {name}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder; {out} is a file")
    if config.threads:
        torch.set_num_threads(config.threads)
    stage = stage_of(config)
    if world.size > 1 and stage is None:
        raise ValueError(f"started as {world.size} processes: say how they share the work, by zero 0, 1, 2 or 3 or a DeepSpeed config")
    if world.size % config.context_parallel:
        raise ValueError(f"context_parallel must divide the number of processes, {world.size}; got {config.context_parallel}")
    device = pick_device(config.device, world.local)
    found = world.of_first(checkpoint.newest(out, say) if world.first else None)  # a shared file system may show it to others later
    if found and resume == "never":
        raise ValueError(f"{out} holds a run at step {found.step}: choose another folder, or resume='auto'")
    if found:
        _same(found.path, "config", Config.from_dict(found.facts["config"]).differences(config))
    task = TASKS[config.task](config, found.path if found else None)
    if found and found.facts["data"] != task.fingerprint:
        _same(found.path, "data", [f"{task.source} is not what it was trained on"])
    torch.manual_seed(data.derive("init", config.seed))
    if stage is None:
        engine = Engine(task.load(found.path) if found else task.create(), task, config, device, world)
    else:
        from .zero import ZeroEngine

        engine = ZeroEngine(task, config, device, world)
    if found:
        processes = found.facts.get("processes", 1)
        engine.restore(found.path, processes=processes)
        say(f"going on from {found.path}" + (f", saved by {processes} processes" if processes != world.size else ""))
        if found.facts["threads"] != torch.get_num_threads():
            say(f"note: saved with {found.facts['threads']} threads, going on with {torch.get_num_threads()}: the last bits may differ")
    say(
        f"{task.title}: {engine.parameters:,} parameters on {device}, "
        + (f"{world.size} processes, ZeRO {stage}, " if stage is not None else "")
        + f"{torch.get_num_threads()} threads; {task.source}"
    )
    return engine, found


def _write_down(engine: Engine, config: Config, out: Path) -> None:
    """What the run is: its config, and DeepSpeed's as it was resolved."""
    out.mkdir(parents=True, exist_ok=True)
    config.save(out / CONFIG)
    if isinstance(resolved := getattr(engine, "resolved", None), dict):
        (out / DEEPSPEED).write_text(json.dumps(resolved, indent=2) + "\n")


def _step(engine: Engine, config: Config, step: int) -> dict[str, Any]:
    """Step `step`, counted from 0, and the row it gives the log."""
    began = time.perf_counter()
    lr, taken = learning_rate(config, step), config.batch * engine.task.tokens_per_row
    rank = (engine.world.rank,) if engine.world.rank else ()
    torch.manual_seed(data.derive("step", config.seed, step, *rank))  # whatever a model draws is a function of the step too
    outcome = engine.step(step, lr)
    rate, step = taken / (time.perf_counter() - began), step + 1
    due = step % config.eval_every == 0 or step == config.steps
    return dict(
        step=step, tokens=step * taken, loss=outcome.loss, grad_norm=outcome.grad_norm, lr=lr, tokens_per_s=rate,
        skipped=int(outcome.skipped), metric=engine.evaluate() if due else "", extra=_extra(engine, rate),
    )  # fmt: skip


def _extra(engine: Engine, tokens_per_s: float) -> dict[str, float]:
    """Memory, and where the peak is known MFU: FLOPs the model needs / (seconds · processes · peak), arXiv:2204.02311, App. B."""
    best = estimate.peak(engine.device)
    mfu = {} if best is None else {"mfu": engine.flops_per_token * tokens_per_s / (best * engine.world.size)}
    return {**mfu, "memory_gb": memory.highest(engine.device) / 1e9}


def _save(out: Path, step: int, engine: Engine) -> checkpoint.Checkpoint:
    def write(folder: Path) -> None:
        engine.save(folder)
        if engine.world.first:
            engine.task.save(folder)

    config, task = engine.config, engine.task
    facts = {
        "config": asdict(config), "data": task.fingerprint, "processes": engine.world.size, "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    return checkpoint.save(out, step, facts, write, keep=config.keep, world=engine.world)


def learning_rate(config: Config, step: int) -> float:
    names = ("steps", "lr", "min_lr", "warmup", "schedule", "cooldown")
    return schedule.learning_rate(step, **{name: getattr(config, name) for name in names})


def saved_config(out: Path) -> Config | None:
    """The config of the run in `out`, None if there is none. ValueError if run.json is something else's."""
    return Config.load(out / CONFIG) if (out / CONFIG).exists() else None


def _same(path: Path, what: str, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"{path} is of another run, its {what} differs: {'; '.join(differences)}. Choose another folder, or ask for the same"
        )

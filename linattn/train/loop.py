"""The training loop: data, engine, schedule, log and checkpoints meet here and nowhere else."""

import math
import shlex
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ..models import Decoder
from . import checkpoint, data, schedule, tokenizer
from .config import Config
from .engine import Engine, pick_device
from .log import Log, read
from .stop import Stop

CONFIG, LOG, TOKENIZER = "run.json", "log.csv", "tokenizer.json"
PATIENCE = 20  # steps in a row without a finite gradient before a run is given up: weights that overflow do not come back


class Run(NamedTuple):
    """What came of a run."""

    out: Path
    step: int
    rows: list[dict]  # of log.csv
    checkpoint: Path
    stopped_by: signal.Signals | None


def train(config: Config, out: Path, *, resume: str = "auto", command: str | None = None, console: Console | None = None) -> Run:
    """Train a decoder as `config` says, in folder `out`.

    resume   "auto": go on from the newest complete checkpoint of `out`, if there is one; "never": `out` must hold none
    command  what to type to go on after a stop. None: `linattn train --out OUT --resume auto`

    ValueError: a run of another config or other data is in `out`; or as `Config`, `data.load` and `Decoder` say.
    SaveError: the last checkpoint could not be written. FloatingPointError: PATIENCE steps in a row were not finite.
    """
    console = console or Console()
    say = lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True)
    engine, corpus, last = _open(config, out, resume, say)
    out.mkdir(parents=True, exist_ok=True)
    config.save(out / CONFIG)
    save = lambda step: _save(out, step, engine, corpus, config)
    step, bad = last.step if last else 0, 0
    with Stop() as stop, Log(out / LOG, console, start=step, steps=config.steps, title=config.variant) as log:
        if step == 0:
            log.row(step=0, tokens=0, bits_per_byte=evaluate(engine, corpus, config))
        while step < config.steps and not stop.signal:
            row = _step(engine, corpus, config, step)
            step = row["step"]
            log.row(**row)
            bad = bad + 1 if row["skipped"] else 0
            if bad == PATIENCE:
                raise FloatingPointError(
                    f"{bad} steps in a row up to step {step} had a loss or gradient that is not finite; try a lower lr than {config.lr}"
                )
            if step % config.save_every == 0 and step < config.steps and not stop.signal:
                try:
                    last = save(step)
                except checkpoint.SaveError as error:  # there may be room again by the next one
                    log.say(f"{error}; the run goes on")
        if last is None or last.step < step:
            last = save(step)
    stopped_by = stop.signal if step < config.steps else None
    if stopped_by:
        say(f"stopped by {stopped_by.name} at step {step} of {config.steps}; saved {last.path}")
        say(f"to go on: {command or f'linattn train --out {shlex.quote(str(out))} --resume auto'}")
    return Run(out, step, read(out / LOG), last.path, stopped_by)


def _open(config: Config, out: Path, resume: str, say) -> tuple[Engine, data.Corpus, checkpoint.Checkpoint | None]:
    """Engine and data as they were at the newest checkpoint of `out`, or at the start. Writes nothing."""
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be 'auto' or 'never'; got {resume!r}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder; {out} is a file")
    if config.threads:
        torch.set_num_threads(config.threads)
    device, found = pick_device(config.device), checkpoint.newest(out, say)
    if found and resume == "never":
        raise ValueError(f"{out} holds a run at step {found.step}: choose another folder, or resume='auto'")
    if found:
        _same(found.path, "config", Config.from_dict(found.facts["config"]).differences(config))
    corpus = data.load(
        config.data, tokenizer=tokenizer.load(found.path / TOKENIZER) if found else config.tokenizer,
        vocab_size=config.vocab_size, held_out=config.held_out, context=config.context,
    )  # fmt: skip
    if found and found.facts["data"] != corpus.fingerprint:
        _same(found.path, "data", [f"{corpus.source} is not the text it was trained on"])
    if found:
        engine = Engine(Decoder.from_pretrained(found.path, backend=config.backend), config, device)
        engine.restore(found.path)
        say(f"going on from {found.path}")
        if found.facts["threads"] != torch.get_num_threads():
            say(f"note: saved with {found.facts['threads']} threads, going on with {torch.get_num_threads()}: the last bits may differ")
    else:
        torch.manual_seed(data.derive("init", config.seed))
        sizes: dict[str, Any] = dict(variant=config.variant, vocab_size=len(corpus.tokenizer.pieces), **config.overrides)
        engine = Engine(Decoder.create(config.preset, backend=config.backend, **sizes), config, device)
    say(
        f"{config.preset} {config.variant}: {sum(p.numel() for p in engine.model.parameters()):,} parameters on {device}, "
        f"{torch.get_num_threads()} threads; {corpus.source}: {len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held out"
    )
    return engine, corpus, found


def _step(engine: Engine, corpus: data.Corpus, config: Config, step: int) -> dict[str, Any]:
    """Step `step`, counted from 0, and the row it gives the log."""
    began = time.perf_counter()
    lr, taken = learning_rate(config, step), config.batch * config.context
    torch.manual_seed(data.derive("step", config.seed, step))  # whatever a model draws is a function of the step too
    tokens = data.batch(corpus.train, context=config.context, rows=config.batch, seed=config.seed, step=step)
    outcome = engine.step(tokens, lr)
    rate, step = taken / (time.perf_counter() - began), step + 1
    due = step % config.eval_every == 0 or step == config.steps
    return dict(
        step=step, tokens=step * taken, loss=outcome.loss, grad_norm=outcome.grad_norm, lr=lr, tokens_per_s=rate,
        skipped=int(outcome.skipped), bits_per_byte=evaluate(engine, corpus, config) if due else "",
    )  # fmt: skip


def _save(out: Path, step: int, engine: Engine, corpus: data.Corpus, config: Config) -> checkpoint.Checkpoint:
    def write(folder: Path) -> None:
        engine.save(folder)
        corpus.tokenizer.save(folder / TOKENIZER)

    facts = {"config": asdict(config), "data": corpus.fingerprint, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return checkpoint.save(out, step, facts, write, keep=config.keep)


def evaluate(engine: Engine, corpus: data.Corpus, config: Config) -> float:
    """Bits per byte of held-out text: -Σ log2 p over the bytes the tokens stand for, the same windows every time."""
    windows = data.held_out_windows(corpus.held_out, context=config.context, count=config.eval_windows)
    lengths = torch.tensor([len(piece) for piece in corpus.tokenizer.pieces])
    nats = sum(float(engine.nats(rows).double().sum()) for rows in windows.split(config.batch))
    return nats / math.log(2) / int(lengths[windows[:, 1:]].sum())


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

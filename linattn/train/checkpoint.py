"""The only place that writes checkpoints: beside, synced, completed by a marker, then renamed. The newest complete one is never touched."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..models.storage import sync
from .world import World

MARKER, ALONE = "complete.json", World()
STEP = re.compile(r"step-(\d{8})")


class SaveError(OSError):
    """A checkpoint could not be written; the message says what is left."""


class Checkpoint(NamedTuple):
    path: Path
    step: int
    facts: dict  # what the writer wanted to know again: its config, the data's fingerprint, …


def save(root: Path, step: int, facts: dict, write: Callable[[Path], None], *, keep: int, world: World = ALONE) -> Checkpoint:
    """Have `write(folder)` fill a folder, make it `root/step-NNNNNNNN`, and remove all but the `keep` newest complete ones.

    All processes of `world` call it and write into the same folder; the first completes it once all have written. A crash, a kill or a
    full disk at any moment, in any of them, leaves the earlier checkpoints as they were. SaveError in all if the writing fails in one.
    """
    final, partial = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    stages: list[Callable[[], None]] = [
        lambda: _begin(root, partial),
        lambda: write(partial),
        lambda: _complete(root, step, facts, partial),
    ]
    for stage in stages:
        error = None
        if world.first or stage is stages[1]:
            try:
                stage()
            except Exception as caught:  # safetensors has an error of its own for a full disk, and a model may bring another
                error = caught
        said = world.all(error and f"{error}")  # all wait here for each other
        if any(said):
            if world.first:
                shutil.rmtree(partial, ignore_errors=True)
            left = newest(root, say=lambda message: None)
            rest = f"{left.path} is as it was" if left else "there is no earlier one"
            raise SaveError(f"could not save step {step} in {root}: {next(filter(None, said))}; {rest}") from error
    if world.first:
        complete = sorted((c for c in map(read, _folders(root)) if isinstance(c, Checkpoint)), key=lambda c: c.step)
        for old in complete[:-keep]:
            shutil.rmtree(old.path, ignore_errors=True)
    return Checkpoint(final, step, facts)


def _begin(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for entry in root.glob(".step-*"):  # what a kill during an earlier save, or a conversion, left
        shutil.rmtree(entry)
    partial.mkdir()


def _complete(root: Path, step: int, facts: dict, partial: Path) -> None:
    final = root / f"step-{step:08d}"
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()}
    for name in sizes:
        sync(partial / name)
    marker = partial / MARKER
    marker.write_text(json.dumps({"step": step, "files": sizes, "facts": facts}, indent=2) + "\n")
    sync(marker)
    sync(partial)
    if final.exists():  # torn, or it would have been found and resumed from
        shutil.rmtree(final)
    partial.rename(final)
    sync(root)


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint of `root`, or None; `say` is told of each torn one that is newer."""
    for folder in sorted(_folders(root), reverse=True):
        found = read(folder)
        if isinstance(found, Checkpoint):
            return found
        say(f"skipping {folder}: {found}")
    return None


def find(path: Path, say: Callable[[str], None]) -> Path:
    """The folder to load a model from: `path` itself, or the newest complete checkpoint of the run `path`. ValueError if there is none."""
    if not path.exists():
        raise ValueError(f"checkpoint: there is no {path}")
    if (path / MARKER).exists() or STEP.fullmatch(path.name):
        found = read(path)
        if isinstance(found, str):
            raise ValueError(f"checkpoint {path} is torn: {found}")
        return path
    found = newest(path, say)
    if found is None and not (path / "model.safetensors").exists():
        raise ValueError(f"checkpoint: {path} holds neither a model nor a complete checkpoint of a run")
    return found.path if found else path


def read(folder: Path) -> Checkpoint | str:
    """The checkpoint in `folder`, or what is wrong with it."""
    try:
        values = json.loads((folder / MARKER).read_text())
        step, files, facts = values["step"], values["files"], values["facts"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so its writing was cut short"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    for name, size in files.items():
        file = folder / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes where {size} were written"
    return Checkpoint(folder, step, facts)


def _folders(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if STEP.fullmatch(entry.name)] if root.is_dir() else []

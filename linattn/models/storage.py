"""The only place that knows a model's files: config.json and model.safetensors, in one folder."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import check_fields

C = TypeVar("C")
M = TypeVar("M", bound="Storable")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FLOATING = ("F64", "F32", "BF16", "F16")  # as safetensors calls them


class Storable(nn.Module):
    """A model made by `cls(config, backend=…)` of a frozen dataclass, which can be saved to a folder and read from it."""

    CONFIG_KIND: ClassVar[type]
    config: Any

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; see `linattn.models.storage.save`."""
        save(self, self.config, Path(folder))

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path, *, backend: str = "auto") -> M:
        """The model saved in `folder`, in the dtypes it was saved in. ValueError or FileNotFoundError says what is wrong with it."""
        config: Any = read_config(Path(folder), cls.CONFIG_KIND)
        with torch.random.fork_rng(devices=()):  # a start that is overwritten at once draws no one's numbers
            model = cls(config, backend=backend)
        load(model, config, Path(folder))
        return model


def save(model: nn.Module, config: Any, folder: Path) -> None:
    """Write both files beside their places, sync, and rename them into place. A full disk leaves what was there as it was: OSError says so.

    The weights carry the config too, so that files of two different saves are told apart.
    """
    text = json.dumps({"model_type": config.MODEL_TYPE, **asdict(config)}, indent=2) + "\n"
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    beside = {name: folder / f".{name}.partial" for name in (WEIGHTS, CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside[WEIGHTS], metadata={"format": "pt", "config": text})
        beside[CONFIG].write_text(text)
        for path in beside.values():
            sync(path)
    except (OSError, SafetensorError) as error:
        for path in beside.values():
            path.unlink(missing_ok=True)
        raise OSError(f"could not save the model in {folder}: {error}; what was there before is as it was") from error
    for name, path in beside.items():
        path.replace(folder / name)
    sync(folder)


def read_config(folder: Path, kind: type[C]) -> C:
    """The config of that kind in `folder`. FileNotFoundError for a missing folder or file, ValueError for one that is not ours."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to load a model from")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no model: {name} is missing")
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # of json, or of the text's encoding
        raise ValueError(f"{path} cannot be read: {error}") from None
    found = values.pop("model_type", None) if isinstance(values, dict) else f"no object but {type(values).__name__}"
    wanted = kind.MODEL_TYPE  # type: ignore[attr-defined]
    if found != wanted:
        raise ValueError(f"{path} is not of a {wanted.replace('_', ' ')}: model_type must be {wanted!r}; got {found!r}")
    check_fields(values, str(path), kind)
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def model_type(folder: Path) -> str | None:
    """What kind of model the config.json in `folder` says it is of; None where it does not."""
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None


def load(model: nn.Module, config: Any, folder: Path) -> None:
    """Give `model` the weights in `folder`, in the dtypes they have there. ValueError says which names, shapes or config fields differ."""
    path, parameters = folder / WEIGHTS, model.state_dict(keep_vars=True)  # parameters, and buffers that are saved
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            problems = _differences(slices, parameters)
            if problems:
                raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(problems)}")
            saved = json.loads((file.metadata() or {}).get("config", "{}"))
            asked = json.loads(json.dumps(asdict(config)))  # as JSON has it: a tuple is a list
            here = {name: value for name, value in asked.items() if name in saved and saved[name] != value}  # older ones lack fields
            there = {name: saved.get(name) for name in here}
            if here:
                raise ValueError(f"{path} and {CONFIG} are of different saves: {there} in the one, {here} in the other")
            for name, parameter in parameters.items():
                # not a new Parameter: the old one carries marks; a copy: how memory is aligned may decide the last bits of a product
                parameter.data = file.get_tensor(name).clone()
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from None


def _differences(slices: dict, parameters: dict[str, Tensor]) -> list[str]:
    """One line each for names that lack, names that are foreign, and tensors of another shape or kind."""
    some = lambda names: f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
    missing, foreign = [name for name in parameters if name not in slices], [name for name in slices if name not in parameters]
    lines = [f"it lacks {some(missing)}"] if missing else []
    lines += [f"it has besides {some(foreign)}"] if foreign else []
    for name, parameter in parameters.items():
        if name in slices and (shape := tuple(slices[name].get_shape())) != tuple(parameter.shape):
            lines.append(f"{name} must be {tuple(parameter.shape)}; got {shape}")
        if name in slices and parameter.is_floating_point() and slices[name].get_dtype() not in FLOATING:
            lines.append(f"{name} must be of {FLOATING}; got {slices[name].get_dtype()}")
    return lines


def sync(path: Path) -> None:
    """What was written to the file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

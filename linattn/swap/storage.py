"""The only place that knows a swapped model's files: under a model_type of ours, so that nobody loads softmax attention unawares."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .find import swapped_of
from .swap import MARK, swap_attention

MODEL_TYPE = "linattn_swapped"
CONFIG, WEIGHTS = "config.json", "linattn.safetensors"


def save_swapped(model: Any, folder: str | Path, **options: Any) -> None:
    """Write config.json and linattn.safetensors to `folder`.

    Of `options`, those of transformers' `save_pretrained`, state_dict and is_main_process are heeded; push_to_hub=True is refused.

    The config is of model_type "linattn_swapped", and the file of weights not called as transformers calls it: plain transformers
    fails to load it, instead of loading softmax attention.
    ValueError for a model that is not of transformers, or swapped with a Variant that has no name to be found by.
    """
    spec, _ = owner_mark(model)
    if options.get("push_to_hub"):
        raise ValueError("push_to_hub=True: a swapped model is saved to a folder only; upload that folder")
    if not options.get("is_main_process", True):
        return
    if spec["variant"] is None:
        raise ValueError(
            "a model swapped with a Variant of your own cannot be saved: its functions have no names; save a state_dict yourself"
        )
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"linattn_version": sys.modules[__name__.partition(".")[0]].__version__, "transformers_version": transformers.__version__}
    values = {
        "model_type": MODEL_TYPE, "architectures": [type(model).__name__], **versions, "swap": spec, "host": model.config.to_dict(),
    }  # fmt: skip
    state, tensors, known = options.get("state_dict") or model.state_dict(), {}, set()
    for name, tensor in state.items():
        if (key := (tensor.data_ptr(), tensor.shape)) not in known or not tensor.numel():  # tied weights once
            tensors[name] = tensor.detach().contiguous()
        known.add(key)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2, default=str) + "\n")
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)


def from_pretrained(folder: str | Path, *, backend: str = "auto", dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
    """The swapped model that `model.save_pretrained(folder)` wrote, in evaluation mode, in the dtypes it was saved in or in `dtype`.

    FileNotFoundError for a missing folder or file, ValueError for files that are not of a swapped model or do not fit each other.
    """
    folder = Path(folder)
    model = unloaded(folder, backend=backend)
    tensors = load_file(folder / WEIGHTS)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in tensors:
            parameter.data = parameter.data.to(tensors[parameter_name].dtype)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {key for key in missing if any(p is model.get_parameter(key) for n, p in _parameters(model) if n in tensors)}
    if unexpected or set(missing) - tied:
        raise ValueError(f"{folder / WEIGHTS} does not fit: it lacks {sorted(set(missing) - tied)[:5]}, and has besides {unexpected[:5]}")
    if (folder / "generation_config.json").exists():
        import transformers

        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.to(device=device, dtype=dtype)


def unloaded(folder: Path, *, backend: str = "auto") -> Any:
    """The model that `folder` describes, swapped, at a random start and in evaluation mode. Errors as of `from_pretrained`."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no swapped model: {name} is missing")
    values = json.loads((folder / CONFIG).read_text())
    if (found := values.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"{folder / CONFIG} is not of a swapped model: model_type must be {MODEL_TYPE!r}; got {found!r}")
    import transformers

    (name,) = values["architectures"]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{folder / CONFIG}: transformers {transformers.__version__} has no class {name}")
    model = kind(kind.config_class.from_dict(values["host"])).eval()
    swap_quietly(model, dict(values["swap"]), backend)
    return model


def swap_quietly(model: nn.Module, spec: dict, backend: str) -> None:
    """The swap that `spec` records, without the notes it was made with."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        swap_attention(model, spec.pop("variant"), backend=backend, **spec)


def owner_mark(model: nn.Module) -> tuple[dict, list]:
    swapped_of(model)
    for module in model.modules():
        if MARK in module.__dict__:
            return module.__dict__[MARK]
    raise ValueError("save the model that swap_attention was called on, not a part of it or a wrapper around it")


def _parameters(model: nn.Module):
    return model.named_parameters(remove_duplicate=False)

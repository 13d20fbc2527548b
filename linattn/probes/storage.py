"""Traces on disk: one safetensors file, tensors under `layer/piece/field`, everything else as JSON in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..ops import State
from .plan import Piece
from .report import Report, report
from .trace import Trace

FORMAT = "linattn-trace-1"


def save(traces: dict[str, Trace], path: str | Path) -> Path:
    """Write every trace. In a process group of several, each rank its own file: NAME.rank0.safetensors, …  Returns the path written.
    ValueError where nothing was kept.
    """
    from safetensors.torch import save_file

    if not traces:
        raise ValueError("nothing was kept: no forward has run inside the block")
    path = Path(path)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        path = path.with_suffix(f".rank{torch.distributed.get_rank()}{path.suffix}")
    tensors, layers = {}, {}
    for name, trace in traces.items():
        pieces = []
        for i, piece in enumerate(trace.pieces):
            pieces.append({"start": piece.start, "length": piece.length})
            for field, value in piece._asdict().items():
                parts = {f"{field}.kv": value.kv, f"{field}.z": value.z} if isinstance(value, State) else {field: value}
                tensors |= {f"{name}/{i}/{part}": x for part, x in parts.items() if isinstance(x, torch.Tensor)}
        conv = trace._conv
        tensors |= {f"{name}/conv/{part}": x for part, x in (conv or {}).items() if isinstance(x, torch.Tensor)}
        layers[name] = {
            "keep": trace.keep, "stride": trace.stride, "how": trace.how, "edited": trace.edited, "pieces": pieces,
            "conv": None if conv is None else conv["width"],
        }  # fmt: skip
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    save_file(tensors, path, {"format": FORMAT, "layers": json.dumps(layers)})
    return path


def load(path: str | Path) -> "Traces":
    """The traces that `save` wrote. ValueError if the file is none of its."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is no file of traces: its format must be {FORMAT!r}; got {about.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of traces: {error}") from None
    found = {}
    for name, layer in json.loads(about["layers"]).items():
        pieces = []
        for i, piece in enumerate(layer["pieces"]):
            get: Any = lambda field, i=i, name=name: tensors.get(f"{name}/{i}/{field}")
            state = lambda field, get=get: None if get(f"{field}.kv") is None else State(get(f"{field}.kv"), get(f"{field}.z"))
            fields = {field: state(field) if field in ("before", "final", "boundaries") else get(field) for field in Piece._fields[2:]}
            pieces.append(Piece(piece["start"], piece["length"], **fields))
        conv = None if layer["conv"] is None else {part: tensors.get(f"{name}/conv/{part}") for part in ("final", "inputs", "before")}
        if conv is not None:
            conv["width"] = layer["conv"]
        found[name] = Trace(name, tuple(layer["keep"]), layer["stride"], pieces, layer["how"], edited=layer["edited"], conv=conv)
    return Traces(found)


class Traces:
    """Traces by layer, as a probe has them: `traces[name]`, `traces[0]`, or a pattern of one name; iterating gives names."""

    def __init__(self, traces: dict[str, Trace]):
        self._traces = traces

    def traces(self) -> dict[str, Trace]:
        return self._traces

    def __iter__(self):
        return iter(self.traces())

    def __len__(self) -> int:
        return len(self.traces())

    def __contains__(self, name: object) -> bool:
        return name in self.traces()

    def __getitem__(self, layer: str | int) -> Trace:
        from .points import match

        traces = self.traces()
        names = match(layer, list(traces), "layer")
        if len(names) > 1:
            raise ValueError(f"layer must name one layer; {layer!r} matches {names}")
        return traces[names[0]]

    def save(self, path: str | Path) -> Path:
        return save(self.traces(), path)

    def report(self, *, against: Mapping[str, Report] | None = None) -> Report:
        """One row per layer and head, of what was kept: half-life, ranks, norm, writes, delta rule, bytes. Prints as a table.

        against: controls by name, as {"untrained model": u.report()} of a probe of `untrained(model)` on the same input. Without it the
        table says that it has none.
        """
        return report(self.traces(), against)

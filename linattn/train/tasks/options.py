"""The only place that reads a task's options into a dataclass of the task's own."""

from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


def read(kind: type[T], values: dict[str, object], task: str) -> T:
    """`kind(**values)`. ValueError that lists the options there are, or names one of another type than its default's."""
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"the task {task} has no option {', '.join(map(repr, unknown))}; there are {list(known)}")
    for name, value in values.items():
        wanted = (int, float) if isinstance(known[name], float) else type(known[name])
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{name} must be of the type of {known[name]!r}; got {value!r}")
    return kind(**values)

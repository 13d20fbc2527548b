"""What a swap did, or would do: one row for each attention module, printed as a table, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Row:
    """One attention module of the model."""

    name: str
    old: str  # class
    new: str  # class, or ""
    heads: str = ""  # of queries / of keys
    width: int = 0  # of a head
    causal: bool = False
    rotary: bool = False
    added: int = 0  # parameters
    status: str = "swapped"  # | kept
    reason: str = ""


@dataclass
class SwapReport:
    """`print(report)` shows the table; `undo()` puts the original modules back."""

    model: nn.Module = field(repr=False)
    rows: list[Row]
    notes: list[str]
    done: bool  # False: a dry run

    @property
    def swapped(self) -> list[str]:
        return [row.name for row in self.rows if row.status == "swapped"]

    @property
    def kept(self) -> dict[str, str]:
        """Names and reasons."""
        return {row.name: row.reason for row in self.rows if row.status == "kept"}

    def parameters(self, which: Literal["added", "attention"] = "added") -> dict[str, nn.Parameter]:
        """Parameters of the swapped modules by their names in the model: what the swap added, or all. ValueError after a dry run."""
        from .find import swapped_of

        if which not in ("added", "attention"):
            raise ValueError(f"which must be 'added' or 'attention'; got {which!r}")
        of = lambda module: module.added() if which == "added" else dict(module.named_parameters())
        return {f"{name}.{key}": p for name, module in swapped_of(self.model).items() for key, p in of(module).items()}

    def undo(self, names: Sequence[str] | None = None) -> None:
        """Put the original modules back, all or those of `names`: the model answers bitwise as before, unless its weights were trained."""
        from .swap import undo

        undo(self.model, names)

    def __str__(self) -> str:
        head = ("module", "was", "is", "heads", "width", "causal", "rope", "added", "status")
        yes = lambda flag: "yes" if flag else "no"
        lines = [head] + [
            (
                row.name, row.old, row.new or "-", row.heads or "-", str(row.width or "-"), yes(row.causal), yes(row.rotary),
                f"{row.added:,}",
                row.status + (f": {row.reason}" if row.reason else ""),
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*lines)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        added = sum(row.added for row in self.rows)
        did = "swapped" if self.done else "would be swapped (dry run)"
        return "\n".join(
            [*text, f"{len(self.swapped)} of {len(self.rows)} {did}, {added:,} parameters added", *(f"note: {n}" for n in self.notes)]
        )

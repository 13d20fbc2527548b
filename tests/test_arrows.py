"""Imports follow the arrows: a cycle, a shortcut or a peek upstairs fails here, not in review."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "linattn"
ROOMS = {  # room: the rooms that it may import, besides itself
    "reference": set(),
    "ops": {"reference", "build"},
    "layers": {"ops", "reference"},
    "models": {"layers", "ops", "reference"},
    "swap": {"layers", "ops", "reference"},
    "probes": {"ops", "reference"},
    "train": {"models", "swap"},  # a model is a callable with parameters: no attention of any kind
    "build": set(),  # the standard library alone
}
DOORS = {"__init__", "__main__", "cli", "info"}  # on the outside of the house: they may import anything


def imported(source: str, here: tuple[str, ...]) -> set[str]:
    """First names below linattn that the source of module `here` imports, absolutely or relatively; "" for the package itself."""
    paths = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = [*here[: len(here) - node.level], *(node.module or "").split(".")] if node.level else node.module.split(".")
            paths += [[*filter(None, stem), alias.name] for alias in node.names]
    return {path[1] if len(path) > 1 else "" for path in paths if path[0] == "linattn"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    room = here[1]
    assert room in ROOMS or room in DOORS, f"{room} is no room of the house; there are {sorted(ROOMS)}"
    if room in ROOMS:
        assert imported(path.read_text(), here) <= {room} | ROOMS[room]


def test_a_wrong_import_is_seen():
    seen = imported(
        "import linattn\nfrom ..models import x\nfrom .. import layers\nimport linattn.swap.y, torch", ("linattn", "ops", "cpu")
    )
    assert seen == {"", "models", "layers", "swap"}

"""ListOps: values against an evaluation of the symbols, sizes kept, the same for the same seed, and a file that a classifier trains on."""

from dataclasses import replace
from statistics import median

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from linattn.cli import app
from linattn.train import images, listops, recipes, train

SMALL = dict(lengths=(8, 40), max_depth=3, max_args=4)


def read(symbols: list[str]) -> tuple[int, int, int]:
    """Value, depth and most arguments of an expression, by a stack, from nothing but its symbols."""
    stack, depth, most = [[]], 0, 0
    for symbol in symbols:
        if symbol.startswith("["):
            stack.append([symbol])
            depth = max(depth, len(stack) - 1)
        elif symbol == "]":
            name, *values = stack.pop()
            most = max(most, len(values))
            assert len(values) >= 2
            middle = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(median(v)), "[SM": lambda v: sum(v) % 10}
            stack[-1].append(middle[name](values))
        else:
            stack[-1].append(int(symbol))
    assert len(stack) == 1 and len(stack[0]) == 1
    return stack[0][0], depth, most


def test_values_and_sizes():
    expressions, values = listops.draw(500, seed=1, **SMALL)
    found = [read(symbols) for symbols in expressions]
    assert [value for value, _, _ in found] == values
    assert {len(symbols) for symbols in expressions} <= set(range(8, 41))
    assert max(depth for _, depth, _ in found) == 3 and max(most for _, _, most in found) == 4
    assert len({tuple(symbols) for symbols in expressions}) == 500
    assert {symbol for symbols in expressions for symbol in symbols} == set(listops.SYMBOLS)
    assert len(set(values)) == 10


def test_long_ones_by_default():
    expressions, values = listops.draw(3, seed=2)
    assert all(500 <= len(symbols) <= 2000 for symbols in expressions)
    assert [read(symbols)[0] for symbols in expressions] == values


def test_a_seed_is_a_set():
    assert listops.draw(20, seed=3, **SMALL) == listops.draw(20, seed=3, **SMALL)
    assert listops.draw(20, seed=3, **SMALL) != listops.draw(20, seed=4, **SMALL)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(lengths=(3, 40)), "4 ≤ shortest ≤ longest; got"),
        (dict(lengths=(40, 8)), "4 ≤ shortest ≤ longest; got"),
        (dict(max_args=1), "max_args must be at least 2; got 1"),
        (dict(max_depth=0), "max_depth must be at least 1; got 0"),
        (dict(lengths=(5, 6), max_args=2, max_depth=1), "different expressions"),  # one of two arguments has 4 symbols
    ],
)
def test_what_cannot_be_made(sizes, message, monkeypatch):
    monkeypatch.setattr(listops, "TRIES", 1000)
    with pytest.raises(ValueError, match=message):
        listops.draw(10, **SMALL | sizes)


def test_command_writes_what_a_classifier_reads(tmp_path):
    path = tmp_path / "listops.npz"
    done = CliRunner().invoke(app, f"data listops {path} --count 60 --lengths 8 24 --max-depth 2 --max-args 3 --seed 5".split())
    assert done.exit_code == 0, done.output
    expressions, values = listops.draw(60, seed=5, lengths=(8, 24), max_depth=2, max_args=3)
    with np.load(path) as file:
        assert file["images"].shape == (60, len(listops.SYMBOLS), 1, 24) and file["labels"].tolist() == values
        at = file["images"][7, :, 0].argmax(0)[: len(expressions[7])]
        assert [listops.SYMBOLS[i] for i in at] == expressions[7]
        assert not file["images"][7, :, 0, len(expressions[7]) :].any()
    config = replace(
        recipes.image(steps=2),
        data=(str(path),),
        overrides=dict(patch_size=1, num_layers=1, dim=16),
        options=dict(shift=0),
        batch=4,
        threads=1,
    )
    assert images.load("", config.data, config.held_out).train[0].shape[1:] == (15, 1, 24)
    assert train(config, tmp_path / "run", console=Console(quiet=True)).step == 2


def test_command_says_what_is_wrong(tmp_path):
    done = CliRunner().invoke(app, f"data listops {tmp_path / 'none' / 'a.npz'} --count 5".split())
    assert done.exit_code == 2 and "folder" in done.output

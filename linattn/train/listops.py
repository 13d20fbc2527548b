"""The only place that makes ListOps: nested operations on digits, whose value is the label. arXiv:1804.06028; sizes of arXiv:2011.04006."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

DIGITS, END = "0123456789", "]"
OPERATIONS: dict[str, Callable[[list[int]], int]] = {  # of two or more digits, each to a digit
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda digits: int(np.median(digits)),  # of an even number: the mean of the middle two, rounded down
    "[SM": lambda digits: sum(digits) % 10,
}
SYMBOLS = (*DIGITS, *OPERATIONS, END)
NESTED = 0.25  # of the arguments are operations themselves
TRIES = 100_000  # expressions drawn before a range of lengths counts as out of reach


def expression(draw: random.Random, *, max_depth: int = 10, max_args: int = 10, longest: int = 2000) -> tuple[list[str], int] | None:
    """Symbols and value of an operation on 2 to max_args arguments, up to max_depth deep; None: it would exceed `longest` symbols."""
    symbols: list[str] = []

    def value(depth: int) -> int:
        name = draw.choice(tuple(OPERATIONS))
        symbols.append(name)
        found = []
        for _ in range(draw.randint(2, max_args)):
            if len(symbols) >= longest:
                raise OverflowError
            if depth < max_depth and draw.random() < NESTED:
                found.append(value(depth + 1))
            else:
                found.append(int(digit := draw.choice(DIGITS)))
                symbols.append(digit)
        symbols.append(END)
        return OPERATIONS[name](found)

    try:
        result = value(1)
    except OverflowError:
        return None
    return (symbols, result) if len(symbols) <= longest else None


def draw(
    count: int, *, seed: int = 0, lengths: tuple[int, int] = (500, 2000), max_depth: int = 10, max_args: int = 10
) -> tuple[list[list[str]], list[int]]:
    """`count` different expressions of a number of symbols in `lengths`, both included, and their values; the same for the same arguments.

    ValueError for sizes that no expression has, or that are not met in TRIES expressions.
    """
    shortest, longest = lengths
    for name, number, least in (("count", count, 1), ("max_depth", max_depth, 1), ("max_args", max_args, 2)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}; got {number}")
    if not 4 <= shortest <= longest:
        raise ValueError(f"lengths must be 4 ≤ shortest ≤ longest; got {lengths}")
    source, idle = random.Random(seed), 0
    found: dict[tuple[str, ...], int] = {}
    while len(found) < count:
        made = expression(source, max_depth=max_depth, max_args=max_args, longest=longest)
        if made is None or len(made[0]) < shortest or tuple(made[0]) in found:
            idle += 1
            if idle == TRIES:
                raise ValueError(
                    f"lengths {lengths} with max_depth={max_depth} and max_args={max_args} gave {len(found)} different expressions "
                    f"of {count}, and no further one in {TRIES:,} tries"
                )
            continue
        idle, found[tuple(made[0])] = 0, made[1]
    return [list(symbols) for symbols in found], list(found.values())


def one_hot(expressions: list[list[str]], longest: int) -> np.ndarray:
    """uint8 [N len(SYMBOLS) 1 longest], 255 where the symbol stands and zeros behind its end: an "image" of one row for `images.load`."""
    pixels = np.zeros((len(expressions), len(SYMBOLS), 1, longest), dtype=np.uint8)
    number = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    for row, symbols in zip(pixels, expressions, strict=True):
        row[[number[symbol] for symbol in symbols], 0, range(len(symbols))] = 255
    return pixels


def save(path: Path, count: int, *, seed: int = 0, lengths: tuple[int, int] = (500, 2000), max_depth: int = 10, max_args: int = 10) -> None:
    """What `draw` makes, as the .npz file that `linattn train --recipe image` reads; there it takes 60 bytes per symbol of room."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"out must be a file in a folder that is there; got {path}")
    expressions, values = draw(count, seed=seed, lengths=lengths, max_depth=max_depth, max_args=max_args)
    with path.open("wb") as file:
        np.savez_compressed(file, images=one_hot(expressions, lengths[1]), labels=np.array(values))

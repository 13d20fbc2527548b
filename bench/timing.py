"""The only place that reads a clock: sides timed in turn, A B C A B C …, within a budget.

Facts this rests on: a side timed alone rides boost clocks and its own warm caches, so sides take turns; the whole call is timed, the
allocation (page faults) and the release of its outputs included, because that is what a caller pays; the garbage collector is off.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

KEEP_FIRST = 1.0  # seconds: a first call this long is a sample, for what it warms up is small beside it
WARM_UP = 0.1  # seconds: a first call shorter than this is no measure of the cost, two more are made


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a side may take. All times in seconds."""

    seconds: float  # wanted for the samples of one side
    least: int = 3  # samples, where they fit into `patience`
    most: int = 400
    patience: float  # for the samples of one side that is slow
    cap: float  # a side whose single call is expected to take longer is left out

    def samples(self, cost: float) -> int:
        """How many samples of a side whose call takes `cost` seconds."""
        wanted = min(max(int(self.seconds / max(cost, 1e-9)), self.least), self.most)
        return max(1, min(wanted, int(self.patience / max(cost, 1e-9))))


def schedule(counts: Sequence[int]) -> Iterator[int]:
    """Which side runs next: side i in all `counts[i]` times, spread evenly over the rounds, each round starting one side later."""
    rounds, n = max(counts, default=0), len(counts)
    for r in range(rounds):
        for i in ((r + j) % n for j in range(n)):
            if (r + 1) * counts[i] // rounds > r * counts[i] // rounds:
                yield i


def take_turns(sides: Sequence[Callable[[], object]], budget: Budget, clock: Callable[[], int] = time.perf_counter_ns) -> list[list[float]]:
    """Milliseconds of every call of every side, warm-up left out."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        samples, counts = [], []
        for side in sides:
            first = _milliseconds(side, clock)
            slow = first >= 1e3 * KEEP_FIRST
            samples.append([first] if slow else [])
            cost = min(_milliseconds(side, clock) for _ in range(2)) if first < 1e3 * WARM_UP else first
            counts.append(budget.samples(cost / 1e3) - slow)
        for i in schedule(counts):
            samples[i].append(_milliseconds(sides[i], clock))
    finally:
        if collecting:
            gc.enable()
    return samples


def _milliseconds(side: Callable[[], object], clock: Callable[[], int]) -> float:
    start = clock()
    side()  # the result is dropped here, inside the measured time
    return (clock() - start) / 1e6


def quantile(samples: Sequence[float], p: float) -> float:
    """Linear between the two samples around rank p · (n − 1)."""
    if not samples:
        raise ValueError(f"samples must hold at least one time; got {samples!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1]; got {p}")
    ordered, rank = sorted(samples), p * (len(samples) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])

"""Turns, budgets and quantiles, on a clock of our own."""

import gc
import itertools
from collections import Counter

import pytest

from bench.timing import Budget, quantile, schedule, take_turns


class Clock:
    """A clock that only sides move: each call of a side costs what it is given."""

    def __init__(self):
        self.now, self.order = 0, []

    def __call__(self) -> int:
        return self.now

    def side(self, name: str, *seconds: float):
        costs = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run():
            self.order.append(name)
            self.now += int(1e9 * next(costs))

        return run


def budget(**changes) -> Budget:
    return Budget(**{"seconds": 1.0, "least": 3, "most": 10, "patience": 8.0, "cap": 100.0, **changes})


def test_sides_of_equal_cost_alternate():
    rounds = [list(schedule([4, 4, 4]))[i : i + 3] for i in range(0, 12, 3)]
    assert rounds == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("counts", ([5], [1, 9], [7, 3, 100], [2, 0, 5], [1, 1, 1]))
def test_every_side_gets_its_count_and_none_waits_for_the_end(counts):
    order = list(schedule(counts))
    assert Counter(order) == Counter({i: n for i, n in enumerate(counts) if n})
    for i, n in enumerate(counts):
        places = [place for place, side in enumerate(order) if side == i]
        gaps = [b - a for a, b in itertools.pairwise([-1, *places])]
        assert not n or max(gaps) <= -(-len(order) // n) + len(counts), f"side {i} of {counts} is bunched: {places}"


def test_schedule_of_nothing_is_empty():
    assert list(schedule([])) == []


def test_samples_follow_the_cost_of_a_call():
    assert budget().samples(0.2) == 5
    assert budget().samples(1e-9) == 10  # most
    assert budget().samples(2.0) == 3  # least
    assert budget().samples(5.0) == 1  # patience before least
    assert budget().samples(50.0) == 1  # and never none


def test_warm_up_is_left_out_unless_it_is_long():
    clock = Clock()
    fast = clock.side("fast", 0.09, 0.01)  # the first call loads what the others find
    slow = clock.side("slow", 2.0)
    times = take_turns([fast, slow], budget(), clock)
    assert times[0] == pytest.approx([10.0] * 10)
    assert times[1] == pytest.approx([2000.0] * 3)
    assert clock.order.count("slow") == 3  # its first call is one of its samples


def test_sides_take_turns():
    clock = Clock()
    take_turns([clock.side(name, 0.25) for name in "ABC"], budget(), clock)
    assert "".join(clock.order[-12:]) == "ABCBCACABABC"


def test_the_collector_is_off_while_timing_and_on_again_after_an_error():
    seen = []

    def fails():
        seen.append(gc.isenabled())
        raise RuntimeError("side")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="side"):
        take_turns([fails], budget())
    assert seen == [False] and gc.isenabled()


def test_a_real_clock_measures_a_real_wait():
    import time

    (times,) = take_turns([lambda: time.sleep(0.01)], budget(seconds=0.05))
    assert len(times) >= 3 and all(10 <= t < 1000 for t in times)


@pytest.mark.parametrize(
    "samples, p, wanted",
    (
        ([3.0], 0.2, 3.0),
        ([4.0, 2.0], 0.5, 3.0),
        ([5, 1, 2, 4, 3], 0.5, 3),
        ([0, 10], 0.8, 8.0),
        ([1, 2, 3, 4, 5, 6], 0.2, 2.0),
        ([1, 2], 1, 2),
    ),
)
def test_quantile(samples, p, wanted):
    assert quantile(samples, p) == pytest.approx(wanted)


def test_quantile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="samples must hold at least one time"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]; got 50"):
        quantile([1.0], 50)

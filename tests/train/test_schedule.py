"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest

from linattn.train.schedule import SCHEDULES, learning_rate

RUN = dict(steps=200, lr=2.0, min_lr=0.1, warmup=20, cooldown=0.25)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rises_then_never_rises_again(schedule):
    rates = [learning_rate(step, schedule=schedule, **RUN) for step in range(RUN["steps"])]
    assert rates[0] == pytest.approx(2.0 / 20) and rates[19] == 2.0
    assert all(a < b for a, b in pairwise(rates[:20]))
    assert all(a >= b for a, b in pairwise(rates[19:]))
    assert min(rates[20:]) >= 0.1 * 2.0


@pytest.mark.parametrize("schedule, middle, last", [("cosine", 1.1, 0.2), ("wsd", 2.0, 0.2), ("linear", 1.1, 0.2), ("constant", 2.0, 2.0)])
def test_middle_and_end(schedule, middle, last):
    assert learning_rate(110, schedule=schedule, **RUN) == pytest.approx(middle)
    assert learning_rate(199, schedule=schedule, **RUN) == pytest.approx(last, abs=0.05)


def test_wsd_falls_only_in_its_cooldown():
    rates = [learning_rate(step, schedule="wsd", **RUN) for step in range(200)]
    assert rates[154] == 2.0 and rates[156] < 2.0  # three quarters of the 180 steps after the warm-up


def test_no_warmup_starts_at_the_top():
    assert learning_rate(0, schedule="cosine", **RUN | {"warmup": 0}) == 2.0

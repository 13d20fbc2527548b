"""A few timings for pytest-benchmark, to compare two commits: `pytest tests/bench/test_cpu_benchmark.py -m slow --benchmark-autosave`."""

import pytest
import torch

from bench import peers
from bench.cases import Inputs

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def plain_memory():
    """The poison that other tests find in fresh memory costs time."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("call", (0, 1), ids=("forward", "forward+backward"))
@pytest.mark.parametrize("form", ("scalar", "channel", "delta", "bidirectional"))
def test_operator(benchmark, form, call):
    benchmark(peers.operator(form, Inputs.create(B=1, T=1024), "auto")[call].run)


@pytest.mark.parametrize("states", (8, 512))
def test_step(benchmark, states):
    benchmark(peers.step("scalar", states, "auto")[0].run)

"""The only place for what holds in every test: threads, poisoned memory, and where a GPU test runs."""

import pytest
import torch


def pytest_configure(config):
    # Every torch.empty, in C++ too, comes filled with NaN: an output that a kernel forgets to write cannot pass.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)  # before the fixtures, whatever the test before it has set
def pytest_runtest_setup(item):
    # Two for the operator: its splits over threads are tested on any machine. One for all else, whose tensors are too small to share.
    torch.set_num_threads(2 if item.path.parent.name == "ops" else 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

"""The only place for what holds in every test: threads, poisoned memory, and where a GPU test runs."""

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(2)  # the kernels' splits over threads are tested on any machine, and figures do not depend on its size
    # Every torch.empty, in C++ too, comes filled with NaN: an output that a kernel forgets to write cannot pass.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

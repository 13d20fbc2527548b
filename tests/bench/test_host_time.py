"""What the host does per launch is counted without a GPU."""

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench import host


def test_a_call_goes_through_triton_up_to_the_driver():
    found = host.measure("delta, cut", repeats=3)
    assert [side["launches"] for side in found.values()] == [3, 4]
    assert all(0 < side["launching"] < side["us"] and side["by triton"] > 0 for side in found.values())

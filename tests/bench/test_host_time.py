"""What the host does per launch is counted without a GPU."""

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench import host


def test_a_call_goes_through_triton_up_to_the_driver():
    found = host.measure("delta, cut", repeats=3)
    assert found["forward launches"] == 4 and found["backward launches"] == 6
    assert all(0 < found[f"{side} triton us"] < found[f"{side} us"] for side in ("forward", "backward"))

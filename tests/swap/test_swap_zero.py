"""Attention transfer under DeepSpeed ZeRO-3, where every parameter but the new ones is frozen and none lies whole in memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None, reason="no deepspeed or transformers"
)


@pytest.mark.slow
def test_transfer_with_frozen_parameters():
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", here / "zero3.py"], capture_output=True, text=True, env={**environment, "PATH": path}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("window ") == 2

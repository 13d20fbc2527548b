"""The Triton kernels, in Triton's interpreter: a process of its own, because the interpreter has to be on before Triton is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).with_name("in_interpreter.py")
PARITY = Path(__file__).with_name("beside_fla.py")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_fla = pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed")


def interpret(file: Path, *options: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(file.parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_kernels_against_the_oracle():
    interpret(INSIDE, "-m", "not slow")


@needs_triton
@pytest.mark.slow
def test_kernels_against_the_oracle_in_full():
    interpret(INSIDE, "-m", "slow")


@needs_triton
@needs_fla
@pytest.mark.slow
def test_kernels_beside_those_of_fla():
    interpret(PARITY)

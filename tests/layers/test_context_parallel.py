"""Context parallelism: a sequence that lies on several processes gives what it gives on one, forwards and backwards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linattn import Decoder
from linattn.layers.context_parallel import shard_sequence


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_give_what_the_whole_gives(processes):
    script = str(Path(__file__).parent / "in_parts.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), script]
    root = str(Path(__file__).parent.parent.parent)
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 8


def test_what_needs_the_whole_sequence_is_refused():
    with pytest.raises(ValueError, match=r"cannot split blocks.1.attention: softmax attends to the keys of all parts"):
        shard_sequence(Decoder.create("tiny", vocab_size=8, softmax_every=2), None)
    with pytest.raises(ValueError, match="Linear has none"):
        shard_sequence(torch.nn.Linear(2, 2), None)

"""What a run takes, said beforehand."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linattn import Decoder
from linattn.train import Config
from linattn.train.estimate import bytes_per_process, dry_run, flops_per_token


@pytest.mark.parametrize("variant, tied", [("gla", True), ("retnet", False)])
def test_the_flops_of_the_matrices_are_those_that_torch_counts(variant, tied):
    T = 64
    model = Decoder.create("tiny", vocab_size=100, variant=variant, dim=64, num_layers=2, tie_embeddings=tied)
    with FlopCounterMode(display=False) as counter:  # it does not know our operator, and counts all but the states
        model(torch.zeros(1, T, dtype=torch.long))[0].sum().backward()
    states = sum(block.attention.flops_per_token(T) for block in model.blocks)
    assert states > 0 and (flops_per_token(model, T) - states) * T == counter.get_total_flops()


def test_attention_to_all_keys_grows_with_their_number():
    model = Decoder.create("tiny", vocab_size=100, variant="softmax")
    assert flops_per_token(model, 2000) - flops_per_token(model, 1000) == 4 * 6 * 1000 * 128  # layers · (2 + 4) · T · dim
    assert flops_per_token(torch.nn.Linear(10, 10, bias=False), 5) == 600


def test_memory_is_shared_out_as_zero_says():
    config, n = Config(zero=0), 1_000_000
    per = lambda stage, precision="float32": bytes_per_process(n, replace(config, zero=stage, precision=precision), 4)
    assert per(0) == dict(weights=4e6, gradients=4e6, optimizer=8e6)
    assert per(1) == dict(weights=4e6, gradients=4e6, optimizer=2e6)
    assert per(2) == dict(weights=4e6, gradients=1e6, optimizer=2e6)
    assert per(3) == dict(weights=1e6, gradients=1e6, optimizer=2e6)
    assert sum(per(0, "bfloat16").values()) == sum(per(0).values()) and per(3, "bfloat16")["optimizer"] == 3e6


def test_a_dry_run_trains_nothing(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("some words " * 40 + str(i))
    config = Config(data=(str(tmp_path),), context=16, batch=8, steps=10, held_out=0.3, zero=2)
    said = "\n".join(dry_run(config, torch.device("cpu"), 4))
    assert "tiny gla, 898,816 parameters" in said and "10 of 128 tokens, 1,280 in all" in said and "in each of 4" in said
    assert re.search(r"time +0\.0 hours, if each process reaches 40% of a product of matrices, .* FLOP/s", said)
    with pytest.raises(ValueError, match="4 processes need zero"):
        dry_run(replace(config, zero=None), torch.device("cpu"), 4)
    with pytest.raises(ValueError, match="batch must be a multiple"):
        dry_run(config, torch.device("cpu"), 3)

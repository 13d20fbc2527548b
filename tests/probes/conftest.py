"""The small models that the tests of probes share."""

from copy import deepcopy
from functools import cache

import pytest
import torch

from linattn import Decoder


@cache
def made(variant, **overrides):
    torch.manual_seed(1)
    options = dict(vocab_size=32, dim=32, num_layers=2, num_heads=2) | overrides
    model = Decoder.create("tiny", variant=variant, **options)
    with torch.no_grad():
        model(torch.randint(0, 32, (2, 50)))  # a hash is fitted by its first batch, which takes a second
    return model.eval()


@pytest.fixture
def decoder():
    return lambda variant="gated_delta", **overrides: deepcopy(made(variant, **overrides))


@pytest.fixture
def tokens():
    return torch.randint(0, 32, (2, 100), generator=torch.Generator().manual_seed(2))

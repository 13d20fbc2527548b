"""The encoder of masked tokens: padding, packing, every variant, files, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from hashes import fitted

from linattn.models import Encoder, EncoderConfig, masked_token_loss
from linattn.models.encoder import VARIANTS_OF_ENCODERS

SMALL = dict(dim=16, num_layers=2, num_heads=2, vocab_size=11)


def make(variant="lion_s_mlm", **options):
    model = Encoder(EncoderConfig(variant=variant, **SMALL | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return fitted(model).double().eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("variant", VARIANTS_OF_ENCODERS)
def test_packed_is_each_alone_and_both_sides_are_seen(variant, post_norm):
    model, tokens = make(variant, post_norm=post_norm, max_positions=9), torch.randint(11, (1, 14))
    ends = [0, 5, 14]
    packed = model(tokens, None, torch.tensor(ends))
    close(packed[:, :5], model(tokens[:, :5]))
    close(packed[:, 5:], model(tokens[:, 5:]))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 11
    assert (model(changed[:, :5])[0, 0] - packed[0, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("variant", ["lion_lit_mlm", "lion_d_mlm", "lion_s_mlm", "lion_s", "gla"])
def test_padding_is_not_there(variant):
    model, tokens = make(variant), torch.randint(11, (2, 9))
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    logits = model(tokens, mask)
    for row in range(2):
        close(logits[row, mask[row]], model(tokens[row : row + 1, mask[row]])[0])


def test_a_masked_batch_is_learnt():
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(**SMALL))
    tokens = torch.arange(40).view(4, 10) % 10
    targets = torch.full_like(tokens, -100)
    targets[:, 3] = tokens[:, 3]
    inputs = tokens.masked_fill(targets != -100, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = masked_token_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_checkpointing_gives_the_same_gradients():
    model, tokens = make().train(), torch.randint(11, (2, 7))
    grads = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(tokens).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_a_saved_encoder_is_the_same_encoder(tmp_path):
    model, tokens = make("lion_d_mlm", max_positions=7), torch.randint(11, (2, 7))
    model.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again(tokens), model(tokens))


def test_the_loss_is_of_what_is_masked():
    logits, targets = torch.randn(2, 3, 11), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    wanted = -F.log_softmax(logits, -1)[[0, 0, 1], [0, 2, 2], [1, 4, 0]].mean()
    torch.testing.assert_close(masked_token_loss(logits, targets), wanted)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"variant must be one of .*; got 'bert'"):
        EncoderConfig(vocab_size=3, variant="bert")
    with pytest.raises(ValueError, match=r"preset must be one of \['tiny', .*; got 'huge'"):
        Encoder.create("huge", vocab_size=3)
    with pytest.raises(ValueError, match=r"has no field 'heads'"):
        Encoder.create("tiny", vocab_size=3, heads=3)
    with pytest.raises(ValueError, match="dim must be an integer, at least 1; got 0"):
        EncoderConfig(vocab_size=3, dim=0)
    model = make(max_positions=4)
    with pytest.raises(ValueError, match="tokens must be no longer than max_positions=4; got 5"):
        model(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, vocab_size=11\)"):
        model(torch.full((1, 3), 11))
    with pytest.raises(ValueError, match=r"mask must be bool \[B T\] = \(1, 3\)"):
        model(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match=r"targets must be int64 \[B T\] = \(1, 3\); got torch.int64 \(3,\)"):
        masked_token_loss(torch.zeros(1, 3, 11), torch.zeros(3, dtype=torch.int64))

"""Generation: what is sampled from, when it stops, that it can be repeated, and that it needs no more memory for more text."""

import pytest
import torch

from linattn.models import Decoder, DecoderConfig, prefill
from linattn.models.generation import keep_top_k, keep_top_p, sample

PROBABILITIES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
LOGITS = PROBABILITIES.log()[None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(vocab_size=17, variant="gla", dim=16, num_layers=2, num_heads=2, mlp_dim=24))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


def support(logits):
    return set(torch.nonzero(logits[0] > -torch.inf).flatten().tolist())


def drawn(temperature=1.0, top_k=None, top_p=None, count=4000):
    generator = torch.Generator().manual_seed(0)
    return sample(LOGITS.expand(count, -1), temperature, top_k, top_p, generator)


@pytest.mark.parametrize(("k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 3, 0}), (5, {0, 1, 2, 3, 4}), (99, {0, 1, 2, 3, 4})])
def test_top_k_keeps_exactly_the_k_likeliest(k, kept):
    assert support(keep_top_k(LOGITS, k)) == kept
    assert set(drawn(top_k=k).tolist()) == kept


def test_top_k_keeps_k_of_equals():
    assert len(support(keep_top_k(torch.zeros(1, 9), 4))) == 4


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-6, {1}), (0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.8, {1, 3, 0}), (0.875, {1, 3, 0}), (1.0, {0, 1, 2, 3, 4})]
)
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    assert support(keep_top_p(LOGITS, p)) == kept
    assert set(drawn(top_p=p).tolist()) == kept


def test_top_p_comes_after_top_k():
    assert set(drawn(top_k=2, top_p=0.9).tolist()) == {1, 3}  # of 2/3 and 1/3, both are needed
    assert set(drawn(top_k=2, top_p=0.6).tolist()) == {1}


def test_samples_follow_the_probabilities():
    share = torch.bincount(drawn(), minlength=5) / 4000
    assert (share - PROBABILITIES).abs().max() < 0.03
    sharper = torch.bincount(drawn(temperature=0.5), minlength=5) / 4000
    wanted = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert (sharper - wanted).abs().max() < 0.03
    assert drawn(temperature=0).eq(1).all()


def test_greedy_is_the_argmax_of_the_whole_text(model):
    text = model.generate(PROMPT, 12, temperature=0)
    assert text.shape == (2, 15) and torch.equal(text[:, :3], PROMPT)
    logits, _ = model(text)
    assert torch.equal(logits[:, 2:-1].argmax(-1), text[:, 3:])
    assert torch.equal(model.generate(PROMPT, 12, temperature=0), text)


def test_one_seed_one_text(model):
    one, same, other = (model.generate(PROMPT, 30, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(model.generate(PROMPT, 30, generator=torch.Generator().manual_seed(7)), one)
    before = torch.random.get_rng_state()
    model.generate(PROMPT, 3, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_streaming_yields_what_generating_returns(model):
    text = model.generate(PROMPT, 10, seed=3, top_k=5)
    assert torch.equal(torch.stack(list(model.stream(PROMPT, 10, seed=3, top_k=5)), 1), text[:, 3:])


def test_stop_tokens_end_a_row_and_the_last_row_ends_it_all(model):
    free = model.generate(PROMPT, 40, seed=5)
    first, second = free[0, 3:].tolist(), free[1, 3:].tolist()
    stop = first[4]
    ends = [row.index(stop) if stop in row else 40 for row in (first, second)]
    text = model.generate(PROMPT, 40, seed=5, stop_tokens=[stop])
    assert text.shape[1] == 3 + min(40, max(ends) + 1)
    for row, wanted, end in zip(text[:, 3:].tolist(), (first, second), ends, strict=True):
        assert row[: end + 1] == wanted[: end + 1]
        assert set(row[end:]) <= {stop}


def test_a_single_row_stops_at_once(model):
    text = model.generate(PROMPT[:1], 40, temperature=0)
    stop = text[0, 8].item()
    end = text[0, 3:].tolist().index(stop) + 4
    assert torch.equal(model.generate(PROMPT[:1], 40, temperature=0, stop_tokens=(stop, 0 if stop else 1))[0, :end], text[0, :end])


def test_no_new_tokens(model):
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)


def test_the_state_is_as_large_after_many_tokens(model):
    def size(T):
        _, state = prefill(model, torch.ones(1, T, dtype=torch.int64), chunk=16)
        return [layer.recurrent.kv.untyped_storage().nbytes() for layer in state]

    assert size(1) == size(50)


def test_generation_leaves_no_graph(model):
    token = next(model.stream(PROMPT, 1))
    assert not token.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=torch.tensor([1, 2])), r"prompt must be \[B T\] int64 or int32 with T >= 1; got torch.int64 \(2,\)"),
        (dict(prompt=torch.zeros(1, 0, dtype=torch.int64)), "with T >= 1"),
        (dict(prompt=torch.tensor([[99]])), "got values from 99 to 99"),
        (dict(max_new_tokens=-1), "max_new_tokens must be an integer, at least 0; got -1"),
        (dict(temperature=-0.5), "temperature must be at least 0; got -0.5"),
        (dict(temperature=float("nan")), "temperature must be at least 0; got nan"),
        (dict(top_k=0), "top_k must be an integer, at least 1, or None; got 0"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\], or be None; got 0.0"),
        (dict(top_p=1.5), "got 1.5"),
        (dict(stop_tokens=[3, 17]), r"stop_tokens must lie in \[0, vocab_size=17\); got \[17\]"),
        (dict(seed=1, generator=torch.Generator()), "give seed or generator, not both"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"prompt": PROMPT, "max_new_tokens": 3, **arguments})


def test_bad_arguments_are_found_before_the_first_token(model):
    with pytest.raises(ValueError, match="top_k"):
        model.stream(PROMPT, 3, top_k=0)

"""Generation by transformers from a state of constant size: cached is uncached, in every way of generating that can be."""

import pytest
import torch

import linattn

pytest.importorskip("transformers")
from swap_hosts import CAUSAL, cached, inputs, out

WAYS = {
    "linear": dict(variant="linear"),
    "gla and a window": dict(variant="gla", window=3),
    "liger": dict(variant="liger"),
    "kda": dict(variant="kda", init="random"),
    "hybrid": dict(variant="hedgehog", keep=[0]),
    "hybrid, softmax last": dict(variant="hedgehog", keep=[1]),
}
NEW = 8


def generate(model, ids, **how):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **how)


def greedy(model, ids):
    for _ in range(NEW):
        ids = torch.cat([ids, out(model, input_ids=ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("way", WAYS)
def test_generating_is_calling_again_and_again(way):
    model = CAUSAL["llama"]()
    linattn.swap_attention(model, **WAYS[way])
    ids = inputs(model)["input_ids"]
    wanted = greedy(model, ids)
    assert torch.equal(generate(model, ids), wanted)
    assert torch.equal(generate(model, ids, cache_implementation="static"), wanted)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), wanted)
    short = greedy(model, ids[:1, :7])
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids[:1, :7]], 1), ids[1:]])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    padded = generate(model, batch, attention_mask=mask)
    assert torch.equal(padded[:1, 5:], short) and torch.equal(padded[1:], wanted[1:])


@pytest.mark.parametrize("variant", linattn.VARIANTS)
def test_every_variant_generates_or_says_why_not(variant):
    model = CAUSAL["llama"]()
    ids = inputs(model)["input_ids"]
    if variant == "ecoformer":
        with pytest.raises(ValueError, match="one hash per head"):  # of keys and queries alike, which grouped heads have not
            linattn.swap_attention(model, variant, init="random")
        return
    linattn.swap_attention(model, variant, init="random")
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("way", ["gla and a window", "hybrid"])
def test_beams(way):
    """Beam search reorders the cache: without a cache it must find the same."""
    model = CAUSAL["llama"]()
    linattn.swap_attention(model, **WAYS[way])
    ids = inputs(model)["input_ids"]
    beams = dict(num_beams=3, num_return_sequences=2)
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "llama"])
def test_every_causal_host_generates(name):
    model = CAUSAL[name]()
    linattn.swap_attention(model, "hedgehog", window=2)
    ids = inputs(model)["input_ids"]
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_the_cache_does_not_grow():
    model = CAUSAL["llama"]()
    linattn.swap_attention(model, "gla", window=3)
    ids = inputs(model)["input_ids"]
    held = lambda cache: sum(t.numel() for layer in cache.layers for part in layer.state for t in part if t is not None)
    cache = cached(model, ids)
    first = held(cache)
    for _ in range(30):
        cache = cached(model, ids[:, :1], cache)
    assert held(cache) == first > 0
    assert cache.get_seq_length() == 42


def test_a_cache_of_another_name_is_found():
    """transformers has renamed it before; overlooked, every token would silently be the first."""
    from transformers import DynamicCache

    model = CAUSAL["llama"]()
    linattn.swap_attention(model, "linear")
    module, x = model.model.layers[0].self_attn, torch.randn(1, 6, 32)
    cache, places = DynamicCache(), (torch.ones(1, 6, 8), torch.zeros(1, 6, 8))
    turned = lambda a, b: tuple(t[:, a:b] for t in places)
    with torch.no_grad():
        whole, _ = module(x, position_embeddings=turned(0, 6))
        parts = [module(x[:, a:b], position_embeddings=turned(a, b), what_it_may_be_called=cache)[0] for a, b in ((0, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_what_a_state_cannot_do():
    model = CAUSAL["llama"]()
    ids = inputs(model)["input_ids"]
    softmax = cached(model, ids)
    linattn.swap_attention(model, "linear")
    with pytest.raises(ValueError, match="layer 0 of the cache holds keys and values of softmax attention"):
        cached(model, ids[:, :1], softmax)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids[:1], prompt_lookup_num_tokens=2)
    cache = cached(model, ids)
    with pytest.raises(ValueError, match="cannot be taken back by tokens: no crop, and no assisted or speculative decoding"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="the cache holds 2 sequences; got 1 to go on with"):
        cached(model, ids[:1, :1], cache)
    cache.batch_repeat_interleave(2)
    cached(model, ids[:, :1].repeat_interleave(2, 0), cache)
    cache.batch_select_indices(torch.tensor([0]))
    cached(model, ids[:1, :1], cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="output_attentions=True: linear attention has no attention weights"):
            model(ids, output_attentions=True)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad(), pytest.raises(ValueError, match="packed sequences cannot be generated from"):
        model(ids[:1], position_ids=packed, use_cache=True)


def test_the_attention_interface_generates_from_the_caches_of_transformers():
    model = CAUSAL["llama"]()
    model.set_attn_implementation(linattn.register_hf("elu1"))
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    assert torch.equal(generate(model, ids, attention_mask=mask)[:1], greedy(model, ids[:1]))
    assert torch.equal(generate(model, ids, attention_mask=mask)[1:, 5:], greedy(model, ids[1:, 5:]))

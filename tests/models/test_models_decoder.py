"""The decoder: one map for training, prefill and decoding, for every variant, hybrid stacks and packed sequences."""

import pytest
import torch
import torch.nn.functional as F
from hashes import fitted

from linattn.layers import SoftmaxAttention
from linattn.models import PRESETS, Decoder, DecoderConfig, decode, next_token_loss, prefill
from linattn.models.config import MIXERS

SIZES = dict(vocab_size=17, dim=16, num_layers=2, num_heads=2, mlp_dim=24)


def make(variant="gla", **sizes):
    model = Decoder(DecoderConfig(variant=variant, **{**SIZES, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return fitted(model)


def tokens(B, T):
    return torch.randint(0, SIZES["vocab_size"], (B, T))


@pytest.mark.parametrize("sizes", [{}, dict(softmax_every=2)], ids=["pure", "hybrid"])
@pytest.mark.parametrize("variant", MIXERS)
def test_prefill_and_decoding_give_the_logits_of_the_whole(variant, sizes):
    model, text = make(variant, **sizes), tokens(2, 19)
    whole, none = model(text)
    assert none is None and whole.shape == (2, 19, 17)
    logits, state = prefill(model, text[:, :9], chunk=4)
    for t in range(9, 19):
        torch.testing.assert_close(logits, whole[:, t - 1], rtol=1e-5, atol=1e-5)
        logits, state = decode(model, text[:, t], state)
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-5, atol=1e-5)


def test_sparse_state_expansion_takes_its_sizes_and_owes_a_balance():
    model, text = make("sse_gdn", softmax_every=2, num_layers=3, partitions=6, active=2, short_conv=3, num_kv_heads=1), tokens(2, 9)
    _, state = model(text, return_state=True)
    assert state[0].kv.shape == (2, 7, 1, 8, 8) and state[0].conv.shape == (2, 16 + 8, 2)
    layers = [model.blocks[i].attention for i in (0, 2)]
    torch.testing.assert_close(model.balance_loss, sum(layer.balance_loss for layer in layers))
    model.eval()(text)
    assert model.balance_loss is None and make("gla").train().balance_loss is None
    made = model.generate(text, 5, seed=0)
    assert torch.equal(made, model.generate(text, 5, seed=0)) and made.shape == (2, 14)
    with pytest.raises(ValueError, match="active must be at least 1 and less than partitions; got 4 of 4"):
        make("sse_gla", active=4)


def test_a_float64_decoder_agrees_with_itself_to_1e_9():
    model, text = make("kda", softmax_every=2).double(), tokens(2, 12)
    logits, state = model(text[:, :5], return_state=True)
    rest, _ = model(text[:, 5:], state)
    torch.testing.assert_close(torch.cat([logits, rest], 1), model(text)[0], rtol=1e-9, atol=1e-9)


def test_packed_sequences_are_each_alone():
    model, text = make("gated_delta", softmax_every=2), tokens(1, 15)
    cu_seqlens = torch.tensor([0, 4, 4, 15])
    packed, state = model(text, None, cu_seqlens, return_state=True)
    alone = torch.cat([model(text[:, :4])[0], model(text[:, 4:])[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    more = tokens(3, 1)
    wanted = model(torch.cat([text[:, 4:], more[2:]], 1))[0][:, -1]
    torch.testing.assert_close(model(more, state)[0][2], wanted, rtol=1e-5, atol=1e-5)


def test_the_loss_is_of_next_tokens_within_sequences():
    model, text = make(), tokens(1, 10)
    logits, _ = model(text)
    nats = F.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
    torch.testing.assert_close(next_token_loss(logits, text), nats.mean())
    within = torch.tensor([i for i in range(9) if i != 3])
    torch.testing.assert_close(next_token_loss(logits, text, torch.tensor([0, 0, 4, 4, 10])), nats[within].mean())
    with pytest.raises(ValueError, match=r"tokens must have T >= 2, .* got \(1, 1\)"):
        next_token_loss(logits[:, :1], text[:, :1])
    with pytest.raises(ValueError, match=r"logits must be \[B T vocab\] to go with tokens \(1, 10\); got \(1, 9, 17\)"):
        next_token_loss(logits[:, 1:], text)


@pytest.mark.parametrize("variant", MIXERS)
def test_gradients_reach_every_parameter(variant):
    model, text = make(variant, tie_embeddings=variant != "gla"), tokens(2, 9)
    next_token_loss(model(text)[0], text).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.ne(0).any(), name


@pytest.mark.parametrize("variant", ["mamba2", "sse_gla", "sse_gdn"])
def test_checkpointed_activations_change_no_gradient(variant):
    model, text = make(variant, softmax_every=2), tokens(2, 9)
    gradients = []
    for checkpoint in (False, True):
        model.zero_grad()
        loss = next_token_loss(model(text, checkpoint_activations=checkpoint)[0], text)
        (loss if model.balance_loss is None else loss + model.balance_loss).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_few_steps_learn_a_sequence_by_heart():
    model, text = Decoder(DecoderConfig(variant="gla", **SIZES)), tokens(1, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        loss = next_token_loss(model(text)[0], text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert torch.equal(model.generate(text[:, :4], 8, temperature=0), text[:, :12])


def test_hybrid_stacks():
    config = DecoderConfig(variant="kda", softmax_every=3, **{**SIZES, "num_layers": 7})
    kinds = [config.attention(i) for i in range(7)]
    assert kinds == ["kda", "kda", "softmax", "kda", "kda", "softmax", "kda"]
    assert [isinstance(block.attention, SoftmaxAttention) for block in Decoder(config).blocks] == [kind == "softmax" for kind in kinds]


def test_fullgraph_compile():
    model, text = make("gla", softmax_every=2), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(text)[0], model(text)[0])


def test_layers_know_their_place():
    model = make("lightning", num_layers=4)
    assert [block.attention.mixer.decay.place.layer_idx for block in model.blocks] == [0, 1, 2, 3]
    assert {block.attention.mixer.decay.place.num_layers for block in model.blocks} == {4}


MILLIONS = {"tiny": (256, 0.9), "small": (8192, 17.4), "base": (50304, 123.8), "350m": (50304, 355.7), "1b": (50304, 1116.0)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_their_size(preset):
    vocab_size, millions = MILLIONS[preset]
    with torch.device("meta"):
        model = Decoder.create(preset, vocab_size=vocab_size)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.01 * millions


@pytest.mark.parametrize("variant", MIXERS)
def test_every_preset_takes_every_variant(variant):
    for preset in PRESETS:
        with torch.device("meta"):
            Decoder.create(preset, vocab_size=64, variant=variant, num_layers=1)


def test_tied_embeddings_are_one_parameter():
    assert "head.weight" not in make().state_dict()
    assert make(tie_embeddings=False).head.weight.shape == (17, 16)


def test_overrides():
    model = Decoder.create("tiny", vocab_size=64, variant="retnet", num_layers=2, softmax_every=2)
    assert model.config == DecoderConfig(vocab_size=64, variant="retnet", dim=128, num_layers=2, num_heads=2, softmax_every=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(preset="huge"), r"preset must be one of \['tiny', .*'1b'\]; got 'huge'"),
        (dict(variant="gal"), "variant must be one of .*'gla'.*'softmax'.*; got 'gal'"),
        (dict(layers=3), "config of a decoder has no field 'layers'; there are .*'num_layers'"),
        (dict(num_layers=0), "num_layers must be an integer, at least 1; got 0"),
        (dict(dim=1.5), "dim must be an integer, at least 1; got 1.5"),
        (dict(mlp_dim=-1), "mlp_dim must be a whole number above 0; got -1"),
        (dict(norm_eps=0), "norm_eps must be above 0; got 0"),
        (dict(tie_embeddings="yes"), "tie_embeddings must be true or false; got 'yes'"),
        (dict(num_heads=3), "dim · expand_k / num_heads must be whole"),
        (dict(num_kv_heads=3), "num_heads must be a positive multiple of num_kv_heads"),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message):
        Decoder.create(**{"preset": "tiny", "vocab_size": 16, **arguments})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.tensor([[3, 17]]), r"tokens must lie in \[0, vocab_size=17\); got values from 3 to 17"),
        (torch.tensor([[-1, 2]]), "got values from -1 to 2"),
        (torch.tensor([1, 2]), r"tokens must be \[B T\] int64 or int32; got torch.int64 \(2,\)"),
        (torch.tensor([[1.0]]), "got torch.float32"),
    ],
)
def test_bad_tokens(text, message):
    with pytest.raises(ValueError, match=message):
        make()(text)


def test_a_state_of_another_depth():
    _, state = make(num_layers=3)(tokens(1, 4), return_state=True)
    with pytest.raises(ValueError, match="state must have one entry for each of 2 layers; got 3"):
        make()(tokens(1, 1), state)

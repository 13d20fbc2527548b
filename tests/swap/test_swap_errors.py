"""Everything that cannot be swapped says so by name and with a way out, and leaves the model as it was."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import linattn
from linattn.layers import Variant
from linattn.swap import Adapter, SwappedAttention, adapters, find, register_adapter
from linattn.swap.find import check_model

pytest.importorskip("transformers")
from swap_hosts import BOTH, CAUSAL, NONE, TEXT, build, inputs, out

WINDOWED = dict(TEXT, **NONE, num_key_value_heads=2)


def unchanged(model, message, variant="linear", **how):
    """swap_attention raises `message`, and what the model is made of and answers is the same as before."""
    modules, settings = dict(model.named_modules()), {key: value for key, value in model.__dict__.items() if key[0] != "_"}
    before = out(model, **inputs(model)) if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message):
        linattn.swap_attention(model, variant, **how)
    assert dict(model.named_modules()) == modules
    assert {key: value for key, value in model.__dict__.items() if key[0] != "_"} == settings
    assert before is None or torch.equal(out(model, **inputs(model)), before)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(layers=[2]), r"layers must lie in \[0, 2\), the number of attention modules; got 2"),
        (dict(layers=["attn"]), r"layers: there is no attention 'attn'; there are \['model.layers.0.self_attn'"),
        (dict(layers="each"), "layers must be 'all', 'every:N', numbers, names, or a function of name and module; got 'each'"),
        (dict(layers="every:0"), "got 'every:0'"),
        (dict(layers=0), "layers must be 'all', 'every:N', numbers, names, or a function of name and module; got 0"),
        (dict(layers=[-1]), r"layers must lie in \[0, 2\), the number of attention modules; got -1"),
        (dict(layers=[True]), r"layers must be 'all', .*; got \[True\]"),
        (dict(keep=[1.0]), r"keep must be 'all', .*; got \[1.0\]"),
        (dict(keep=[0, 1]), "nothing to swap in LlamaForCausalLM: of 2 attention modules none is left by `layers` and `keep`$"),
        (dict(layers=[]), "nothing to swap in LlamaForCausalLM: of 2"),
        (dict(variant="glaa"), r"variant must be a linattn.layers.Variant or one of \['linear', .*'hedgehog', 'liger'\]; got 'glaa'"),
        (dict(init="zeros"), r"init must be one of \['from_softmax', 'random'\]; got 'zeros'"),
        (dict(on_unsupported="skip"), r"on_unsupported must be one of \['raise', 'keep'\]; got 'skip'"),
        (dict(window=-1), "window must be a number of tokens, at least 0; got -1"),
        (dict(window=4, init="random"), "window needs init='from_softmax'"),
        (dict(variant=Variant(source="", feature="relu", normalize=True, offset=1.0), window=4), "window=4 needs a variant without offset"),
        (dict(variant="kda"), r"model.layers.0.self_attn \(LlamaAttention\): init='from_softmax' needs .* the delta rule cannot"),
        (dict(variant="mamba2"), "one key for all heads cannot: init='random'"),
        (dict(causal=False), r"model.layers.0.self_attn \(LlamaAttention\) is causal; it cannot take bidirectional attention"),
        (dict(backend="nonesuch"), "name must be one of"),
    ],
)  # fmt: skip
def test_arguments(how, message):
    unchanged(CAUSAL["llama"](), message, **how)


def test_bidirectional_hosts():
    model = BOTH["bert"]()
    unchanged(model, r"encoder.layer.0.attention.self \(BertSelfAttention\) is bidirectional; it cannot take causal attention", causal=True)
    unchanged(model, "window=4: .* sees both sides; a window is of the tokens before", window=4)
    unchanged(model, r"encoder.layer.0.attention.self \(BertSelfAttention\): gating must be one of .*; got 'x'", variant="gla", gating="x")


def test_a_failure_at_the_last_layer_leaves_the_first_as_it_was():
    model = CAUSAL["llama"]()
    model.model.layers[1].self_attn.half()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn is in float16 on a CPU"):
        linattn.swap_attention(model, "linear")
    assert dict(model.named_modules()) == modules


@pytest.mark.skipif(linattn.why_not("triton") is None, reason="triton can run here")
def test_a_missing_backend_is_said_before_anything_is_done():
    unchanged(CAUSAL["llama"](), "backend 'triton' cannot be used: ", backend="triton")


def test_models_without_known_attention():
    unchanged(nn.Linear(2, 2), "nothing to swap in Linear: no attention of a class in linattn.swap.ADAPTERS$")
    bloom = build("BloomForCausalLM", "BloomConfig", vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    message = r"transformer.h.0.self_attention \(BloomAttention\) cannot be swapped: it has ALiBi biases. keep=\['transformer.h.0"
    unchanged(bloom, message)
    unchanged(bloom, "nothing to swap in BloomForCausalLM: of 1 .* BloomAttention: it has ALiBi biases$", on_unsupported="keep")

    class LlamaAttention(nn.Linear):  # the name alone is no match
        pass

    unchanged(nn.Sequential(LlamaAttention(2, 2)), "there is no adapter for .*LlamaAttention; linattn.swap.register_adapter takes one")


def test_a_class_that_was_changed_since_its_adapter_was_written():
    model = CAUSAL["llama"]()
    del model.model.layers[1].self_attn.v_proj
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers.1.self_attn \(LlamaAttention\) cannot be swapped: it has no v_proj: another version"):
        linattn.swap_attention(model, "linear")
    assert dict(model.named_modules()) == modules


def test_cross_attention_is_kept_or_an_error():
    model = build(
        "GPT2LMHeadModel", "GPT2Config", **NONE, vocab_size=50, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True, attn_pdrop=0.0
    )
    unchanged(model, r"transformer.h.0.crossattention \(GPT2Attention\) cannot be swapped: it is cross-attention. keep=\['transformer")
    report = linattn.swap_attention(model, "linear", on_unsupported="keep")
    assert report.swapped == ["transformer.h.0.attn"]
    assert report.kept == {"transformer.h.0.crossattention": "unsupported: it is cross-attention"}
    with pytest.raises(ValueError, match="encoder_hidden_states: swapped attention cannot be cross-attention"):
        model.transformer.h[0].attn(torch.zeros(1, 2, 32), encoder_hidden_states=torch.zeros(1, 2, 32))


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Phi3"])
def test_sliding_windows(name):
    own = dict(use_sliding_window=True, max_window_layers=0) if name == "Qwen2" else {}
    model = build(f"{name}ForCausalLM", f"{name}Config", **WINDOWED, **own, sliding_window=4)
    unchanged(model, "of 2 attention modules none is left. .*it sees 4 tokens back only", on_unsupported="keep")
    unchanged(model, r"Attention\) cannot be swapped: it sees 4 tokens back only; replace_sliding=True lets it see all")
    report = linattn.swap_attention(model, "linear", replace_sliding=True, layers=[0], keep=[1])
    assert len(report.swapped) == 1
    with pytest.raises(ValueError, match="attention_mask is not causal"):  # the host's own mask would still say 4 back
        out(model, **inputs(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, when it is first imported
def test_wrapped_models():
    model = CAUSAL["llama"]()
    unchanged(nn.DataParallel(nn.Linear(2, 2)), "model is wrapped by torch.nn.parallel.data_parallel.DataParallel: swap attention first")
    unchanged(torch.compile(nn.Linear(2, 2)), "is compiled by torch.compile: swap attention first")
    model.model.layers[0].compile()
    unchanged_modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"model.layers.0 is compiled by torch.compile"):
        linattn.swap_attention(model, "linear")
    assert dict(model.named_modules()) == unchanged_modules
    partitioned = CAUSAL["llama"]()
    partitioned.lm_head.weight.ds_id = 1
    unchanged(partitioned, "is partitioned by DeepSpeed ZeRO-3: swap attention first")
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module; got builtins.int"):
        check_model(1)
    offloaded = CAUSAL["llama"]()
    offloaded.model.layers[1]._hf_hook = SimpleNamespace(offload=True)
    unchanged(offloaded, "model.layers.1 is offloaded by accelerate: swap attention first")

    class Wrapper(nn.Module):
        __module__, __qualname__ = "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"

    unchanged(nn.Sequential(Wrapper()), "0 is wrapped by torch.distributed.fsdp.fully_sharded_data_parallel.FullySharded")


def test_attention_by_itself_has_no_place_to_be_swapped_in():
    attention = CAUSAL["llama"]().model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"model is itself the attention \(LlamaAttention\): swap the model it is a part of"):
        linattn.swap_attention(attention, "linear")


def test_weights_that_are_packed():
    model = CAUSAL["llama"]()
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        projection = getattr(attention, name)
        projection.weight = nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers.1.self_attn \(LlamaAttention\) cannot be swapped: its weights are quantised or packed"):
        linattn.swap_attention(model, "linear")
    assert dict(model.named_modules()) == modules


def test_swap_twice():
    model = CAUSAL["llama"]()
    report = linattn.swap_attention(model, "linear", keep=[1])
    unchanged(model, r"model.layers.0.self_attn is swapped already: undo\(\) that swap first")
    with pytest.raises(ValueError, match=r"names must be of swapped attention; got \['x'\]"):
        report.undo(["x"])
    report.undo()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no swapped attention"):
        report.undo()


def test_dropout_on_weights_is_a_warning():
    model = build("GPT2LMHeadModel", "GPT2Config", **NONE, vocab_size=50, n_embd=32, n_layer=1, n_head=4)
    with pytest.warns(UserWarning, match="dropout on attention weights has no counterpart"):
        report = linattn.swap_attention(model, "linear")
    assert any("dropout on attention weights" in note for note in report.notes)


def test_the_attention_interface_refuses():
    with pytest.raises(ValueError, match=r"feature must be one of .*, which are positive; got 'identity'"):
        linattn.register_hf("identity")
    model = build("MistralForCausalLM", "MistralConfig", **WINDOWED, sliding_window=4)
    model.set_attn_implementation(linattn.register_hf("elu1"))
    with pytest.raises(ValueError, match="linattn-elu1 sees all tokens before, and MistralAttention 4 back only"):
        out(model, **inputs(model))


def test_an_adapter_of_ones_own(monkeypatch):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x, attn_mask=None, is_causal=False):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
            return self.out(nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(-2))

    monkeypatch.setattr(adapters, "ADAPTERS", table := dict(adapters.ADAPTERS))
    monkeypatch.setattr(find, "ADAPTERS", table)
    mine = Adapter(
        call="timm", parts=("qkv", "out"), heads=lambda host: linattn.swap.Heads(8, 2, 2, 4, 0.5),
        project=lambda m, x: m.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2), output=lambda m, o, x: m.out(o), causal=lambda host: False,
    )  # fmt: skip
    register_adapter(Mine, mine)
    with pytest.raises(ValueError, match=r"there is an adapter for .*Mine already"):
        register_adapter(Mine, mine)
    with pytest.raises(ValueError, match=r"adapter must be a linattn.swap.Adapter; got str"):
        register_adapter(Mine, "mine")
    model, x = nn.Sequential(Mine()), torch.randn(2, 5, 8)
    before = model(x)
    report = linattn.swap_attention(model, Variant(source="here", feature="relu", normalize="clamp"))
    assert isinstance(model[0], SwappedAttention) and model(x).shape == before.shape
    report.undo()
    assert torch.equal(model(x), before)


def test_a_subclass_is_registered_with_the_adapter_of_its_base(monkeypatch):
    model, other = CAUSAL["llama"](), CAUSAL["llama"]()
    kind = type(model.model.layers[0].self_attn)

    class Mine(kind):
        pass

    for module in (m for m in model.modules() if type(m) is kind):
        module.__class__ = Mine
    with pytest.raises(ValueError, match=r"there is no adapter for .*Mine; linattn.swap.register_adapter takes one"):
        linattn.swap_attention(model, "linear")
    monkeypatch.setattr(adapters, "ADAPTERS", table := dict(adapters.ADAPTERS))
    monkeypatch.setattr(find, "ADAPTERS", table)
    register_adapter(Mine, adapters.ADAPTERS[adapters.path_of(kind)])
    for each in (model, other):
        linattn.swap_attention(each, "linear")
    assert torch.equal(out(model, **inputs(model)), out(other, **inputs(other)))
    monkeypatch.setattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    with pytest.raises(ValueError, match="cannot be swapped: there is no apply_rotary_pos_emb in "):
        linattn.swap_attention(CAUSAL["llama"](), "linear")


def test_swapping_imports_no_extra():
    code = "import sys, linattn, linattn.swap; print({'transformers', 'timm', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"

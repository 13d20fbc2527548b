"""Every host of transformers: swapped, it answers as the maths says, hides the future or not, and goes back bitwise."""

import copy
import io
from importlib import import_module

import pytest
import torch
from torch import nn

import linattn
from linattn.swap import ADAPTERS, SwappedAttention

pytest.importorskip("transformers")
from swap_hosts import BOTH, CAUSAL, CLIP_TEXT, inputs, out

HOSTS = CAUSAL | BOTH | CLIP_TEXT


@pytest.mark.parametrize("name", HOSTS)
def test_swapped_is_the_linear_attention_of_the_attention_interface(name):
    """Two routes to one formula: our module, and the host's own with our function. It pins the mapping of all weights."""
    model = HOSTS[name]()
    given = inputs(model)
    softmax = out(model, **given)
    model.set_attn_implementation(linattn.register_hf("elu1"))
    wanted = out(model, **given)
    model.set_attn_implementation("sdpa")
    linattn.swap_attention(model, "linear")
    assert out(model, **given).shape == softmax.shape
    torch.testing.assert_close(out(model, **given), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - softmax).abs().max() > 1e-2  # or nothing was shown


@pytest.mark.parametrize("name", CAUSAL | CLIP_TEXT)
def test_a_window_over_everything_is_the_softmax_itself(name):
    model = HOSTS[name]()
    given = inputs(model)
    before = out(model, **given)
    linattn.swap_attention(model, "hedgehog", window=16)
    torch.testing.assert_close(out(model, **given), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HOSTS)
def test_the_future_is_hidden_from_causal_hosts_only(name):
    model = HOSTS[name]()
    linattn.swap_attention(model, "hedgehog", window=0 if name in BOTH else 3)
    given = inputs(model)
    key, x = next(iter(given.items()))
    other = x.clone()
    if x.is_floating_point():
        other[..., -1, -1] += 1
    else:
        other[:, -1] = 3 + (other[:, -1] - 2) % 40
    a, b = out(model, **{key: x}), out(model, **{key: other})
    assert not torch.allclose(a[:, -1], b[:, -1])
    assert torch.equal(a[:, :-1], b[:, :-1]) == (name not in BOTH)


@pytest.mark.parametrize("name", HOSTS)
def test_undo_and_what_is_kept(name):
    model = HOSTS[name]()
    model.bfloat16()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    model.train()
    [m.eval() for m in model.modules() if isinstance(m, nn.Dropout)]
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    given = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs(model).items()}
    before, settings = out(model, **given), copy.copy(model.__dict__)
    report = linattn.swap_attention(model, "gla", gating="symmetric")
    assert report.swapped and not report.kept
    for key, p in model.named_parameters():
        assert p is weights[key] if key in weights else p.requires_grad  # under their own names, the same objects
        assert p.dtype == torch.bfloat16
    assert not first.requires_grad
    assert set(weights) <= set(dict(model.named_parameters()))
    assert all(model.get_submodule(key).training for key in report.swapped)
    assert not torch.equal(out(model, **given), before) and out(model, **given).isfinite().all()
    report.undo()
    assert torch.equal(out(model, **given), before)
    assert dict(model.named_modules()) == modules and model.__dict__.keys() == settings.keys()


def test_every_host_of_transformers_in_the_table_is_tested():
    classes = {type(m).__module__ + "." + type(m).__name__ for make in HOSTS.values() for m in make().modules()}
    table = {path for path in ADAPTERS if path.startswith("transformers.")}
    here = {path for path in table if hasattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2])}
    assert here <= classes and len(table - here) <= 1  # DINOv2's, of other versions


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")  # the new name is not in all versions
def test_gradients_reach_the_new_parameters_and_checkpointing_changes_nothing():
    model = CAUSAL["llama"]()
    report = linattn.swap_attention(model, "gla", window=3)
    ids = inputs(model)["input_ids"]

    def gradients():
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads = {name: p.grad.clone() for name, p in report.parameters("attention").items()}
        model.zero_grad()
        return grads

    plain = gradients()
    assert all(g.abs().max() > 0 for g in plain.values())
    model.gradient_checkpointing_enable()
    for name, g in gradients().items():
        torch.testing.assert_close(g, plain[name])


def test_hybrids_selections_and_the_report():
    model = CAUSAL["llama"]()
    numbers = lambda report: [int(name.split(".")[2]) for name in report.swapped]
    dry = lambda **how: linattn.swap_attention(model, "hedgehog", dry_run=True, **how)
    assert numbers(dry()) == [0, 1]
    assert numbers(dry(layers=[1])) == numbers(dry(keep=[0])) == numbers(dry(layers="every:2")) == [1]
    assert numbers(dry(keep="every:2")) == numbers(dry(layers=lambda name, module: module.layer_idx == 0)) == [0]
    assert not any(isinstance(m, SwappedAttention) for m in model.modules())
    report = linattn.swap_attention(model, "hedgehog", keep=[0])
    text = str(report)
    assert "model.layers.1.self_attn  LlamaAttention  TransformersAttention  4/2    8      yes     yes   256    swapped" in text
    assert "1 of 2 swapped, 256 parameters added" in text and "kept" in text
    twin = copy.deepcopy(model)
    given = inputs(model)
    assert torch.equal(out(twin, **given), out(model, **given))
    torch.save(model, whole := io.BytesIO())
    whole.seek(0)
    assert torch.equal(out(torch.load(whole, weights_only=False), **given), out(model, **given))
    report.undo()
    assert not torch.equal(out(twin, **given), out(model, **given))  # the copy is its own


def test_modes_compare_with_the_host():
    model = CAUSAL["llama"]()
    given = inputs(model)
    before = out(model, **given)
    report = linattn.swap_attention(model, "linear")
    modules = [model.get_submodule(name) for name in report.swapped]
    for mode in ("softmax", "transfer"):
        for module in modules:
            module.mode = mode
        assert torch.equal(out(model, **given), before)
    assert all(0 < float(module.error) < 10 for module in modules)

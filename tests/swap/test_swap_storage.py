"""A swapped model comes back from its folder bit for bit, and never as softmax attention by mistake."""

import json

import pytest
import torch

import linattn
from linattn.layers import Variant

pytest.importorskip("transformers")
from swap_hosts import BOTH, CAUSAL, inputs, out


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "vit"])
def test_saved_and_loaded(tmp_path, name):
    model = (CAUSAL | BOTH)[name]()
    linattn.swap_attention(model, "gla", gating="symmetric", keep=[0], window=3 if name in CAUSAL else 0)
    given = inputs(model)
    model.save_pretrained(tmp_path)
    loaded = linattn.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(out(loaded, **given), out(model, **given))
    model.bfloat16().save_pretrained(tmp_path)
    loaded = linattn.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = linattn.from_pretrained(tmp_path / "again", dtype=torch.float32).state_dict()
    for name, p in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == p.dtype and torch.equal(again[name], p.float())


def test_transformers_alone_fails_loudly(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    model = CAUSAL["llama"]()
    linattn.swap_attention(model, "linear")  # adds no parameter: nothing but the config tells the files from softmax's
    model.save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="linattn_swapped"):
            load(tmp_path)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_files_that_are_not_of_a_swapped_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no swapped model: config.json is missing"):
        linattn.from_pretrained(tmp_path)
    model = CAUSAL["llama"]()
    model.save_pretrained(tmp_path)
    (tmp_path / "linattn.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model_type must be 'linattn_swapped'; got 'llama'"):
        linattn.from_pretrained(tmp_path)
    report = linattn.swap_attention(model, "hedgehog")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["swap"]["layers"] = values["swap"]["layers"][:1]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"does not fit: it lacks .* and has besides"):
        linattn.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub=True: a swapped model is saved to a folder only"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    report.undo()
    linattn.swap_attention(model, Variant(source="here", feature="relu", normalize=True))
    with pytest.raises(ValueError, match="a model swapped with a Variant of your own cannot be saved"):
        model.save_pretrained(tmp_path)


def test_after_undo_it_is_saved_as_before(tmp_path):
    from transformers import AutoModelForCausalLM

    model = CAUSAL["llama"]()
    before = out(model, **inputs(model))
    linattn.swap_attention(model, "linear").undo()
    model.save_pretrained(tmp_path)
    assert torch.equal(out(AutoModelForCausalLM.from_pretrained(tmp_path), **inputs(model)), before)

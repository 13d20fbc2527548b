"""Any choice of layers, swapped, undone in any order and swapped again: what was not asked for stays, and the end is the beginning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linattn

pytest.importorskip("transformers")
from swap_hosts import NONE, TEXT, build, inputs, out

LAYERS = 4
MODEL = build("LlamaForCausalLM", "LlamaConfig", **TEXT | NONE | dict(num_hidden_layers=LAYERS, num_key_value_heads=2))
GIVEN = inputs(MODEL)
numbers = st.sets(st.integers(0, LAYERS - 1))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    layers=numbers, keep=numbers, back=numbers, again=numbers, variant=st.sampled_from(["linear", "hedgehog", "gla", "liger"]),
    window=st.integers(0, 4),
)  # fmt: skip
def test_swap_and_undo(layers, keep, back, again, variant, window):
    modules, before = dict(MODEL.named_modules()), out(MODEL, **GIVEN)
    settings_before = {**MODEL.__dict__, **MODEL.generation_config.__dict__}
    for chosen in (layers, again):
        wanted = [f"model.layers.{i}.self_attn" for i in sorted(chosen - keep)]
        if not wanted:
            with pytest.raises(ValueError, match="none is left by `layers` and `keep`"):
                linattn.swap_attention(MODEL, variant, layers=chosen, keep=keep, window=window)
            continue
        report = linattn.swap_attention(MODEL, variant, layers=sorted(chosen), keep=keep, window=window)
        assert report.swapped == wanted
        assert all((MODEL.get_submodule(name) is modules[name]) == (name not in wanted) for name in modules if name.endswith("self_attn"))
        first = [name for name in wanted if int(name.split(".")[2]) in back]
        if first:
            report.undo(first)
        if len(first) < len(wanted):
            assert out(MODEL, **GIVEN).isfinite().all()
            report.undo()
        assert dict(MODEL.named_modules()) == modules and torch.equal(out(MODEL, **GIVEN), before)
        assert {**MODEL.__dict__, **MODEL.generation_config.__dict__} == settings_before

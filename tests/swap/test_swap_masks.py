"""Padding and packed sequences: a row alone, a row beside padding, and a row packed with others give the same."""

import pytest
import torch

import linattn
from linattn.swap import masks

pytest.importorskip("transformers")
from swap_hosts import BOTH, CAUSAL, inputs, out

WAYS = {"linear": dict(variant="linear"), "gla and a window": dict(variant="gla", window=3), "kda": dict(variant="kda", init="random")}
IMPLEMENTATIONS = ("sdpa", "eager")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("keep", [(), (0,)], ids=["all", "hybrid"])
def test_a_padded_row_is_the_row_alone(way, left, keep, implementation):
    model = CAUSAL["llama"]()
    model.set_attn_implementation(implementation)
    linattn.swap_attention(model, keep=keep, **WAYS[way])
    ids = inputs(model)["input_ids"]
    short = ids[1:, :7]
    pad, real = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64)
    join = lambda a, b: torch.cat([a, b] if left else [b, a], 1)
    batch = torch.cat([ids[:1], join(pad, short)])
    mask = torch.cat([torch.ones(1, 12, dtype=torch.int64), join(pad, real)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = out(model, input_ids=batch, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[:1], out(model, input_ids=ids[:1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1:, 5:] if left else together[1:, :7], out(model, input_ids=short), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_padded_row_is_the_row_alone_where_both_sides_are_seen(implementation):
    model = BOTH["bert"]()
    model.set_attn_implementation(implementation)
    linattn.swap_attention(model, "gla", gating="symmetric")
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    together = out(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(together[1:, :7], out(model, input_ids=ids[1:, :7]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep", [(), (0,)], ids=["all", "hybrid"])
def test_packed_sequences_are_each_alone(way, keep, implementation):
    model = CAUSAL["llama"]()
    model.set_attn_implementation(implementation)
    linattn.swap_attention(model, keep=keep, **WAYS[way])
    ids, ends = inputs(model)["input_ids"].flatten()[None], [0, 1, 9, 24]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(ends, ends[1:])])[None]
    ends_too = torch.tensor(ends, dtype=torch.int32)  # as transformers' DataCollatorWithFlattening gives them
    flash = dict(cu_seq_lens_q=ends_too, cu_seq_lens_k=ends_too, max_length_q=15, max_length_k=15)
    packed, told = out(model, input_ids=ids, position_ids=positions), out(model, input_ids=ids, position_ids=positions, **flash)
    assert torch.equal(packed, told)
    for a, b in zip(ends, ends[1:]):
        torch.testing.assert_close(packed[:, a:b], out(model, input_ids=ids[:, a:b]), rtol=1e-4, atol=1e-4)


def test_the_attention_interface_pads_and_packs():
    model = CAUSAL["llama"]()
    model.set_attn_implementation(linattn.register_hf("relu"))
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    padded = out(model, input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    torch.testing.assert_close(padded[1:, 5:], out(model, input_ids=ids[1:, 5:]), rtol=1e-4, atol=1e-4)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = out(model, input_ids=ids[:1], position_ids=positions)
    torch.testing.assert_close(packed[:, 5:], out(model, input_ids=ids[:1, 5:]), rtol=1e-4, atol=1e-4)


def test_masks_that_no_linear_attention_can_keep_are_refused():
    x, T = torch.zeros(1, 6, 4), 6
    read = lambda mask, causal=True: masks.read(mask, x, 0, causal, None, None)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    assert read(causal[None, None]) == masks.ALL
    for wrong in (causal.triu(-2), causal | (torch.arange(T) < 2), torch.ones(T, T, dtype=torch.bool)):  # sliding, prefix, open
        with pytest.raises(ValueError, match=r"attention_mask is not causal \+ padding \+ packing"):
            read(wrong[None, None])
    with pytest.raises(ValueError, match="attention_mask hides different keys from different queries"):
        read(causal[None, None], causal=False)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B S\] with B = 1 and S >= 6; got \(1, 3\)"):
        read(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"\[B 1 T S\] with T = 6.*got \(1, 2, 6, 6\)"):
        read(torch.ones(1, 2, 6, 6))
    with pytest.raises(ValueError, match="cu_seq_lens need their sequences in one row; got 2 rows"):
        masks.read(None, torch.zeros(2, 3, 4), 0, True, None, torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match="cu_seq_lens and attention_mask say different ends: give position_ids"):
        masks.read(causal[None, None], x, 0, True, None, torch.tensor([0, 2, 6]))
    assert masks.read(causal[None, None], x, 0, True, None, torch.tensor([0, 0, 6])).real is None
    with pytest.raises(ValueError, match="give cu_seq_lens or attention_mask, not both"):
        masks.read(torch.ones(1, 6), x, 0, True, None, torch.tensor([0, 6]))
    for wrong in ([0, 4], [1, 6], [0, 4, 3, 6]):
        with pytest.raises(ValueError, match="cu_seq_lens must rise from 0 to the number of tokens, 6"):
            masks.read(None, x, 0, True, None, torch.tensor(wrong))

"""Edits reach what they are meant for, leave the rest alone, go on through the sequence by themselves, and are never silently lost."""

import pytest
import torch
from test_capture import ALL, FORM, FORMS, Alone, close

import linattn
from linattn import VARIANTS, probes


@FORM
def test_an_edit_that_changes_nothing_changes_nothing(form):
    for model in (Alone(form), Alone(form, causal=False, gating="source")):
        sides = (None,) if model.mixer.causal else ("left", "right")
        want, _ = model()
        for side in sides:
            with linattn.probe(model, keep=ALL) as p:
                for at in (0, 31, 40, 69):
                    p.edit(0, at=at, fn=lambda S: S, direction=side)
                got, _ = model()
            close(got, want)
            assert p.last_edit.moved == 0.0
            with linattn.probe(model, keep=ALL) as plain:
                model()
            for t in (0, 31, 35, 68):
                for each in sides:
                    close(p[0].state(t, each), plain[0].state(t, each))


@FORM
def test_an_edit_goes_on_as_an_initial_state_would(form):
    model = Alone(form)
    _, state = model(part=slice(0, 30), return_state=True)
    state = state._replace(kv=0.5 * state.kv)
    want, last = model(part=slice(30, None), state=state, return_state=True)
    with linattn.probe(model) as p:
        p.edit(0, at=29, fn=lambda S: 0.5 * S)
        got, after = model(return_state=True)
    close(got[:, 30:], want)
    close(after.kv, last.kv)


@FORM
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_side_is_edited_alone(form, side):
    model = Alone(form, causal=False, gating="symmetric")
    want, _ = model()
    with linattn.probe(model) as p:
        p.edit(0, at=30, fn=lambda S: 0 * S, direction=side)
        got, _ = model()
    untouched, touched = (slice(0, 31), slice(31, None)) if side == "left" else (slice(30, None), slice(0, 30))
    close(got[:, untouched], want[:, untouched])
    assert (got[:, touched] - want[:, touched]).abs().amax(-1).max() > 1e-3


def test_sequences_heads_and_packing_are_edited_alone():
    model = Alone("delta")
    want, _ = model()
    with linattn.probe(model) as p:
        p.edit(0, at=[30, 50], fn=lambda S: 0 * S, heads=[1])
        got, _ = model()
    close(got[0, :31], want[0, :31])
    close(got[1, :51], want[1, :51])
    close(got[:, :, 0], want[:, :, 0])
    assert (got - want)[0, 31:51, 1].abs().max() > 1e-3 and (got - want)[1, 51:, 1].abs().max() > 1e-3
    cu = torch.tensor([0, 20, 20, 50, 70])
    want, _ = model(B=1, cu_seqlens=cu)
    with linattn.probe(model) as p:
        p.edit(0, at=30, fn=lambda S: 0 * S)
        got, _ = model(B=1, cu_seqlens=cu)
    close(got[:, :31], want[:, :31])
    close(got[:, 50:], want[:, 50:])
    assert (got - want)[:, 31:50].abs().max() > 1e-3


@FORM
def test_erase_takes_one_reader_and_protects_the_others(form):
    model = Alone(form)
    with linattn.probe(model, keep=ALL) as p:
        model()
    r = p[0].readers([45, 50, 55], at=40)
    with linattn.probe(model) as q:
        q.erase(0, at=40, readers=r[:, :, :1], protect=r[:, :, 1:])
        got, _ = model()
    trace = p[0]
    a = trace.attention([45])
    a[..., :41] = 0
    close(got[:, 45], torch.einsum("bhrt,bthv->brhv", a, trace.v)[:, 0], 1e-9)  # only what came after is left
    close(got[:, [50, 55]], trace.o[:, [50, 55]], 1e-9)
    assert q.last_edit.leak < 1e-9 and q.last_edit.moved > 0


def test_rewrite_puts_a_value_where_the_reader_looks():
    model = Alone("delta", groups=2)
    with linattn.probe(model, keep=ALL) as p:
        model()
    r, trace = p[0].readers([41], at=40), p[0]
    S = trace.state(40)
    both = r.unflatten(1, (2, 2))[:, :, 0]  # the first query head of each state head
    value = torch.randn(2, 2, 3, dtype=torch.float64)
    new = probes.written(S, both, value, None)
    close(torch.einsum("bhrk,bhkv->bhrv", both, new)[:, :, 0], value, 1e-10)
    with linattn.probe(model) as q:
        q.rewrite(0, at=40, readers=both, values=value)
        got, _ = model()
    a = trace.attention([41])[:, ::2]
    a[..., :41] = 0
    close(got[:, 41, ::2], torch.einsum("bhrt,bthv->brhv", a, trace.v)[:, 0] + value, 1e-9)


def test_ridge_reports_what_leaks():
    model = Alone("delta")
    with linattn.probe(model, keep=ALL) as p:
        model()
    r = p[0].readers([45, 46, 47, 48, 49, 50, 51], at=40)  # more than K = 4: exact protection is impossible
    with linattn.probe(model) as q:
        q.erase(0, at=40, readers=r[:, :, :1], protect=r[:, :, 1:], ridge=1e-3)
        model()
    assert q.last_edit.leak > 1e-3 and "leak" in repr(q.last_edit)


def test_steer_adds_an_outer_product():
    model = Alone("scalar")
    key, value = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    _, state = model(part=slice(0, 30), return_state=True)
    want, _ = model(part=slice(30, None), state=state._replace(kv=state.kv + 2 * key[:, None] * value))
    with linattn.probe(model) as p:
        p.steer(0, at=29, key=key, value=value, strength=2.0)
        got, _ = model()
    close(got[:, 30:], want)


def test_a_direction_is_taken_out_of_a_whole_memory():
    S, d = torch.randn(2, 3, 4, 5), torch.randn(5)
    assert (probes.without_value_direction(S, d) @ d).abs().max() < 1e-5
    e = torch.randn(4)
    assert (e @ probes.without_key_direction(S, e)).abs().max() < 1e-5


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_patched_run_goes_on_as_its_donor_would(variant, decoder, tokens):
    """Resuming from any captured state, convolution included, is the uninterrupted run."""
    model = decoder(variant)
    other = torch.cat([tokens[:, :50].flip(1), tokens[:, 50:]], 1)
    with torch.no_grad():
        want, _ = model(tokens)
        with linattn.probe(model, keep=ALL) as donor:
            model(tokens)
        with linattn.probe(model) as p:
            p.patch("*", at=49, source=donor)
            got, _ = model(other)
        close(got[:, 50:], want[:, 50:], 1e-5)
        with linattn.probe(model, keep=("final", "writes", "conv")) as donor:
            model(tokens[:, :50])
        with linattn.probe(model) as p:  # within decoding: the position is that of the whole sequence
            p.patch("*", at=69, source=donor, source_at=49)
            _, state = model(torch.cat([other[:, :50], other[:, :20]], 1), return_state=True)
            step, _ = model(tokens[:, 50:51], state)
        if not model.blocks[0].attention.variant.rope:
            close(step, want[:, 50:51], 1e-4)


def test_without_the_convolution_its_own_past_goes_on(decoder, tokens):
    model = decoder("gated_delta")
    other = torch.cat([tokens[:, :50].flip(1), tokens[:, 50:]], 1)
    with torch.no_grad():
        want, _ = model(tokens)
        with linattn.probe(model, keep=("final", "writes", "conv")) as donor:
            model(tokens)
        with linattn.probe(model) as p:
            p.patch("*", at=49, source=donor, conv=False)
            got, _ = model(other)
    assert (got[:, 50:53] - want[:, 50:53]).abs().max() > 1e-4


@pytest.mark.parametrize("form", [form for form in FORMS if form != "offset"])
def test_a_knocked_out_write_is_as_if_the_token_wrote_nothing(form):
    model = Alone(form)
    with linattn.probe(model, keep=ALL) as p:
        p.knockout(0, tokens=[10, 11])
        model()
    u = p[0].u
    assert not (u * p[0].k.norm(dim=-1)[..., None])[:, 10:12].any() and u[:, 12:].abs().max() > 0
    with linattn.probe(model, keep=ALL) as p:
        p.knockout(0, tokens=[10], heads=[0])
        model()
    assert not p[0].k[:, 10, 0].any() and p[0].k[:, 10, 1].all()


def test_a_knocked_out_read_reads_nothing():
    model = Alone("delta", groups=2)
    want, _ = model()
    with linattn.probe(model) as p:
        p.knockout(0, tokens=[10, 12], what="read", heads=[1])
        got, _ = model()
    assert not got[:, [10, 12], 2:].any()
    keep = [t for t in range(70) if t not in (10, 12)]
    assert torch.equal(got[:, keep], want[:, keep]) and torch.equal(got[:, :, :2], want[:, :, :2])


def test_gradients_flow_through_an_edit():
    model = Alone("scalar")
    strength = torch.ones((), dtype=torch.float64, requires_grad=True)
    with linattn.probe(model) as p:
        p.edit(0, at=20, fn=lambda S: strength * S)
        model()[0].sum().backward()
    with torch.no_grad(), linattn.probe(model) as q:
        q.edit(0, at=20, fn=lambda S: 2 * S)
        more = model()[0].sum()
    close(strength.grad, more - model()[0].sum().detach(), 1e-9)  # the output is linear in the state

"""What a probe keeps is what the operator did: states, writes, who read what, in every form; and the model's outputs stay as they were."""

import sys

import pytest
import torch

import linattn
from linattn import VARIANTS, probes
from linattn.layers import Mixer
from linattn.layers.convolution import ShortConvolution
from linattn.layers.decays import ChannelGate, Place, ScalarGate
from linattn.layers.variants import Variant

ALL = ("final", "boundaries", "writes", "gates", "reads", "output", "conv", "inputs")
EACH = pytest.mark.parametrize("variant", list(VARIANTS))
FORMS = {
    "plain": Variant(source="test"),
    "normalised": Variant(source="test", feature="elu1", normalize=True),
    "offset": Variant(source="test", feature="relu", normalize="clamp", offset=0.5),
    "scalar": Variant(source="test", decay=ScalarGate),
    "channel": Variant(source="test", decay=ChannelGate),
    "delta": Variant(source="test", decay=ScalarGate, delta=True, feature="l2norm"),
    "channel delta": Variant(source="test", decay=ChannelGate, delta=True, feature="l2norm"),
}
FORM = pytest.mark.parametrize("form", list(FORMS))


class Alone(torch.nn.Module):
    """A mixer with heads made by nobody: T tokens of x and q, k, v."""

    def __init__(self, form, dtype=torch.float64, groups=1, **options):
        super().__init__()
        self.mixer = Mixer(FORMS[form], Place(8, 2, 4), **options).to(dtype)
        self.groups, self.dtype = groups, dtype

    def forward(self, T=70, B=2, state=None, cu_seqlens=None, mask=None, return_state=False, seed=0, part=slice(None)):
        draw = torch.Generator().manual_seed(seed)
        x, q, k, v = (
            torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype)
            for shape in ((B, T, 8), (B, T, 2 * self.groups, 4), (B, T, 2, 4), (B, T, 2, 3))
        )
        x, q, k, v = (t[:, part] for t in (x, q, k, v))
        return self.mixer(x, q, k, v, state, cu_seqlens, mask, return_state=return_state)


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)


def same(a, b, model):
    """Bit for bit; to rounding where the feature map has a way round the operator, which a probe does not take."""
    shortcut = hasattr(model.blocks[0].attention.mixer.feature, "attend")
    return torch.allclose(a, b, atol=1e-5) if shortcut else torch.equal(a, b)


def joined(rows, values):
    """Σ_j a_tj v_j: rows [B HQ R T], values [B T H V] → [B R HQ V]."""
    return torch.einsum("bhrt,bthv->brhv", rows, values.repeat_interleave(rows.shape[1] // values.shape[2], 2))


@EACH
def test_keeping_changes_no_bit_and_states_are_those_of_the_model(variant, decoder, tokens):
    model = decoder(variant)
    with torch.no_grad():
        before, _ = model(tokens)
        with linattn.probe(model, keep=ALL) as p:
            during, _ = model(tokens)
        assert same(before, during, model)
        for t in (0, 5, 63, 64, 99):
            _, state = model(tokens[:, : t + 1], return_state=True)
            for i, name in enumerate(p):
                close(p[name].state(t), state[i].recurrent.kv, 1e-5)
                if state[i].conv is not None:
                    close(p[name].snapshot(t).conv, state[i].conv, 1e-5)


@pytest.mark.parametrize("variant", ["gated_delta", "taylorshift", "lion_s"])
def test_off_costs_one_attribute_test(variant, decoder, tokens, monkeypatch):
    """Each mixer and each convolution looks once whether it is probed, and no line of linattn.probes runs."""
    model = decoder(variant)
    looked, ran = [], set()
    for kind, name in ((Mixer, "probe"), (ShortConvolution, "conv_probe")):
        plain = kind.__getattribute__
        spy = lambda self, asked, plain=plain, name=name: (asked == name and looked.append(id(self))) or plain(self, asked)
        monkeypatch.setattr(kind, "__getattribute__", spy)
    sys.setprofile(lambda frame, event, argument: ran.add(frame.f_globals.get("__name__", "")))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        sys.setprofile(None)
    monkeypatch.undo()
    parts = [id(module) for module in model.modules() if isinstance(module, (Mixer, ShortConvolution))]
    assert sorted(looked) == sorted(parts) and "linattn.layers.mixer" in ran
    assert not [name for name in ran if name.startswith("linattn.probes")]


@EACH
def test_gradients_are_kept_bit_for_bit_too(variant, decoder, tokens):
    model = decoder(variant)
    grads = []
    for probed in (False, True):
        model.zero_grad()
        if probed:
            with linattn.probe(model, keep=ALL):
                model(tokens)[0].square().mean().backward()
        else:
            model(tokens)[0].square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(same(a, b, model) for a, b in zip(*grads, strict=True))


@FORM
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_and_readers_are_exact(form, groups):
    model = Alone(form, groups=groups)
    with linattn.probe(model, keep=ALL) as p:
        model()
    trace, rows = p[0], [0, 30, 69]
    close(joined(trace.attention(rows), trace.v), trace.o[:, rows])
    close(joined(trace.attention(rows, over="writes"), trace.u), trace.o[:, rows])
    assert not trace.attention([30])[..., 31:].any()
    a, r = trace.attention([50, 69]), trace.readers([50, 69], at=40)
    a[..., :41] = 0
    read = torch.einsum("bhrk,bhkv->brhv", r, trace.state(40).repeat_interleave(groups, 1))
    close(joined(a, trace.v) + read, trace.o[:, [50, 69]])


def two_sided(model, t, T=70):
    """The state from each side after token t, by the operator itself on parts of the sequence."""
    return (model(T, part=part, return_state=True)[1].kv[side] for side, part in enumerate((slice(0, t + 1), slice(t, T))))


@FORM
@pytest.mark.parametrize("gating", ["source", "target", "symmetric"])
def test_bidirectional_states_rows_and_readers(form, gating):
    model = Alone(form, causal=False, gating=gating)
    with linattn.probe(model, keep=ALL) as p:
        model()
    trace = p[0]
    for t in (0, 7, 63, 64, 69):
        left, right = two_sided(model, t)
        close(trace.state(t, "left"), left)
        close(trace.state(t, "right"), right)
    close(joined(trace.attention([3, 66]), trace.v), trace.o[:, [3, 66]])
    full = trace.attention([20])
    r = trace.readers([20], at=10, direction="left")
    far = full.clone()
    far[..., 11:] = 0
    close(joined(far, trace.v)[:, 0], torch.einsum("bhrk,bhkv->brhv", r, trace.state(10, "left"))[:, 0], 1e-10)
    r = trace.readers([20], at=30, direction="right")
    far = full.clone()
    far[..., :30] = 0
    close(joined(far, trace.v)[:, 0], torch.einsum("bhrk,bhkv->brhv", r, trace.state(30, "right"))[:, 0], 1e-10)


def test_without_decay_both_sides_add_up_to_the_whole_and_with_decay_they_do_not():
    for form, holds in (("plain", True), ("scalar", False)):
        model = Alone(form, causal=False, gating="target")
        with linattn.probe(model, keep=("writes", "final")) as p:
            model()
        trace = p[0]
        error = max((trace.state(t, "left") + trace.state(t + 1, "right") - trace.final[0]).abs().max() for t in range(69))
        assert (error < 1e-12) == holds and (holds or error > 0.1)


@FORM
@pytest.mark.parametrize("causal", [True, False])
def test_packed_states_are_those_of_the_sequences_alone(form, causal):
    model = Alone(form, causal=causal, gating=None if causal else "source")
    cu = torch.tensor([0, 3, 3, 70])
    with linattn.probe(model, keep=ALL) as p:
        model(B=1, cu_seqlens=cu)
    for a, b in ((0, 3), (3, 70)):
        with linattn.probe(model, keep=ALL) as alone:
            model(B=1, part=slice(a, b))
        for t in {a, b - 1, (a + b) // 2, min(b - 1, a + 64)}:
            for side in (None,) if causal else ("left", "right"):
                close(p[0].state(t, side), alone[0].state(t - a, side))
        rows = p[0].attention([b - 1])
        close(rows[..., a:b], alone[0].attention([b - 1 - a]))
        assert not rows[..., :a].any() and not rows[..., b:].any()
    with pytest.raises(ValueError, match="packed sequences"):
        print(p[0].at)
    if causal and not FORMS[form].normalize:
        close(p[0].readers([60], at=20), alone[0].readers([57], at=17))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "offset"])
def test_padding_is_as_if_it_were_not_there(form):
    model = Alone(form)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[:, :9] = False
    with linattn.probe(model, keep=ALL) as p:
        model(mask=mask)
    with linattn.probe(model, keep=ALL) as alone:
        model(part=slice(9, None))
    close(p[0].final, alone[0].final)
    close(p[0].state(40), alone[0].state(31))
    rows = p[0].attention([40])
    close(rows[..., 9:], alone[0].attention([31]))
    assert not p[0].state(5).any()
    gates = FORMS[form].decay is not FORMS["plain"].decay
    assert not gates or torch.allclose(probes.half_life(p[0]), probes.half_life(alone[0]))


@EACH
def test_decoding_leaves_the_trace_of_a_prefill(variant, decoder, tokens):
    model = decoder(variant)
    with torch.no_grad():
        with linattn.probe(model, keep=ALL) as whole:
            model(tokens)
        with linattn.probe(model, keep=ALL) as steps:
            _, state = model(tokens[:, :70], return_state=True)
            for t in range(70, 100):
                _, state = model(tokens[:, t : t + 1], state)
    for name in whole:
        a, b = steps[name], whole[name]
        assert a.length == b.length == 100
        for field in ("q", "k", "v", "u", "o"):
            close(getattr(a, field), getattr(b, field), 1e-4)
        for t in (20, 69, 70, 99):
            close(a.state(t), b.state(t), 1e-4)
        close(a.attention([99]), b.attention([99]), 1e-4)
        if b._conv:
            close(a.snapshot(80).conv, b.snapshot(80).conv, 1e-5)


def test_a_fresh_call_starts_a_fresh_trace(decoder, tokens):
    model = decoder()
    with linattn.probe(model, keep=ALL) as p:
        model(tokens)
        model(tokens[:, :10])
    assert p[0].length == 10 and p[0].x.shape[1] == 10


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_captured_once(reentrant, decoder, tokens, monkeypatch):
    import linattn.models.decoder as module

    kept = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *args, use_reentrant, **rest: (
        kept(lambda x: args[0](x)[0], args[1], use_reentrant=True), None) if reentrant else kept(*args, use_reentrant=False, **rest)
    )  # fmt: skip
    model = decoder()
    calls = []

    class Count:
        def update(self, layer, piece, how):
            calls.append(layer)

        def result(self):
            return len(calls)

    with linattn.probe(model, keep=ALL, reduce=[Count()]) as p:
        logits, _ = model(tokens, checkpoint_activations=True)
        logits.square().mean().backward()
    assert len(calls) == len(p) == 2 and p[0].length == 100
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(tokens)[0].square().mean().backward()
    assert all(torch.allclose(a, b.grad, atol=1e-6) for a, b in zip(plain, model.parameters(), strict=True))


def test_edits_are_made_again_where_activations_are_recomputed(decoder, tokens):
    model, grads = decoder(), []
    for checkpointed in (False, True):
        model.zero_grad()
        with linattn.probe(model) as p:
            p.edit(0, at=40, fn=lambda S: 0.5 * S)
            model(tokens, checkpoint_activations=checkpointed)[0].square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_compiled_in_one_graph_on_and_off(decoder, tokens):
    torch._dynamo.reset()
    model = decoder(num_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        want, _ = model(tokens)
        off, _ = compiled(tokens)
        with linattn.probe(model, keep=ALL) as p:
            on, _ = compiled(tokens)
        state = p[0].state(50)
        again, _ = compiled(tokens)
        with linattn.probe(compiled, keep=ALL) as q:
            compiled(tokens)
        with linattn.probe(model, keep=ALL) as plain:
            model(tokens)
    assert torch.equal(want, off) and torch.equal(want, on) and torch.equal(want, again)
    close(state, plain[0].state(50), 1e-6)
    assert list(q) == ["_orig_mod." + name for name in p] and q[0].length == 100
    torch._dynamo.reset()


def test_autocast(decoder, tokens):
    model = decoder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, _ = model(tokens)
        with linattn.probe(model, keep=ALL) as p:
            during, _ = model(tokens)
            state, rows = p[0].state(50), p[0].attention([60])
        close(joined(rows, p[0].v.float()), p[0].o[:, [60]].float(), 2e-2)
    assert torch.equal(before, during) and p[0].q.dtype == torch.bfloat16 and state.dtype == torch.float32
    _, want = model(tokens[:, :51], return_state=True)
    close(state, want[0].recurrent.kv, 5e-2)


def test_bfloat16_model(decoder, tokens):
    model = decoder().bfloat16()
    with torch.no_grad():
        before, _ = model(tokens)
        with linattn.probe(model, keep=ALL) as p:
            during, _ = model(tokens)
    assert torch.equal(before, during)
    _, want = model(tokens[:, :51], return_state=True)
    assert (p[0].state(50) - want[0].recurrent.kv).norm() <= 2e-2 * want[0].recurrent.kv.norm()


def test_kept_with_gradients(decoder, tokens):
    model = decoder()
    with linattn.probe(model, keep=("final", "writes"), detach=False) as p:
        model(tokens)
    (p[0].state(30).square().sum() + probes.participation_ratio(p[0].final).sum()).backward()
    grad = model.blocks[0].attention.k_proj.weight.grad
    assert grad is not None and grad.abs().max() > 0


def test_heads_dtype_and_every(decoder):
    model = decoder("gla", num_heads=4, num_kv_heads=2)
    long = torch.randint(0, 32, (1, 300))
    with linattn.probe(model, keep=ALL) as whole, torch.no_grad():
        model(long)
    with linattn.probe(model, keep=ALL, heads=[1], every=2, dtype=torch.float64) as p, torch.no_grad():
        model(long)
    a, b = p[0], whole[0]
    assert a.at == [0, 128, 256] and b.at == [0, 64, 128, 192, 256]
    assert a.q.dtype == torch.float64 and a.q.shape[2] == 2 and a.k.shape[2] == 1
    close(a.boundaries.float(), b.boundaries[:, ::2, 1:], 1e-6)
    close(a.state(200).float(), b.state(200)[:, 1:], 1e-5)
    close(a.attention([250]).float(), b.attention([250])[:, 2:], 1e-5)


def test_pooled_map_is_the_sum_of_rows():
    model = Alone("delta")
    with linattn.probe(model, keep="reads") as p:
        model(T=20)
    whole = p[0].attention(range(20))
    pooled, signed = p[0].attention_pooled(8), p[0].attention_pooled(8, signed=True)
    assert pooled.shape == (2, 2, 3, 3)
    close(pooled[..., 1, 0], whole[..., 8:16, :8].abs().sum((-1, -2)))
    close(signed[..., 2, 2], whole[..., 16:, 16:].sum((-1, -2)))


def test_reducers_see_every_call_and_merge(decoder, tokens):
    model = decoder()
    make = lambda: [probes.Saturation(), probes.HalfLife(), probes.Moments(), probes.Sketch(16)]
    with linattn.probe(model, keep=(), reduce=(all_ := make())), torch.no_grad():
        model(tokens)
        model(tokens.flip(0))
    assert next(iter(all_[3].result().values())).shape == (2 * 2 * 2, 2, 16)
    parts = [make(), make()]
    for one, x in zip(parts, (tokens, tokens.flip(0))):
        with linattn.probe(model, keep=(), reduce=one), torch.no_grad():
            model(x)
    merged = [a.merge(b) for a, b in zip(*parts)]
    with linattn.probe(model, keep=ALL) as p, torch.no_grad():
        model(tokens)
    name = next(iter(p))
    for reducer, other in zip(all_, merged):
        got, want = reducer.result()[name], other.result()[name]
        for a, b in zip(got.values(), want.values()) if isinstance(got, dict) else [(got, want)]:
            assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-6)
    assert torch.allclose(all_[1].result()[name], probes.half_life(p[0]), rtol=1e-5)
    o = p[0].o.flatten(0, -2).double()
    moments = all_[2].result()[name]
    assert moments["n"] == 2 * len(o) and torch.allclose(moments["mean"], o.mean(0), atol=1e-6)
    assert torch.allclose(moments["covariance"], torch.cat([o, o]).T.cov(), atol=1e-6)


def test_the_estimate_is_what_is_kept(decoder, tokens):
    for variant in VARIANTS:
        model = decoder(variant)
        p = linattn.probe(model, keep=ALL, every=1)
        before = p.estimate(2, 100)
        with p, torch.no_grad():
            model(tokens)
        kept = dict.fromkeys(before, 0)
        for name in p:
            piece = p[name].pieces[0]
            conv = p[name]._conv or {"inputs": None, "final": None}
            kept["conv"] += 0 if conv["inputs"] is None else conv["inputs"].nbytes
            kept["final"] += 0 if conv["final"] is None else conv["final"].nbytes
            for field in before.keys() - {"conv"}:
                value = getattr(piece, field)
                if value is not None and not (field == "log_decay" and value.ndim == 1):
                    kept[field] += sum(t.nbytes for t in (value if isinstance(value, tuple) else [value]) if t is not None)
        assert before == p.estimate(2, 100) == kept
        assert "KiB" in p.estimate_text(2, 100)


def test_saved_and_loaded_traces_answer_alike(decoder, tokens, tmp_path):
    model = decoder()
    with linattn.probe(model, keep=ALL) as p, torch.no_grad():
        model(tokens)
    path = p.save(tmp_path / "trace.safetensors")
    loaded = probes.load(path)
    assert list(loaded) == list(p)
    for name in p:
        assert torch.equal(loaded[name].state(77), p[name].state(77)) and torch.equal(loaded[name].final, p[name].final)
        assert torch.equal(loaded[name].attention([70]), p[name].attention([70]))
        assert torch.equal(loaded[name].snapshot(50).conv, p[name].snapshot(50).conv)
    with torch.no_grad(), linattn.probe(model) as again:
        again.patch("*", at=49, source=loaded)
        got, _ = model(torch.cat([tokens[:, :50].flip(1), tokens[:, 50:]], 1))
    assert torch.allclose(got[:, 50:], model(tokens)[0][:, 50:], atol=1e-5)


def test_any_holder_of_a_mixer_can_be_probed(tokens):
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = torch.nn.ModuleList([Alone("scalar", torch.float32), torch.nn.Linear(2, 2), Alone("delta", torch.float32)])

        def forward(self):
            return [layer() for layer in (self.stack[0], self.stack[2])]

    model = Foreign()
    with linattn.probe(model, layers="stack.2.*", keep=ALL) as p:
        model()
    assert list(p) == ["stack.2.mixer"] and p["stack.2.mixer"].state(3).shape == (2, 2, 4, 3)

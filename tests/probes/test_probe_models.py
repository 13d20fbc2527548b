"""Whole models under a probe: images and packs of them, two curves, masked text, swapped hosts, several threads, torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_capture import ALL, close, joined

import linattn
from linattn import VARIANTS, Decoder, Encoder, VisionTransformer, probes
from linattn.layers import Mixer, snakes
from linattn.layers.decays import Place
from linattn.models.l2vit import GlobalAttention


def vision(variant, **overrides):
    torch.manual_seed(1)
    options = dict(img_size=32, patch_size=4, num_classes=5, dim=32, num_layers=2, num_heads=2) | overrides
    model = VisionTransformer.create(f"vit_tiny_{variant}", **options)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))  # a hash is fitted by its first batch
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_images_are_seen_from_both_sides_without_a_change(variant, images):
    model = vision(variant)
    with torch.no_grad():
        before = model(images)
        with linattn.probe(model, keep=ALL) as p:
            during = model(images)
    if hasattr(model.blocks[0].attention.mixer.feature, "attend"):
        close(during, before, 1e-5)
    else:
        assert torch.equal(before, during)
    trace, rows = p[1], [0, 40, 64]
    close(joined(trace.attention(rows), trace.v), trace.o[:, rows], 1e-4)
    assert trace.length == 65 and trace.attention_pooled(13).shape[-2:] == (5, 5)
    read = joined(trace.attention([40]).masked_fill(torch.arange(65) > 20, 0.0), trace.v)
    if not model.blocks[0].attention.variant.normalize:
        r = trace.readers([40], at=20, direction="left")
        close(torch.einsum("bhrk,bhkv->brhv", r, trace.state(20, "left")), read, 1e-4)


@pytest.mark.parametrize("variant", ["lion_s", "lion_lit", "gated_delta", "retnet"])
def test_an_image_of_a_pack_is_as_if_alone(variant, images):
    model, sizes = vision(variant), [images[0], images[1][:, :16]]
    with torch.no_grad():
        want = model(sizes)
        with linattn.probe(model, keep=ALL) as p:
            got = model(sizes)
        assert torch.equal(want, got)
        with linattn.probe(model, keep=ALL) as alone:
            model(sizes[1][None])
    trace, other = p[1], alone[1]
    for t in (0, 13, 32):
        for side in ("left", "right"):
            close(trace.state(65 + t, side), other.state(t, side), 1e-5)
    close(trace.attention([65 + 7])[..., 65:], other.attention([7]), 1e-5)
    close(trace.readers([65 + 20], at=65 + 5, direction="left"), other.readers([20], at=5, direction="left"), 1e-5)
    close(trace.readers([65 + 5], at=65 + 20, direction="right"), other.readers([5], at=20, direction="right"), 1e-5)


@pytest.mark.parametrize("variant", ["lion_d", "lion_s", "retnet"])
def test_two_curves_are_two_walks(variant, images):
    """What both walks leave in the outputs, divided by what they share, is what the mixer gave; each can be edited alone."""
    model = vision(f"{variant}_natural")
    with torch.no_grad():
        before = model(images)
        with linattn.probe(model, keep=ALL) as p:
            estimate = p.estimate(2, 65)
            seen = []
            hook = model.blocks[0].attention.mixer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
            during = model(images)
            hook.remove()
    close(during, before, 1e-5)
    assert list(p)[:2] == ["blocks.0.attention.mixer", "blocks.0.attention.mixer.second"] and len(p) == 4
    assert estimate == p.estimate(2, 65)
    curves = snakes([(8, 8)], prefix=1)
    both = 0
    for trace, order in zip((p[0], p[1]), curves, strict=True):
        assert torch.equal(trace.order, order)
        close(joined(trace.attention([0, 50]), trace.v), trace.o[:, [0, 50]], 1e-4)
        both = both + trace.o[:, order.argsort()] / 2
    eps = 1e-6
    o = both if not VARIANTS[variant].normalize else both[..., :-1] / (2 * both[..., -1:] + eps) * 2
    close(o, seen[0], 1e-4)
    with torch.no_grad(), linattn.probe(model, layers="*.0.*.second") as q:
        q.edit(0, at=20, fn=lambda S: 0 * S, direction="left")
        assert (model(images) - before).abs().max() > 1e-5
    with torch.no_grad(), linattn.probe(model, layers="*.second") as q:
        close(model(images), before, 1e-5)
    assert len(q) == 2


def test_masked_text_is_as_if_padding_were_not_there():
    torch.manual_seed(1)
    model = Encoder.create("tiny", vocab_size=32, variant="lion_s_mlm", dim=32, num_layers=2, num_heads=2).eval()
    tokens, mask = torch.randint(0, 32, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    mask[0, 30:] = False
    with torch.no_grad():
        want = model(tokens, mask=mask)
        with linattn.probe(model, keep=ALL) as p:
            got = model(tokens, mask=mask)
        with linattn.probe(model, keep=ALL) as alone:
            model(tokens[:1, :30])
    assert torch.equal(want, got)
    for side, t in (("left", 29), ("right", 0), ("left", 12), ("right", 12)):
        close(p[1].state(t, side)[:1], alone[1].state(t, side), 1e-5)
    a = p[1].attention([3])[:1]
    close(a[..., :30], alone[1].attention([3]), 1e-5)
    assert not a[..., 30:].any()


def test_attention_of_l2vit_is_probed():
    layer, x = GlobalAttention(64).eval(), torch.randn(2, 4, 5, 64)
    with torch.no_grad(), linattn.probe(layer, keep=ALL) as p:
        layer(x)
    close(joined(p[0].attention([3, 19]), p[0].v), p[0].o[:, [3, 19]], 1e-5)


def test_reading_an_image_by_segments_is_refused(images):
    model = vision("lion_s")
    with (
        pytest.raises(ValueError, match="segment must be None while"),
        linattn.probe(model),
        torch.no_grad(),
    ):
        model(images, segment=16)


@pytest.mark.parametrize("variant", ["gla", "retnet", "gated_delta", "linear"])
@pytest.mark.parametrize("causal", [True, False])
def test_one_head_on_two_threads_keeps_its_bits(variant, causal):
    """Where heads are fewer than threads the kernel cuts time too, but not where it records."""
    torch.set_num_threads(2)
    draw = lambda *shape: torch.randn(1, 2048, *shape)
    mixer = Mixer(variant, Place(8, 1, 16), causal=causal).eval()
    given = draw(8), draw(1, 16), draw(1, 16), draw(1, 16)
    with torch.no_grad():
        want, _ = mixer(*given)
        with linattn.probe(mixer, keep=ALL) as p:
            got, _ = mixer(*given)
    assert torch.equal(want, got) and p[0].at[:3] == [0, 64, 128]


def small(kind, config, **sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return getattr(transformers, kind)(getattr(transformers, config)(**shape, **sizes)).eval()


@pytest.mark.parametrize("variant", ["hedgehog", "gated_delta", "lion_s"])
def test_a_swapped_host_is_probed_and_edited(variant):
    none = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = small("LlamaForCausalLM", "LlamaConfig", vocab_size=50, num_key_value_heads=2, **none)
    linattn.swap_attention(model, variant, **{} if variant == "hedgehog" else {"init": "random"})
    ids = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        want = model(ids).logits
        with linattn.probe(model, keep=ALL) as p:
            got = model(ids).logits
        assert torch.equal(want, got) and list(p) == [f"model.layers.{i}.self_attn.mixer" for i in range(2)]
        trace = p[1]
        assert trace.state(39).shape[1] == 2 and trace.q.shape[2] == 4
        close(joined(trace.attention([0, 39]), trace.v), trace.o[:, [0, 39]], 1e-4)
        r = trace.readers([25, 30], at=20)
        with linattn.probe(model) as q:
            q.erase(1, at=20, readers=r[:, :, :1], protect=r[:, :, 1:])
            edited = model(ids).logits
    assert torch.equal(edited[:, :20], want[:, :20]) and (edited[:, 25] - want[:, 25]).abs().max() > 1e-5
    assert q.last_edit.leak < 0.05


@pytest.mark.parametrize("kind", ["Bert", "ViT"])
def test_a_swapped_host_that_sees_both_sides(kind):
    if kind == "Bert":
        model = small("BertModel", "BertConfig", vocab_size=50, attention_probs_dropout_prob=0.0)
        given = dict(input_ids=torch.randint(3, 50, (2, 12)), attention_mask=(torch.arange(12) < torch.tensor([[12], [8]])).long())
    else:
        model = small("ViTModel", "ViTConfig", image_size=12, patch_size=4, num_channels=1)
        given = dict(pixel_values=torch.randn(2, 1, 12, 12))
    linattn.swap_attention(model, "lion_s")
    with torch.no_grad():
        want = model(**given).last_hidden_state
        with linattn.probe(model, keep=ALL) as p:
            got = model(**given).last_hidden_state
    assert torch.equal(want, got) and len(p) == 2
    close(joined(p[0].attention([4]), p[0].v), p[0].o[:, [4]], 1e-5)
    assert p[0].state(3, "left").shape == p[0].state(3, "right").shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_edits_in_one_graph(backend, decoder, tokens):
    """Made in every call, with what they moved and leaked, and with gradients, as without the compiler."""
    torch._dynamo.reset()
    model = decoder(num_layers=1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with linattn.probe(model, keep=("writes", "reads")) as p, torch.no_grad():
        model(tokens)
    r = p[0].readers([60, 70], at=40)
    found = []
    for call in (model, compiled, compiled):
        model.zero_grad()
        with linattn.probe(model, keep=("final", "writes")) as q:
            q.erase(0, at=40, readers=r[:, :, :1], protect=r[:, :, 1:], ridge=1e-3)
            q.knockout(0, tokens=[3])
            q.steer(0, at=50, key=torch.ones(12), value=torch.ones(24), heads=[0])
            logits, _ = call(tokens)
            logits.square().mean().backward()
        found.append((logits.detach(), q[0].state(80), torch.tensor([[e.moved, e.leak or 0.0] for e in q.changes]),
                      model.blocks[0].attention.k_proj.weight.grad.clone()))  # fmt: skip
    for again in found[1:]:
        for a, b in zip(again, found[0], strict=True):
            close(a, b, 1e-4)
    assert found[0][2][0, 1] > 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_model_under_zero_3(tmp_path):
    """Parameters lie in parts, and DeepSpeed's own hooks gather them: a probe touches neither."""
    pytest.importorskip("deepspeed")
    script, root = Path(__file__).with_name("probe_zero3.py"), Path(__file__).parents[2]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as without") == 2
    traces = [probes.load(tmp_path / f"trace.rank{rank}.safetensors") for rank in range(2)]
    assert traces[0][0].state(10).shape == traces[1][0].state(10).shape and not torch.equal(traces[0][0].state(10), traces[1][0].state(10))


def test_what_is_kept_grows_with_no_token_under_reducers(decoder):
    """Sums of every layer and head, whatever the length: the same bytes after 64 tokens and after 640."""
    model, sizes = decoder("gla"), []
    for length in (64, 640):
        reducers = [probes.Saturation(), probes.HalfLife(), probes.Moments()]
        with linattn.probe(model, keep=(), reduce=reducers), torch.no_grad():
            model(torch.randint(0, 32, (2, length)))
        tensors = [x for reducer in reducers for sums in reducer.sums.values() for x in sums if isinstance(x, torch.Tensor)]
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors))
    assert sizes[0] == sizes[1] > 0


def test_offloaded_and_loaded_elsewhere(decoder, tokens, tmp_path):
    model = decoder()
    with linattn.probe(model, keep=ALL, device="cpu", dtype=torch.bfloat16) as p, torch.no_grad():
        model(tokens)
    p.save(tmp_path / "t.safetensors")
    loaded = probes.load(tmp_path / "t.safetensors")
    assert loaded[0].q.dtype == torch.bfloat16 and torch.equal(loaded[0].state(50), p[0].state(50))
    other = Decoder(model.config).eval()  # a new model: a state of the right shape goes in, whoever saved it
    with torch.no_grad(), linattn.probe(other, keep="final") as q:
        q.patch(0, at=30, source=loaded, source_at=50)
        other(tokens)
    assert q.last_edit.moved > 0

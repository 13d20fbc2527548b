"""What a probe refuses, in what words, and that nothing is left behind."""

import pytest
import torch
from test_capture import ALL, Alone

import linattn
from linattn import probes


def says(*parts):
    return pytest.raises(ValueError, match=".*".join(parts))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"layers": "blocks.9.*"}, ("layers must match", "blocks.0.attention.mixer", "blocks.9")),
        ({"layers": 5}, ("layers must match", "5 matches nothing")),
        ({"layers": []}, ("layers must match",)),
        ({"layers": 1.5}, ("layers must be names, patterns or numbers", "1.5")),
        ({"heads": 1}, ("heads must be", "1")),
        ({"device": "abacus"}, ("device must be", "abacus")),
        ({"keep": "states"}, ("keep must be of", "boundaries", "states")),
        ({"every": 0}, ("every must be", "got 0")),
        ({"heads": [-1]}, ("heads must be", "-1")),
        ({"dtype": torch.int32}, ("dtype must be", "int32")),
        ({"budget": -1}, ("budget must be", "-1")),
        ({"reduce": [3]}, ("reduce must be", "int")),
    ],
)
def test_arguments(options, parts, decoder):
    with says(*parts):
        linattn.probe(decoder(), **options)


def test_a_model_without_linear_attention():
    with says("no linear attention", "Sequential"):
        linattn.probe(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with says("model must be a torch.nn.Module", "str"):
        linattn.probe("model")


def test_heads_that_are_not_there(decoder, tokens):
    model = decoder()
    with says("heads must lie in", "7"), linattn.probe(model, heads=[7], keep=ALL):
        model(tokens)


def test_a_capture_over_budget_is_refused_before_any_work(decoder, tokens):
    model = decoder()
    with says("would take", "budget is 9.77 KiB"), linattn.probe(model, keep=ALL, budget=10_000) as p:
        model(tokens)
    assert not p.traces() and model.blocks[0].attention.mixer.probe is None
    with linattn.probe(model, keep=ALL, budget=sum(p.estimate(2, 100).values())):
        model(tokens)


def test_a_sequence_that_grows_over_budget(decoder, tokens):
    model = decoder()
    room = sum(linattn.probe(model, keep="writes").estimate(2, 150).values())
    with says("budget"), linattn.probe(model, keep="writes", budget=room):
        _, state = model(tokens, return_state=True)
        model(tokens, state)


def test_two_probes_at_once(decoder):
    model = decoder()
    with linattn.probe(model):
        with says("probed already"), linattn.probe(model):
            pass
    with linattn.probe(model):
        pass


def test_sequences_split_over_processes(decoder):
    """Context parallelism, of which `shard` is the mark: no process has a state of the whole sequence."""
    model = decoder()
    model.blocks[1].attention.shard = object()
    with says("split over several processes", "blocks.1.attention.mixer", "context_parallel=1"), linattn.probe(model):
        pass
    assert all(block.attention.mixer.probe is None for block in model.blocks)


def test_the_model_is_itself_again_after_an_error(decoder, tokens):
    model = decoder()
    with pytest.raises(KeyError), linattn.probe(model):
        raise KeyError
    assert all(block.attention.mixer.probe is None and block.attention.conv.conv_probe is None for block in model.blocks)


def test_positions_past_the_end(decoder, tokens):
    model = decoder()
    with linattn.probe(model, keep=ALL) as p:
        model(tokens)
    for t in (100, -1, 1.5):
        with says("t must be a token of the 100", str(t)):
            p[0].state(t)
    with says("t must be", "100"):
        p[0].attention([100])
    with says("rows must come after", "40"):
        p[0].readers([40], at=40)
    with says("at must not come before"):
        p[0].survival(10, [5])


def test_an_edit_that_was_not_reached(decoder, tokens):
    model = decoder()
    with says("edit of", r"not reached at \[100\]", "saw 100 tokens"), linattn.probe(model) as p:
        p.edit(0, at=100, fn=lambda S: S)
        model(tokens)
    with says("knockout", r"\[200\]"), linattn.probe(model) as p:
        p.knockout(1, tokens=[3, 200])
        model(tokens)
    with says("saw 0 tokens"), linattn.probe(model) as p:
        p.erase(0, at=3, readers=torch.ones(1, 2, 12))


def test_edits(decoder, tokens):
    model = decoder("gla")
    p = linattn.probe(model)
    with says("layer must match", "nothing"):
        p.edit("blocks.7.*", at=3, fn=abs)
    with says("at must be", "-3"):
        p.edit(0, at=-3, fn=abs)
    with says("direction", "None: this layer is causal", "left"):
        p.edit(0, at=3, fn=abs, direction="left")
    with says("what must be", "both"):
        p.knockout(0, tokens=[1], what="both")
    with says("tokens must be"):
        p.knockout(0, tokens=[])
    with says("fn must be a function", "3"):
        p.edit(0, at=3, fn=3)
    with says("no edit was made"):
        print(p.last_edit)
    for edit, parts in (
        (lambda p: p.edit(0, at=3, fn=lambda S: S[..., :1]), ("must give a state of shape",)),
        (lambda p: p.edit(0, at=3, fn=lambda S: None), ("must give a state of shape", "None")),
        (lambda p: p.steer(0, at=3, key=torch.ones(99), value=torch.ones(32)), ("key must be", "99")),
        (lambda p: p.erase(0, at=3, readers=torch.ones(2, 2, 99)), ("readers must be", "99")),
        (lambda p: p.rewrite(0, at=3, readers=torch.ones(2, 2, 8), values=torch.ones(99)), ("values must be", "99")),
        (lambda p: p.edit(0, at=[3, 4, 5], fn=lambda S: S), ("one for each of 2 sequences", "3")),
        (lambda p: p.edit(0, at=3, fn=lambda S: S, heads=[4]), ("heads must lie in", "4")),
    ):
        with says(*parts), linattn.probe(model) as p:
            edit(p)
            model(tokens)


def test_a_bidirectional_scan_needs_a_direction():
    model = Alone("scalar", causal=False, gating="source")
    with says("direction of the edit", "'left' or 'right'", "None"):
        linattn.probe(model).edit(0, at=3, fn=abs)
    with says("direction must be", "up"):
        linattn.probe(model).edit(0, at=3, fn=abs, direction="up")
    with linattn.probe(model, keep=ALL) as p:
        model()
    with says("direction must be 'left' or 'right'"):
        p[0].state(3)
    with says("direction must be"):
        p[0].readers([9], at=3)


def test_a_trace_of_another_model(decoder, tokens):
    model, other = decoder("gated_delta"), decoder("gated_delta", num_heads=4)
    with linattn.probe(other, keep=ALL) as donor:
        other(tokens)
    with says("source is of another model"), linattn.probe(model) as p:
        p.patch(0, at=10, source=donor)
        model(tokens)
    alone = Alone("delta", torch.float32)
    with linattn.probe(alone, keep=ALL) as strange:
        alone()
    with says("source is of another model", "has not kept"):
        linattn.probe(model).patch(0, at=10, source=strange)
    with says("source must be", "int"):
        linattn.probe(model).patch(0, at=10, source=3)
    with linattn.probe(model, keep="writes") as donor:
        model(tokens)
    with says("no convolution state", "conv"):
        linattn.probe(model).patch(0, at=10, source=donor)


def test_what_was_not_kept_is_named(decoder, tokens, tmp_path):
    model = decoder()
    with linattn.probe(model, keep="gates") as p:
        model(tokens)
    trace = p[0]
    for ask, name in (
        (lambda: trace.final, "final"), (lambda: trace.boundaries, "boundaries"), (lambda: trace.state(3), "writes"),
        (lambda: trace.attention([3]), "reads"), (lambda: probes.surprise(trace), "writes"), (lambda: probes.transition(trace), "reads"),
    ):  # fmt: skip
        with says("keep must name", name):
            ask()
    with linattn.probe(model, keep="boundaries") as p:
        model(tokens)
    assert p[0].state(63).shape == (2, 2, 12, 24)
    with says("keep must name 'writes'"):
        p[0].state(64)
    with says("nothing was kept"):
        linattn.probe(model)[0]
    with says("nothing was kept"):
        linattn.probe(model).save(tmp_path / "t.safetensors")
    plain = decoder("gla")
    with linattn.probe(plain, keep=ALL) as p:
        plain(tokens)
    with says("has no beta", "such a layer has none"):
        probes.surprise(p[0])


def test_rows_of_an_edited_run(decoder, tokens):
    model = decoder()
    with linattn.probe(model, keep=ALL) as p:
        p.edit(0, at=10, fn=lambda S: 0 * S)
        model(tokens)
    with says("was edited"):
        p[0].attention([20])
    assert p[0].state(20).shape and p[1].attention([20]).shape


def test_files_that_are_no_traces(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("not a trace")
    with says("no file of traces"):
        probes.load(tmp_path / "text")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with says("no file of traces", "linattn-trace-1", "None"):
        probes.load(tmp_path / "x.safetensors")

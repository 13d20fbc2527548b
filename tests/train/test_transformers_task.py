"""Models of transformers on the one loop, swapped and not: they learn, resume bit for bit, and leave folders that load elsewhere."""

import shutil
from dataclasses import replace
from io import StringIO

import pytest
import torch
from launching import command, finish, some_text
from rich.console import Console

import linattn
from linattn.train import recipes, train
from linattn.train.data import held_out_windows
from linattn.train.log import read
from linattn.train.tasks import TASKS

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return some_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A config without weights, its output tied to its embedding."""
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def config_of(text, llama, **fields):
    sizes = dict(
        options=dict(model=str(llama)),
        held_out=0.2,
        context=32,
        batch=4,
        warmup=1,
        lr=1e-2,
        eval_every=3,
        save_every=3,
        keep=9,
        device="cpu",
    )
    return replace(recipes.transformers(steps=6), data=(str(text),), **sizes | fields)


def run(config, out):
    return train(config, out, console=Console(file=StringIO()))


def figures(out):
    return [(row["loss"], row["grad_norm"], row["bits_per_byte"]) for row in read(out / "log.csv")]


@pytest.mark.parametrize("swap", ["", "gla"])
def test_it_learns_goes_on_bit_for_bit_and_loads_elsewhere(text, llama, tmp_path, swap):
    config = config_of(text, llama, options=dict(model=str(llama), swap=swap))
    whole = run(config, tmp_path / "run")
    before = figures(tmp_path / "run")
    assert before[-1][2] < before[0][2] - 0.2
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    run(replace(config, checkpoint_activations=False), tmp_path / "run")
    assert figures(tmp_path / "run") == before
    load = linattn.from_pretrained if swap else transformers.AutoModelForCausalLM.from_pretrained
    model = load(whole.checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    task = TASKS["transformers"](config, None)
    tokens = held_out_windows(task.corpus.held_out, context=32, count=64)
    with torch.no_grad():
        bits, weight = task.score(model, {"tokens": tokens, "bytes": task._bytes(tokens)})
    assert float(bits) / float(weight) == pytest.approx(before[-1][2], rel=1e-5)
    again = run(config_of(text, whole.checkpoint, steps=1), tmp_path / "more")  # its weights are where another run begins
    assert again.rows[0]["bits_per_byte"] == pytest.approx(before[-1][2], rel=1e-5)


def test_what_it_cannot_do_is_said(text, llama, tmp_path):
    for change, said in (
        (dict(options={}), "model must be a folder with the config.json of a model of transformers; got ''"),
        (dict(packing=True), "set and packing are of our own decoders"),
        (dict(options=dict(model=str(llama), swap="mha")), "variant must be"),
        (dict(options=dict(model=str(llama), swap="gla", init="zeros")), "init must be"),
    ):
        with pytest.raises(ValueError, match=said):
            run(config_of(text, llama, **change), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    shutil.copytree(llama, tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="weights as safetensors: nothing is unpickled"):
        run(config_of(text, tmp_path / "pickled"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("stage, precision", [(1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")])
def test_swapped_under_zero_in_two_processes(text, llama, tmp_path, stage, precision):
    pytest.importorskip("deepspeed")
    out = tmp_path / "run"
    out.mkdir()
    options = dict(model=str(llama), swap="gla")
    config = config_of(text, llama, options=options, zero=stage, precision=precision, checkpoint_activations=True)
    config.save(out / "run.json")
    code, said = finish(command(2, "train", "--out", out))
    assert code == 0, said
    before = figures(out)
    shutil.rmtree(out / "step-00000006")
    code, said = finish(command(2, "train", "--out", out))
    assert code == 0 and "going on from" in said and figures(out) == before, said
    linattn.from_pretrained(out / "step-00000006")
    if precision == "float32":
        alone = run(replace(config, zero=None, checkpoint_activations=False), tmp_path / "alone")
        assert [row[0] for row in before[1:]] == pytest.approx([row["loss"] for row in alone.rows[1:]], rel=1e-4)

"""`linattn swap`: from a folder of transformers to a linear model in a folder of ours, with a report, and on from where it stopped."""

import json

import pytest
import torch
from typer.testing import CliRunner

import linattn
from linattn.cli import app

pytest.importorskip("transformers")
from swap_hosts import BOTH, NONE, TEXT, build

LLAMA = TEXT | NONE | dict(vocab_size=257, num_key_value_heads=2)


def swap(*arguments):
    return CliRunner().invoke(app, ["swap", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    build("LlamaForCausalLM", "LlamaConfig", **LLAMA).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question; " * 100)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers by the old name
def test_all_stages_then_nothing_is_left_to_do(folder):
    pytest.importorskip("peft")
    arguments = (folder / "model", "--out", folder / "out", "--data", folder / "text.txt", "--context", 32, "--batch", 2, "--window", 4)
    arguments += ("--softmax", 1, "--transfer", 3, "--distill", 3, "--lora", 2, "--chain", 1)
    result = swap(*arguments)
    assert result.exit_code == 0, result.output
    assert "held-out bits per byte: softmax " in result.output and "LlamaAttention" in result.output
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [row["stage"] for row in report["rows"]] == ["softmax", "swap", "transfer", "keep", "distill", "lora"]
    assert all(4 < row["value"] < 12 for row in report["rows"])
    assert (
        set(report["rows"][1]["errors"])
        == set(report["rows"][2]["errors"])
        == set(report["rows"][3]["importance"])
        == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    )
    model = linattn.from_pretrained(folder / "out")
    assert len(linattn.swap.swap.swapped_of(model)) == 1
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    again = swap(*arguments)
    assert again.exit_code == 0 and "done already" in again.output and "after" not in again.output.split("done already")[1].split("\n")[1]
    other = swap(*arguments, "--seed", 1)
    assert other.exit_code == 2 and "holds a run of another source" in other.output.replace("\n", " ")


def test_a_run_that_was_cut_off_goes_on(folder, monkeypatch):
    from linattn.swap import linearise

    arguments = lambda out: (
        *(folder / "model", "--out", folder / out, "--data", folder / "text.txt", "--context", 32, "--batch", 2),
        *("--transfer", 4, "--distill", 4),
    )
    assert swap(*arguments("whole")).exit_code == 0
    distill = linearise.distill
    monkeypatch.setattr(linearise, "distill", lambda *a, **k: (_ for _ in ()).throw(OSError("cut off")))
    assert swap(*arguments("parted")).exit_code == 2
    monkeypatch.setattr(linearise, "distill", distill)
    assert "softmax, swap, transfer" in swap(*arguments("parted")).output
    whole, parted = (linattn.from_pretrained(folder / out).state_dict() for out in ("whole", "parted"))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_nothing_to_transfer(folder):
    arguments = (folder / "model", "--out", folder / "out", "--data", folder / "text.txt", "--context", 32, "--batch", 2)
    result = swap(*arguments, "--variant", "liger", "--transfer", 2, "--distill", 2)
    assert result.exit_code == 0 and "transfer is left out: liger adds no parameters" in result.output
    rows = json.loads((folder / "out" / "report.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["softmax", "swap", "transfer", "distill"] and rows[1]["value"] == rows[2]["value"]


def test_a_tokenizer_of_transformers(folder):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    from linattn.train.hosts import Host

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<eos>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([(folder / "text.txt").read_text()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder / "model")
    arguments = (folder / "model", (str(folder / "text.txt"),))
    with pytest.raises(ValueError, match="has 257 tokens, and its text token"):
        Host(*arguments, context=16, rows=2, seed=0, device="cpu")
    model = build("LlamaForCausalLM", "LlamaConfig", **LLAMA | dict(vocab_size=280))
    model.save_pretrained(folder / "model")
    host = Host(*arguments, context=16, rows=2, seed=0, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely: log2(280) bits each, and a token is several bytes
    text = (folder / "text.txt").read_text()
    bytes_per_token = len(text) / len(bpe.encode(text).ids)
    assert host.bits_per_byte(model) == pytest.approx(8.129 / bytes_per_token, rel=0.1)
    with torch.no_grad():
        assert host.load()(**host.batch(0)).logits.shape == (2, 16, 280)
    stages = ("--transfer", 0, "--distill", 1, "--context", 16, "--batch", 2)
    result = swap(folder / "model", "--out", folder / "out", "--data", folder / "text.txt", *stages)
    assert result.exit_code == 0 and (folder / "out" / "tokenizer.json").exists(), result.output  # which `linattn probe` then reads with


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--out", "out"), "nowhere holds no model of transformers: config.json is missing"),
        (("model", "--out", "out", "--variant", "glaa"), "variant must be"),
        (("model", "--out", "out", "--lr", "0"), "lr must be above 0; got 0.0"),
        (("model", "--out", "out", "--softmax", "2"), "softmax must be below 2, the number of layers that can be swapped; got 2"),
        (("vit", "--out", "out"), "vit holds no language model: ViTConfig has no vocab_size"),
        (("bert", "--out", "out"), "is bidirectional; it cannot take causal attention"),
        (("small", "--out", "out"), "has 50 tokens, and its text token 256: it needs its own tokenizer files"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    if arguments[0] == "small":
        build("LlamaForCausalLM", "LlamaConfig", **LLAMA | dict(vocab_size=50)).save_pretrained("small")
    if arguments[0] == "vit":
        BOTH["vit"]().save_pretrained("vit")
    if arguments[0] == "bert":
        build("BertLMHeadModel", "BertConfig", **TEXT | dict(vocab_size=257)).save_pretrained("bert")
    result = swap(*arguments, "--data", "text.txt", "--context", 32)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (folder / "out").exists()

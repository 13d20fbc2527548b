"""Token files: the same stream as from text, mapped; packing: every document as if it were alone."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from linattn.train import TASKS, Config, data, sample, tokens, train
from linattn.train.tasks import DecoderTask

TEXTS = [f"document {i}: " + "word " * (i % 7 + 5) for i in range(60)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(text)
    return tmp_path / "text"


def decoded(stream, coder):
    return b"".join(coder.pieces[i] or b"\n" for i in stream.tolist()).split(b"\n")[:-1]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_built_corpus_is_that_of_its_text(folder, tmp_path, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    how = dict(tokenizer=tokenizer, vocab_size=300, held_out=0.3)
    tokens.build((str(folder),), tmp_path / "built", **how)
    mapped, read = tokens.load(tmp_path / "built", context=16), data.load((str(folder),), context=16, **how)
    assert torch.equal(mapped.train, read.train) and torch.equal(mapped.held_out, read.held_out)
    assert mapped.tokenizer.pieces == read.tokenizer.pieces and mapped.fingerprint == read.fingerprint


def test_json_lines_parquet_and_files_of_tokenizers(folder, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS) + "\n\n")
    tokens.build((str(tmp_path / "a.jsonl"),), tmp_path / "one", tokenizer="bpe", vocab_size=300, held_out=0.3, field="body")
    tokens.build((str(folder),), tmp_path / "two", tokenizer=str(tmp_path / "one" / "tokenizer.json"), held_out=0.3)
    one, two = (tokens.load(tmp_path / name, context=16) for name in ("one", "two"))
    assert torch.equal(one.train, two.train) and one.tokenizer.end == two.tokenizer.end
    assert sorted(decoded(one.train, one.tokenizer) + decoded(one.held_out, one.tokenizer)) == sorted(text.encode() for text in TEXTS)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    tokens.build((str(tmp_path / "a.parquet"),), tmp_path / "three", held_out=0.3, field="body")
    tokens.build((str(folder),), tmp_path / "four", held_out=0.3)
    assert torch.equal(*(tokens.load(tmp_path / name, context=16).train for name in ("three", "four")))
    with pytest.raises(ValueError, match=r"has no column 'text'; there are \['body'\]"):
        tokens.build((str(tmp_path / "a.parquet"),), tmp_path / "five")


def test_a_file_of_words_trains_and_generates(folder, tmp_path):
    pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["?", "document", "word", ":", *map(str, range(60))])}
    file = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"}}
    nothing = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    (tmp_path / "words.json").write_text(json.dumps({**file, **nothing, "added_tokens": []}))
    tokens.build((str(folder),), tmp_path / "built", tokenizer=str(tmp_path / "words.json"), held_out=0.3)
    quiet, sizes = Console(file=StringIO()), dict(overrides=dict(dim=32, num_layers=2), context=8, batch=4, steps=4, warmup=1, device="cpu")
    built = train(Config(data=(str(tmp_path / "built"),), **sizes), tmp_path / "a", console=quiet)
    read = train(Config(data=(str(folder),), tokenizer=str(tmp_path / "words.json"), held_out=0.3, **sizes), tmp_path / "b", console=quiet)
    assert [row["loss"] for row in built.rows] == [row["loss"] for row in read.rows]
    assert (
        built.rows[-1]["bits_per_byte"] == read.rows[-1]["bits_per_byte"] < built.rows[0]["bits_per_byte"] < 6.1 / 3
    )  # bits, bytes a word
    said = StringIO()
    sample.stream(
        tmp_path / "a", "document", said, tokens=3, temperature=0, top_k=None, top_p=None, seed=0, threads=0, device="cpu", backend="auto",
        say=print,
    )  # fmt: skip
    assert set(said.getvalue().split()) <= {*words}
    with pytest.raises(ValueError, match=r"tokenizer must be left out for .*built"):
        train(Config(data=(str(tmp_path / "built"),), tokenizer="bpe", **sizes), tmp_path / "c", console=quiet)


@pytest.mark.parametrize("name", ["decoder", "masked"])
def test_a_built_corpus_serves_every_task_of_text(folder, tmp_path, name):
    tokens.build((str(folder),), tmp_path / "built", held_out=0.3)
    variant = "gla" if name == "decoder" else "lion_s_mlm"
    sizes = dict(task=name, variant=variant, overrides=dict(dim=16, num_layers=1), context=16, batch=2, held_out=0.3)
    built, read = (TASKS[name](Config(data=(str(path),), **sizes), None) for path in (tmp_path / "built", folder))
    assert all(tensor.equal(read.batch(1, range(2))[key]) for key, tensor in built.batch(1, range(2)).items())


def test_what_cannot_be_built_leaves_nothing(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"title": "no text"}\n')
    (tmp_path / "words.json").write_text('{"model": {"type": "Wordless"}}')
    for how, said in (
        (dict(paths=(str(tmp_path / "bad.jsonl"),)), "bad.jsonl, line 2: there is no text in the field 'text'"),
        (dict(paths=(str(tmp_path / "nowhere"),)), "there is no .*nowhere"),
        (dict(paths=(str(folder),), held_out=1.5), "held_out must lie between 0 and 1; got 1.5"),
        (dict(paths=(str(folder),), tokenizer=str(tmp_path / "words.json")), r"words\.json is not a tokenizer: "),
    ):
        with pytest.raises(ValueError, match=said):
            tokens.build(how.pop("paths"), tmp_path / "out", **how)
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already"):
        tokens.build((str(folder),), tmp_path / "out")


def test_a_torn_corpus_is_refused(folder, tmp_path):
    tokens.build((str(folder),), tmp_path / "built", held_out=0.3)
    with (tmp_path / "built" / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train.bin must have \d+ bytes; it has \d+"):
        tokens.load(tmp_path / "built", context=16)


@pytest.mark.parametrize("variant", ["gla", "gated_delta", "retnet", "softmax"])  # states, convolutions, positions
def test_packed_documents_are_each_alone(folder, variant):
    config = Config(
        data=(str(folder),), variant=variant, overrides=dict(dim=32, num_layers=2), held_out=0.3, context=64, batch=3, packing=True
    )
    task = DecoderTask(config, None)
    model = task.create().double()
    batch = task.batch(0, range(3))
    starts = batch["cu_seqlens"].tolist()
    assert len(starts) > 4 and starts[0] == 0 and starts[-1] == 3 * 64
    packed = task.losses(model, batch)
    x, y = batch["tokens"][:, :-1].flatten(), batch["tokens"][:, 1:].flatten()
    for start, end in zip(starts[:-1], starts[1:]):
        logits, _ = model(x[None, start:end])
        torch.testing.assert_close(packed[start:end], torch.nn.functional.cross_entropy(logits[0].float(), y[start:end], reduction="none"))
        assert start % 64 == 0 or x[start] == task.corpus.tokenizer.end  # a document begins with the end of another
        assert task.corpus.tokenizer.end not in x[start + 1 : end]


def test_a_built_corpus_trains_packed_and_resumes(folder, tmp_path):
    tokens.build((str(folder),), tmp_path / "built", held_out=0.3)
    quiet = Console(file=StringIO())
    config = Config(
        data=(str(tmp_path / "built"),), overrides=dict(dim=32, num_layers=2), context=32, batch=4, steps=8, packing=True, accumulate=2,
        eval_every=4, save_every=4, lr=1e-2, warmup=2, device="cpu",
    )  # fmt: skip
    whole = train(config, tmp_path / "run", console=quiet)
    assert whole.rows[-1]["bits_per_byte"] < whole.rows[0]["bits_per_byte"]
    (tmp_path / "run" / "step-00000008" / "complete.json").unlink()
    again = train(config, tmp_path / "run", console=quiet)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in whole.rows]
    at_once = train(replace(config, accumulate=1), tmp_path / "other", console=quiet)
    for one, two in zip(whole.rows[1:], at_once.rows[1:], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)

"""Text to tokens and back."""

import builtins
import sys

import pytest

from linattn.train import tokenizer
from linattn.train.tokenizer import BPE, Bytes, Subwords

TEXTS = [
    b"",
    b"plain",
    "é ü ß – 漢字 🙂\u00ad\u00a0".encode(),
    b"def f(x):\r\n\treturn  x\n\n",
    b"<|end|> [UNK] <s>",
    bytes(range(32)) + b"\x7f",
]


@pytest.fixture(scope="module")
def bpe():
    return BPE.train([b"the cat sat on the mat; the cat was fat. " * 20, "für über".encode() * 9], 300)


def test_bytes_round_trip_any_bytes():
    texts = [*TEXTS, bytes(range(256))]
    assert [Bytes().decode(t.tolist()) for t in Bytes().encode(texts)] == texts


def test_bpe_round_trip_utf8(bpe):
    assert [bpe.decode(t.tolist()) for t in bpe.encode(TEXTS)] == TEXTS


def test_bpe_learned_something(bpe):
    assert len(bpe.pieces) <= 300 and len(set(bpe.pieces)) == len(bpe.pieces)
    assert len(bpe.encode([b"the cat sat"])[0]) < 8
    assert bpe.end == len(bpe.pieces) - 1 and bpe.pieces[bpe.end] == b""


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_saved_and_loaded(kind, bpe, tmp_path):
    made = Bytes() if kind == "bytes" else bpe
    made.save(tmp_path / "tokenizer.json")
    again = tokenizer.load(tmp_path / "tokenizer.json")
    assert again.pieces == made.pieces and again.end == made.end
    assert [t.tolist() for t in again.encode(TEXTS)] == [t.tolist() for t in made.encode(TEXTS)]


def sentence_pieces(**how):
    """A Unigram tokenizer that would cut, pad and frame what it is given, as files of models often do."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False)
    model.train_from_iterator(["the cat sat on the mat; the cat was fat. "] * 20, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))])
    model.enable_truncation(4)
    model.enable_padding(length=200)
    return model


def test_any_tokenizer_of_the_package(tmp_path):
    sentence_pieces().save(str(tmp_path / "t.json"))
    coder = tokenizer.load(tmp_path / "t.json")
    assert type(coder) is Subwords
    text = b"the fat cat sat on the cat"
    (tokens,) = coder.encode([text])
    assert 6 < len(tokens) < 26 and coder.decode(tokens.tolist()) == text and coder.decode([*tokens.tolist(), coder.end]) == text
    assert coder.count(tokens[None]) == len(text) and tokens.max() < coder.end == coder.model.get_vocab_size()
    ids = tokens.tolist()
    assert "".join(coder.letters(ids[:3], iter(ids[3:]))) == text.decode()[len(coder.decode(ids[:3])) :]  # the space between them too


@pytest.mark.parametrize(
    "text, said",
    [(None, "holds no tokenizer.json"), ("{", "is not a tokenizer"), ('{"a": 1}', "it is neither of `linattn train` nor of the package")],
)
def test_what_is_no_tokenizer_is_refused(text, said, tmp_path):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        tokenizer.load(tmp_path / "tokenizer.json")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tokenizers":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        BPE.train([b"text"], 300)

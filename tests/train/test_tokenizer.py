"""Text to tokens and back."""

import builtins
import sys

import pytest

from linattn.train import tokenizer
from linattn.train.tokenizer import BPE, Bytes, decode

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
    assert [decode(Bytes(), t.tolist()) for t in Bytes().encode(texts)] == texts


def test_bpe_round_trip_utf8(bpe):
    assert [decode(bpe, t.tolist()) for t in bpe.encode(TEXTS)] == TEXTS


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


@pytest.mark.parametrize(
    "text, said", [(None, "holds no tokenizer.json"), ("{", "is not a tokenizer"), ('{"a": 1}', "is not a tokenizer saved by")]
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

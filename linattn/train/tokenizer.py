"""The only place that knows how text becomes tokens: a tokenizer is a table of byte strings and a way to encode."""

import json
from pathlib import Path

import torch
from torch import Tensor


class Bytes:
    """One token per byte, and token 256 between documents. Needs nothing, loses nothing."""

    name = "bytes"
    pieces = (*(bytes([i]) for i in range(256)), b"")  # token -> the bytes it stands for
    end = 256

    def encode(self, documents: list[bytes]) -> list[Tensor]:
        empty = torch.zeros(0, dtype=torch.int16)
        return [torch.frombuffer(bytearray(text), dtype=torch.uint8).short() if text else empty for text in documents]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"linattn_tokenizer": "bytes"}) + "\n")


class BPE:
    """Byte-level byte-pair encoding of the `tokenizers` package, and one more token between documents.

    Exact for UTF-8 text; bytes that are not UTF-8 become U+FFFD.
    """

    name = "bpe"

    def __init__(self, model):
        alphabet, added = _byte_alphabet(), set(model.get_added_tokens_decoder())
        table = sorted(model.get_vocab().items(), key=lambda item: item[1])
        if [i for _, i in table] != list(range(len(table))):
            raise ValueError("a tokenizer must number its tokens from 0 on without gaps")
        if strange := [word for word, i in table if i not in added and not set(word) <= set(alphabet)]:
            raise ValueError(
                f"a tokenizer must be byte-level BPE, so that bits per byte can be told; this one has the token {strange[0]!r}"
            )
        self.model = model
        self.pieces = (*(word.encode() if i in added else bytes(alphabet[letter] for letter in word) for word, i in table), b"")
        self.end = len(table)

    @classmethod
    def train(cls, documents: list[bytes], vocab_size: int) -> "BPE":
        """Learn `vocab_size` tokens, the end of document counted, from `documents`."""
        tokenizers = _tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        model.train_from_iterator((text.decode(errors="replace") for text in documents), trainer)
        return cls(model)

    def encode(self, documents: list[bytes]) -> list[Tensor]:
        dtype = torch.int16 if len(self.pieces) <= 2**15 else torch.int32
        return [torch.tensor(e.ids, dtype=dtype) for e in self.model.encode_batch([text.decode(errors="replace") for text in documents])]

    def save(self, path: Path) -> None:
        self.model.save(str(path))


Tokenizer = Bytes | BPE


def decode(tokenizer: Tokenizer, tokens: list[int]) -> bytes:
    """The bytes `tokens` stand for; tokens beyond the table (a padded vocabulary) stand for none."""
    return b"".join(tokenizer.pieces[i] for i in tokens if i < len(tokenizer.pieces))


def load(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`. ValueError if it is neither of ours."""
    try:
        text = path.read_text()
        values = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} holds no {path.name}: it is not a checkpoint of `linattn train`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    if values == {"linattn_tokenizer": "bytes"}:
        return Bytes()
    if isinstance(values, dict) and "model" in values:
        return BPE(_tokenizers().Tokenizer.from_str(text))
    raise ValueError(f"{path} is not a tokenizer saved by `linattn train`")


def _tokenizers():
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError("tokenizer 'bpe' needs the package `tokenizers`: pip install tokenizers, or use tokenizer 'bytes'") from None
    return tokenizers


def _byte_alphabet() -> dict[str, int]:
    """Letter -> the byte that byte-level BPE writes it for: visible Latin-1 stands for itself, the rest from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in visible]
    return {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(hidden)}

"""The only place that knows how text becomes tokens: a tokenizer is a table of byte strings and a way to encode."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Table:
    """A tokenizer whose every token stands for bytes of its own: `pieces[token]`."""

    pieces: tuple[bytes, ...]

    def count(self, windows: Tensor) -> int:
        """How many bytes the tokens of windows [B T] stand for."""
        return sum(len(self.pieces[token]) for token in windows.flatten().tolist())

    def decode(self, tokens: list[int]) -> bytes:
        """The bytes `tokens` stand for; tokens beyond the table (a padded vocabulary) stand for none."""
        return b"".join(self.pieces[i] for i in tokens if i < len(self.pieces))

    def letters(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
        """Text as tokens come: a letter of several bytes appears once it is whole; bytes that are no letter appear as U+FFFD."""
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield text.decode(self.decode([token]))
        yield text.decode(b"", final=True)


class Bytes(Table):
    """One token per byte, and token 256 between documents. Needs nothing, loses nothing."""

    name = "bytes"
    pieces = (*(bytes([i]) for i in range(256)), b"")
    end = 256

    def encode(self, documents: list[bytes]) -> list[Tensor]:
        empty = torch.zeros(0, dtype=torch.int16)
        return [torch.frombuffer(bytearray(text), dtype=torch.uint8).short() if text else empty for text in documents]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"linattn_tokenizer": "bytes"}) + "\n")


class Subwords:
    """Any tokenizer of the `tokenizers` package, and one more token between documents.

    Tokens stand for text only together, so bytes are counted of what a window of them decodes to: a tokenizer that drops accents or knows
    some words as [UNK] only is judged by the text it keeps. Nothing is added to a text, cut off or padded, whatever the file says.
    """

    name = "tokenizers"

    def __init__(self, model: Any):
        model.no_truncation()
        model.no_padding()
        self.model = model
        self.end = max(model.get_vocab(with_added_tokens=True).values()) + 1  # the last token of all

    def encode(self, documents: list[bytes]) -> list[Tensor]:
        dtype = torch.int16 if self.end < 2**15 else torch.int32
        texts = [text.decode(errors="replace") for text in documents]
        return [torch.tensor(e.ids, dtype=dtype) for e in self.model.encode_batch(texts, add_special_tokens=False)]

    def count(self, windows: Tensor) -> int:
        """How many bytes the text has that windows [B T] decode to, each by itself."""
        return sum(len(self.decode(window)) for window in windows.tolist())

    def decode(self, tokens: list[int]) -> bytes:
        return self.model.decode([i for i in tokens if i < self.end]).encode()

    def letters(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
        stream = _tokenizers().decoders.DecodeStream(skip_special_tokens=True)
        for token in prompt:
            stream.step(self.model, token)
        for token in tokens:
            yield (stream.step(self.model, token) if token < self.end else None) or ""

    def save(self, path: Path) -> None:
        self.model.save(str(path))


class BPE(Table, Subwords):
    """Byte-level byte-pair encoding of the `tokenizers` package, and one more token between documents.

    Exact for UTF-8 text; bytes that are not UTF-8 become U+FFFD.
    """

    name = "bpe"

    def __init__(self, model: Any, pieces: tuple[bytes, ...]):
        Subwords.__init__(self, model)
        self.pieces = (*pieces, b"")

    @classmethod
    def train(cls, documents: list[bytes], vocab_size: int) -> "BPE":
        """Learn `vocab_size` tokens, the end of document counted, from `documents`."""
        tokenizers = _tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()  # for who reads the file elsewhere
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        model.train_from_iterator((text.decode(errors="replace") for text in documents), trainer)
        return cls(model, _pieces(model) or ())


Tokenizer = Bytes | BPE | Subwords


def make(name: str, documents: Callable[[], list[bytes]], vocab_size: int) -> Tokenizer:
    """ "bytes"; "bpe", of `vocab_size` tokens learnt from `documents()`; or what is in the file of that name."""
    if name == "bytes":
        return Bytes()
    return BPE.train(documents(), vocab_size) if name == "bpe" else load(Path(name))


def of_transformers(coder: Tokenizer) -> Any:
    """The same tokens as a tokenizer of transformers, the end of document being its eos_token."""
    from transformers import PreTrainedTokenizerFast

    tokenizers = _tokenizers()
    if isinstance(coder, Bytes):
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_byte_alphabet(), merges=[]))
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = tokenizers.decoders.ByteLevel()
    else:
        model = tokenizers.Tokenizer.from_str(coder.model.to_str())
    model.add_special_tokens(["<|end|>"])
    if model.token_to_id("<|end|>") != coder.end:
        raise ValueError("a tokenizer with gaps in its numbers, or with a token <|end|>, cannot be exported")
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")


def load(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`, by us or by the `tokenizers` package. ValueError if it is none."""
    try:
        text = path.read_text()
        values = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} holds no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    if values == {"linattn_tokenizer": "bytes"}:
        return Bytes()
    if isinstance(values, dict) and "model" in values:
        try:
            model = _tokenizers().Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        pieces = _pieces(model)
        return Subwords(model) if pieces is None else BPE(model, pieces)
    raise ValueError(f"{path} is not a tokenizer: it is neither of `linattn train` nor of the package `tokenizers`")


def _pieces(model: Any) -> tuple[bytes, ...] | None:
    """The bytes that each token stands for, where the tokenizer is byte-level BPE without gaps in its numbers; else None."""
    alphabet, added = _byte_alphabet(), set(model.get_added_tokens_decoder())
    table = sorted(model.get_vocab().items(), key=lambda item: item[1])
    if [i for _, i in table] != list(range(len(table))) or not _is_byte_level(model):
        return None
    if any(i not in added and not set(word) <= set(alphabet) for word, i in table):
        return None
    return tuple(word.encode() if i in added else bytes(alphabet[letter] for letter in word) for word, i in table)


def _is_byte_level(model: Any) -> bool:
    return "ByteLevel" in str(json.loads(model.to_str())["pre_tokenizer"])


def _tokenizers() -> Any:
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

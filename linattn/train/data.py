"""The only place that knows where text comes from and which windows a step sees: a batch is a function of (seed, step) alone."""

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import tokenizer as tokenizers

NOT_OURS = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")  # foreign, or missing on some machines
TABLES = ("encodings", "pydoc_data")  # character tables, and the topics that come in as documents of their own


class Corpus(NamedTuple):
    """Text as two token streams with an end token after each document."""

    train: Tensor  # [N] int16 or int32
    held_out: Tensor  # [M]
    tokenizer: tokenizers.Tokenizer
    fingerprint: str  # of the text and the split: equal on equal data only
    source: str  # in words


def load(paths: tuple[str, ...], *, tokenizer: str | tokenizers.Tokenizer, vocab_size: int, held_out: float, context: int) -> Corpus:
    """Read `paths` (none: the standard library), split by the hash of each document, encode.

    A split that would leave a side without one window is made by position instead: the last share of the stream is held out.
    `tokenizer` is a name as in `tokenizer.make` ("bpe" is trained on the training side), or one that is made already.
    ValueError: a path is missing, nothing there is text, or there is less than one window of `context` + 1 tokens to train or evaluate on.
    """
    documents = list(user_documents(paths) if paths else standard_library())
    size = sum(map(len, documents))
    where = ", ".join(paths) if paths else "the Python standard library"
    if not size:
        raise ValueError(f"the corpus is empty: no text in {where}")
    for split in (_split_by_hash, _split_by_position):
        rest, kept = split(documents, held_out)
        coder = tokenizers.make(tokenizer, lambda: rest, vocab_size) if isinstance(tokenizer, str) else tokenizer  # noqa: B023 - called here
        train, evaluation = _stream(rest, coder), _stream(kept, coder)
        if min(len(train), len(evaluation)) > context:
            break
    else:
        raise ValueError(
            f"the corpus is too short: {len(train)} tokens to train and {len(evaluation)} to evaluate on in {where}; "
            f"context {context} needs {context + 1} of each"
        )
    fingerprint = hashlib.blake2b(repr((coder.name, held_out)).encode(), digest_size=8)
    for text in documents:
        fingerprint.update(hashlib.blake2b(text).digest())
    return Corpus(train, evaluation, coder, fingerprint.hexdigest(), f"{len(documents)} documents, {size / 1e6:.2f} MB, of {where}")


def batch(tokens: Tensor, *, context: int, of: int, rows: range, seed: int, step: int) -> Tensor:
    """Windows `rows` of the `of` ones of step `step`: int64 [len(rows), context + 1], inputs and the next token of each.

    Each epoch lays windows end to end from an offset of its own and visits all of them once in an order of its own.
    """
    windows = max(1, (len(tokens) - context) // context)
    offsets = []
    for i in (step * of + row for row in rows):
        epoch, place = divmod(i, windows)
        start, order = _epoch(seed, epoch, windows, min(context, len(tokens) - windows * context))
        offsets.append(start + int(order[place]) * context)
    return torch.stack([tokens[i : i + context + 1] for i in offsets]).long()


def held_out_windows(tokens: Tensor, *, context: int, count: int) -> Tensor:
    """At most `count` windows spread evenly over the stream, never overlapping: int64 [n, context + 1]."""
    room = (len(tokens) - 1) // context
    n = min(count, room)
    return torch.stack([tokens[i : i + context + 1] for i in ((j * room // n) * context for j in range(n))]).long()


def derive(*parts: object) -> int:
    """A seed of 63 bits for a purpose, the same on every machine: derive("order", seed, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, Tensor]:
    random = torch.Generator().manual_seed(derive("order", seed, epoch))
    return int(torch.randint(offsets, (), generator=random)), torch.randperm(windows, generator=random)


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document is among the `share` kept for evaluation: by its hash, so that equal ones are on one side."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < share * 2**64


def _split_by_hash(documents: list[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    return [text for text in documents if not is_held_out(text, share)], [text for text in documents if is_held_out(text, share)]


def _split_by_position(documents: list[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    left = int((1 - share) * sum(map(len, documents)))
    rest, kept = [], []
    for text in documents:
        rest.append(text[: max(0, left)])
        kept.append(text[max(0, left) :])
        left -= len(text)
    return [text for text in rest if text], [text for text in kept if text]


def _stream(documents: list[bytes], tokenizer: tokenizers.Tokenizer) -> Tensor:
    end = torch.tensor([tokenizer.end])
    parts = [part for tokens in tokenizer.encode(documents) for part in (tokens, end.to(tokens.dtype))]
    return torch.cat(parts) if parts else end[:0]


def standard_library() -> Iterator[bytes]:
    """The language reference in English (pydoc's topics), then the library's own modules, in the order of their names."""
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        yield from (topics[name].encode() for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files(root, skip=(*NOT_OURS, *TABLES)):
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):  # that one describes the machine
            yield path.read_bytes()


def user_documents(paths: tuple[str, ...]) -> Iterator[bytes]:
    """Every text file among `paths` and below them, in the order of their names; what holds a zero byte is no text."""
    for file in user_files(paths):
        text = file.read_bytes()
        if text and b"\0" not in text:
            yield text


def user_files(paths: tuple[str, ...]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"data: there is no {path}")
        yield from _files(path) if path.is_dir() else [path]


def _files(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))

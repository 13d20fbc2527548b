"""The only place that knows token files: a corpus encoded once, which every process maps into its memory and none reads as a whole."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tokenizer as tokenizers
from .config import Config
from .data import Corpus, is_held_out, user_files
from .data import load as read_text

MARKER = "tokens.json"  # written last: a folder without it was not finished
TOKENIZER = "tokenizer.json"
SAMPLE = 64_000_000  # bytes of text that a tokenizer is trained on
AT_ONCE = 4_000_000  # bytes of text encoded at a time
KINDS = {"int16": torch.int16, "int32": torch.int32}


def build(
    paths: tuple[str, ...], out: Path, *, tokenizer: str = "bytes", vocab_size: int = 4096, held_out: float = 0.05, field: str = "text"
) -> dict[str, Any]:
    """Encode every document of `paths` into folder `out`; returns what its tokens.json says.

    paths      text files (a document each), .jsonl and .parquet files (a document for each row's `field`), and folders of such
    tokenizer  "bytes", "bpe" (trained here, on the first 64 MB of training text), or a file of the package `tokenizers`
    held_out   share of the documents, chosen by their hash, that is kept for evaluation

    Twice the memory of AT_ONCE is enough for any size. ValueError before anything is written: a path is missing, `out` is there already,
    no text is found; nothing is left behind on any failure.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1; got {held_out}")
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder")
    documents = _documents(paths, field)
    first = list(islice(documents, 1))
    if not first:
        raise ValueError(f"no text in {', '.join(paths)}")
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        training = lambda: _sample(text for text in _documents(paths, field) if not is_held_out(text, held_out))
        coder = tokenizers.make(tokenizer, training, vocab_size)
        facts = _write(beside, chain(first, documents), coder, held_out)
        coder.save(beside / TOKENIZER)
        (beside / MARKER).write_text(json.dumps(facts, indent=2) + "\n")
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return facts


def is_built(paths: tuple[str, ...]) -> bool:
    return len(paths) == 1 and (Path(paths[0]) / MARKER).exists()


def corpus(config: Config, saved: Path | None) -> Corpus:
    """The corpus of a run, built or read as text; of a run that goes on from checkpoint `saved` with the tokenizer that lies there."""
    if not is_built(config.data):
        name = tokenizers.load(saved / TOKENIZER) if saved else config.tokenizer
        return read_text(config.data, tokenizer=name, vocab_size=config.vocab_size, held_out=config.held_out, context=config.context)
    if config.tokenizer != "bytes":
        raise ValueError(f"tokenizer must be left out for {config.data[0]}, which was built with its own; got {config.tokenizer!r}")
    return load(Path(config.data[0]), context=config.context)


def load(folder: Path, *, context: int) -> Corpus:
    """The corpus that `build` wrote to `folder`, mapped. ValueError if it is torn, or has less than a window to train or evaluate on."""
    try:
        facts = json.loads((folder / MARKER).read_text())
        kind, counts = facts["dtype"], {name: facts[name] for name in ("train", "held_out")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MARKER} cannot be read: {error}") from None
    for name, count in counts.items():
        path, size = folder / f"{name}.bin", count * KINDS[kind].itemsize
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(f"{path} must have {size} bytes; it has {path.stat().st_size if path.exists() else 'gone'}")
        if count <= context:
            raise ValueError(f"the corpus is too short: {count} tokens in {path}; context {context} needs {context + 1}")
    train, held_out = (torch.from_file(str(folder / f"{name}.bin"), size=count, dtype=KINDS[kind]) for name, count in counts.items())
    return Corpus(train, held_out, tokenizers.load(folder / TOKENIZER), facts["fingerprint"], f"{facts['source']}, in {folder}")


def _documents(paths: tuple[str, ...], field: str) -> Iterator[bytes]:
    for file in user_files(paths):
        if file.suffix in (".jsonl", ".ndjson"):
            with file.open() as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of(line, field, f"{file}, line {number}")
        elif file.suffix == ".parquet":
            yield from _parquet(file, field)
        else:
            text = file.read_bytes()
            if text and b"\0" not in text:
                yield text


def _text_of(line: str, field: str, where: str) -> bytes:
    try:
        return json.loads(line)[field].encode()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: there is no text in the field {field!r} ({type(error).__name__}: {error})") from None


def _parquet(file: Path, field: str) -> Iterator[bytes]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{file} needs the package pyarrow: pip install pyarrow") from None
    table = parquet.ParquetFile(file)
    if field not in table.schema_arrow.names:
        raise ValueError(f"{file} has no column {field!r}; there are {table.schema_arrow.names}")
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        yield from (text.encode() for text in batch.column(0).to_pylist() if text)


def _sample(documents: Iterable[bytes]) -> list[bytes]:
    sample, size = [], 0
    for text in documents:
        sample.append(text)
        if (size := size + len(text)) >= SAMPLE:
            break
    return sample


def _write(folder: Path, documents: Iterable[bytes], coder: tokenizers.Tokenizer, held_out: float) -> dict[str, Any]:
    kind = "int16" if coder.end < 2**15 else "int32"
    digest = hashlib.blake2b(repr((coder.name, held_out)).encode(), digest_size=8)
    counts, size, total = {"train": 0, "held_out": 0}, 0, 0
    end = torch.tensor([coder.end], dtype=KINDS[kind])
    with (folder / "train.bin").open("wb") as train, (folder / "held_out.bin").open("wb") as kept:
        files = {"train": train, "held_out": kept}
        for part in _parts(documents):
            for text, tokens in zip(part, coder.encode(part), strict=True):
                name = "held_out" if is_held_out(text, held_out) else "train"
                files[name].write(_bytes(torch.cat([tokens.to(KINDS[kind]), end])))
                counts[name] += len(tokens) + 1
                digest.update(hashlib.blake2b(text).digest())
                size, total = size + len(text), total + 1
    source = f"{total:,} documents, {size / 1e6:.2f} MB"
    return {"format": 1, "dtype": kind, **counts, "fingerprint": digest.hexdigest(), "source": source, "tokenizer": coder.name}


def _parts(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for text in documents:
        part.append(text)
        if (size := size + len(text)) >= AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _bytes(tokens: Tensor) -> bytes:
    return tokens.numpy().tobytes()

"""Where text comes from, how it is split, and which windows a step sees."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from linattn.train import data

OPTIONS = dict(tokenizer="bytes", vocab_size=0, held_out=0.2, context=16)


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_bytes(f"document {i} ".encode() * 5)
    return tmp_path


@pytest.fixture(scope="module")
def library():
    return list(data.standard_library())


def test_the_library_is_there_with_prose_and_code(library):
    assert sum(map(len, library)) > 5e6
    assert any(b"def dataclass(" in text for text in library) and any(b"Assert statements" in text for text in library)
    assert library == list(data.standard_library())


def test_split_is_by_content_and_loses_nothing(folder):
    corpus = data.load((str(folder),), **OPTIONS)
    assert data.load((str(folder),), **OPTIONS).fingerprint == corpus.fingerprint
    both = torch.cat([corpus.train, corpus.held_out])
    texts = bytes(both[both < 256].tolist())
    assert int((both == 256).sum()) == 40 and all(f"document {i} ".encode() * 5 in texts for i in range(40))
    (folder / "00.txt").rename(folder / "zz.txt")  # another name, the same side
    (folder / "more.txt").write_bytes(b"one more")
    again = data.load((str(folder),), **OPTIONS)
    assert again.fingerprint != corpus.fingerprint
    assert _documents(again.held_out) - {b"one more"} == _documents(corpus.held_out)
    assert _documents(again.train) - {b"one more"} == _documents(corpus.train)


def _documents(stream):
    ends = (stream == 256).nonzero()[:, 0].tolist()
    return {bytes(stream[start:end].tolist()) for start, end in zip([0, *(e + 1 for e in ends)], ends, strict=False)}


def test_one_file_is_split_by_position(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 201)))
    corpus = data.load((str(tmp_path / "book.txt"),), **OPTIONS)
    assert corpus.train.tolist() == [*range(1, 161), 256] and corpus.held_out.tolist() == [*range(161, 201), 256]


def test_only_text_is_read(folder):
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\0" * 9)
    (folder / ".hidden").write_bytes(b"secret" * 9)
    assert len(list(data.user_documents((str(folder),)))) == 40


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: p / "nowhere", "data: there is no .*nowhere"),
        (lambda p: p, "the corpus is empty: no text in"),
        (
            lambda p: (p / "short.txt").write_bytes(b"twenty bytes of text") and p,
            "too short: 17 tokens to train and 5 .*context 16 needs 17",
        ),
    ],
)
def test_bad_corpora_are_refused(make, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        data.load((str(make(tmp_path)),), **OPTIONS)


TOKENS = torch.arange(1000)
WINDOWS = dict(context=16, of=4, rows=range(4))


def test_a_batch_is_a_function_of_seed_and_step():
    first = data.batch(TOKENS, seed=1, step=7, **WINDOWS)
    assert first.shape == (4, 17) and first.dtype == torch.int64
    for step in (0, 500, 3):
        data.batch(TOKENS, seed=1, step=step, **WINDOWS)
    assert torch.equal(first, data.batch(TOKENS, seed=1, step=7, **WINDOWS))
    assert not torch.equal(first, data.batch(TOKENS, seed=2, step=7, **WINDOWS))
    assert not torch.equal(first, data.batch(TOKENS, seed=1, step=8, **WINDOWS))
    halves = [data.batch(TOKENS, seed=1, step=7, context=16, of=4, rows=rows) for rows in (range(2), range(2, 4))]
    assert torch.equal(first, torch.cat(halves))  # however the rows are split
    assert torch.equal(first[:, 1:] - first[:, :-1], torch.ones(4, 16, dtype=torch.int64))  # windows are contiguous


@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_visits_every_window_once(seed):
    windows = (1000 - 16) // 16
    starts = [int(row[0]) for step in range(3 * windows) for row in data.batch(TOKENS, seed=seed, step=step, **WINDOWS)]
    for epoch in range(12):
        seen = Counter(token for start in starts[epoch * windows : (epoch + 1) * windows] for token in range(start, start + 16))
        assert set(seen.values()) == {1} and len(seen) == windows * 16
    assert starts[:windows] != sorted(starts[:windows])
    assert len({start % 16 for start in starts}) > 4  # epochs lay their windows from different offsets


@pytest.mark.parametrize("length", [17, 18, 31, 32, 33, 50])
def test_the_shortest_corpora(length):
    for step in range(50):
        assert data.batch(TOKENS[:length], seed=0, step=step, **WINDOWS).shape == (4, 17)


def test_held_out_windows_spread_and_do_not_overlap():
    windows = data.held_out_windows(TOKENS, context=16, count=10)
    starts = windows[:, 0].tolist()
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] > 800
    assert all(b - a >= 16 for a, b in pairwise(starts))
    assert data.held_out_windows(TOKENS[:40], context=16, count=10).shape == (2, 17)

"""The only place that brings text to a language model of transformers: its tokenizer, windows of tokens, and bits per byte."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data
from .engine import pick_device
from .tokenizer import Bytes

HELD_OUT, WINDOWS = 0.05, 32


class HostTokenizer:
    """A tokenizer of transformers, as `data.load` takes one; its end of text stands between documents."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.name = tokenizer, type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer must have an eos_token, which is put between documents")
        self.end: int = tokenizer.eos_token_id

    def encode(self, documents: list[bytes]) -> list[Tensor]:
        texts = [text.decode(errors="replace") for text in documents]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [torch.tensor(each, dtype=torch.int32) for each in ids]

    def count(self, windows: Tensor) -> int:
        return sum(len(self.tokenizer.decode(window, skip_special_tokens=True).encode()) for window in windows.tolist())


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def tokenizer_of(folder: Path, config: Any = None) -> Any:
    """The tokenizer in a folder of transformers. config: the model's, where the folder's is none of transformers'."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, config=config)


def coder_of(folder: Path) -> HostTokenizer | Bytes:
    """The tokenizer in a folder of transformers, bytes where there is none."""
    return HostTokenizer(tokenizer_of(folder)) if has_tokenizer(folder) else Bytes()


def check_vocabulary(corpus: data.Corpus, vocabulary: int, folder: Path) -> None:
    if (largest := int(max(corpus.train.max(), corpus.held_out.max()))) >= vocabulary:
        raise ValueError(f"{folder} has {vocabulary} tokens, and its text token {largest}: it needs its own tokenizer files")


class Host:
    """The language model in a folder of transformers, and text for it. Without tokenizer files tokens are bytes, and 256 ends a document.

    ValueError where the folder holds no model, a tokenizer does not fit it, or the text is too short.
    """

    def __init__(self, folder: Path, paths: tuple[str, ...], *, context: int, rows: int, seed: int, device: str):
        try:
            from transformers import AutoConfig
        except ModuleNotFoundError:
            raise ValueError("a model of transformers needs transformers: pip install 'linattn[hf]'") from None
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no model of transformers: config.json is missing")
        config = AutoConfig.from_pretrained(folder)
        if (vocabulary := getattr(config, "vocab_size", None)) is None:
            raise ValueError(f"{folder} holds no language model: {type(config).__name__} has no vocab_size")
        coder: Any = coder_of(folder)
        self.folder, self.coder, self.device = folder, coder, pick_device(device)
        self.context, self.rows, self.seed = context, rows, seed
        self.corpus = data.load(paths, tokenizer=coder, vocab_size=0, held_out=HELD_OUT, context=context)
        check_vocabulary(self.corpus, vocabulary, folder)
        self.source = f"{folder.name}; {self.corpus.source}; {self.corpus.fingerprint}; context {context}, {rows} windows, seed {seed}"

    def load(self) -> Any:
        """The model, in float32."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.to(self.device)

    def batch(self, step: int) -> dict[str, Any]:
        tokens = data.batch(self.corpus.train, context=self.context, of=self.rows, rows=range(self.rows), seed=self.seed, step=step)
        tokens = tokens[:, :-1].to(self.device)
        return dict(input_ids=tokens, labels=tokens)

    @torch.no_grad()
    def bits_per_byte(self, model: Any) -> float:
        """−Σ log2 p over the bytes that the tokens of held-out windows stand for."""
        model.eval()
        nats, size = 0.0, 0
        for rows in data.held_out_windows(self.corpus.held_out, context=self.context, count=WINDOWS).split(self.rows):
            rows = rows.to(self.device)
            logits = model(rows[:, :-1], use_cache=False).logits.float()
            nats += float(torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="sum"))
            size += self.coder.count(rows[:, 1:])
        return nats / math.log(2) / size

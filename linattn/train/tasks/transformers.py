"""The only place that knows how a causal language model of transformers is trained: softmax as it is, or swapped to linear attention."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...swap import from_pretrained, swap_attention
from .. import data, hosts
from ..config import Config
from .decoder import DecoderTask
from .task import Batch


@dataclass(frozen=True, kw_only=True)
class TransformersOptions:
    """Which model. ValueError for none."""

    model: str = ""  # folder with config.json: its weights, swapped ones too, or where it has none a new model of that config
    swap: str = ""  # the variant that takes the place of its attention before training, as in `linattn.swap_attention`; "": none
    init: str = "random"  # of what a swap adds: "random", or "from_softmax" for weights that softmax has trained

    def __post_init__(self):
        if not self.model or not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"model must be a folder with the config.json of a model of transformers; got {self.model!r}")


class TransformersTask(DecoderTask):
    """As the decoder's, for a model of transformers and its own tokenizer; without tokenizer files tokens are bytes.

    A checkpoint is a folder that transformers loads, or of a swapped model `linattn.from_pretrained`; tied weights are in it once.
    """

    starts_whole = True  # from weights that are there: ZeRO-3 shares them out when all are loaded
    options_kind = TransformersOptions

    def __init__(self, config: Config, saved: Path | None):
        if config.overrides or config.packing:
            raise ValueError("set and packing are of our own decoders: a model of transformers is what its config.json says")
        super().__init__(config, saved)
        self.title = f"{self.folder.name}{self.options.swap and f', {self.options.swap}'}"

    @property
    def folder(self) -> Path:
        return Path(self.options.model)

    def _corpus(self, config: Config, saved: Path | None) -> data.Corpus:
        from transformers import AutoConfig

        coder: Any = hosts.coder_of(self.folder)
        found = data.load(config.data, tokenizer=coder, vocab_size=0, held_out=config.held_out, context=config.context)
        values = json.loads((self.folder / "config.json").read_text())
        vocabulary = values["host"]["vocab_size"] if "host" in values else AutoConfig.from_pretrained(self.folder).vocab_size
        hosts.check_vocabulary(found, vocabulary, self.folder)
        return found

    def create(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        model: Any
        if any(self.folder.glob("*.safetensors")):
            model = self.load(self.folder)
        elif any(self.folder.glob("*.bin")):
            raise ValueError(f"model {self.folder} must have its weights as safetensors: nothing is unpickled")
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder), dtype=torch.float32)
        if self.options.swap:
            init: Any = self.options.init  # checked there
            swap_attention(model, self.options.swap, init=init, backend=self.config.backend)
        return model

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        if (folder / "linattn.safetensors").exists():
            return from_pretrained(folder, backend=self.config.backend, dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def save(self, folder: Path) -> None:
        if isinstance(self.corpus.tokenizer, hosts.HostTokenizer):
            self.corpus.tokenizer.tokenizer.save_pretrained(folder)

    def part(self, batch: Batch, index: int, of: int) -> Batch:
        raise ValueError(f"context_parallel must be 1 for a model of transformers; got {of}")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["tokens"][:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="none")

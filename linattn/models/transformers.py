"""The only place where a decoder is a model of transformers: its config, its class, its tokenizer, and the folder that `export` writes.

    linattn export runs/first decoder/
    AutoModelForCausalLM.from_pretrained("decoder/", trust_remote_code=True)      the code trusted is one line that imports this module

Needs the extra hf. `linattn.models` does not import it.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import DecoderConfig
from .decoder import IGNORE, Decoder


class LinattnConfig(PretrainedConfig):
    """`sizes` holds the fields of a `DecoderConfig`."""

    model_type = "linattn"

    def __init__(self, sizes: dict | None = None, **more: Any):
        self.sizes = sizes or {}
        self.vocab_size = self.sizes.get("vocab_size", 0)
        self.hidden_size, self.num_hidden_layers = self.sizes.get("dim", 0), self.sizes.get("num_layers", 0)
        super().__init__(**{"tie_word_embeddings": False, **more})  # the decoder ties by itself


class States(Cache):
    """A decoder's state as the cache that transformers hands from step to step: constant in size, but for softmax layers."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: tuple | None = None
        self.seen = 0

    def get_seq_length(self, *args: Any) -> int:
        return self.seen


class LinattnForCausalLM(PreTrainedModel, GenerationMixin):
    """`linattn.Decoder` with the signature of transformers. Rows must be as long as each other: ValueError for padding, and for beams."""

    config_class = LinattnConfig
    base_model_prefix = "decoder"
    _is_stateful = True  # what was read cannot be unread: no assisted generation

    def __init__(self, config: LinattnConfig, backend: str = "auto"):
        super().__init__(config)
        self.decoder = Decoder(DecoderConfig(**config.sizes), backend=backend)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """The decoder's modules have started themselves."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: States | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int = 0, **how: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """input_ids [B T] → logits [B T vocab]; the loss is that of each next token of labels [B T], −100 for none."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask must hide nothing: rows of different lengths go one by one")
        if use_cache and past_key_values is None:
            past_key_values = States()
        state = None if past_key_values is None else past_key_values.state
        x, after = self.decoder.features(input_ids, state, return_state=past_key_values is not None)
        logits, loss = self.decoder.logits(x[:, -logits_to_keep:]), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
        if past_key_values is not None:
            past_key_values.state, past_key_values.seen = after, past_key_values.seen + input_ids.shape[1]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # type: ignore[call-arg]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, generation_mode: Any, *sizes: Any) -> bool:
        if getattr(generation_config, "num_beams", 1) > 1:
            raise ValueError("num_beams must be 1")
        model_kwargs.setdefault("past_key_values", States())
        return True

    def get_input_embeddings(self) -> Any:
        return self.decoder.embedding


def export(decoder: Decoder, folder: Path, tokenizer: Any = None) -> None:
    """Write `decoder`, and a tokenizer of transformers, to `folder`, which must not be there. Tied weights are written once."""
    if folder.exists():
        raise ValueError(f"{folder} is there already: choose another folder")
    from dataclasses import asdict

    config = LinattnConfig(asdict(decoder.config), eos_token_id=None if tokenizer is None else tokenizer.eos_token_id)
    with torch.device("meta"):
        model = LinattnForCausalLM(config)
    model.decoder = decoder
    config.architectures = [LinattnForCausalLM.__name__]
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "linattn_model.LinattnConfig", "AutoModelForCausalLM": "linattn_model.LinattnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "linattn_model.py").write_text("from linattn.models.transformers import LinattnConfig, LinattnForCausalLM\n")


AutoConfig.register(LinattnConfig.model_type, LinattnConfig)
AutoModelForCausalLM.register(LinattnConfig, LinattnForCausalLM)

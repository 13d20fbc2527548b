"""Tiny models of every host, with weights drawn here: name → (model, inputs, how to get its output [B T ·])."""

import inspect
from functools import partial

import torch

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZE | dict(vocab_size=50, max_position_embeddings=64)
IMAGE = SIZE | dict(image_size=12, patch_size=4, num_channels=1)
NONE = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)


def build(kind: str, config: str, **sizes):
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():  # as drawn, attention is nearly uniform, and a wrong mapping of weights hardly seen
        for name, p in model.named_parameters():
            if p.ndim == 2 and any(part in name for part in ("proj", "query", "key", "value", "dense", "c_attn")):
                p.mul_(6)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


CAUSAL = {
    "llama": partial(build, "LlamaForCausalLM", "LlamaConfig", **TEXT, **NONE, num_key_value_heads=2),
    "mistral": partial(build, "MistralForCausalLM", "MistralConfig", **TEXT, **NONE, num_key_value_heads=2, sliding_window=None),
    "qwen2": partial(build, "Qwen2ForCausalLM", "Qwen2Config", **TEXT, **NONE, num_key_value_heads=2),
    "qwen3": partial(build, "Qwen3ForCausalLM", "Qwen3Config", **TEXT, **NONE, num_key_value_heads=2, head_dim=8),
    "gemma": partial(build, "GemmaForCausalLM", "GemmaConfig", **TEXT, **NONE, num_key_value_heads=1, head_dim=16),
    "phi3": partial(build, "Phi3ForCausalLM", "Phi3Config", **TEXT, **NONE, num_key_value_heads=2, sliding_window=None),
    "gpt2": partial(
        build, "GPT2LMHeadModel", "GPT2Config", **NONE, vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        scale_attn_by_inverse_layer_idx=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neox": partial(build, "GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT, **NONE, rotary_pct=0.5),
    "bert_decoder": partial(build, "BertLMHeadModel", "BertConfig", **TEXT, is_decoder=True, attention_probs_dropout_prob=0.0),
}  # fmt: skip
CLIP_TEXT = {"clip_text": partial(build, "CLIPTextModel", "CLIPTextConfig", **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2)}
BOTH = {
    "bert": partial(build, "BertModel", "BertConfig", **TEXT, attention_probs_dropout_prob=0.0),
    "roberta": partial(build, "RobertaModel", "RobertaConfig", **TEXT, attention_probs_dropout_prob=0.0),
    "vit": partial(build, "ViTModel", "ViTConfig", **IMAGE),
    "deit": partial(build, "DeiTModel", "DeiTConfig", **IMAGE),
    "dinov2": partial(build, "Dinov2Model", "Dinov2Config", **IMAGE),
    "clip": partial(build, "CLIPVisionModel", "CLIPVisionConfig", **IMAGE),
}


def inputs(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if hasattr(model.config, "vocab_size"):
        return dict(input_ids=torch.randint(3, 50, (2, 12), generator=generator))
    return dict(pixel_values=torch.randn(2, 1, 12, 12, generator=generator))


@torch.no_grad()
def out(model, **given) -> torch.Tensor:
    if model.config.model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox"):
        given.setdefault("use_cache", False)
    answer = model(**given)
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


def cached(model, ids, cache=None):
    """The cache after ids [B T], which follow `cache`. transformers calls it past_key_values before 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        return getattr(model(ids, use_cache=True, **{name: cache}), name)

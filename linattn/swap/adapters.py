"""The only place that knows how foreign attention modules are built: one adapter for each class, by exact path, so that none is imported.

A subclass, or another class of the same name, is no match: it may attend differently.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn


class Heads(NamedTuple):
    """The sizes of one attention module."""

    dim: int  # of its input
    queries: int
    keys: int  # heads of k and v
    width: int  # of one head, of q, k and v alike
    scale: float  # the softmax is of scale · q·k


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How one class of attention is read. `m` below is the module that takes the host's place and holds its `parts` under their own names.

    call     how its owner calls it: a key of `linattn.swap.calls.CALLS`
    parts    names of the host's submodules and parameters that do the projections
    heads    host → Heads
    project  (m, x [B T dim]) → q [B T HQ K], k [B T H K], v [B T H K], before rotary positions
    output   (m, o [B T HQ·K], x) → y
    causal   whether the host hides the future
    rotary   whether the call brings cos and sin, for `apply_rotary_pos_emb` of the host's own file, or of a class it inherits from
    refuse   host → why it cannot be swapped, or None
    window   host → width of its own sliding window, or 0
    dropout  host → its dropout on attention weights, which linear attention has not
    layer    host → its number in the cache, or None
    """

    call: str
    parts: tuple[str, ...]
    heads: Callable[[Any], Heads]
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Any, Tensor, Tensor], Tensor]
    causal: Callable[[Any], bool] = lambda host: bool(host.is_causal)
    rotary: bool = False
    refuse: Callable[[Any], str | None] = lambda host: None
    window: Callable[[Any], int] = lambda host: 0
    dropout: Callable[[Any], float] = lambda host: 0.0
    layer: Callable[[Any], int | None] = lambda host: getattr(host, "layer_idx", None)


def path_of(module: nn.Module | type) -> str:
    """Module and name of a class: a key of ADAPTERS."""
    kind = module if isinstance(module, type) else type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def adapter_of(module: nn.Module) -> Adapter:
    return ADAPTERS[path_of(module)]


def register_adapter(kind: type, adapter: Adapter) -> None:
    """Let `swap_attention` swap modules of exactly class `kind`. ValueError if there is an adapter for it already."""
    if not isinstance(adapter, Adapter):
        raise ValueError(f"adapter must be a linattn.swap.Adapter; got {type(adapter).__name__}")
    if (path := path_of(kind)) in ADAPTERS:
        raise ValueError(f"there is an adapter for {path} already")
    ADAPTERS[path] = adapter


def rotation_of(kind: type) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`apply_rotary_pos_emb` of the file of that class, or of one it inherits from."""
    files = [sys.modules.get(base.__module__) for base in kind.__mro__]
    return next((rotate for file in files if (rotate := getattr(file, "apply_rotary_pos_emb", None))), None)


def turned(host: nn.Module, q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """q and k [B T H K] by the rotary positions of the host's own file."""
    rotate = rotation_of(type(host))
    assert rotate is not None  # the plan has looked for it
    return rotate(q, k, *table, unsqueeze_dim=2)


# -- projections -------------------------------------------------------------------------------------------------------------------------


def _split(m, *heads: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(-1, (-1, m.heads.width)) for t in heads)


def _separate(m, x):  # q_proj, k_proj, v_proj, and norms of q and k where there are
    q, k, v = _split(m, m.q_proj(x), m.k_proj(x), m.v_proj(x))
    return (m.q_norm(q), m.k_norm(k), v) if hasattr(m, "q_norm") else (q, k, v)


def _gpt2(m, x):
    return _split(m, *m.c_attn(x).split(m.heads.queries * m.heads.width, -1))


def _neox(m, x):  # q, k and v of one head lie together
    return m.query_key_value(x).unflatten(-1, (-1, 3 * m.heads.width)).chunk(3, -1)


def _phi3(m, x):
    h = m.heads
    return _split(m, *m.qkv_proj(x).split([h.queries * h.width, h.keys * h.width, h.keys * h.width], -1))


def _bert(m, x):
    return _split(m, m.query(x), m.key(x), m.value(x))


def _timm(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, -1, m.heads.width)).unbind(2)
    return m.q_norm(q), m.k_norm(k), v


def _timm_output(m, o, x):
    o = m.norm(o)
    return m.proj_drop(m.proj(o if m.gate is None else o * m.gate(x).sigmoid()))


def _torch(m, x):
    return _split(m, *nn.functional.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1))


def _torch_refuse(host):
    if not host._qkv_same_embed_dim:
        return "its keys or values have a width of their own (kdim, vdim)"
    return "it adds a bias row to keys and values (add_bias_kv)" if host.bias_k is not None or host.add_zero_attn else None


# -- sizes -------------------------------------------------------------------------------------------------------------------------------


def _decoder_heads(host):
    c = host.config
    width = getattr(host, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Heads(
        c.hidden_size, c.num_attention_heads, getattr(c, "num_key_value_heads", None) or c.num_attention_heads, width, host.scaling
    )


def _even_heads(host):
    """As many heads of keys as of queries; CLIP calls its scale `scale`."""
    c = host.config
    scale = host.scaling if hasattr(host, "scaling") else host.scale
    return Heads(c.hidden_size, c.num_attention_heads, c.num_attention_heads, c.hidden_size // c.num_attention_heads, scale)


def _vit_heads(host):
    return Heads(host.config.hidden_size, host.num_attention_heads, host.num_attention_heads, host.head_dim, host.scaling)


def _timm_heads(host):
    return Heads(host.qkv.in_features, host.num_heads, host.num_heads, host.head_dim, host.scale)


def _torch_heads(host):
    return Heads(host.embed_dim, host.num_heads, host.num_heads, host.head_dim, host.head_dim**-0.5)


# -- the table ---------------------------------------------------------------------------------------------------------------------------

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_own_window = lambda host: getattr(host, "sliding_window", None) or 0  # Qwen: of this layer
_config_window = lambda host: getattr(host.config, "sliding_window", None) or 0  # Mistral, Phi-3: of all layers
_LLAMA = Adapter(
    call="transformers", parts=_QKVO, heads=_decoder_heads, project=_separate, output=lambda m, o, x: m.o_proj(o), rotary=True,
    dropout=lambda host: host.attention_dropout,
)  # fmt: skip
_BERT = Adapter(
    call="transformers", parts=("query", "key", "value"), heads=_even_heads, project=_bert, output=lambda m, o, x: o,
    causal=lambda host: bool(host.is_decoder), dropout=lambda host: host.dropout.p,
    refuse=lambda host: "of relative positions" if getattr(host, "position_embedding_type", "absolute") != "absolute" else None,
)  # fmt: skip
_VIT = Adapter(
    call="transformers", parts=_QKVO, heads=_vit_heads, project=_separate, output=lambda m, o, x: m.o_proj(o),
    dropout=lambda host: host.attention_dropout, layer=lambda host: None,
)  # fmt: skip

ADAPTERS: dict[str, Adapter] = {
    f"transformers.models.{path}": adapter
    for path, adapter in {
        "llama.modeling_llama.LlamaAttention": _LLAMA,
        "mistral.modeling_mistral.MistralAttention": replace(_LLAMA, window=_config_window),
        "qwen2.modeling_qwen2.Qwen2Attention": replace(_LLAMA, window=_own_window),
        "qwen3.modeling_qwen3.Qwen3Attention": replace(_LLAMA, parts=(*_QKVO, "q_norm", "k_norm"), window=_own_window),
        "gemma.modeling_gemma.GemmaAttention": _LLAMA,
        "phi3.modeling_phi3.Phi3Attention": replace(_LLAMA, parts=("qkv_proj", "o_proj"), project=_phi3, window=_config_window),
        "gpt2.modeling_gpt2.GPT2Attention": Adapter(
            call="transformers", parts=("c_attn", "c_proj", "resid_dropout"), heads=_even_heads, project=_gpt2,
            output=lambda m, o, x: m.resid_dropout(m.c_proj(o)), dropout=lambda host: host.attn_dropout.p,
            refuse=lambda host: "it is cross-attention" if host.is_cross_attention else None,
        ),
        "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": Adapter(
            call="transformers", parts=("query_key_value", "dense"), heads=_even_heads, project=_neox,
            output=lambda m, o, x: m.dense(o), rotary=True, dropout=lambda host: host.attention_dropout,
        ),
        "bert.modeling_bert.BertSelfAttention": _BERT,
        "roberta.modeling_roberta.RobertaSelfAttention": _BERT,
        "vit.modeling_vit.ViTAttention": _VIT,
        "deit.modeling_deit.DeiTAttention": _VIT,
        "dinov2.modeling_dinov2.Dinov2Attention": _VIT,
        "dinov2.modeling_dinov2.Dinov2SelfAttention": Adapter(  # before transformers 5.18, inside a Dinov2Attention without projections
            call="transformers", parts=("query", "key", "value"), heads=_even_heads, project=_bert, output=lambda m, o, x: o,
            dropout=lambda host: host.dropout_prob, layer=lambda host: None,
        ),
        "clip.modeling_clip.CLIPAttention": Adapter(
            call="transformers", parts=("q_proj", "k_proj", "v_proj", "out_proj"), heads=_even_heads, project=_separate,
            output=lambda m, o, x: m.out_proj(o), causal=lambda host: "Text" in type(host.config).__name__,
            dropout=lambda host: host.dropout, layer=lambda host: None,
        ),
    }.items()
} | {
    "timm.layers.attention.Attention": Adapter(
        call="timm", parts=("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"), heads=_timm_heads, project=_timm,
        output=_timm_output, causal=lambda host: False, dropout=lambda host: host.attn_drop.p,
    ),
    "torch.nn.modules.activation.MultiheadAttention": Adapter(
        call="torch", parts=("in_proj_weight", "in_proj_bias", "out_proj"), heads=_torch_heads, project=_torch,
        output=lambda m, o, x: m.out_proj(o), causal=lambda host: False, refuse=_torch_refuse, dropout=lambda host: host.dropout,
    ),
}  # fmt: skip

# Attention that swaps would silently change: refused by name, with the reason.
REFUSED = {
    "transformers.models.bert.modeling_bert.BertCrossAttention": "it is cross-attention",
    "transformers.models.roberta.modeling_roberta.RobertaCrossAttention": "it is cross-attention",
    "transformers.models.bloom.modeling_bloom.BloomAttention": "it has ALiBi biases",
    "transformers.models.mpt.modeling_mpt.MptAttention": "it has ALiBi biases",
    "transformers.models.swin.modeling_swin.SwinSelfAttention": "it is windowed, with relative positions",
    "transformers.models.t5.modeling_t5.T5Attention": "it has relative positions",
    "timm.layers.attention.AttentionRope": "it turns patches by rotary positions of two dimensions",
    "timm.layers.attention_pool.AttentionPoolLatent": "its queries are not its keys",
    "timm.models.swin_transformer.WindowAttention": "it is windowed, with relative positions",
    "timm.models.beit.Attention": "it has relative positions",
    "timm.models.levit.Attention": "it has position biases",
    "timm.models.pvt_v2.Attention": "it attends to fewer keys than there are tokens",
    "timm.models.eva.EvaAttention": "it turns patches by rotary positions of two dimensions",
    "timm.models.vision_transformer_relpos.RelPosAttention": "it has relative positions",
}

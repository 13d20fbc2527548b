"""The only place that reads a host's masks: which tokens are real, and where packed sequences end. Anything else they say is refused."""

from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    real: Tensor | None  # [B T] bool; None: all
    cu_seqlens: Tensor | None  # [N+1], of the B · T tokens row after row; None: each row is one sequence


ALL = Seen(None, None)


def read(mask: Tensor | None, x: Tensor, past: int, causal: bool, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Seen:
    """What `mask` says of the tokens x [B T ·] that come after `past` others.

    mask        None | [B S] of padding, true or 1 for a real token | [B or 1, 1, T or 1, S], bool or added to logits; its columns
                past … past + T are x
    cu_seqlens  ends of packed sequences in one row, as transformers' collator gives them; a mask [B 1 T S] beside them must say the same.
                Without these, and without a mask, position_ids that start again are read as such ends

    ValueError for a mask that is not causal (or open to both sides) + padding + packing, as it cannot be kept by a linear attention.
    """
    B, T = x.shape[:2]
    if cu_seqlens is not None:
        if mask is not None and mask.ndim == 2:
            raise ValueError("give cu_seq_lens or attention_mask, not both: packed sequences have no padding")
        packed = _packed(cu_seqlens, B, T)
        if mask is not None and not _same(packed, read(mask, x, past, causal, None, None)):
            raise ValueError("cu_seq_lens and attention_mask say different ends: give position_ids that start again with every sequence")
        return packed
    if mask is None:
        return ALL if past or position_ids is None or not causal else _by_positions(position_ids, B, T)
    if mask.ndim == 2:
        if mask.shape[0] != B or mask.shape[1] < T:
            raise ValueError(f"attention_mask must be [B S] with B = {B} and S >= {T}; got {tuple(mask.shape)}")
        real = mask[:, :T].bool() if mask.shape[1] < past + T else mask[:, past : past + T].bool()
        return ALL if bool(real.all()) else Seen(real, None)
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, T) or mask.shape[3] < past + T:
        raise ValueError(f"attention_mask must be [B S] or [B 1 T S] with T = {T} and S >= {past + T}; got {tuple(mask.shape)}")
    if (known := getattr(mask, "_linattn", None)) is not None and known[0] == (past, T, causal):
        return known[1]  # all layers share one mask
    seen = _of_square(mask, B, T, past, causal)
    mask._linattn = ((past, T, causal), seen)  # type: ignore[attr-defined]
    return seen


def _of_square(mask: Tensor, B: int, T: int, past: int, causal: bool) -> Seen:
    visible = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0].expand(B, T, -1)
    if not causal:
        real = visible[:, 0, past : past + T]
        if not bool((visible == visible[:, :1]).all()):
            raise ValueError(
                "attention_mask hides different keys from different queries; attention to both sides can only leave out padding"
            )
        return ALL if bool(real.all()) else Seen(real.contiguous(), None)
    own = visible[:, :, past : past + T]
    column = torch.arange(T, device=mask.device)
    real = own.diagonal(dim1=1, dim2=2)  # a real token sees itself
    start = torch.where(visible.any(-1), visible.int().argmax(-1), past + T) - past  # of the sequence a token is of; < 0: before x
    expected = (column <= column[:, None]) & (column >= start[..., None]) & real[:, None]
    follows = real[:, 1:] & real[:, :-1] & (start[:, 1:] != start[:, :-1])  # the first token of a packed sequence, which starts at itself
    if not bool(((own == expected) | ~real[..., None]).all() & (~follows | (start[:, 1:] == column[1:])).all()):
        raise ValueError(
            "attention_mask is not causal + padding + packing (a sliding window, a prefix, a mask of your own?): keep these layers softmax"
        )
    again = torch.zeros_like(real)
    again[:, 1:] = follows
    if bool(follows.any()):  # every row begins a sequence too
        again[:, 0] = True
        ends = again.flatten().nonzero()[:, 0]
        return Seen(None if bool(real.all()) else real.contiguous(), torch.cat([ends, ends.new_tensor([B * T])]))
    return ALL if bool(real.all()) else Seen(real.contiguous(), None)


def _by_positions(position_ids: Tensor, B: int, T: int) -> Seen:
    if position_ids.ndim != 2 or position_ids.shape[1] != T or T == 1:
        return ALL
    again = torch.zeros_like(position_ids, dtype=torch.bool)
    again[:, 1:] = position_ids.diff(dim=1) != 1
    if not bool(again.any()):
        return ALL
    again[:, 0] = True
    ends = again.expand(B, T).flatten().nonzero()[:, 0]
    return Seen(None, torch.cat([ends, ends.new_tensor([B * T])]))


def _packed(cu_seqlens: Tensor, rows: int, tokens: int) -> Seen:
    if rows != 1:
        raise ValueError(f"cu_seq_lens need their sequences in one row; got {rows} rows")
    ends = cu_seqlens.tolist()
    if ends[:1] != [0] or ends[-1] != tokens or any(a > b for a, b in zip(ends, ends[1:])):
        raise ValueError(f"cu_seq_lens must rise from 0 to the number of tokens, {tokens}; got {ends if len(ends) < 20 else '…'}")
    return Seen(None, cu_seqlens)


def _same(packed: Seen, masked: Seen) -> bool:
    """Whether a mask says the ends that cu_seqlens do, which may hold empty sequences."""
    assert packed.cu_seqlens is not None
    ends = packed.cu_seqlens.unique_consecutive().tolist()
    return masked.real is None and (ends[1:-1] == [] if masked.cu_seqlens is None else ends == masked.cu_seqlens.tolist())

"""Who reads what: implicit attention and readers, exactly, as gradients of the operator, which is linear in its values and its state.

    o_t = Σ_j a_tj v_j + S_sᵀ r_ts        a_tj = ∂o_t / ∂v_j,   r_ts = ∂o_t / ∂S_s

with everything else held still. One backward call of the operator gives R rows at once: their values are R columns, each with a 1 at
its own row. So every variant, decay, normaliser, direction and packing the operator has is here too, and nothing is [T T].
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import State, linear_attention

Over = Literal["values", "writes"]


def rows_of(q, k, log_decay, beta, rows: Sequence[int], how: dict[str, Any], *, z=None, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    """Gradients of o at `rows` to values [B HQ R T], and to the state before the first token, [N HQ R K] or [2 N HQ R K].

    z: the normaliser's state before the first token, [N H K] or [2 N H K].
    """
    q, k = (t if t.dtype == torch.float64 else t.float() for t in (q, k))
    (B, T, H, K), HQ, R = k.shape, q.shape[2], len(rows)
    G, N = HQ // H, B if cu_seqlens is None else len(cu_seqlens) - 1
    columns = R * G
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        v = q.new_zeros(B, T, H, columns, requires_grad=True)
        sides = () if how["causal"] else (2,)
        kv = q.new_zeros(*sides, N, H, K + bool(how["offset"]), columns, requires_grad=True)
        if how["normalize"] and z is None:
            z = q.new_zeros(kv.shape[:-1])
        inputs = [None if t is None else t.detach() for t in (log_decay, beta, z)]
        o, _ = linear_attention(
            q.detach(), k.detach(), v, inputs[0], inputs[1], initial_state=State(kv, inputs[2] if how["normalize"] else None),
            cu_seqlens=cu_seqlens, check_values=False, **{**how, "backend": "auto"},
        )  # fmt: skip
        one = torch.zeros_like(o).unflatten(2, (H, G))
        for i, t in enumerate(rows):
            for g in range(G):
                one[:, t, :, g, i * G + g] = 1
        dv, dkv = torch.autograd.grad(o, (v, kv), one.flatten(2, 3))
    dv = dv.unflatten(-1, (R, G)).permute(0, 2, 4, 3, 1)  # [B H G R T]
    dkv = dkv.unflatten(-1, (R, G)).movedim(-1, -3).transpose(-1, -2)  # [… H G R K]
    return dv.flatten(1, 2), dkv.flatten(-4, -3)


def replay(k: Tensor, u: Tensor, log_decay: Tensor | None, before: State, offset: float = 0.0) -> State:
    """The state after tokens that wrote u [B n H V] under k [B n H K], from `before`: S = Γ S₀ + Σ_j Γ_j k_j u_jᵀ, delta rule or not."""
    dtype = before.kv.dtype
    k, u = k.to(dtype), u.to(dtype)
    with torch.autocast(k.device.type, enabled=False):
        _, after = linear_attention(
            torch.zeros_like(k), k, u, log_decay, initial_state=before, return_state=True, normalize=before.z is not None, offset=offset,
            check_values=False,
        )  # fmt: skip
    return after


def carried(writes: Tensor, k, log_decay, beta) -> Tensor:
    """What is left of state columns [B H K C] after tokens that write nothing: A_t … A_1 S, erasing included."""
    dtype = writes.dtype
    none = writes.new_zeros(*k.shape[:3], writes.shape[-1])
    with torch.autocast(k.device.type, enabled=False):
        k = k.to(dtype)
        _, after = linear_attention(
            torch.zeros_like(k), k, none, log_decay, beta, initial_state=State(writes), return_state=True, check_values=False
        )
    return after.kv

"""The delta rule inside a chunk: `wy` solves for what is written given the state before the chunk, `wy_backward` is its gradient.

(I + M) u = β (v − (k ⊙ 2^ℓ) S)      M = β · scores(k, k), strictly lower
u = ũ − w S                          ũ = X β v,   w = X β (k ⊙ 2^ℓ),   X = (I + M)⁻¹
"""

import triton
import triton.language as tl

from .gate import _meets, clock, dot, faded, gates, scores, spread, unclock
from .gradients import _load_gates, _per_gate, _put_gates
from .layout import column, locate, matrix, put, put_column, tile, tokens


@triton.jit
def inverse(M):
    """(I + M)⁻¹ of a strictly lower M [C C]: blocks of 2s from blocks of s, with −B⁻¹ M A⁻¹ in the lower corner. Stable as substitution."""
    C: tl.constexpr = M.shape[0]
    i = tl.arange(0, C)
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for level in tl.static_range(7):
        if 2 ** (level + 1) <= C:
            corner = _meets(C, level) & (((i >> level) & 1) == 1)[:, None] & (((i >> level) & 1) == 0)[None, :]
            X -= dot(dot(X, tl.where(corner, M, 0.0)), X)
    return X


@triton.jit(do_not_specialize=["N", "T", "H"])
def wy(
    k, v, g, beta, cu_seqlens, w, u, N, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, LEAVING: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, H): w [tokens H K] and ũ [tokens H V]."""
    h = tl.program_id(1)
    _, start, length, c = locate(tl.program_id(0), cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:
        return
    first, step, live = tokens(start, length, c, C, REVERSE)
    jk = tl.arange(0, BK)
    b_k = tile(k, first, step, live, H, h, jk, K)
    ell = clock(gates(g, first, step, live, H, h, jk, K, DECAY), LEAVING)
    b_beta = column(beta, first, step, live, H, h)[:, None]
    X = inverse(b_beta * scores(b_k, b_k, ell, 0.0, True, DECAY)).to(b_k.dtype)
    put(w, dot(X, (b_beta * faded(b_k, ell, DECAY)).to(b_k.dtype)), first, step, live, H, h, jk, K)
    for iv in range((V + BV - 1) // BV):
        jv = iv * BV + tl.arange(0, BV)
        b_v = tile(v, first, step, live, H, h, jv, V)
        put(u, dot(X, (b_beta * b_v).to(b_v.dtype)), first, step, live, H, h, jv, V)


@triton.jit(do_not_specialize=["N", "T", "H"])
def wy_backward(
    k, v, g, beta, u, du, states, cu_seqlens, dk_others, dk, dv, dg, dbeta, N, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, LEAVING: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, H). To dk and dg it adds what reading with k costs; dv and dbeta it makes."""
    at, h = tl.program_id(0), tl.program_id(1)
    _, start, length, c = locate(at, cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:
        return
    first, step, live = tokens(start, length, c, C, REVERSE)
    i, jk = tl.arange(0, C), tl.arange(0, BK)
    b_k = tile(k, first, step, live, H, h, jk, K)
    ell = clock(gates(g, first, step, live, H, h, jk, K, DECAY), LEAVING)
    b_beta = column(beta, first, step, live, H, h)
    A = scores(b_k, b_k, ell, 0.0, True, DECAY)
    X = inverse(b_beta[:, None] * A).to(b_k.dtype)
    k_seen = faded(b_k, ell, DECAY).to(b_k.dtype)
    dM = tl.zeros([C, C], tl.float32)
    dk_read = tl.zeros([C, BK], tl.float32)
    b_dbeta = tl.zeros([C], tl.float32)
    for iv in range((V + BV - 1) // BV):
        jv = iv * BV + tl.arange(0, BV)
        b_v = tile(v, first, step, live, H, h, jv, V)
        S = matrix(states, at * H + h, jk, jv, K, V).to(b_k.dtype)
        dr = dot(tl.trans(X), tile(du, first, step, live, H, h, jv, V).to(b_k.dtype))
        dM -= dot(dr.to(b_k.dtype), tl.trans(tile(u, first, step, live, H, h, jv, V)))
        b_dbeta += tl.sum((b_v - dot(k_seen, S)) * dr, 1)
        b_dv = b_beta[:, None] * dr
        dk_read -= dot(b_dv.to(b_k.dtype), tl.trans(S))
        put(dv, b_dv, first, step, live, H, h, jv, V)
    dM = tl.where(i[:, None] > i[None, :], dM, 0.0)
    put_column(dbeta, b_dbeta + tl.sum(dM * A, 1), first, step, live, H, h)
    dA = b_beta[:, None] * dM
    dk_read = faded(dk_read, ell, DECAY) + spread(dA, b_k, ell, 0.0, True, DECAY)
    dk_key = spread(tl.trans(dA), b_k, ell, 0.0, False, DECAY)
    put(dk, tile(dk_others, first, step, live, H, h, jk, K) + dk_read + dk_key, first, step, live, H, h, jk, K)
    if DECAY != "none":
        b_dg = _load_gates(dg, first, step, live, H, h, jk, K, DECAY)
        b_dg += unclock(_per_gate(b_k * (dk_read - dk_key), DECAY), LEAVING)
        _put_gates(dg, b_dg, first, step, live, H, h, jk, K, DECAY)

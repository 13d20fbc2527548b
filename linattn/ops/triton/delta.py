"""The delta rule: `wy` solves a chunk for what it writes, given the state before it, `solved` is its gradient, `joined` joins segments.

    (I + M) u = β (v − (k ⊙ 2^ℓ) S)      M = β · scores(k, k), strictly lower
    u = X (v − (k ⊙ 2^ℓ) S)              X = (I + M)⁻¹ diag(β)

X is all that is stored. X v and X (k ⊙ 2^ℓ) in its place, each rounded, would be two large tensors whose small difference is u.
"""

import triton
import triton.language as tl

from .gate import _meets, carried_z, clock, dot, faded, fine, gates, load_total, product, scores, spread
from .layout import column, locate, matrix, put, put_column, tile, tokens, vector


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
    k, g, beta, cu_seqlens, solution, N, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, LEAVING: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, H): X [tokens H C]."""
    h = tl.program_id(1)
    _, start, length, c = locate(tl.program_id(0), cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:
        return
    first, step, live = tokens(start, length, c, C, REVERSE)
    jk = tl.arange(0, BK)
    b_k = tile(k, first, step, live, H, h, jk, K)
    ell = clock(gates(g, first, step, live, H, h, jk, K, DECAY), LEAVING)
    b_beta = column(beta, first, step, live, H, h)
    X = inverse(b_beta[:, None] * scores(b_k, b_k, ell, 0.0, True, DECAY)) * b_beta[None, :]
    put(solution, X, first, step, live, H, h, tl.arange(0, C), C)


@triton.jit
def solved(
    k, g, v, beta, u, du, states, dv, dbeta, row, first, step, live, H, h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, LEAVING: tl.constexpr,
    TK: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """From du of one chunk: dv and dbeta are stored, returned are (I + M)⁻ᵀ and dA, the gradient of scores(k, k) [C C].

    dr = (I + M)⁻ᵀ du,   dv = β dr,   dM = −dr uᵀ strictly lower,   dβ = rows of (v − (k ⊙ 2^ℓ) S) ⊙ dr and of dM ⊙ scores(k, k)
    """
    i = tl.arange(0, C)
    b_beta = column(beta, first, step, live, H, h)
    A = tl.zeros([C, C], tl.float32)
    for ik in tl.range(0, BK // TK, disable_licm=True):
        jk = ik * TK + tl.arange(0, TK)
        b_k = tile(k, first, step, live, H, h, jk, K)
        A += scores(b_k, b_k, clock(gates(g, first, step, live, H, h, jk, K, DECAY), LEAVING), 0.0, True, DECAY)
    X = tl.trans(inverse(b_beta[:, None] * A))
    dM = tl.zeros([C, C], tl.float32)
    b_dbeta = tl.zeros([C], tl.float32)
    for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
        jv = iv * BV + tl.arange(0, BV)
        b_v = tile(v, first, step, live, H, h, jv, V)
        dr = fine(X, tile(du, first, step, live, H, h, jv, V), b_v)
        dM -= product(dr, tl.trans(tile(u, first, step, live, H, h, jv, V)), FINE)
        put(dv, b_beta[:, None] * dr, first, step, live, H, h, jv, V)
        left_over = b_v.to(tl.float32)
        for ik in tl.range(0, BK // TK, disable_licm=True):
            jk = ik * TK + tl.arange(0, TK)
            ell = clock(gates(g, first, step, live, H, h, jk, K, DECAY), LEAVING)
            k_seen = faded(tile(k, first, step, live, H, h, jk, K), ell, DECAY).to(b_v.dtype)
            left_over -= dot(k_seen, matrix(states, row, jk, jv, K, V).to(b_v.dtype))
        b_dbeta += tl.sum(left_over * dr, 1)
    dM = tl.where(i[:, None] > i[None, :], dM, 0.0)
    put_column(dbeta, b_dbeta + tl.sum(dM * A, 1), first, step, live, H, h)
    return X, b_beta[:, None] * dM


@triton.jit
def solved_keys(
    X, dA, beta, du, states, row, first, step, live, H, h, b_k, ell, jk,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, FINE: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """From what `solved` returned: what reading with k and being read as a key give to the columns jk of dk."""
    b_beta = column(beta, first, step, live, H, h)
    dk_read = tl.zeros(b_k.shape, tl.float32)
    for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
        jv = iv * BV + tl.arange(0, BV)
        dr = fine(X, tile(du, first, step, live, H, h, jv, V), b_k)
        dk_read -= product(b_beta[:, None] * dr, tl.trans(matrix(states, row, jk, jv, K, V).to(b_k.dtype)), FINE)
    dk_read = faded(dk_read, ell, DECAY) + spread(dA, b_k, ell, 0.0, True, DECAY, FINE and DECAY != "channel")
    return dk_read, spread(tl.trans(dA), b_k, ell, 0.0, False, DECAY, FINE and DECAY != "channel")


@triton.jit
def joined(
    S, z, parts, parts_z, totals, turns, row, turn_row, step, count, k, v,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, NORMALIZE: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What S and z become over the `count` segments of the delta rule that come before `row`: R S + part, of each. TURNED: Rᵀ.

    PRECISION: how the tensor cores at hand multiply float32.
    """
    for s in tl.range(0, count, num_stages=1, disable_licm=True):
        at = row - (count - s) * step
        turn = turns + (turn_row - (count - s) * step).to(tl.int64) * (K * K)
        if TURNED:
            turn += k[:, None] + k[None, :] * K
        else:
            turn += k[:, None] * K + k[None, :]
        R = tl.load(turn, mask=(k < K)[:, None] & (k < K)[None, :], other=0.0)
        S = tl.dot(R, S, input_precision=PRECISION) + matrix(parts, at, k, v, K, V)
        if NORMALIZE:
            z = carried_z(z, load_total(totals, at, k, K, DECAY), DECAY) + vector(parts_z, at, k, K)
    return S, z

"""Bidirectional attention without decay: every token sees one and the same state, the sum over all of them and over both initial states.

    S = Σ_j k_j v_jᵀ + S_left + S_right         n_i = scale · Sᵀ q_i
    G = Σ_i q_i dn_iᵀ                           dq_i = S dn_i,   dk_j = G v_j,   dv_j = Gᵀ k_j    (G with those of both last states)

The sums over segments are `seg_state`'s; here they are added up, and read. z and its gradient go the same way, with 1 for v and dd for dn.
"""

import triton
import triton.language as tl

from .gate import dot
from .layout import column, first_row, gradient, locate, matrix, put, put_column, put_matrix, put_vector, tile, tokens, vector


@triton.jit(do_not_specialize=["N", "T", "H", "segments", "chunks"])
def seg_sum(
    parts, parts_z, kv, z, dkv, dz, cu_seqlens, whole, whole_z, last, last_z, N, T, H, segments, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, NORMALIZE: tl.constexpr,
    VARLEN: tl.constexpr, GRAD: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Grid (S or G, N × H, V tiles): the whole sum, and the last state of either side, which holds its own initial state alone."""
    f, n, h, iv = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    k, v = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    if VARLEN:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - start.to(tl.int32)
    else:
        start, length = n.to(tl.int64) * T, T
    first = first_row(n, start, T, chunks * C, VARLEN)
    S, Z = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    for s in range(tl.cdiv(length, chunks * C)):
        row = (f * segments + first + s) * H + h
        S += matrix(parts, row, k, v, K, V)
        if NORMALIZE:
            Z += vector(parts_z, row, k, K)
    row, right, out = n * H + h, (N + n) * H + h, (2 * f * N + n) * H + h
    left_S, right_S = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32)
    left_Z, right_Z = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    if STARTS:
        if f == 0:
            left_S, right_S = matrix(kv, row, k, v, K, V), matrix(kv, right, k, v, K, V)
            left_Z, right_Z = vector(z, row, k, K), vector(z, right, k, K)
    if GRAD and ENDS:
        if f == 1:
            left_S, right_S = matrix(dkv, row, k, v, K, V), matrix(dkv, right, k, v, K, V)
            left_Z, right_Z = vector(dz, row, k, K), vector(dz, right, k, K)
    if (STARTS and GRAD) or (ENDS and not GRAD):
        put_matrix(last, S + left_S, out, k, v, K, V)
        put_matrix(last, S + right_S, out + N * H, k, v, K, V)
        if iv == 0:
            put_vector(last_z, Z + left_Z, out, k, K)
            put_vector(last_z, Z + right_Z, out + N * H, k, K)
    put_matrix(whole, S + left_S + right_S, (f * N + n) * H + h, k, v, K, V)
    if iv == 0:
        put_vector(whole_z, Z + left_Z + right_Z, (f * N + n) * H + h, k, K)


@triton.jit(do_not_specialize=["N", "T", "H", "G"])
def nodecay_out(
    q, whole, whole_z, cu_seqlens, o, d, scale, eps, N, T, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, NORMALIZE: tl.constexpr,
    DIVIDE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, query heads)."""
    hq = tl.program_id(1)
    n, start, length, c = locate(tl.program_id(0), cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:
        return
    row = n * H + hq // G
    first, step, live = tokens(start, length, c, C, False)
    jk = tl.arange(0, BK)
    b_q = tile(q, first, step, live, H * G, hq, jk, K)
    if NORMALIZE:
        rows = scale * tl.sum(b_q * vector(whole_z, row, jk, K)[None, :], 1)
        put_column(d, rows, first, step, live, H * G, hq)
        if DIVIDE == "clamp":
            factor = scale / tl.maximum(rows, eps)
        else:
            factor = scale / tl.where(live, rows + eps, 1.0)
    else:
        factor = tl.where(live, scale, scale)
    for iv in range((V + BV - 1) // BV):
        jv = iv * BV + tl.arange(0, BV)
        out = dot(b_q, matrix(whole, row, jk, jv, K, V).to(b_q.dtype)) * factor[:, None]
        put(o, out, first, step, live, H * G, hq, jv, V)


@triton.jit(do_not_specialize=["N", "T", "H", "G"])
def nodecay_bwd(
    k, v, do, dd, factor, whole, whole_z, cu_seqlens, dwrites, dq, dk, dv, scale, N, T, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, NORMALIZE: tl.constexpr,
    VARLEN: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, query heads + H): dq of one query head, or dk and dv of one head."""
    at, hq = tl.program_id(0), tl.program_id(1)
    n, start, length, c = locate(at, cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:
        return
    first, step, live = tokens(start, length, c, C, False)
    jk = tl.arange(0, BK)
    acc = tl.zeros([C, BK], tl.float32)
    if hq < H * G:
        row = n * H + hq // G
        for iv in range((V + BV - 1) // BV):
            jv = iv * BV + tl.arange(0, BV)
            dn = gradient(do, factor, scale, first, step, live, H * G, hq, jv, V, NORMALIZE)
            acc += dot(dn, tl.trans(matrix(whole, row, jk, jv, K, V).to(dn.dtype)))
        if NORMALIZE:
            acc += column(dd, first, step, live, H * G, hq)[:, None] * vector(whole_z, row, jk, K)[None, :]
        put(dq, acc, first, step, live, H * G, hq, jk, K)
    else:
        h = hq - H * G
        row = (N + n) * H + h
        b_k = tile(k, first, step, live, H, h, jk, K)
        for iv in range((V + BV - 1) // BV):
            jv = iv * BV + tl.arange(0, BV)
            dS = matrix(whole, row, jk, jv, K, V).to(b_k.dtype)
            b_dv = dot(b_k, dS)
            if WRITES:
                b_dv += tile(dwrites, first, step, live, H, h, jv, V)
            put(dv, b_dv, first, step, live, H, h, jv, V)
            acc += dot(tile(v, first, step, live, H, h, jv, V), tl.trans(dS))
        if NORMALIZE:
            acc += vector(whole_z, row, jk, K)[None, :]
        put(dk, acc, first, step, live, H, h, jk, K)

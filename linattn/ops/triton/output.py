"""`output`: o = (what the state before the chunk shows) + (what the chunk's own tokens show), walking each segment from left to right.

The state from the left is carried in registers; bidirectional calls read the one from the right, stored by `seg_state`.
"""

import triton
import triton.language as tl

from .delta import joined
from .gate import carried, carried_z, clock, dot, faded, fine, gates, read, read_z, scores, scores_both, written
from .layout import first_row, locate, matrix, put, put_column, put_matrix, put_vector, tile, tokens, vector
from .state import entering, entering_z


@triton.jit(do_not_specialize=["N", "T", "H", "G", "segments", "chunks", "every"])
def output(
    q, k, v, g, solution, incoming, incoming_z, parts, parts_z, totals, turns, states, zs, fades, cu_seqlens, o, d, writes, bkv,
    bz, last, last_z, scale, eps, N, T, H, G, segments, chunks, every,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr,
    DELTA: tl.constexpr, LEAVING_LEFT: tl.constexpr, LEAVING_RIGHT: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr,
    DIVIDE: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, SCANNED: tl.constexpr, RECORD: tl.constexpr,
    WRITES: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, PIPE: tl.constexpr, PRECISION: tl.constexpr,
    TK: tl.constexpr,
):  # fmt: skip
    """Grid (V tiles, segments × query heads). NORMALIZE: row sums d are formed; DIVIDE: "none", "sum" or "clamp".

    DELTA: `solution` is X of delta.py, u = X (v − what k reads of the state already); SCANNED: what enters is joined here, see state.py.
    """
    iv, segment, hq = tl.program_id(0), tl.program_id(1) // (H * G), tl.program_id(1) % (H * G)
    h = hq // G
    n, start, length, block = locate(segment, cu_seqlens, N, T, chunks * C, VARLEN)
    count = tl.minimum(chunks, tl.cdiv(length, C) - block * chunks)
    jk, jv = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    own_row, sequence_row = segment * H + h, n * H + h
    if STARTS or (SCANNED and not DELTA):
        row = sequence_row if DELTA else own_row  # without segments they are one
        S, z = matrix(incoming, row, jk, jv, K, V), vector(incoming_z, row, jk, K)
    else:
        S, z = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    if DELTA and SCANNED:
        S, z = joined(S, z, parts, parts_z, totals, turns, own_row, own_row, H, block, jk, jv, K, V, DECAY, NORMALIZE, False, PRECISION)
    right_row = (segments + segment) * H + h  # the family N follows P
    chunk_row = first_row(n, start, T, C, VARLEN)
    record_row = first_row(n, start, T, C * every, VARLEN)
    speaks = (hq % G == 0) & (count >= 0)  # one query head of a group stores what all of them share
    for s in tl.range(0, count, num_stages=PIPE, disable_licm=True):
        c = block * chunks + s
        first, step, live = tokens(start, length, c, C, REVERSE)
        b_q = tile(q, first, step, live, H * G, hq, jk, K)
        b_k = tile(k, first, step, live, H, h, jk, K)
        b_u = tile(v, first, step, live, H, h, jv, V)
        b_g = gates(g, first, step, live, H, h, jk, K, DECAY)
        ell, L = clock(b_g, LEAVING_LEFT), tl.sum(b_g, 0)
        if RECORD:
            kept = speaks & (c % every == 0)
            at = ((record_row + c // every) * H + h).to(tl.int64)
            tl.store(bkv + at * (K * V) + jk[:, None] * V + jv[None, :], S, mask=(jk < K)[:, None] & (jv < V)[None, :] & kept)
            if NORMALIZE:
                tl.store(bz + at * K + jk, z, mask=(jk < K) & kept & (iv == 0))
        if DELTA:  # write
            b_X = tile(solution, first, step, live, H, h, tl.arange(0, C), C)
            u = fine(b_X, b_u - read(b_k, S, ell, DECAY), b_u)
            if WRITES:
                put(writes, u, first, step, live & speaks, H, h, jv, V)
            b_u = u.to(b_u.dtype)
        out = read(b_q, S, ell, DECAY)  # emit what the state shows, and carry it on: the chunk's own part needs none of it
        if NORMALIZE:
            rows = read_z(b_q, z, ell, DECAY)
            z = carried_z(z, L, DECAY) + tl.sum(faded(b_k, L - ell, DECAY).to(tl.float32), 0)
        S = carried(S, L, DECAY) + written(b_k, b_u, L - ell, DECAY)
        P, row = tl.zeros([C, C], tl.float32), (chunk_row + c) * H + h
        for ik in tl.range(0, BK // TK, disable_licm=True):
            part = ik * TK + tl.arange(0, TK)
            x = tile(q, first, step, live, H * G, hq, part, K)
            y = tile(k, first, step, live, H, h, part, K)
            a = gates(g, first, step, live, H, h, part, K, DECAY)
            left = clock(a, LEAVING_LEFT)
            if BOTH:
                right = clock(a, LEAVING_RIGHT)
                e = tl.sum(a, 0) - right
                out += read(x, entering(states, fades, incoming, row, right_row, part, jv, K, V, DECAY, SCANNED), e, DECAY)
                if NORMALIZE:
                    rows += read_z(x, entering_z(zs, fades, incoming_z, row, right_row, part, K, DECAY, SCANNED), e, DECAY)
                P += scores_both(x, y, left, right, True, DECAY)
            else:
                P += scores(x, y, left, OWN, True, DECAY)
        out = (out + dot(P.to(b_u.dtype), b_u)) * scale
        if NORMALIZE:
            rows = (rows + tl.sum(P, 1)) * scale
            put_column(d, rows, first, step, live & (iv == 0), H * G, hq)
            if DIVIDE == "sum":
                out = out / tl.where(live, rows + eps, 1.0)[:, None]
            elif DIVIDE == "clamp":
                out = out / tl.maximum(rows, eps)[:, None]
        put(o, out, first, step, live, H * G, hq, jv, V)
    if ENDS and (DELTA or not SCANNED):
        if speaks & (block == tl.maximum(tl.cdiv(length, chunks * C), 1) - 1):
            put_matrix(last, S, sequence_row, jk, jv, K, V)
            if iv == 0:
                put_vector(last_z, z, sequence_row, jk, K)

"""States between chunks: `seg_state` walks every segment of the sequence by itself, `seg_scan` joins the segments.

There are up to four families of states, two per direction, all by the same recurrence S ← 2^L S + (x ⊙ 2^e)ᵀ y:

    family     0 P   from the left      1 N   from the right     D dP   gradient of P      D+1 dN   gradient of N        D directions
    x, y       k, v                     k, v                     q, dn                      q, dn
    walks      to the right, e = L − ℓ  to the left, e = ℓ       to the left, e = ℓ         to the right, e = L − ℓ

What is stored for a chunk is the state on entering it from its segment's end, in the dtype of k; it is carried in float32. The part that
comes from beyond the segment is added by the reader (`entering`), faded by the decay between: no state is read only to be written again.

The delta rule makes each step depend on the one before, so there a segment is a whole sequence. With w and ũ from `delta.wy`,

    P    u  = ũ − w P,                          P  ← 2^L P + (k ⊙ 2^(L−ℓ))ᵀ u
    dP   du = (k ⊙ 2^(L−ℓ)) dP + scoresᵀ dn,    dP ← 2^L dP + (q ⊙ 2^ℓ)ᵀ dn − wᵀ du
"""

import triton
import triton.language as tl

from .gate import carried, carried_z, clock, dot, faded, gates, read, scores, written
from .layout import column, first_row, gradient, locate, matrix, put, put_matrix, put_vector, tile, tokens, vector


@triton.jit
def entering(states, fades, incoming, row, seg_row, k, v, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, SCANNED: tl.constexpr):
    """State on entering a chunk, in float32: the segment's own part, and the faded state from beyond the segment."""
    S = matrix(states, row, k, v, K, V).to(tl.float32)
    if SCANNED:
        S += carried(matrix(incoming, seg_row, k, v, K, V), _load_total(fades, row, k, K, DECAY), DECAY)
    return S


@triton.jit
def entering_z(zs, fades, incoming_z, row, seg_row, k, K: tl.constexpr, DECAY: tl.constexpr, SCANNED: tl.constexpr):
    z = vector(zs, row, k, K)
    if SCANNED:
        z += carried_z(vector(incoming_z, seg_row, k, K), _load_total(fades, row, k, K, DECAY), DECAY)
    return z


@triton.jit
def _load_total(totals, row, k, K: tl.constexpr, DECAY: tl.constexpr):
    if DECAY == "channel":
        total = vector(totals, row, k, K)
    elif DECAY == "none":
        total = 0.0
    else:
        total = tl.load(totals + row)
    return total


@triton.jit
def _store_total(totals, total, row, k, here, K: tl.constexpr, DECAY: tl.constexpr):
    if DECAY == "channel":
        tl.store(totals + row.to(tl.int64) * K + k, total, mask=(k < K) & here)
    elif DECAY != "none":
        tl.store(totals + row, total, mask=here)


@triton.jit
def _walk(
    x, y, k, w, writes, dwrites, dd, factor, scale, g, initial, initial_z, dbkv, dbz, states, zs, fades, last, last_z, totals,
    start, length, chunk, chunks, row, last_row, initial_row, record_row, heads, h, iv, G, every,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
    LEAVING: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, LEFTWARDS: tl.constexpr, GRAD: tl.constexpr,
    FRESH: tl.constexpr, STORED: tl.constexpr, ENDS: tl.constexpr, RECORD: tl.constexpr, WRITES: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """One segment, one tile of V columns, from zero (FRESH) or `initial`.

    STORED: whether the state on entering each chunk is kept; ENDS: whether the one at the end is.
    """
    jk, jv = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    inside = (jk < K)[:, None] & (jv < V)[None, :]
    if FRESH:
        S, z = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    else:
        S, z = matrix(initial, initial_row, jk, jv, K, V), vector(initial_z, initial_row, jk, K)
    if DELTA:
        du = tl.zeros([C, BV], tl.float32)
    if DECAY == "channel":
        past = tl.zeros([BK], tl.float32)
    else:
        past = 0.0
    for s in tl.range(0, chunks * G, num_stages=PIPE):  # the query heads of a group one after the other
        head, j = s % G + 0 * chunk, s // G  # a tensor, in the interpreter too
        c = chunk + (chunks - 1 - j if LEFTWARDS else j)
        first, step, live = tokens(start, length, c, C, REVERSE)
        b_x = tile(x, first, step, live, heads * G, h * G + head, jk, K)
        if GRAD:
            b_y = gradient(y, factor, scale, first, step, live, heads * G, h * G + head, jv, V, NORMALIZE)
        else:
            b_y = tile(y, first, step, live, heads, h, jv, V)
        b_g = gates(g, first, step, live, heads, h, jk, K, DECAY)
        at = (row + c * heads).to(tl.int64)
        if STORED:
            tl.store(states + at * (K * V) + jk[:, None] * V + jv[None, :], S.to(states.dtype.element_ty), mask=inside & (head == 0))
            _store_total(fades, past, at, jk, (head == 0) & (iv == 0), K, DECAY)
        ell, L = clock(b_g, LEAVING), tl.sum(b_g, 0)
        e = ell if LEFTWARDS else L - ell
        if DELTA:
            b_w = tile(w, first, step, live, heads, h, jk, K)
            if GRAD:
                b_k = tile(k, first, step, live, heads, h, jk, K)
                P = scores(b_k, b_x, ell, OWN, False, DECAY)
                du = tl.where(head == 0, read(b_k, S, L - ell, DECAY), du) + dot(P.to(b_y.dtype), b_y)
                if WRITES:
                    du += tl.where(head == 0, tile(dwrites, first, step, live, heads, h, jv, V), 0.0)
                put(writes, du, first, step, live & (head == G - 1), heads, h, jv, V)
            else:
                b_y = (b_y - dot(b_w, S.to(b_w.dtype))).to(b_y.dtype)
                put(writes, b_y, first, step, live, heads, h, jv, V)
        L = tl.where(head == 0, L, 0.0)
        if NORMALIZE:
            if STORED:
                tl.store(zs + at * K + jk, z, mask=(jk < K) & (head == 0) & (iv == 0))
            if GRAD:
                weight = column(dd, first, step, live, heads * G, h * G + head)
            else:
                weight = tl.where(live, 1.0, 0.0)
            z = carried_z(z, L, DECAY) + tl.sum(faded(b_x, e, DECAY) * weight[:, None], 0)
        S = carried(S, L, DECAY) + written(b_x, b_y, e, DECAY)
        past += L
        if DELTA:
            if GRAD:
                S -= dot(tl.trans(b_w), tl.where(head == G - 1, du, 0.0).to(b_w.dtype))
        if RECORD:
            if GRAD:  # a recorded start hands its gradient to all that came before it
                recorded = (c % every == 0) & (head == G - 1)
                at = (record_row + c // every * heads).to(tl.int64)
                S += tl.load(dbkv + at * (K * V) + jk[:, None] * V + jv[None, :], mask=inside & recorded, other=0.0)
                if NORMALIZE:
                    z += tl.load(dbz + at * K + jk, mask=(jk < K) & recorded, other=0.0)
    if ENDS:
        put_matrix(last, S, last_row, jk, jv, K, V)
        if iv == 0:
            put_vector(last_z, z, last_row, jk, K)
            _store_total(totals, past, last_row, jk, True, K, DECAY)


@triton.jit(do_not_specialize=["N", "T", "H", "G", "family", "segments", "chunks", "every"])
def seg_state(
    q, k, v, do, w, u, du, dwrites, dd, factor, g, kv, z, dkv, dz, dbkv, dbz, cu_seqlens, states, zs, fades, last, last_z, totals,
    scale, N, T, H, G, family, segments, chunks, every,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr,
    DELTA: tl.constexpr, LEAVING_LEFT: tl.constexpr, LEAVING_RIGHT: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, GRAD: tl.constexpr, SCANNED: tl.constexpr, RECORD: tl.constexpr, WRITES: tl.constexpr,
    KEEP: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Grid (families × V tiles, segments × H): the programs that read the same tokens are neighbours, and the second finds them in L2.

    `chunks` per segment, `segments` rows of them, `family`: the first one wanted. Forward only N is kept per chunk: P is `output`'s.
    KEEP: whether states on entering chunks are wanted at all, or only the sums of whole segments. STARTS, ENDS: whether the call has an
    initial state, and a last one (GRAD: and with them gradients of either).
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    f, iv = family + tl.program_id(0) // tiles, tl.program_id(0) % tiles
    segment, h = tl.program_id(1) // H, tl.program_id(1) % H
    n, start, length, block = locate(segment, cu_seqlens, N, T, chunks * C, VARLEN)
    count = tl.minimum(chunks, tl.cdiv(length, C) - block * chunks)
    D: tl.constexpr = 2 if BOTH else 1
    rows = tl.cdiv(T, C) * N
    if VARLEN:
        rows = T // C + N
    keeper = f if GRAD else f - 1
    row = (tl.maximum(keeper, 0) * rows + first_row(n, start, T, C, VARLEN)) * H + h
    last_row = (f * segments + segment) * H + h
    initial_row = ((f % D) * N + n) * H + h
    record_row = first_row(n, start, T, C * every, VARLEN) * H + h
    chunk = block * chunks
    if f == 0:
        _walk(
            k, v, k, w, u, dwrites, dd, factor, scale, g, kv, z, dbkv, dbz, states, zs, fades, last, last_z, totals,
            start, length, chunk, count, row, last_row, initial_row, record_row, H, h, iv, 1, every,
            K, V, BK, BV, C, DECAY, DELTA, LEAVING_LEFT, OWN, NORMALIZE, REVERSE, False, False,
            SCANNED or not STARTS, GRAD and KEEP, SCANNED or (ENDS and not GRAD), RECORD, WRITES, PIPE,
        )  # fmt: skip
    if BOTH:
        if f == 1:
            _walk(
                k, v, k, w, u, dwrites, dd, factor, scale, g, kv, z, dbkv, dbz, states, zs, fades, last, last_z, totals,
                start, length, chunk, count, row, last_row, initial_row, record_row, H, h, iv, 1, every,
                K, V, BK, BV, C, DECAY, DELTA, LEAVING_RIGHT, OWN, NORMALIZE, REVERSE, True, False,
                SCANNED or not STARTS, KEEP, SCANNED or (ENDS and not GRAD), RECORD, WRITES, PIPE,
            )  # fmt: skip
    if GRAD:
        if f == D:
            _walk(
                q, do, k, w, du, dwrites, dd, factor, scale, g, dkv, dz, dbkv, dbz, states, zs, fades, last, last_z, totals,
                start, length, chunk, count, row, last_row, initial_row, record_row, H, h, iv, G, every,
                K, V, BK, BV, C, DECAY, DELTA, LEAVING_LEFT, OWN, NORMALIZE, REVERSE, True, True,
                SCANNED or not ENDS, KEEP, SCANNED or STARTS, RECORD, WRITES, PIPE,
            )  # fmt: skip
        if BOTH:
            if f == D + 1:
                _walk(
                    q, do, k, w, du, dwrites, dd, factor, scale, g, dkv, dz, dbkv, dbz, states, zs, fades, last, last_z, totals,
                    start, length, chunk, count, row, last_row, initial_row, record_row, H, h, iv, G, every,
                    K, V, BK, BV, C, DECAY, DELTA, LEAVING_RIGHT, OWN, NORMALIZE, REVERSE, False, True,
                    SCANNED or not ENDS, KEEP, SCANNED or STARTS, RECORD, WRITES, PIPE,
                )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "H", "families", "segments", "chunks"])
def seg_scan(
    parts, parts_z, totals, kv, z, dkv, dz, last, last_z, cu_seqlens, N, T, H, segments, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, GRAD: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Grid (families, N × H, V tiles): in place, what each segment adds becomes what enters it; in a fixed order. `last` gets the end."""
    f, n, h, iv = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    k, v = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    if VARLEN:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - start.to(tl.int32)
    else:
        start, length = n.to(tl.int64) * T, T
    count, first = tl.cdiv(length, chunks * C), first_row(n, start, T, chunks * C, VARLEN)
    D: tl.constexpr = 2 if BOTH else 1
    right, grad = f % D == 1, f >= D
    leftwards = right != grad
    initial_row = ((f % D) * N + n) * H + h
    S, Z = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    if GRAD and ENDS:
        if grad:
            S, Z = matrix(dkv, initial_row, k, v, K, V), vector(dz, initial_row, k, K)
    if STARTS:
        if not grad:
            S, Z = matrix(kv, initial_row, k, v, K, V), vector(z, initial_row, k, K)
    for s in range(count):
        segment = first + tl.where(leftwards, count - 1 - s, s)
        row = (f * segments + segment) * H + h
        total = _load_total(totals, row, k, K, DECAY)
        part = matrix(parts, row, k, v, K, V)
        put_matrix(parts, S, row, k, v, K, V)
        S = carried(S, total, DECAY) + part
        if NORMALIZE:
            if iv == 0:
                part_z = vector(parts_z, row, k, K)
                put_vector(parts_z, Z, row, k, K)
                Z = carried_z(Z, total, DECAY) + part_z
    if (STARTS and GRAD) or (ENDS and not GRAD):
        put_matrix(last, S, (f * N + n) * H + h, k, v, K, V)
        if iv == 0:
            put_vector(last_z, Z, (f * N + n) * H + h, k, K)

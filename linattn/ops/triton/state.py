"""States between chunks: `seg_state` walks every segment of the sequence by itself, `seg_scan` or the reader joins the segments.

There are up to four families of states, two per direction, all by the same recurrence S ← 2^L S + (x ⊙ 2^e)ᵀ y:

    family     0 P   from the left      1 N   from the right     D dP   gradient of P      D+1 dN   gradient of N        D directions
    x, y       k, v                     k, v                     q, dn                      q, dn
    walks      to the right, e = L − ℓ  to the left, e = ℓ       to the left, e = ℓ         to the right, e = L − ℓ

What is stored for a chunk is the state on entering it from its segment's end, in the dtype of k; it is carried in float32. The part that
comes from beyond the segment is added by the reader (`entering`), faded by the decay between: no state is read only to be written again.

The delta rule makes each step depend on the one before. With X from `delta.wy`,

    P    u  = X (v − (k ⊙ 2^ℓ) P),              P  ← 2^L P + (k ⊙ 2^(L−ℓ))ᵀ u
    dP   du = (k ⊙ 2^(L−ℓ)) dP + scoresᵀ dn,    dP ← 2^L dP + (q ⊙ 2^ℓ)ᵀ dn − (k ⊙ 2^ℓ)ᵀ Xᵀ du

Both are linear in the state, so a segment is one matrix R [K K] and what it adds: P ← R P + P_own, dP ← Rᵀ dP + dP_own. R is the walk of P
from the identity with v = 0: K more columns of the same walk. What walks a segment again joins those before it (`joined`). For S segments
that is S²/2 reads of R in place of S, from the L2 cache, and no more products in a row than in a launch that does nothing else, in which
most of the chip would wait: by estimate not slower at the √(2 chunks) segments that there are at most.
"""

import triton
import triton.language as tl

from .delta import joined
from .gate import carried, carried_z, clock, dot, faded, fine, gates, load_total, read, scores, store_total, written
from .layout import first_row, gradient, locate, matrix, put, put_column, put_matrix, put_vector, row_factors, tile, tokens, vector


@triton.jit
def entering(states, fades, incoming, row, seg_row, k, v, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, SCANNED: tl.constexpr):
    """State on entering a chunk, in float32: the segment's own part, and the faded state from beyond the segment."""
    S = matrix(states, row, k, v, K, V).to(tl.float32)
    if SCANNED:
        S += carried(matrix(incoming, seg_row, k, v, K, V), load_total(fades, row, k, K, DECAY), DECAY)
    return S


@triton.jit
def entering_z(zs, fades, incoming_z, row, seg_row, k, K: tl.constexpr, DECAY: tl.constexpr, SCANNED: tl.constexpr):
    z = vector(zs, row, k, K)
    if SCANNED:
        z += carried_z(vector(incoming_z, seg_row, k, K), load_total(fades, row, k, K, DECAY), DECAY)
    return z


@triton.jit
def _walk(
    x, y, k, solution, writes, dwrites, o, d, dd, factor, scale, eps, g, initial, initial_z, dbkv, dbz, states, zs, fades, last, last_z,
    parts, parts_z, totals, turns, start, length, chunk, chunks, row, last_row, initial_row, part_row, turn_row, record_row, before, after,
    heads, h, iv, G, every,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
    LEAVING: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr, CLAMP: tl.constexpr, REVERSE: tl.constexpr, LEFTWARDS: tl.constexpr,
    GRAD: tl.constexpr, SCANNED: tl.constexpr, STARTS: tl.constexpr, RESUMED: tl.constexpr, STORED: tl.constexpr, ENDS: tl.constexpr,
    TURNS: tl.constexpr, RECORD: tl.constexpr, WRITES: tl.constexpr, PIPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment, one tile of V columns, by itself (SCANNED) or from `initial` (STARTS) on, (RESUMED) past the segments before.

    STORED: whether the state on entering each chunk is kept; ENDS: whether the one at the end of the walk, or (RESUMED) of the sequence is.
    TURNS: columns past V are those of R.
    """
    jk, jv = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    inside = (jk < K)[:, None] & (jv < V)[None, :]
    if TURNS:
        turned = jv - (V + BV - 1) // BV * BV
        S, z = tl.where(jk[:, None] == turned[None, :], 1.0, 0.0), tl.zeros([BK], tl.float32)
    elif SCANNED or not STARTS:
        S, z = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    else:
        S, z = matrix(initial, initial_row, jk, jv, K, V), vector(initial_z, initial_row, jk, K)
    if RESUMED:
        S, z = joined(
            S, z, parts, parts_z, totals, turns, part_row, turn_row, -heads if LEFTWARDS else heads, before, jk, jv, K, V, DECAY,
            NORMALIZE, LEFTWARDS, PRECISION,
        )  # fmt: skip
    if DELTA:
        du = tl.zeros([C, BV], tl.float32)
    if DECAY == "channel":
        past = tl.zeros([BK], tl.float32)
    else:
        past = 0.0
    for s in tl.range(0, chunks * G, num_stages=PIPE, disable_licm=True):  # the query heads of a group one after the other
        head, j = s % G + 0 * chunk, s // G  # a tensor, in the interpreter too
        c = chunk + (chunks - 1 - j if LEFTWARDS else j)
        first, step, live = tokens(start, length, c, C, REVERSE)
        b_x = tile(x, first, step, live, heads * G, h * G + head, jk, K)
        weight = tl.where(live, 1.0, 0.0)
        if GRAD:
            if not NORMALIZE:
                b_y = gradient(y, factor, scale, first, step, live, heads * G, h * G + head, jv, V, False)
            else:
                by, weight = row_factors(y, o, d, scale, eps, first, step, live, heads * G, h * G + head, V, BV, CLAMP)
                b_y = tile(y, first, step, live, heads * G, h * G + head, jv, V)
                b_y = (b_y * by[:, None]).to(b_y.dtype)
                if LEFTWARDS:  # dP, whatever else there is
                    put_column(factor, by, first, step, live & (iv == 0), heads * G, h * G + head)
                    put_column(dd, weight, first, step, live & (iv == 0), heads * G, h * G + head)
        else:
            b_y = tile(y, first, step, live, heads, h, jv, V)
        b_g = gates(g, first, step, live, heads, h, jk, K, DECAY)
        at = (row + c * heads).to(tl.int64)
        if STORED:
            tl.store(states + at * (K * V) + jk[:, None] * V + jv[None, :], S.to(states.dtype.element_ty), mask=inside & (head == 0))
            store_total(fades, past, at, jk, (head == 0) & (iv == 0), K, DECAY)
        ell, L = clock(b_g, LEAVING), tl.sum(b_g, 0)
        e = ell if LEFTWARDS else L - ell
        if DELTA:
            b_X = tile(solution, first, step, live, heads, h, tl.arange(0, C), C)
            if GRAD:
                b_k = tile(k, first, step, live, heads, h, jk, K)
                P = scores(b_k, b_x, ell, OWN, False, DECAY)
                du = tl.where(head == 0, read(b_k, S, L - ell, DECAY), du) + dot(P.to(b_y.dtype), b_y)
                if WRITES:
                    du += tl.where(head == 0, tile(dwrites, first, step, live, heads, h, jv, V), 0.0)
                if STORED:
                    put(writes, du, first, step, live & (head == G - 1), heads, h, jv, V)
            else:
                b_y = fine(b_X, b_y - read(b_x, S, ell, DECAY), b_y).to(b_y.dtype)
                if STORED:
                    put(writes, b_y, first, step, live, heads, h, jv, V)
        L = tl.where(head == 0, L, 0.0)
        if NORMALIZE:
            if STORED:
                tl.store(zs + at * K + jk, z, mask=(jk < K) & (head == 0) & (iv == 0))
            z = carried_z(z, L, DECAY) + tl.sum(faded(b_x, e, DECAY) * weight[:, None], 0)
        S = carried(S, L, DECAY) + written(b_x, b_y, e, DECAY)
        past += L
        if DELTA:
            if GRAD:
                S -= written(b_k, fine(tl.trans(b_X), tl.where(head == G - 1, du, 0.0), b_k), ell, DECAY)
        if RECORD:
            if GRAD:  # a recorded start hands its gradient to all that came before it
                recorded = (c % every == 0) & (head == G - 1)
                at = (record_row + c // every * heads).to(tl.int64)
                S += tl.load(dbkv + at * (K * V) + jk[:, None] * V + jv[None, :], mask=inside & recorded, other=0.0)
                if NORMALIZE:
                    z += tl.load(dbz + at * K + jk, mask=(jk < K) & recorded, other=0.0)
    if ENDS:
        if after == 0:
            put_matrix(last, S, last_row, jk, jv, K, V)
            if iv == 0:
                put_vector(last_z, z, last_row, jk, K)
                if SCANNED:
                    store_total(totals, past, last_row, jk, True, K, DECAY)
    if TURNS:
        at = turns + turn_row.to(tl.int64) * (K * K) + jk[:, None] * K + turned[None, :]
        tl.store(at, S, mask=(jk < K)[:, None] & ((turned >= 0) & (turned < K))[None, :])


@triton.jit(do_not_specialize=["N", "T", "H", "G", "family", "segments", "chunks", "every"])
def seg_state(
    q, k, v, do, solution, u, du, dwrites, o, d, dd, factor, g, kv, z, dkv, dz, dbkv, dbz, cu_seqlens, states, zs, fades, last, last_z,
    parts, parts_z, totals, turns, scale, eps, N, T, H, G, family, segments, chunks, every,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr,
    DELTA: tl.constexpr, LEAVING_LEFT: tl.constexpr, LEAVING_RIGHT: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr,
    CLAMP: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, GRAD: tl.constexpr, SCANNED: tl.constexpr, RECORD: tl.constexpr,
    WRITES: tl.constexpr, KEEP: tl.constexpr, RESUMED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, PIPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (families × V tiles, segments × H): the programs that read the same tokens are neighbours, and the second finds them in L2.

    `chunks` per segment, `segments` rows of them, `family`: the first one wanted. Forward only N is kept per chunk: P is `output`'s.
    KEEP: whether states on entering chunks are wanted at all, or only the sums of whole segments. STARTS, ENDS: whether the call has an
    initial state, and a last one (GRAD: and with them gradients of either). SCANNED: segments are walked by themselves, from zero; RESUMED:
    from what enters them, by the `parts`, `totals` and `turns` of such a walk. GRAD and NORMALIZE: `dd`, `factor` of every row are made.
    """
    TURNS: tl.constexpr = DELTA and not KEEP  # after the families' tiles come those of R
    D: tl.constexpr = 2 if BOTH else 1
    tiles: tl.constexpr = (V + BV - 1) // BV
    f, iv = family + tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if TURNS:
        beyond = tl.program_id(0) - (2 if GRAD else 1) * tiles
        f, iv = tl.where(beyond < 0, f, 0), tl.where(beyond < 0, iv, tiles + beyond)
    segment, h = tl.program_id(1) // H, tl.program_id(1) % H
    n, start, length, block = locate(segment, cu_seqlens, N, T, chunks * C, VARLEN)
    count = tl.minimum(chunks, tl.cdiv(length, C) - block * chunks)
    rows = tl.cdiv(T, C) * N
    if VARLEN:
        rows = T // C + N
    keeper = f if GRAD else f - 1
    row = (tl.maximum(keeper, 0) * rows + first_row(n, start, T, C, VARLEN)) * H + h
    part_row, turn_row = (f * segments + segment) * H + h, segment * H + h
    initial_row, last_row = ((f % D) * N + n) * H + h, part_row
    on_left, on_right = 0, 0  # how many segments of the sequence are there
    if RESUMED:
        last_row = (f * N + n) * H + h
        on_left, on_right = block, tl.maximum(tl.cdiv(length, chunks * C), 1) - 1 - block
    record_row = first_row(n, start, T, C * every, VARLEN) * H + h
    chunk = block * chunks
    if f == 0:
        _walk(
            k, v, k, solution, u, dwrites, o, d, dd, factor, scale, eps, g, kv, z, dbkv, dbz, states, zs, fades, last, last_z,
            parts, parts_z, totals, turns, start, length, chunk, count, row, last_row, initial_row, part_row, turn_row, record_row,
            on_left, on_right, H, h, iv, 1, every,
            K, V, BK, BV, C, DECAY, DELTA, LEAVING_LEFT, OWN, NORMALIZE, CLAMP, REVERSE, False, False,
            SCANNED, STARTS, RESUMED, GRAD and KEEP, SCANNED or (ENDS and not GRAD), TURNS, RECORD, WRITES, PIPE, PRECISION,
        )  # fmt: skip
    if BOTH:
        if f == 1:
            _walk(
                k, v, k, solution, u, dwrites, o, d, dd, factor, scale, eps, g, kv, z, dbkv, dbz, states, zs, fades, last, last_z,
                parts, parts_z, totals, turns, start, length, chunk, count, row, last_row, initial_row, part_row, turn_row, record_row,
                on_right, on_left, H, h, iv, 1, every,
                K, V, BK, BV, C, DECAY, DELTA, LEAVING_RIGHT, OWN, NORMALIZE, CLAMP, REVERSE, True, False,
                SCANNED, STARTS, RESUMED, KEEP, SCANNED or (ENDS and not GRAD), False, RECORD, WRITES, PIPE, PRECISION,
            )  # fmt: skip
    if GRAD:
        if f == D:
            _walk(
                q, do, k, solution, du, dwrites, o, d, dd, factor, scale, eps, g, dkv, dz, dbkv, dbz, states, zs, fades, last, last_z,
                parts, parts_z, totals, turns, start, length, chunk, count, row, last_row, initial_row, part_row, turn_row, record_row,
                on_right, on_left, H, h, iv, G, every,
                K, V, BK, BV, C, DECAY, DELTA, LEAVING_LEFT, OWN, NORMALIZE, CLAMP, REVERSE, True, True,
                SCANNED, ENDS, RESUMED, KEEP, SCANNED or STARTS, False, RECORD, WRITES, PIPE, PRECISION,
            )  # fmt: skip
        if BOTH:
            if f == D + 1:
                _walk(
                    q, do, k, solution, du, dwrites, o, d, dd, factor, scale, eps, g, dkv, dz, dbkv, dbz, states, zs, fades, last, last_z,
                    parts, parts_z, totals, turns, start, length, chunk, count, row, last_row, initial_row, part_row, turn_row, record_row,
                    on_left, on_right, H, h, iv, G, every,
                    K, V, BK, BV, C, DECAY, DELTA, LEAVING_RIGHT, OWN, NORMALIZE, CLAMP, REVERSE, False, True,
                    SCANNED, ENDS, RESUMED, KEEP, SCANNED or STARTS, False, RECORD, WRITES, PIPE, PRECISION,
                )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "H", "segments", "chunks"])
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
        total = load_total(totals, row, k, K, DECAY)
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

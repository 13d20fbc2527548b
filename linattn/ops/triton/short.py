"""`short`: sequences of at most `tiles.SHORT` tokens, without states, by the quadratic form: one launch forward, one or two backward.

    P_ij = M_ij (q_i · k_j)      n_i = scale · Σ_j P_ij v_j      d_i = scale · Σ_j P_ij      M_ij = 2^−|ℓ_i − ℓ_j|, from the right by r

A clock runs over the whole sequence, so what a gate's gradient sums up are rows and columns of one float32 matrix, Π = P ⊙ dP, and not
products of rounded tensors. dn, dd: gradients of numerator and row sum, made on loading from do and o.
"""

import triton
import triton.language as tl

from .gate import clock, dot, gates, unclock
from .layout import column, put, put_column, row_factors, tile, tokens


@triton.jit
def _clocks(g, start, T, block, before, h, H, C: tl.constexpr, DECAY: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Both clocks of a block of tokens, and the sum of gates up to its end; `before`: the sum up to its start."""
    first, step, live = tokens(start, T, block, C, False)
    b_g = gates(g, first, step, live, H, h, step, 1, DECAY)
    return before + clock(b_g, LEFT), before + clock(b_g, RIGHT), before + tl.sum(b_g, 0)


@triton.jit
def _before(g, start, T, block, h, H, C: tl.constexpr, DECAY: tl.constexpr):
    """The sum of gates up to the start of a block."""
    before = 0.0
    if DECAY != "none":
        for b in range(block):
            first, step, live = tokens(start, T, b, C, False)
            before += tl.sum(gates(g, first, step, live, H, h, step, 1, DECAY), 0)
    return before


@triton.jit
def _fades(i, j, left_i, left_j, right_i, right_j, KEYS: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr):
    """M [len(i), len(j)], with a query per row; KEYS: its transpose, with a key per row."""
    if KEYS:
        after = i[:, None] <= j[None, :]
    else:
        after = i[:, None] >= j[None, :]
    if DECAY == "none":
        M = tl.where(after, 1.0, 0.0 if CAUSAL else 1.0)
    elif CAUSAL:
        M = tl.where(after, tl.exp2(-tl.abs(left_i[:, None] - left_j[None, :])), 0.0)
    else:
        M = tl.exp2(-tl.abs(tl.where(after, left_i[:, None] - left_j[None, :], right_i[:, None] - right_j[None, :])))
    return M


@triton.jit(do_not_specialize=["T", "H", "G"])
def short(
    q, k, v, g, o, d, scale, eps, T, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DIVIDE: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of C queries of all sequences, query heads). LEFT, RIGHT: whether a token pays its gate on leaving, from either side."""
    blocks = tl.cdiv(T, C)
    n, block, hq = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    start, h, i = n.to(tl.int64) * T, hq // G, block * C + tl.arange(0, C)
    jk, jv = tl.arange(0, BK), tl.arange(0, BV)
    first, step, live = tokens(start, T, block, C, False)
    b_q = tile(q, first, step, live, H * G, hq, jk, K)
    left_i, right_i, _ = _clocks(g, start, T, block, _before(g, start, T, block, h, H, C, DECAY), h, H, C, DECAY, LEFT, RIGHT)
    out, rows = tl.zeros([C, BV], tl.float32), tl.zeros([C], tl.float32)
    before = 0.0
    for b in tl.range(0, block + 1 if CAUSAL else blocks, num_stages=PIPE, disable_licm=True):
        first_j, step_j, live_j = tokens(start, T, b, C, False)
        b_k = tile(k, first_j, step_j, live_j, H, h, jk, K)
        b_v = tile(v, first_j, step_j, live_j, H, h, jv, V)
        left_j, right_j, before = _clocks(g, start, T, b, before, h, H, C, DECAY, LEFT, RIGHT)
        P = dot(b_q, tl.trans(b_k)) * _fades(i, b * C + step_j, left_i, left_j, right_i, right_j, False, DECAY, CAUSAL)
        out += dot(P.to(b_v.dtype), b_v)
        if DIVIDE != "none":
            rows += tl.sum(P, 1)
    out *= scale
    if DIVIDE != "none":
        rows *= scale
        put_column(d, rows, first, step, live, H * G, hq)
        if DIVIDE == "sum":
            out = out / tl.where(live, rows + eps, 1.0)[:, None]
        else:
            out = out / tl.maximum(rows, eps)[:, None]
    put(o, out, first, step, live, H * G, hq, jv, V)


@triton.jit
def _gradients(do, o, d, scale, eps, first, step, live, heads, h, jv, V: tl.constexpr, DIVIDE: tl.constexpr):
    """dn [C BV] in the dtype of do, and dd [C]."""
    b_do = tile(do, first, step, live, heads, h, jv, V)
    if DIVIDE == "none":
        dn, dd = b_do * scale, tl.where(live, 0.0, 0.0)
    else:
        factor, dd = row_factors(do, o, d, scale, eps, first, step, live, heads, h, V, jv.shape[0], DIVIDE == "clamp")
        dn = b_do * factor[:, None]
    return dn.to(b_do.dtype), dd


@triton.jit(do_not_specialize=["T", "H", "G", "rows"])
def short_bwd(
    q, k, v, g, do, o, d, dq, dk, dv, sums, scale, eps, T, H, G, rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DIVIDE: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all sequences, query heads + H): dq of one query head, or dk and dv of one head.

    sums [2, rows, H (G + 1)]: what each program's tokens give to the gradients of both their clocks, sums of rows or columns of Π.
    """
    blocks = tl.cdiv(T, C)
    n, block, hq = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    start, i = n.to(tl.int64) * T, block * C + tl.arange(0, C)
    reads = hq < H * G
    h = tl.where(reads, hq // G, hq - H * G)
    jk, jv = tl.arange(0, BK), tl.arange(0, BV)
    first, step, live = tokens(start, T, block, C, False)
    past = _before(g, start, T, block, h, H, C, DECAY)
    left_i, right_i, _ = _clocks(g, start, T, block, past, h, H, C, DECAY, LEFT, RIGHT)
    before, after = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if reads:
        b_q = tile(q, first, step, live, H * G, hq, jk, K)
        dn, dd = _gradients(do, o, d, scale, eps, first, step, live, H * G, hq, jv, V, DIVIDE)
        acc, past = tl.zeros([C, BK], tl.float32), 0.0
        for b in tl.range(0, block + 1 if CAUSAL else blocks, num_stages=PIPE, disable_licm=True):
            first_j, step_j, live_j = tokens(start, T, b, C, False)
            b_k = tile(k, first_j, step_j, live_j, H, h, jk, K)
            b_v = tile(v, first_j, step_j, live_j, H, h, jv, V)
            left_j, right_j, past = _clocks(g, start, T, b, past, h, H, C, DECAY, LEFT, RIGHT)
            j = b * C + step_j
            dS = (dot(dn, tl.trans(b_v)) + dd[:, None]) * _fades(i, j, left_i, left_j, right_i, right_j, False, DECAY, CAUSAL)
            acc += dot(dS.to(b_k.dtype), b_k)
            if DECAY != "none":
                share = dS * dot(b_q, tl.trans(b_k))
                before += tl.sum(tl.where(i[:, None] > j[None, :], share, 0.0), 1)
                if not CAUSAL:
                    after += tl.sum(tl.where(i[:, None] < j[None, :], share, 0.0), 1)
        put(dq, acc, first, step, live, H * G, hq, jk, K)
        from_left, from_right = before, -after
    else:
        b_k = tile(k, first, step, live, H, h, jk, K)
        b_v = tile(v, first, step, live, H, h, jv, V)
        b_dk, b_dv = tl.zeros([C, BK], tl.float32), tl.zeros([C, BV], tl.float32)
        begin = block if CAUSAL else 0
        past_begin = past if CAUSAL else 0.0 * past
        for s in tl.range(0, (blocks - begin) * G, num_stages=PIPE, disable_licm=True):  # all queries of one head, then those of the next
            b, head = begin + s % (blocks - begin), h * G + s // (blocks - begin)
            first_j, step_j, live_j = tokens(start, T, b, C, False)
            b_q = tile(q, first_j, step_j, live_j, H * G, head, jk, K)
            dn, dd = _gradients(do, o, d, scale, eps, first_j, step_j, live_j, H * G, head, jv, V, DIVIDE)
            j = b * C + step_j
            left_j, right_j, past = _clocks(g, start, T, b, tl.where(b == begin, past_begin, past), h, H, C, DECAY, LEFT, RIGHT)
            M = _fades(i, j, left_i, left_j, right_i, right_j, True, DECAY, CAUSAL)
            S = dot(b_k, tl.trans(b_q)) * M
            b_dv += dot(S.to(dn.dtype), dn)
            dP = dot(b_v, tl.trans(dn)) + dd[None, :]
            b_dk += dot((dP * M).to(b_q.dtype), b_q)
            if DECAY != "none":
                share = S * dP
                after += tl.sum(tl.where(i[:, None] < j[None, :], share, 0.0), 1)
                if not CAUSAL:
                    before += tl.sum(tl.where(i[:, None] > j[None, :], share, 0.0), 1)
        put(dk, b_dk, first, step, live, H, h, jk, K)
        put(dv, b_dv, first, step, live, H, h, jv, V)
        from_left, from_right = -after, before
    if DECAY != "none":
        put_column(sums, from_left, first, step, live, H * (G + 1), hq)
        if not CAUSAL:
            put_column(sums + rows * H * (G + 1), from_right, first, step, live, H * (G + 1), hq)


@triton.jit(do_not_specialize=["T", "H", "G", "rows"])
def short_gates(
    sums, dg, T, H, G, rows,
    LONGEST: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, H): from gradients of the clocks to those of the gates, [tokens, H]."""
    n, h = tl.program_id(0), tl.program_id(1)
    start = n.to(tl.int64) * T
    first, step, live = tokens(start, T, 0, LONGEST, False)
    left = column(sums, first, step, live, H * (G + 1), H * G + h)
    for head in range(G):
        left += column(sums, first, step, live, H * (G + 1), h * G + head)
    b_dg = unclock(left, LEFT)
    if not CAUSAL:
        sums += rows * H * (G + 1)
        right = column(sums, first, step, live, H * (G + 1), H * G + h)
        for head in range(G):
            right += column(sums, first, step, live, H * (G + 1), h * G + head)
        b_dg += unclock(right, RIGHT)
    put_column(dg, b_dg, first, step, live, H, h)

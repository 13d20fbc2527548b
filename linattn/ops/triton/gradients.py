"""`bwd_dq` and `bwd_dkv`: the gradients of one chunk, given the states and gradient states on entering it; every chunk at once.

A clock is pulled up by what reads through it and down by what was written through it, and a chunk's total by what crosses the chunk:

    dℓ (from the left)    q·dq − k·dk          dL    2^L ⟨P, dP⟩ + Σ_j k_j·dk_j, of dk only what the state dP gave
    dℓ (from the right)   k·dk − q·dq          dL    2^L ⟨N, dN⟩ + Σ_i q_i·dq_i, of dq only what the state N gave

All sums stay inside the chunk; summed over the whole sequence instead, rounding errors of both terms pile up to percents.
"""

import triton
import triton.language as tl

from .delta import solved, solved_keys
from .gate import carried_z, clock, dot, faded, gates, per_gate, read, scores, scores_both, spread, unclock
from .layout import column, first_row, gradient, locate, matrix, put, put_column, tile, tokens, vector
from .state import entering, entering_z


@triton.jit(do_not_specialize=["N", "T", "H", "G", "segments", "chunks", "rows"])
def bwd_dq(
    q, k, v, do, dd, factor, g, states, zs, fades, incoming, incoming_z, cu_seqlens, dq, dg_rows, scale, N, T, H, G, segments, chunks, rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr,
    LEAVING_LEFT: tl.constexpr, LEAVING_RIGHT: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, SCANNED: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, query heads). dg_rows: the queries' share of the gate's gradient."""
    at, hq = tl.program_id(0), tl.program_id(1)
    h = hq // G
    n, start, length, c = locate(at, cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:  # a row that belongs to no sequence
        return
    segment = first_row(n, start, T, chunks * C, VARLEN) + c // chunks
    row, seg_row = at * H + h, segment * H + h
    right_row, right_seg = row + rows * H, seg_row + segments * H
    first, step, live = tokens(start, length, c, C, REVERSE)
    dP = tl.zeros([C, C], tl.float32)
    if NORMALIZE:
        b_dd = column(dd, first, step, live, H * G, hq)
        dP += b_dd[:, None]
    if TK < BK:
        for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
            jv = iv * BV + tl.arange(0, BV)
            dn = gradient(do, factor, scale, first, step, live, H * G, hq, jv, V, NORMALIZE)
            dP += dot(dn, tl.trans(tile(v, first, step, live, H, h, jv, V)))
    read_here = tl.zeros([C], tl.float32)
    for ik in tl.range(0, BK // TK, disable_licm=True):
        jk = ik * TK + tl.arange(0, TK)
        left, right = tl.zeros([C, TK], tl.float32), tl.zeros([C, TK], tl.float32)
        for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
            jv = iv * BV + tl.arange(0, BV)
            dn = gradient(do, factor, scale, first, step, live, H * G, hq, jv, V, NORMALIZE)
            if TK == BK:
                dP += dot(dn, tl.trans(tile(v, first, step, live, H, h, jv, V)))
            S = entering(states, fades, incoming, row, seg_row, jk, jv, K, V, DECAY, SCANNED)
            left += dot(dn, tl.trans(S.to(dn.dtype)))
            if BOTH:
                S = entering(states, fades, incoming, right_row, right_seg, jk, jv, K, V, DECAY, SCANNED)
                right += dot(dn, tl.trans(S.to(dn.dtype)))
        if NORMALIZE:
            left += b_dd[:, None] * entering_z(zs, fades, incoming_z, row, seg_row, jk, K, DECAY, SCANNED)[None, :]
            if BOTH:
                right += b_dd[:, None] * entering_z(zs, fades, incoming_z, right_row, right_seg, jk, K, DECAY, SCANNED)[None, :]
        b_g = gates(g, first, step, live, H, h, jk, K, DECAY)
        ell = clock(b_g, LEAVING_LEFT)
        b_k = tile(k, first, step, live, H, h, jk, K)
        left = faded(left, ell, DECAY) + spread(dP, b_k, ell, OWN, True, DECAY)
        b_q = tile(q, first, step, live, H * G, hq, jk, K)
        if DECAY != "none":
            dg = unclock(per_gate(b_q * left, DECAY), LEAVING_LEFT)
        if BOTH:
            r, L = clock(b_g, LEAVING_RIGHT), tl.sum(b_g, 0)
            right = faded(right, L - r, DECAY)
            if DECAY != "none":
                dg += tl.sum(per_gate(b_q * right, DECAY), 0)
            right += spread(dP, b_k, r, 0.0, False, DECAY)
            if DECAY != "none":
                dg -= unclock(per_gate(b_q * right, DECAY), LEAVING_RIGHT)
            left += right
        put(dq, left, first, step, live, H * G, hq, jk, K)
        if DECAY == "channel":
            put(dg_rows, dg, first, step, live, H * G, hq, jk, K)
        elif DECAY != "none":
            read_here += dg
    if DECAY != "none" and DECAY != "channel":
        put_column(dg_rows, read_here, first, step, live, H * G, hq)


@triton.jit(do_not_specialize=["N", "T", "H", "G", "segments", "chunks", "rows"])
def bwd_dkv(
    q, k, v, do, dd, factor, g, states, zs, fades, incoming, incoming_z, cu_seqlens, dg_rows, dwrites, v_given, beta, du, dq, dk, dv,
    dg, dbeta, scale, N, T, H, G, segments, chunks, rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr,
    LEAVING_LEFT: tl.constexpr, LEAVING_RIGHT: tl.constexpr, OWN: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, SCANNED: tl.constexpr, WRITES: tl.constexpr, DELTA: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, H, dk and dv). DELTA: dq too; v is u, its gradient du is there, and goes on to v and beta."""
    at, h = tl.program_id(0), tl.program_id(1)
    n, start, length, c = locate(at, cu_seqlens, N, T, C, VARLEN)
    if c * C >= length:
        return
    segment = first_row(n, start, T, chunks * C, VARLEN) + c // chunks
    D: tl.constexpr = 2 if BOTH else 1
    p_row, p_seg, family, seg_family = at * H + h, segment * H + h, rows * H, segments * H
    dp_row, dp_seg = p_row + D * family, p_seg + D * seg_family
    dn_row, dn_seg = p_row + 3 * family, p_seg + 3 * seg_family
    first, step, live = tokens(start, length, c, C, REVERSE)
    FINE: tl.constexpr = BK <= 64  # of wider heads the operands do not fit the registers
    if DECAY != "channel":
        b_g = gates(g, first, step, live, H, h, step, K, DECAY)
        ell, r, L = clock(b_g, LEAVING_LEFT), clock(b_g, LEAVING_RIGHT), tl.sum(b_g, 0)
    if tl.program_id(2) == 1:
        if not DELTA:
            for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
                jv = iv * BV + tl.arange(0, BV)
                acc = tl.zeros([C, BV], tl.float32)
                for ik in tl.range(0, BK // TK, disable_licm=True):
                    jk = ik * TK + tl.arange(0, TK)
                    b_k = tile(k, first, step, live, H, h, jk, K)
                    if DECAY == "channel":
                        b_g = gates(g, first, step, live, H, h, jk, K, DECAY)
                        ell, r, L = clock(b_g, LEAVING_LEFT), clock(b_g, LEAVING_RIGHT), tl.sum(b_g, 0)
                    dS = entering(states, fades, incoming, dp_row, dp_seg, jk, jv, K, V, DECAY, SCANNED)
                    acc += read(b_k, dS, L - ell, DECAY)
                    if BOTH:
                        dS = entering(states, fades, incoming, dn_row, dn_seg, jk, jv, K, V, DECAY, SCANNED)
                        acc += read(b_k, dS, r, DECAY)
                for head in tl.range(0, G, disable_licm=True):
                    P = tl.zeros([C, C], tl.float32)
                    for ik in tl.range(0, BK // TK, disable_licm=True):
                        jk = ik * TK + tl.arange(0, TK)
                        b_k = tile(k, first, step, live, H, h, jk, K)
                        b_q = tile(q, first, step, live, H * G, h * G + head, jk, K)
                        if DECAY == "channel":
                            b_g = gates(g, first, step, live, H, h, jk, K, DECAY)
                            ell, r = clock(b_g, LEAVING_LEFT), clock(b_g, LEAVING_RIGHT)
                        if BOTH:
                            P += scores_both(b_k, b_q, ell, r, False, DECAY)
                        else:
                            P += scores(b_k, b_q, ell, OWN, False, DECAY)
                    dn = gradient(do, factor, scale, first, step, live, H * G, h * G + head, jv, V, NORMALIZE)
                    acc += dot(P.to(dn.dtype), dn)
                if WRITES:
                    acc += tile(dwrites, first, step, live, H, h, jv, V)
                put(dv, acc, first, step, live, H, h, jv, V)
    else:
        gate = tl.where(live, 0.0, 0.0)
        if DELTA:
            X, dA = solved(
                k, g, v_given, beta, v, du, states, dv, dbeta, p_row, first, step, live, H, h, K, V, BK, BV, C, DECAY, LEAVING_LEFT, TK,
                FINE,
            )  # fmt: skip
        elif DECAY != "channel" and DECAY != "none":
            for head in tl.range(0, G, disable_licm=True):
                gate += column(dg_rows, first, step, live, H * G, h * G + head)
        for ik in tl.range(0, BK // TK, disable_licm=True):
            jk = ik * TK + tl.arange(0, TK)
            left, right = tl.zeros([C, TK], tl.float32), tl.zeros([C, TK], tl.float32)
            crossing = tl.zeros([TK], tl.float32)  # ⟨P, dP⟩ + ⟨N, dN⟩ per channel
            for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
                jv = iv * BV + tl.arange(0, BV)
                b_v = tile(v, first, step, live, H, h, jv, V)
                dS = entering(states, fades, incoming, dp_row, dp_seg, jk, jv, K, V, DECAY, SCANNED)
                left += dot(b_v, tl.trans(dS.to(b_v.dtype)))
                if DECAY != "none":
                    crossing += tl.sum(dS * entering(states, fades, incoming, p_row, p_seg, jk, jv, K, V, DECAY, SCANNED), 1)
                if BOTH:
                    dS = entering(states, fades, incoming, dn_row, dn_seg, jk, jv, K, V, DECAY, SCANNED)
                    right += dot(b_v, tl.trans(dS.to(b_v.dtype)))
                    if DECAY != "none":
                        S = entering(states, fades, incoming, p_row + family, p_seg + seg_family, jk, jv, K, V, DECAY, SCANNED)
                        crossing += tl.sum(dS * S, 1)
            if NORMALIZE:
                dz = entering_z(zs, fades, incoming_z, dp_row, dp_seg, jk, K, DECAY, SCANNED)
                left += tl.where(live, 1.0, 0.0)[:, None] * dz[None, :]
                if DECAY != "none":
                    crossing += dz * entering_z(zs, fades, incoming_z, p_row, p_seg, jk, K, DECAY, SCANNED)
                if BOTH:
                    dz = entering_z(zs, fades, incoming_z, dn_row, dn_seg, jk, K, DECAY, SCANNED)
                    right += tl.where(live, 1.0, 0.0)[:, None] * dz[None, :]
                    if DECAY != "none":
                        crossing += dz * entering_z(zs, fades, incoming_z, p_row + family, p_seg + seg_family, jk, K, DECAY, SCANNED)
            b_k = tile(k, first, step, live, H, h, jk, K)
            if DECAY == "channel":
                b_g = gates(g, first, step, live, H, h, jk, K, DECAY)
                ell, r, L = clock(b_g, LEAVING_LEFT), clock(b_g, LEAVING_RIGHT), tl.sum(b_g, 0)
            left = faded(left, L - ell, DECAY)
            if DECAY == "channel":
                b_dg = tl.sum(b_k * left, 0)[None, :] + tl.where(live, 1.0, 0.0)[:, None] * carried_z(crossing, L, DECAY)[None, :]
            elif DECAY != "none":
                b_dg = tl.sum(tl.sum(b_k * left, 0), 0) + tl.where(live, 1.0, 0.0) * (tl.sum(crossing, 0) * tl.exp2(L))
            if BOTH:
                right = faded(right, r, DECAY)
            for head in tl.range(0, G, disable_licm=True):
                b_q = tile(q, first, step, live, H * G, h * G + head, jk, K)
                dP = tl.zeros([C, C], tl.float32)
                if DELTA:
                    b_dq = tl.zeros([C, TK], tl.float32)
                for iv in tl.range(0, (V + BV - 1) // BV, disable_licm=True):
                    jv = iv * BV + tl.arange(0, BV)
                    dn = gradient(do, factor, scale, first, step, live, H * G, h * G + head, jv, V, NORMALIZE)
                    dP += dot(tile(v, first, step, live, H, h, jv, V), tl.trans(dn))
                    if DELTA:
                        b_dq += dot(dn, tl.trans(matrix(states, p_row, jk, jv, K, V).to(dn.dtype)))
                if NORMALIZE:
                    b_dd = column(dd, first, step, live, H * G, h * G + head)
                    dP += b_dd[None, :]
                    if DELTA:
                        b_dq += b_dd[:, None] * vector(zs, p_row, jk, K)[None, :]
                left += spread(dP, b_q, ell, OWN, False, DECAY)
                if BOTH:
                    right += spread(dP, b_q, r, 0.0, True, DECAY)
                if DELTA:
                    b_dq = faded(b_dq, ell, DECAY) + spread(tl.trans(dP), b_k, ell, OWN, True, DECAY)
                    put(dq, b_dq, first, step, live, H * G, h * G + head, jk, K)
                    if DECAY != "none":
                        b_dg += unclock(per_gate(b_q * b_dq, DECAY), LEAVING_LEFT)
                elif DECAY == "channel":
                    b_dg += tile(dg_rows, first, step, live, H * G, h * G + head, jk, K)
            if DELTA:
                read_with, as_key = solved_keys(
                    X, dA, beta, du, states, p_row, first, step, live, H, h, b_k, ell, jk, K, V, BV, FINE, DECAY
                )
                left += as_key
                if DECAY != "none":
                    b_dg += unclock(per_gate(b_k * read_with, DECAY), LEAVING_LEFT)
            if DECAY != "none":
                b_dg -= unclock(per_gate(b_k * left, DECAY), LEAVING_LEFT)
                if BOTH:
                    b_dg += unclock(per_gate(b_k * right, DECAY), LEAVING_RIGHT)
                if DECAY == "channel":
                    put(dg, b_dg, first, step, live, H, h, jk, K)
                else:
                    gate += b_dg
            if BOTH:
                left += right
            if DELTA:
                left += read_with
            put(dk, left, first, step, live, H, h, jk, K)
        if DECAY != "channel" and DECAY != "none":
            put_column(dg, gate, first, step, live, H, h)

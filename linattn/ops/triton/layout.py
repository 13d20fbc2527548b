"""The only Triton file that knows where a token, a chunk and a state lie in memory.

A block is SPAN consecutive tokens of one sequence. Blocks are numbered without a table: in a dense batch sequence n owns ⌈T / SPAN⌉ rows,
in a packed one its rows begin at ⌊start / SPAN⌋ + n, which never overlaps the next sequence's. So no host ever reads `cu_seqlens`; the few
rows that belong to no sequence lie past the end of the one they are counted to.
"""

import triton
import triton.language as tl


@triton.jit
def locate(row, cu_seqlens, N, T, SPAN, VARLEN: tl.constexpr):
    """Block `row` → its sequence, that one's first token and length, and the block's number in it."""
    if VARLEN:
        low, high = row * 0, row * 0 + N - 1
        while low < high:  # the last sequence whose rows begin at or before this one
            middle = (low + high + 1) // 2
            begin = tl.load(cu_seqlens + middle).to(tl.int32) // SPAN + middle
            low = tl.where(begin <= row, middle, low)
            high = tl.where(begin <= row, high, middle - 1)
        n = low
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - start.to(tl.int32)
        block = row - (start.to(tl.int32) // SPAN + n)
    else:
        n = row // tl.cdiv(T, SPAN)
        start = n.to(tl.int64) * T
        length = T + row * 0
        block = row % tl.cdiv(T, SPAN)
    return n, start, length, block


@triton.jit
def first_row(n, start, T, SPAN, VARLEN: tl.constexpr):
    """Row of the first block of sequence n."""
    if VARLEN:
        row = start.to(tl.int32) // SPAN + n
    else:
        row = n * tl.cdiv(T, SPAN)
    return row


@triton.jit
def tokens(start, length, c, C: tl.constexpr, REVERSE: tl.constexpr):
    """Chunk c of a sequence → address of its first token, signed steps from there [C], which of them exist [C]."""
    i = tl.arange(0, C)
    live = c * C + i < length
    if REVERSE:  # the scan reads time backwards
        first, step = start + (length - 1 - c * C), -i
    else:
        first, step = start + c * C, i
    return first, step, live


@triton.jit
def tile(ptr, first, step, live, heads, h, d, D: tl.constexpr):
    """Rows [C] and columns d of a [tokens, heads, D] tensor; zeros outside."""
    at = ptr + (first * heads + h) * D + step[:, None] * (heads * D) + d[None, :]
    return tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put(ptr, x, first, step, live, heads, h, d, D: tl.constexpr):
    at = ptr + (first * heads + h) * D + step[:, None] * (heads * D) + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def gradient(do, factor, scale, first, step, live, heads, h, v, V: tl.constexpr, NORMALIZE: tl.constexpr):
    """Rows of dn: those of do, times the row's own factor where the call is normalised, times `scale` where it is not."""
    x = tile(do, first, step, live, heads, h, v, V)
    if NORMALIZE:
        dn = x * column(factor, first, step, live, heads, h)[:, None]
    else:
        dn = x * scale
    return dn.to(x.dtype)


@triton.jit
def row_factors(do, o, d, scale, eps, first, step, live, heads, h, V: tl.constexpr, BV: tl.constexpr, CLAMP: tl.constexpr):
    """Of rows divided by their sum: factor [C], with dn = factor · do, and dd [C], the gradient of the sum."""
    rows = tl.where(live, column(d, first, step, live, heads, h), 1.0)
    if CLAMP:
        factor, kept = scale / tl.maximum(rows, eps), rows > eps
    else:
        factor, kept = scale / (rows + eps), live
    dot_o = tl.where(live, 0.0, 0.0)
    for iv in tl.static_range((V + BV - 1) // BV):
        v = iv * BV + tl.arange(0, BV)
        dot_o += tl.sum(tile(do, first, step, live, heads, h, v, V).to(tl.float32) * tile(o, first, step, live, heads, h, v, V), 1)
    return factor, tl.where(kept, -factor * dot_o, 0.0)


@triton.jit
def column(ptr, first, step, live, heads, h):
    """One number per token [C] of a [tokens, heads] tensor."""
    return tl.load(ptr + first * heads + h + step * heads, mask=live, other=0.0)


@triton.jit
def put_column(ptr, x, first, step, live, heads, h):
    tl.store(ptr + first * heads + h + step * heads, x, mask=live)


@triton.jit
def matrix(ptr, row, k, v, K: tl.constexpr, V: tl.constexpr):
    """Rows k, columns v of the `row`-th state of [rows, K, V]."""
    at = ptr + row.to(tl.int64) * (K * V) + k[:, None] * V + v[None, :]
    return tl.load(at, mask=(k < K)[:, None] & (v < V)[None, :], other=0.0)


@triton.jit
def put_matrix(ptr, x, row, k, v, K: tl.constexpr, V: tl.constexpr):
    at = ptr + row.to(tl.int64) * (K * V) + k[:, None] * V + v[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(k < K)[:, None] & (v < V)[None, :])


@triton.jit
def vector(ptr, row, k, K: tl.constexpr):
    return tl.load(ptr + row.to(tl.int64) * K + k, mask=k < K, other=0.0)


@triton.jit
def put_vector(ptr, x, row, k, K: tl.constexpr):
    tl.store(ptr + row.to(tl.int64) * K + k, x, mask=k < K)

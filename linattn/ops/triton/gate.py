"""The only Triton file that knows the decay kinds: none, head, scalar, channel.

Gates are taken to base 2 on loading. A clock ℓ is the running sum of gates inside a chunk, [C], or [C K] for a channel decay; every
exponent formed is ≤ 0. A channel decay cannot be pulled out of a product of two tiles as one factor per pair: `scores` and `spread` split
the chunk in halves, the halves in halves, and so on: two tokens meet at the one level where a border lies between them, both faded to it.

Loops that fade are `disable_licm`: masks and fades hoisted out of a loop hold registers all through it, and made some kernels spill.
"""

import triton
import triton.language as tl

from .layout import column, put, put_column, tile, vector

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def gates(ptr, first, step, live, heads, h, k, K: tl.constexpr, DECAY: tl.constexpr):
    """Base-2 log decay of a chunk, zero past the end: [C], or [C K]."""
    if DECAY == "channel":
        at = ptr + (first * heads + h) * K + step[:, None] * (heads * K) + k[None, :]
        g = tl.load(at, mask=live[:, None] & (k < K)[None, :], other=0.0) * LOG2E
    elif DECAY == "scalar":
        g = tl.load(ptr + first * heads + h + step * heads, mask=live, other=0.0) * LOG2E
    elif DECAY == "head":
        g = tl.where(live, tl.load(ptr + h), 0.0) * LOG2E
    else:
        g = tl.where(live, 0.0, 0.0)
    return g


@triton.jit
def clock(g, LEAVING: tl.constexpr):
    """ℓ: inclusive, or exclusive where a token pays its gate on leaving."""
    if LEAVING:
        ell = tl.cumsum(g, 0) - g
    else:
        ell = tl.cumsum(g, 0)
    return ell


@triton.jit
def unclock(dl, LEAVING: tl.constexpr):
    """Gradient of `clock` to g."""
    if LEAVING:
        dg = tl.cumsum(dl, 0, reverse=True) - dl
    else:
        dg = tl.cumsum(dl, 0, reverse=True)
    return dg


@triton.jit
def per_gate(x, DECAY: tl.constexpr):
    """[C K] → what one gate governs: [C K] for a channel decay, else its row sums [C]."""
    if DECAY == "channel":
        y = x
    else:
        y = tl.sum(x, 1)
    return y


@triton.jit
def put_gates(dg, x, first, step, live, heads, h, k, K: tl.constexpr, DECAY: tl.constexpr):
    if DECAY == "channel":
        put(dg, x, first, step, live, heads, h, k, K)
    else:
        put_column(dg, x, first, step, live, heads, h)


@triton.jit
def load_gates(dg, first, step, live, heads, h, k, K: tl.constexpr, DECAY: tl.constexpr):
    if DECAY == "channel":
        x = tile(dg, first, step, live, heads, h, k, K)
    else:
        x = column(dg, first, step, live, heads, h)
    return x


@triton.jit
def load_total(totals, row, k, K: tl.constexpr, DECAY: tl.constexpr):
    """Decay over a stretch: a number, or [K]."""
    if DECAY == "channel":
        total = vector(totals, row, k, K)
    elif DECAY == "none":
        total = 0.0
    else:
        total = tl.load(totals + row)
    return total


@triton.jit
def store_total(totals, total, row, k, here, K: tl.constexpr, DECAY: tl.constexpr):
    if DECAY == "channel":
        tl.store(totals + row.to(tl.int64) * K + k, total, mask=(k < K) & here)
    elif DECAY != "none":
        tl.store(totals + row, total, mask=here)


@triton.jit
def faded(x, e, DECAY: tl.constexpr):
    """x [C ·] ⊙ 2^e, float32 where there is a decay; a channel decay needs · = K."""
    if DECAY == "channel":
        y = x * tl.exp2(e)
    elif DECAY == "none":
        y = x
    else:
        y = x * tl.exp2(e)[:, None]
    return y


@triton.jit
def carried(S, total, DECAY: tl.constexpr):
    """The state [K V] over a stretch of decay `total`: a number, or [K]."""
    if DECAY == "channel":
        S = S * tl.exp2(total)[:, None]
    elif DECAY != "none":
        S = S * tl.exp2(total)
    return S


@triton.jit
def carried_z(z, total, DECAY: tl.constexpr):
    if DECAY != "none":
        z = z * tl.exp2(total)
    return z


@triton.jit
def read(x, S, e, DECAY: tl.constexpr):
    """(x ⊙ 2^e) S: rows x [C K] read the state."""
    if DECAY == "channel":
        y = dot(faded(x, e, DECAY).to(x.dtype), S.to(x.dtype))
    else:
        y = faded(dot(x, S.to(x.dtype)), e, DECAY)
    return y


@triton.jit
def read_z(x, z, e, DECAY: tl.constexpr):
    """(x ⊙ 2^e) z: what rows x [C K] read of the normaliser."""
    if DECAY == "channel":
        y = tl.sum(faded(x, e, DECAY) * z[None, :], 1)
    else:
        y = tl.sum(x * z[None, :], 1)
        if DECAY != "none":
            y *= tl.exp2(e)
    return y


@triton.jit
def written(x, y, e, DECAY: tl.constexpr):
    """(x ⊙ 2^e)ᵀ y: what rows x [C K] and y [C V] leave in the state. The rows of y are faded where they can be: x then stays as loaded."""
    if DECAY == "channel":
        S = dot(tl.trans(faded(x, e, DECAY).to(x.dtype)), y.to(x.dtype))
    else:
        S = dot(tl.trans(x), faded(y, e, DECAY).to(x.dtype))
    return S


@triton.jit
def scores(x, y, ell, OWN: tl.constexpr, LATER: tl.constexpr, DECAY: tl.constexpr):
    """[C C]: product of row i of x and row j of y, faded by 2^−|ℓ_i − ℓ_j|, where i is after j (LATER) or before; OWN times it at i = j."""
    if DECAY == "channel":
        C: tl.constexpr = x.shape[0]
        i = tl.arange(0, C)
        P = tl.where(i[:, None] == i[None, :], OWN * tl.sum(x.to(tl.float32) * y, 1)[:, None], 0.0)
        for level in tl.static_range(7):
            if 2 ** (level + 1) <= C:
                a, b = _half(x, ell, level, LATER), _half(y, ell, level, not LATER)
                P += tl.where(_meets(C, level), dot(a, tl.trans(b)), 0.0)
    else:
        P = dot(x, tl.trans(y)) * _fade(ell, OWN, LATER, DECAY)
    return P


@triton.jit
def scores_both(x, y, ell, r, LATER: tl.constexpr, DECAY: tl.constexpr):
    """Scores from both sides, a token's own once: by clock ℓ where row i is on the LATER side of j (or the earlier one), by r elsewhere."""
    if DECAY == "channel":
        P = scores(x, y, ell, 1.0, LATER, DECAY) + scores(x, y, r, 0.0, not LATER, DECAY)
    elif DECAY == "none":
        P = dot(x, tl.trans(y))
    else:
        i = tl.arange(0, ell.shape[0])
        if LATER:
            left = i[:, None] > i[None, :]
        else:
            left = i[:, None] < i[None, :]
        P = dot(x, tl.trans(y)) * tl.exp2(-tl.abs(tl.where(left, ell[:, None] - ell[None, :], r[:, None] - r[None, :])))
    return P


@triton.jit
def spread(dP, y, ell, OWN: tl.constexpr, LATER: tl.constexpr, DECAY: tl.constexpr, FINE: tl.constexpr = False):
    """Gradient of `scores` to x [C K], from dP [C C] and y. FINE: dP is not rounded to the dtype of y."""
    if DECAY == "channel":
        C: tl.constexpr = y.shape[0]
        i = tl.arange(0, C)
        dx = OWN * tl.sum(tl.where(i[:, None] == i[None, :], dP, 0.0), 1)[:, None] * y
        for level in tl.static_range(7):
            if 2 ** (level + 1) <= C:
                met = tl.where(_meets(C, level), dP, 0.0)
                dx += _half(product(met, _half(y, ell, level, not LATER), FINE), ell, level, LATER)
    else:
        dx = product(dP * _fade(ell, OWN, LATER, DECAY), y, FINE)
    return dx


@triton.jit
def product(a, y, FINE: tl.constexpr):
    """a y, of a float32 a that is rounded to the dtype of y, or (FINE) is not."""
    if FINE:
        x = fine(a, y.to(tl.float32), y)
    else:
        x = dot(a.to(y.dtype), y)
    return x


@triton.jit
def _fade(ell, OWN: tl.constexpr, LATER: tl.constexpr, DECAY: tl.constexpr):
    C: tl.constexpr = ell.shape[0]
    i = tl.arange(0, C)
    if LATER:
        see = i[:, None] > i[None, :]
    else:
        see = i[:, None] < i[None, :]
    if DECAY == "none":
        fade = tl.where(see, 1.0, 0.0)
    else:
        fade = tl.where(see, tl.exp2(-tl.abs(ell[:, None] - ell[None, :])), 0.0)
    return fade + tl.where(i[:, None] == i[None, :], OWN, 0.0)


@triton.jit
def _half(x, ell, level: tl.constexpr, LATER: tl.constexpr):
    """Rows of x in the later (or earlier) half of their block of 2^(level + 1), faded to the border between the halves; zeros elsewhere."""
    C: tl.constexpr = x.shape[0]
    i = tl.arange(0, C)
    border = (i >> (level + 1) << (level + 1)) + (2**level - 1)
    at_border = tl.gather(ell, tl.broadcast_to(border[:, None], ell.shape), 0)
    here = ((i >> level) & 1) == (1 if LATER else 0)
    return tl.where(here[:, None], x * tl.exp2(-tl.abs(ell - at_border)), 0.0).to(x.dtype)


@triton.jit
def _meets(C: tl.constexpr, level: tl.constexpr):
    """Pairs inside one block of 2^(level + 1)."""
    block = tl.arange(0, C) >> (level + 1)
    return block[:, None] == block[None, :]


@triton.jit
def fine(a, b, like):
    """Product of float32 operands in a call of dtype `like`: in a half type they may be rounded to tensor-float, which is finer."""
    return tl.dot(a, b, input_precision="ieee" if like.dtype == tl.float32 else "tf32")


@triton.jit
def dot(a, b):
    """float32 stays float32: no tensor-float rounding. Operands of a half type accumulate in float32."""
    return tl.dot(a, b, input_precision="ieee")

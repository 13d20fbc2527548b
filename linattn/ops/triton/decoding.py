"""`step`: one token per sequence, the state read once and written once."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["H", "G"])
def step(
    q, k, v, g, beta, kv, z, o, kv_out, z_out, scale, eps, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Grid (V tiles, B × H): every query head of the group reads the state while it is in registers."""
    iv, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    jk, jv = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    ink, inv = jk < K, jv < V
    inside = ink[:, None] & inv[None, :]
    at = bh * (K * V) + jk[:, None] * V + jv[None, :]
    S = tl.load(kv + at, mask=inside, other=0.0)
    b_k = tl.load(k + bh * K + jk, mask=ink, other=0.0).to(tl.float32)
    u = tl.load(v + bh * V + jv, mask=inv, other=0.0).to(tl.float32)
    if DECAY == "head":
        a = tl.exp(tl.load(g + bh % H)) + tl.zeros([BK], tl.float32)
    elif DECAY == "scalar":
        a = tl.exp(tl.load(g + bh)) + tl.zeros([BK], tl.float32)
    elif DECAY == "channel":
        a = tl.exp(tl.load(g + bh * K + jk, mask=ink, other=0.0))
    else:
        a = tl.full([BK], 1.0, tl.float32)
    S *= a[:, None]
    if DELTA:
        u = tl.load(beta + bh) * (u - tl.sum(S * b_k[:, None], 0))
    S += b_k[:, None] * u[None, :]
    tl.store(kv_out + at, S, mask=inside)
    if DIVIDE != "none":
        b_z = a * tl.load(z + bh * K + jk, mask=ink, other=0.0) + b_k
        if iv == 0:
            tl.store(z_out + bh * K + jk, b_z, mask=ink)
    for head in range(G):
        row = bh * G + head
        b_q = tl.load(q + row * K + jk, mask=ink, other=0.0).to(tl.float32)
        out = scale * tl.sum(S * b_q[:, None], 0)
        if DIVIDE == "sum":
            out /= scale * tl.sum(b_z * b_q, 0) + eps
        elif DIVIDE == "clamp":
            out /= tl.maximum(scale * tl.sum(b_z * b_q, 0), eps)
        tl.store(o + row * V + jv, out.to(o.dtype.element_ty), mask=inv)

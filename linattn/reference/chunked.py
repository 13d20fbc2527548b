"""The one chunk skeleton, forward and hand-written backward, one direction at a time: the text every kernel is read against.

    forward    gate → write → emit → carry             backward    carry → emit → write → gate

A chunk keeps a clock ℓ per token, the running sum of log decay inside the chunk, and its total L. Entering a token costs its gate
(ℓ inclusive) or leaving it does (`leaving`: ℓ exclusive). Then, with S the state before the chunk and every exponent ≤ 0:

    seen     a token sees the state before the chunk faded by e^ℓ_i, an earlier token j faded by e^(ℓ_i − ℓ_j)
    kept     what token j wrote reaches the end of the chunk faded by e^(L − ℓ_j), the old state by e^L

Only `fade`, `scores`, `scores_backward` and `clock` know the decay kinds; a decay is [B T H 1] or [B T H K] here.
The numerator n and the normaliser's row sum d leave separately; the caller divides. Layout inside: head first, [B H G C ·] for queries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunk(NamedTuple):
    """One chunk, head first."""

    q: Tensor  # [B H G C K]
    k: Tensor  # [B H C K]
    v: Tensor  # [B H C V]
    beta: Tensor | None  # [B H C 1]
    clock: Tensor  # ℓ [B H C 1|K]
    total: Tensor  # L [B H 1 1|K]


# -- gate -------------------------------------------------------------------------------------------------------------------------------


LEAST = -104.0  # exp gives 0 in float32; a log decay of -inf itself would make a difference of clocks NaN


def clock(g: Tensor, leaving: bool) -> tuple[Tensor, Tensor]:
    """ℓ and L. L is the last sum itself, not a second sum: they meet in e^(L − ℓ), and rounding grows with the decay."""
    total = g.clamp(min=LEAST).cumsum(2)
    return F.pad(total, (0, 0, 1, -1)) if leaving else total, total[:, :, -1:]


def fade(clock: Tensor) -> Tensor:
    """e^(ℓ_i − ℓ_j) for i ≥ j: [B H C C 1|K]. Clamped, because the masked half would overflow."""
    return (clock[:, :, :, None] - clock[:, :, None]).clamp(max=0).exp()


def scores(x: Tensor, k: Tensor, clock: Tensor) -> Tensor:
    """How much token i, reading with x [B H G C K], sees of key j: [B H G C C]."""
    if clock.shape[-1] == 1:
        return (x @ k.mT[:, :, None]) * fade(clock)[:, :, None, ..., 0]
    return torch.einsum("bhgik,bhjk,bhijk->bhgij", x, k, fade(clock))


def scores_backward(dP: Tensor, x: Tensor, k: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `scores` to x [B H G C K] and k [B H C K]."""
    E = fade(clock)
    if clock.shape[-1] == 1:
        dP = dP * E[:, :, None, ..., 0]
        return dP @ k[:, :, None], (dP.mT @ x).sum(2)
    return torch.einsum("bhgij,bhjk,bhijk->bhgik", dP, k, E), torch.einsum("bhgij,bhgik,bhijk->bhjk", dP, x, E)


# -- the skeleton -----------------------------------------------------------------------------------------------------------------------


def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, leaving: bool, C: int) -> list[Chunk]:
    """Cut [B T · ·] into chunks of C; a tail of zeros neither writes nor fades."""
    pad = -k.shape[1] % C
    cut = lambda x: [] if x.shape[1] == 0 else F.pad(x, (0, 0, 0, 0, 0, pad)).transpose(1, 2).split(C, 2)
    qs = [x.unflatten(1, (k.shape[2], -1)) for x in cut(q)]
    betas = [None] * len(qs) if beta is None else cut(beta[..., None])
    return [
        Chunk(q_c, k_c, v_c, b_c, *clock(g_c, leaving)) for q_c, k_c, v_c, b_c, g_c in zip(qs, cut(k), cut(v), betas, cut(g), strict=True)
    ]


def write(c: Chunk, S: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What each token adds: v itself, or (delta rule) beta times the part of v the state does not hold: a unit lower triangular solve."""
    if c.beta is None:
        return c.v, None, None
    A = scores(c.k[:, :, None], c.k, c.clock)[:, :, 0].tril(-1)
    M = c.beta * A + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    r = c.beta * (c.v - (c.k * c.clock.exp()) @ S)
    return torch.linalg.solve_triangular(M, r, upper=False, unitriangular=True), A, M


def see(P: Tensor, own: float) -> Tensor:
    """Causal mask [C C] applied to scores, the token's own with weight `own`."""
    return P.tril(-1) + own * torch.diag_embed(P.diagonal(dim1=-2, dim2=-1))


def forward(q, k, v, g, beta, S, z, *, leaving: bool, own: float, C: int):
    """→ n [B T HQ V], d [B T HQ], S, z after the last token, starts: the states (S, z) before each chunk, writes u [B T H V]."""
    T = k.shape[1]
    n, d, u_all, starts = [], [], [], []
    for c in chunks(q, k, v, g, beta, leaving, C):
        starts.append((S, z))
        q_seen = c.q * c.clock.exp()[:, :, None]
        k_kept = c.k * (c.total - c.clock).exp()
        u, _, _ = write(c, S)  # write
        P = see(scores(c.q, c.k, c.clock), own)
        n.append(q_seen @ S[:, :, None] + P @ u[:, :, None])  # emit
        d.append((q_seen * z[:, :, None, None]).sum(-1) + P.sum(-1))
        S = c.total.exp().mT * S + k_kept.mT @ u  # carry
        z = c.total.exp()[:, :, 0] * z + k_kept.sum(2)
        u_all.append(u)
    time_first = lambda xs, like, *tail: (
        torch.cat(xs, -2).flatten(1, -3).transpose(1, 2)[:, :T] if xs else like.new_zeros(like.shape[0], 0, *tail)
    )
    n = time_first(n, q, q.shape[2], v.shape[-1])
    d = time_first([x[..., None] for x in d], q, q.shape[2], 1)[..., 0]
    return n, d, S, z, starts, time_first(u_all, v, *v.shape[2:])


def backward(dn, dd, dS, dz, q, k, v, g, beta, starts, *, leaving: bool, own: float, C: int, dstarts=None, du_all=None):
    """Gradients (dq, dk, dv, dg, dbeta, dS, dz) for those of n, d, the last S and z, and, if given, of `starts` and the writes."""
    T = k.shape[1]
    todo = list(zip(chunks(q, k, v, g, beta, leaving, C), chunks(dn, k, v, g, None, leaving, C), starts, strict=True))
    dds = [x.q for x in chunks(dd[..., None], k, v, g, None, leaving, C)]
    dus = None if du_all is None else [x.v for x in chunks(q, k, du_all, g, None, leaving, C)]
    out: list[tuple] = []
    for i, (c, dc, (S, z)) in reversed(list(enumerate(todo))):
        dn_c, dd_c = dc.q, dds[i]
        seen, kept, across = c.clock.exp(), (c.total - c.clock).exp(), c.total.exp()
        u, A, M = write(c, S)
        P = see(scores(c.q, c.k, c.clock), own)
        # carry, emit
        du = (c.k * kept) @ dS + (P.mT @ dn_c).sum(2)
        du = du if dus is None else du + dus[i]
        dk_kept = (u @ dS.mT + dz[:, :, None]) * kept
        dtotal = across[:, :, 0] * ((S * dS).sum(-1) + z * dz)
        dq, dk = scores_backward(see(dn_c @ u.mT[:, :, None] + dd_c, own), c.q, c.k, c.clock)
        dq = dq + (dn_c @ S.mT[:, :, None] + dd_c * z[:, :, None, None]) * seen[:, :, None]
        q_seen = c.q * seen[:, :, None]
        dS = across.mT * dS + (q_seen.mT @ dn_c).sum(2)
        dz = across[:, :, 0] * dz + (q_seen * dd_c).sum((2, 3))
        dk_read = torch.zeros_like(c.k)
        dbeta = None
        if c.beta is not None:  # write
            dr = torch.linalg.solve_triangular(M.mT, du, upper=True, unitriangular=True)
            dM = -(dr @ u.mT).tril(-1)
            k_seen = c.k * seen
            dbeta = (dM * A).sum(-1, keepdim=True) + ((c.v - k_seen @ S) * dr).sum(-1, keepdim=True)
            du = c.beta * dr
            dk_read, dk_key = scores_backward((c.beta * dM)[:, :, None], c.k[:, :, None], c.k, c.clock)
            dk_read, dk = dk_read[:, :, 0] - (du @ S.mT) * seen, dk + dk_key
            dS = dS - k_seen.mT @ du
        # gate: reading with a faded state pulls the clock up, keys left behind pull it down
        dclock = (c.q * dq).sum(2) + c.k * (dk_read - dk - dk_kept)
        dtotal = dtotal + (c.k * dk_kept).sum(2)
        if c.clock.shape[-1] == 1:
            dclock, dtotal = dclock.sum(-1, keepdim=True), dtotal.sum(-1, keepdim=True)
        dg = dclock.flip(2).cumsum(2).flip(2)
        dg = (dg - dclock if leaving else dg) + dtotal[:, :, None]
        if dstarts is not None:
            dS, dz = dS + dstarts[0][:, i], dz + dstarts[1][:, i]
        out.append((dq.flatten(1, 2), dk_read + dk + dk_kept, du, dg, dbeta))
    join = lambda xs, like: torch.cat(xs, 2).transpose(1, 2)[:, :T] if xs else torch.zeros_like(like)
    dq, dk, dv, dg, dbeta = (list(xs) for xs in zip(*reversed(out), strict=True)) if out else ([], [], [], [], [])
    dbeta = None if beta is None else join(dbeta, beta[..., None])[..., 0]
    return join(dq, q), join(dk, k), join(dv, v), join(dg, g), dbeta, dS, dz

"""The oracle: the operator token by token, plain autograd. Every backend answers to this file in float64.

    S_t = A_t S_{t-1} + k_t u_tᵀ                    state [K V]
    z_t = A_t z_{t-1} + k_t                         normaliser [K]
    o_t = scale · S_tᵀ q_t                          divided, if normalised, by scale · z_tᵀ q_t (+ eps, or clamped to eps from below)

    A_t = diag(exp(log_decay_t))                    log_decay: None | [H] | [B T H] | [B T H K], its shape is its kind
    u_t = v_t                                       beta None: additive write
    u_t = beta_t · (v_t − (A_t S_{t-1})ᵀ k_t)       beta [B T H]: delta rule

Bidirectional: one such scan from the left, one from the right; each owns half of the token's own term. Between a token and its neighbour
one gate is paid; which one is the gating convention:

    convention    from the left, t-1 → t    from the right, t+1 → t
    source        gate of t-1               gate of t+1                 LION as released, arXiv:2502.16249
    target        gate of t                 gate of t
    symmetric     gate of t                 gate of t+1

Dims: B batch, T time, H heads of k and v, G query heads per such head, K key width, V value width.
"""

import torch
from torch import Tensor


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    causal: bool = True,
    gating: str = "target",
    normalize: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
    kv: Tensor | None = None,
    z: Tensor | None = None,
    stride: int = 0,
):
    """q [B T G·H K], k [B T H K], v [B T H V] → o [B T G·H V], kv [B H K V], z [B H K], boundaries (kv, z), writes u [B T H V].

    causal=False: kv, z, boundaries and writes carry a leading axis of 2, from the left and from the right. `boundaries` are the states
    before every `stride`-th token in scan order, [B N H K V]. Everything is in the dtype of q.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    q = q.unflatten(2, (H, q.shape[2] // H))
    if log_decay is None:
        g = q.new_zeros(B, T, H, 1)
    elif log_decay.ndim == 1:
        g = log_decay.expand(B, T, H)[..., None]
    else:
        g = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    directions = 1 if causal else 2
    kv = q.new_zeros(directions, B, H, K, V) if kv is None else kv.reshape(directions, B, H, K, V)
    z = q.new_zeros(directions, B, H, K) if z is None else z.reshape(directions, B, H, K)
    if causal:
        left = one_direction(q, k, v, g, beta, kv[0], z[0], leaving=False, own=1.0, stride=stride)
        n, d, *state = left
    else:
        left = one_direction(q, k, v, g, beta, kv[0], z[0], leaving=gating == "source", own=0.5, stride=stride)
        flip = [None if x is None else x.flip(1) for x in (q, k, v, g, beta)]
        right = one_direction(*flip, kv[1], z[1], leaving=gating != "target", own=0.5, stride=stride)
        n, d = left[0] + right[0].flip(1), left[1] + right[1].flip(1)
        state = [torch.stack(pair) for pair in zip(left[2:6], right[2:6], strict=True)] + [torch.stack([left[6], right[6].flip(1)])]
    kv, z, bkv, bz, u = state
    n, d = scale * n, scale * d[..., None]
    if normalize == "sum":
        n = n / (d + eps)
    elif normalize == "clamp":
        n = n / d.clamp(min=eps)
    return n.flatten(2, 3), kv, z, (bkv, bz), u


def one_direction(q, k, v, g, beta, S, z, *, leaving, own, stride):
    """One scan. `leaving`: a token pays its gate on leaving the state behind, not on entering; `own`: weight of its own term."""
    n, d, writes, S_before, z_before = [], [], [], [], []
    for t in range(q.shape[1]):
        a = g[:, t].exp()
        if stride and t % stride == 0:
            S_before.append(S)
            z_before.append(z)
        if not leaving:
            S, z = a[..., None] * S, a * z
        u = v[:, t] if beta is None else beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S_own, z_own = k[:, t, :, :, None] * u[:, :, None, :], k[:, t]
        n.append(torch.einsum("bhkv,bhgk->bhgv", S + own * S_own, q[:, t]))
        d.append(torch.einsum("bhk,bhgk->bhg", z + own * z_own, q[:, t]))
        S, z = S + S_own, z + z_own
        if leaving:
            S, z = a[..., None] * S, a * z
        writes.append(u)
    join = lambda xs, like, *tail: torch.stack(xs, 1) if xs else like.new_zeros(like.shape[0], 0, *tail)
    return (
        join(n, q, *q.shape[2:4], v.shape[-1]),
        join(d, q, *q.shape[2:4]),
        S,
        z,
        join(S_before, S, *S.shape[1:]),
        join(z_before, z, *z.shape[1:]),
        join(writes, v, *v.shape[2:]),
    )

"""EcoFormer, arXiv:2209.09004: queries and keys as ±1 codes of a kernelised hash, fitted to the data once, and what they cost in energy."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import State, linear_attention
from .decays import Place, gate_dtype

BIAS_MODES, BANDWIDTHS = ("all", "self"), ("frozen", "input")


class _Sign(torch.autograd.Function):
    """±1, with 0 → +1; the gradient goes straight through where |x| < 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


class KernelHash(nn.Module):
    """The feature map of the variant `ecoformer`: h = sign(A (κ(x) − μ)) in {−1, +1}^bits, and a constant √bias beside it.

        κ_a(x) = exp(−|x − p_a|² / 2s),  x of length 1,  p_a one of `anchors` tokens          h·h' + bias = bits − 2 · Hamming(h, h') + bias

    A [H bits anchors], p, μ and s are buffers, which `fit` learns; the codes pass gradients on to x. The first batch trained on fits them,
    and before that there is no hash: ValueError outside training. Fit before torch.compile, which does not look.

    bias       > bits, so that every weight is positive; None: bits + 1
    bias_mode  "all": Σ_j (h_i·h_j + bias) v_j / Σ_j (h_i·h_j + bias), the affinity that the paper describes. "self": as its released code
               has it, with bias · v_i in the numerator alone; what was trained with it needs it. Not causal
    bandwidth  s: "frozen", one number per head from the fit; "input": the mean of |x − p|² over all tokens of the same input, as released.
               Then every token depends on all of them, on padding too: neither causal, nor packed, nor masked
    seed       of the fit
    """

    weight: Tensor
    anchors: Tensor
    mean: Tensor
    spread: Tensor
    fitted: Tensor

    def __init__(
        self,
        place: Place,
        *,
        bits: int = 16,
        anchors: int = 25,
        bias: float | None = None,
        bias_mode: str = "all",
        bandwidth: str = "frozen",
        seed: int = 0,
    ):
        super().__init__()
        for name, value, known in (("bias_mode", bias_mode, BIAS_MODES), ("bandwidth", bandwidth, BANDWIDTHS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}; got {value!r}")
        if bits < 1 or anchors < 1:
            raise ValueError(f"bits and anchors must be at least 1; got {bits} and {anchors}")
        self.bias = bits + 1 if bias is None else bias
        if self.bias <= bits:
            raise ValueError(f"bias must be above bits = {bits}, or weights could be negative; got {bias}")
        self.bits, self.count, self.bias_mode, self.bandwidth, self.seed = bits, anchors, bias_mode, bandwidth, seed
        self.key_dim = bits + 1
        H = place.heads
        self.register_buffer("weight", torch.zeros(H, bits, anchors))
        self.register_buffer("anchors", torch.zeros(H, anchors, place.key_dim))
        self.register_buffer("mean", torch.zeros(H, anchors))
        self.register_buffer("spread", torch.ones(H))
        self.register_buffer("fitted", torch.tensor(False))
        self._ready = False  # `fitted` as last seen: reading it waits for the device
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_ready", False))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, anchors={self.count}, bias={self.bias}, bias_mode={self.bias_mode!r}, bandwidth={self.bandwidth!r}"

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B T H K] → their codes with √bias behind: [B T H bits + 1]. Where k is q it is hashed once."""
        one = lambda x: F.pad(self.codes(x), (0, 1), value=math.sqrt(self.bias))
        coded = one(q)
        return coded, coded if k is q else one(k)

    def codes(self, x: Tensor) -> Tensor:
        """x [B T H K] → ±1 [B T H bits] in x's dtype. ValueError for other heads or widths, and where the hash is not fitted."""
        self._check(x)
        if not self._ready and not torch.compiler.is_compiling():
            self._ready = bool(self.fitted)
            if not self._ready and not self.training:
                raise ValueError("the hash is not fitted: call fit(x) on a batch of queries, load a fitted state, or train one batch")
            if not self._ready:
                self.fit(x)
        kappa = self._kernel(unit(x)) - self.mean.to(gate_dtype(x))
        return _Sign.apply(torch.einsum("bthm,hrm->bthr", kappa, self.weight.to(kappa.dtype))).to(x.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None,
        *, causal: bool, cu_seqlens: Tensor | None, return_state: bool, backend: str,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """The operator on the codes, with `bias_mode` and the limits of a bandwidth that looks at all tokens."""
        if self.bandwidth == "input" and (causal or cu_seqlens is not None or mask is not None):
            raise ValueError("bandwidth='input' depends on every token: it needs causal=False, and neither cu_seqlens nor mask")
        if self.bias_mode == "self" and (causal or state is not None or return_state):
            raise ValueError("bias_mode='self' needs causal=False and no segments: its row sum counts every token")
        q, k = self(q, k)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != k.shape[:2]:
                raise ValueError(f"mask must be bool [B T] = {tuple(k.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
            k, v = (x.masked_fill(~mask[..., None, None], 0.0) for x in (k, v))
        how: dict[str, Any] = dict(causal=causal, scale=1.0, cu_seqlens=cu_seqlens, backend=backend)
        if self.bias_mode == "self":
            own, _ = linear_attention(q[..., :-1], k[..., :-1], v, **how)
            rows, _ = linear_attention(q, k, torch.ones_like(v[..., :1]), **how)
            return (own + self.bias * v) / rows, None
        return linear_attention(q, k, v, normalize=True, initial_state=state, return_state=return_state, **how)

    # -- the fit --------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, x: Tensor, *, neighbours: int = 10, steps: int = 100, lr: float = 5e-4, momentum: float = 0.9, tokens: int = 256) -> list:
        """Learn the hash from a batch of queries x [B T H K]; returns the mean squared residual after each bit, which shrinks.

        Self-supervised: a pair of tokens is to agree (+1) where one is among the other's `neighbours` nearest, to differ (−1) among the
        farthest. Bits are found one by one, each by `steps` of SGD on tanh(g/2) for sign(g), and kept if its signs then fit what is
        left of the labels better than those of the random start. At most `tokens` tokens of each sequence are looked at (and 16 sequences),
        for the labels are quadratic in them. With torch.distributed every process ends with rank 0's hash.
        ValueError for fewer than `anchors` tokens.
        """
        self._check(x)
        if x.shape[0] == 0 or x.shape[1] < self.count:
            raise ValueError(f"the fit takes its {self.count} anchors from the tokens of one sequence; got x {tuple(x.shape)}")
        draw = torch.Generator().manual_seed(self.seed)
        with torch.autocast(x.device.type, enabled=False):
            x = x[:16].to(gate_dtype(x))
            if x.shape[1] > tokens:
                x = x[:, torch.randperm(x.shape[1], generator=draw)[:tokens].to(x.device)]
            x = unit(x)
            T = x.shape[1]
            at = torch.randperm(T, generator=draw)[: self.count].to(x.device)
            self.anchors.copy_(x[0, at].transpose(0, 1))
            self.spread.copy_(self._distances(x).mean((0, 1, 3)))
            kappa = self._kernel(x)
            self.mean.copy_(kappa.mean((0, 1)))
            start = torch.randn(self.weight.shape, generator=draw, dtype=x.dtype).to(x.device)
            labels = self.bits * agreement(x, min(neighbours, T // 2))
            residuals = self._greedy((kappa - kappa.mean((0, 1))).transpose(1, 2), labels, start, steps, lr, momentum)
        self.fitted.fill_(True)
        if dist.is_available() and dist.is_initialized():
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self._ready = True
        return residuals

    def _greedy(self, kappa, labels, start, steps, lr, momentum):
        """kappa [B H T m], labels [B H T T], start [H bits m]: fills self.weight, bit by bit. The gradient of cost(tanh(kappa w / 2)) is
        written out: the whole fit is eight times faster than by autograd."""
        scale = kappa.shape[2] * self.bits
        cost = lambda y: -torch.einsum("bht,bhts,bhs->bh", y, labels, y).mean() / scale
        signs = lambda w: torch.where(torch.einsum("bhtm,hm->bht", kappa, w) >= 0, 1.0, -1.0).to(kappa.dtype)
        residuals = []
        for r in range(self.bits):
            w, speed, both = start[:, r, :, None].clone(), 0.0, labels + labels.mT
            for _ in range(steps):  # of SGD with Nesterov's momentum
                y = (kappa @ w / 2).tanh()
                slope = kappa.mT @ ((1 - y * y) * (both @ y)) / (-2 * scale * kappa.shape[0] * kappa.shape[1])
                grad = slope.sum(0)
                speed = momentum * speed + grad
                w -= lr * (grad + momentum * speed)
            old, new = start[:, r], w[..., 0]
            best = new if cost(signs(new)) < cost(signs(old)) else old
            self.weight[:, r] = best
            y = signs(best)
            labels = labels - y[..., :, None] * y[..., None, :]
            residuals.append(labels.square().mean().item())
        return residuals

    # -- the kernel -----------------------------------------------------------------------------------------------------------------------

    def _distances(self, x):
        """|x − p|² [B T H m] for unit x, by 1 + |p|² − 2 x·p: no [B T H m K]."""
        p = self.anchors.to(x.dtype)
        return 1 + p.square().sum(-1) - 2 * torch.einsum("bthk,hmk->bthm", x, p)

    def _kernel(self, x):
        D = self._distances(x)
        s = D.mean((1, 3), keepdim=True) if self.bandwidth == "input" else self.spread.to(x.dtype)[:, None]
        return torch.exp(-D / (2 * s))

    def _check(self, x):
        H, _, K = self.anchors.shape
        if x.ndim != 4 or x.shape[2:] != (H, K):
            raise ValueError(f"x must be [B T H K] with H K = {(H, K)}, one hash per head; got {tuple(x.shape)}")


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in float32 or float64; 0 stays 0."""
    return F.normalize(x.to(gate_dtype(x)), dim=-1)


def agreement(x: Tensor, neighbours: int) -> Tensor:
    """Pair labels [B H T T] of unit x [B T H K]: +1 for the `neighbours` most similar of each row (itself among them), −1 for the least."""
    similarity = torch.einsum("bthk,bshk->bhts", x, x)
    labels = torch.zeros_like(similarity).scatter_(-1, similarity.topk(neighbours, -1).indices, 1.0)
    return labels.scatter_(-1, similarity.topk(neighbours, -1, largest=False).indices, -1.0)


# -- energy -------------------------------------------------------------------------------------------------------------------------------


class Operations(NamedTuple):
    """Multiplications and additions, and what they take: 3.7 and 0.9 pJ each in float32 at 45 nm, as the paper counts."""

    multiplications: float
    additions: float

    @property
    def picojoule(self) -> float:
        return 3.7 * self.multiplications + 0.9 * self.additions

    def __add__(self, other):
        return Operations(self.multiplications + other.multiplications, self.additions + other.additions)

    def __mul__(self, times):
        return Operations(times * self.multiplications, times * self.additions)


def attention_operations(kind: str, tokens: int, dim: int, heads: int, *, bits: int = 16, anchors: int = 25) -> Operations:
    """What one attention layer costs without its projections: `kind` "softmax", 2N²D + HN² and 2N²D, or "ecoformer",

        HN(2m + mb + b + 1 + d) multiplications, in the hash and the last division alone, and HN(2md + mb + 2b + 2bd + d) additions.

    ValueError for another kind, and for heads that do not divide dim.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
    N, H, d, m, b = tokens, heads, dim // heads, anchors, bits
    if kind == "softmax":
        return Operations(2 * N * N * dim + H * N * N, 2 * N * N * dim)
    if kind == "ecoformer":
        return Operations(H * N * (2 * m + m * b + b + 1 + d), H * N * (2 * m * d + m * b + 2 * b + 2 * b * d + d))
    raise ValueError(f"kind must be 'softmax' or 'ecoformer'; got {kind!r}")


class Stage(NamedTuple):
    """One stage of a pyramid of transformer blocks."""

    attention: str  # "softmax" or "ecoformer"
    side: int  # tokens are side²
    dim: int
    depth: int
    heads: int
    mlp_ratio: int
    patch: int  # width of the convolution that leads into the stage
    convolved: str = "mlp"  # where depthwise 3×3 convolutions are: in each feed-forward layer (PVTv2), or one for the "stage" (Twins)


def pyramid_operations(stages: list[Stage], *, classes: int = 1000, in_chans: int = 3) -> Operations:
    """What a network such as PVTv2 or Twins costs: attention, and convolutions and linear maps as a multiplication and an addition each.

    A LayerNorm takes 5 of each per number: two in a block, one before and one after a stage. EcoFormer has two input projections, for its
    queries are its keys; softmax has three.
    """
    total, width = Operations(stages[-1].dim * classes, stages[-1].dim * classes), in_chans
    for stage in stages:
        N, D, hidden = stage.side**2, stage.dim, stage.dim * stage.mlp_ratio
        in_mlp, in_stage = (9, 0) if stage.convolved == "mlp" else (0, 9)
        entry = N * D * width * stage.patch**2 + in_stage * N * D + 2 * 5 * N * D
        projections = (3 if stage.attention == "ecoformer" else 4) * N * D * D
        block = projections + 2 * N * D * hidden + in_mlp * N * hidden + 2 * 5 * N * D
        attention = attention_operations(stage.attention, N, D, stage.heads)
        total = total + Operations(entry, entry) + (Operations(block, block) + attention) * stage.depth
        width = D
    return total

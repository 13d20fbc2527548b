"""What a state tells of itself: how long it remembers, how full it is, what still stands in it, and who disturbs whom."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reduce import participation_ratio
from ..trace import Direction, Trace


def half_life(trace: Trace) -> Tensor:
    """ln ½ / mean log decay over real tokens, [H] or, of a channel decay, [H K]: after how many tokens half is forgotten; inf: never."""
    g = trace.log_decay
    if g is None:
        if not {"gates", "writes", "reads"} & set(trace.keep):
            trace.need("log_decay", hint="gates")
        heads = next((t.shape[-2] for t in (trace.k, trace.beta[..., None] if trace.beta is not None else None) if t is not None), 1)
        return torch.full((heads,), torch.inf)
    if g.ndim > 1:
        n = g.shape[0] * g.shape[1] if trace.mask is None else trace.mask.sum()
        g = g.sum((0, 1)) / n  # a masked token's is 0
    return torch.where(g < 0, math.log(0.5) / g, torch.inf)


def survival(trace: Trace, j: int, at: Sequence[int]) -> Tensor:
    """[B H len(at)]: k_jᵀ A_t … A_{j+1} k_j / ‖k_j‖²: 1 intact, 0 overwritten, < 0 turned round; under pure decay ∏ α."""
    return trace.survival(j, at)


def write_strength(trace: Trace) -> Tensor:
    """[B T H] (bidirectional: [2 B T H]): ‖u_t‖ · ‖k_t‖, the norm of what token t adds to the state."""
    trace.need("u", "k", hint="writes")
    return trace.u.norm(dim=-1) * trace.k.to(trace.u).norm(dim=-1)


def surprise(trace: Trace) -> Tensor:
    """[B T H]: ‖u_t‖ / (β_t ‖v_t‖) of a delta rule: 0, the state knew it already; 1, it knew nothing there; more, it was wrong."""
    trace.need("u", hint="writes")
    trace.need("v", "beta", hint="reads")
    tiny = torch.finfo(trace.u.dtype).tiny
    return trace.u.norm(dim=-1) / (trace.beta * trace.v.to(trace.u).norm(dim=-1)).clamp_min(tiny)


class Interference(NamedTuple):
    signal: Tensor  # [B HQ R]: |a_tj| ‖v_j‖ of the token that is meant
    noise: Tensor  # root of the sum of squares of all others
    snr: Tensor  # signal / noise
    cosine: Tensor  # between a_tj v_j and Σ a v, all that the row reads: 1, nothing else is heard; < 0, it is read the wrong way round


def interference(trace: Trace, rows: Sequence[int], tokens: Tensor | Sequence[int]) -> Interference:
    """How loud the value that row t is meant to read is among all others: `tokens` [R] or [B R], whose value is meant for each row.

    a are the weights over values, o_t = Σ_j a_tj v_j. Over what tokens wrote, u, a delta rule's later tokens would count as loud where they
    only took others' values away again. snr adds others up as if they were unrelated; the cosine has them as they add up.
    """
    trace.need("v", hint="reads")
    a = trace.attention(rows)
    v = trace.v.to(a).transpose(1, 2).repeat_interleave(a.shape[1] // trace.v.shape[2], 1)  # [B HQ T V]
    heard = a @ v
    weight = a.abs() * v.norm(dim=-1)[:, :, None]
    index = torch.as_tensor(tokens, device=a.device) - trace.first
    if bool(((index < 0) | (index >= trace.length)).any()):
        raise ValueError(f"tokens must lie in [{trace.first}, {trace.first + trace.length}), those that {trace.name!r} saw")
    index = index.expand(len(a), len(rows))[:, None, :, None].expand(*a.shape[:3], 1)
    signal = weight.gather(-1, index)[..., 0]
    noise = (weight.square().sum(-1) - signal.square()).clamp_min(0).sqrt()
    meant = a.gather(-1, index) * v.gather(2, index.expand(*index.shape[:3], v.shape[-1]))
    cosine = torch.nn.functional.cosine_similarity(meant, heard, dim=-1)
    return Interference(signal, noise, signal / noise.clamp_min(torch.finfo(a.dtype).tiny), cosine)


class Ranks(NamedTuple):
    """Four answers to "how many directions are in use", each between 0 and min(K, V)."""

    participation: Tensor  # (Σσ²)² / Σσ⁴
    stable: Tensor  # Σσ² / σ₁²
    entropy: Tensor  # exp of the entropy of σ / Σσ; a state rounded to bfloat16 reads too high here
    numeric: Tensor  # how many σ exceed `threshold` · σ₁


def ranks(S: Tensor, threshold: float = 1e-2) -> Ranks:
    """Of states [… K V]; 0 where a state is. Sources: Roy & Vetterli 2007 (entropy), Rudelson & Vershynin 2007 (stable)."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1); got {threshold}")
    S = S if S.dtype == torch.float64 else S.float()
    s = torch.linalg.svdvals(S)
    tiny = torch.finfo(s.dtype).tiny
    p = s / s.sum(-1, keepdim=True).clamp_min(tiny)
    entropy = torch.exp(-(p * p.clamp_min(tiny).log()).sum(-1)) * (s[..., 0] > 0)
    stable = s.square().sum(-1) / s[..., 0].square().clamp_min(tiny)
    return Ranks(participation_ratio(S), stable, entropy, (s > threshold * s[..., :1]).sum(-1).to(s.dtype))


class Transition(NamedTuple):
    """A token's transition along its own key: α_t (1 − β_t ‖k_t‖²). < 0: it turns what is stored there round; 0: it overwrites."""

    eigenvalue: Tensor  # [B T H]
    negative: Tensor  # [H]: share of real tokens with one below 0


def transition(trace: Trace) -> Transition:
    """The transition spectrum (arXiv:2411.12537): all others are α_t. Of a channel decay α is its mean along the key."""
    trace.need("k", hint="reads")
    k = trace.k if trace.k.dtype == torch.float64 else trace.k.float()
    squared = k.square().sum(-1)
    value = torch.ones_like(squared)
    g = trace.log_decay
    if g is not None:
        if g.ndim == 4:
            value = (k.square() * g.exp()).sum(-1) / squared.clamp_min(torch.finfo(k.dtype).tiny)
        else:
            value = value * g.exp()
    if trace.beta is not None:
        value = value * (1 - trace.beta * squared)
    real = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device) if trace.mask is None else trace.mask
    return Transition(value, (value[real] < 0).to(value.dtype).mean(0))


class Trajectory(NamedTuple):
    speed: Tensor  # [B N−1 H]: ‖ΔS‖ / ‖S‖ between the positions
    angle: Tensor  # [B N−2 H]: between successive ΔS, in radians; 0: the state moves in a straight line


def trajectory(trace: Trace, at: Sequence[int], direction: Direction = None) -> Trajectory:
    """How fast and how straight the state moves through `at`, three positions or more. After arXiv:2509.08502 (straightening)."""
    if len(at) < 3:
        raise ValueError(f"at must be three positions or more; got {list(at)}")
    S = torch.stack([trace.state(t, direction) for t in at], 1).flatten(-2)  # [B N H K·V]
    step = S.diff(dim=1)
    tiny = torch.finfo(S.dtype).tiny
    speed = step.norm(dim=-1) / S[:, 1:].norm(dim=-1).clamp_min(tiny)
    cosine = torch.nn.functional.cosine_similarity(step[:, 1:], step[:, :-1], dim=-1)
    return Trajectory(speed, cosine.clamp(-1, 1).acos())


def offsets(trace: Trace, rows: Sequence[int], around: Tensor, reach: int = 4) -> Tensor:
    """[2·reach + 1]: share of Σ|a| that rows place at each offset −reach … reach from the tokens `around` [B R], over batch and heads.

    Where a model stores a pair is a matter of its short convolution: at the value, one later, or spread; look before cutting.
    """
    a = trace.attention(rows).abs().sum(1)  # [B R T]
    where = around[..., None] + torch.arange(-reach, reach + 1, device=around.device)
    inside = (where >= 0) & (where < a.shape[-1])
    found = a.gather(-1, where.clamp(0, a.shape[-1] - 1)) * inside
    return found.sum((0, 1)) / a.sum().clamp_min(torch.finfo(a.dtype).tiny)


def lens(
    model: nn.Module, trace: Trace, rows: Sequence[int], at: int, *, residual: Tensor | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[B R vocab]: what the state after token `at` says to rows t > at, as logits: decode(residual + W_o (norm(Sᵀ r_t) · gate(x_t))).

    r are the rows' readers, and the gate is theirs: without it the read-out is not the model's. residual [B R dim] is the stream that the
    layer adds to (None: 0). decode: from the stream to logits; None: the model's last norm and output, as of a `Decoder`, past all later
    layers, as the logit lens does. It trains nothing and so needs no control. ValueError for a layer that is not linattn's own, or that
    sees both sides.
    """
    if not trace.causal:
        raise ValueError(f"trace must be of a causal layer; {trace.name!r} is bidirectional")
    trace.need("x", hint="inputs")
    name = trace.name.rpartition(".")[0]
    layer = dict(model.named_modules()).get(name)
    if not all(hasattr(layer, part) for part in ("o_proj", "norm", "g_proj", "num_heads")):
        raise ValueError(f"model has no layer {name!r} with norm, g_proj and o_proj, which the lens looks through: {type(model).__name__}")
    if decode is None and not (hasattr(model, "norm") and hasattr(model, "logits")):
        raise ValueError(f"decode must be given for a {type(model).__name__}, which has no norm and logits of its own")
    r, S = trace.readers(rows, at), trace.state(at)
    if r.shape[1] != layer.num_heads:
        raise ValueError(f"trace must be of all heads, {layer.num_heads}; got {r.shape[1]}")
    x = trace.x[:, [t - trace.first for t in rows]]
    o = (r.to(S) @ S.repeat_interleave(r.shape[1] // S.shape[1], 1)).transpose(1, 2)  # [B R HQ V]
    y = layer.o_proj(layer.norm(o.to(x), None if layer.g_proj is None else layer.g_proj(x)))
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual must be [B R dim] = {tuple(y.shape)}; got {tuple(residual.shape)}")
    y = y if residual is None else residual + y
    return model.logits(model.norm(y)) if decode is None else decode(y)

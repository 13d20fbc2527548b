"""The only place that knows that a sequence may lie on several processes: what each has to learn of the others' parts of it.

By state: LASP-2, arXiv:2502.07563. Each process walks its own T / N tokens from an empty state and says what they write and how much they
forget; one all-gather of that, of a size that T has no part in, tells each what state its tokens begin with. Here the walk is the operator
itself, once for the state and once more with what came before, so that every decay, the delta rule, normalisers, gradients and both
directions come out as in one process; the price is a second pass of the operator.

By heads: DeepSpeed-Ulysses, arXiv:2309.14509. Each process gives away its tokens' heads but a share, and gets that share of all tokens:
nothing is computed twice and softmax can be split too, but what is sent grows with the tokens, and the processes must divide the heads.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import State, linear_attention


class Shard(NamedTuple):
    """Part `rank` of `size` equal ones of every sequence, in the order of the processes of `group`."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> "Shard":
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's x, [size *x.shape]. Its gradient is summed over the processes: all of them must use it, be it times zero."""
        return _Gather.apply(x, self)

    def before(self, x: Tensor) -> Tensor:
        """The x of the process before this one; of the first, zeros."""
        parts = self.gather(x)
        return parts[self.rank - 1] if self.rank else parts[0] * 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, how: dict[str, Any]) -> Tensor:
        """`linear_attention` of this process's part, given all others: [B T HQ V]."""
        local, passes = self._walk(q, k, v, log_decay, beta, how)
        pieces = [local.kv, passes] if local.z is None else [local.kv, passes, local.z]
        flat = self.gather(torch.cat([piece.flatten() for piece in pieces]))  # [size ·]: one collective
        parts = [part.unflatten(1, piece.shape) for part, piece in zip(flat.split([p.numel() for p in pieces], 1), pieces, strict=True)]
        # transitions [size (2) B H K or K' K'] meet states [size (2) B H K V]
        forget = (lambda m, s: m @ s) if beta is not None else (lambda m, s: m[..., None] * s)
        decay = parts[1] if beta is None else None
        kv = self._carry(parts[0], parts[1], forget, how["causal"])
        z = None
        if local.z is not None:
            z_passes = decay if decay is not None else self.gather(_diagonal(k, log_decay, how["causal"]))
            z = self._carry(parts[2], z_passes, lambda m, s: m * s, how["causal"])
        return linear_attention(q, k, v, log_decay, beta, initial_state=State(kv, z), **how)[0]

    def _walk(self, q, k, v, log_decay, beta, how) -> tuple[State, Tensor]:
        """What this part writes into an empty state, and what it leaves of one that was there: K factors, or with beta a K × K matrix."""
        _, state = linear_attention(q, k, v, log_decay, beta, return_state=True, **how)
        if beta is None:
            return state, _diagonal(k, log_decay, how["causal"]).expand(state.kv.shape[:-1])
        K, rows = k.shape[-1], state.kv.shape[:-2]
        unit = torch.eye(K, device=k.device, dtype=state.kv.dtype).expand(*rows, K, K)
        nothing = torch.zeros_like(k)
        plain = {**how, "normalize": False, "eps": 1e-6}
        _, passed = linear_attention(q, k, nothing, log_decay, beta, initial_state=State(unit.contiguous()), return_state=True, **plain)
        return state, passed.kv

    def _carry(self, states: Tensor, passes: Tensor, forget, causal: bool) -> Tensor:
        """The state that this part begins with: those before it one after the other, and where not causal also those behind it."""
        if causal:
            return self._sweep(states, passes, forget, range(self.size), lambda i: i < self.rank)
        left = self._sweep(states[:, 0], passes[:, 0], forget, range(self.size), lambda i: i < self.rank)
        right = self._sweep(states[:, 1], passes[:, 1], forget, reversed(range(self.size)), lambda i: i > self.rank)
        return torch.stack([left, right])

    def _sweep(self, states, passes, forget, order, counts) -> Tensor:
        state = torch.zeros_like(states[0])
        for i in order:
            after = forget(passes[i], state) + states[i]
            state = after if counts(i) else state + 0.0 * after  # still in the graph: all processes take part in the gradient's sum
        return state


class Heads(Shard):
    """The same part of every sequence, exchanged within a layer for whole sequences of every N-th part of the heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, how: dict[str, Any]) -> Tensor:
        in_time = [x for x in (q, k, v, log_decay, beta) if x is not None and x.ndim > 1]
        q, k, v, *gates = self.whole(*in_time)
        if log_decay is not None:
            log_decay = gates.pop(0) if log_decay.ndim > 1 else log_decay.chunk(self.size)[self.rank]
        return self.part(linear_attention(q, k, v, log_decay, gates.pop() if gates else None, **how)[0])

    def whole(self, *parts: Tensor) -> list[Tensor]:
        """Parts [B T/N H …] of every head → this process's heads of every token, [B T H/N …]; one exchange for each dtype."""
        laid = [x.unflatten(2, (self.size, -1)).movedim(2, 0).flatten(3) for x in parts]  # [N B T/N ·]: whom each is for
        found: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(x.dtype for x in parts):
            which = [i for i, x in enumerate(parts) if x.dtype == dtype]
            got = _Exchange.apply(torch.cat([laid[i] for i in which], -1), self).movedim(0, 1).flatten(1, 2)  # [B T ·]
            found |= zip(which, got.split([laid[i].shape[-1] for i in which], -1), strict=True)
        return [found[i].unflatten(2, (-1, *x.shape[3:])) for i, x in enumerate(parts)]

    def part(self, o: Tensor) -> Tensor:
        """The way back: [B T H/N V] → [B T/N H V]."""
        return _Exchange.apply(o.unflatten(1, (self.size, -1)).movedim(1, 0), self).movedim(0, 2).flatten(2, 3)


WAYS: dict[str, type[Shard]] = {"state": Shard, "heads": Heads}


def shard_sequence(model: nn.Module, group: Any, by: str = "state") -> None:
    """Have every attention layer of `model` take its input for part of a sequence: of T tokens, the process of rank r in `group` has
    [r · T / N, (r + 1) · T / N). Gradients of the parameters are then those of the part, to be summed over the group.

    by   "state" or "heads", as above

    ValueError, and nothing done, for what only works on a whole sequence, two curves and feature maps with a way of their own; by state for
    softmax layers too, and by heads where the processes do not divide them.
    """
    if by not in WAYS:
        raise ValueError(f"context parallelism must be by one of {list(WAYS)}; got {by!r}")
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, "shard")}
    if not layers:
        raise ValueError(f"context parallelism needs attention layers of ours; {type(model).__name__} has none")
    for name, module in layers.items():
        if reason := module.whole_sequence(by):
            raise ValueError(f"context parallelism cannot split {name}: {reason}")
    shard = WAYS[by].of(group)
    for name, module in layers.items():
        if by == "heads" and module.num_kv_heads % shard.size:
            raise ValueError(f"the {shard.size} processes of a sequence must divide the {module.num_kv_heads} key heads of {name}")
    for module in layers.values():
        module.shard = shard


def _diagonal(k: Tensor, log_decay: Tensor | None, causal: bool) -> Tensor:
    """exp Σ log_decay over the part, [(2) B H 1 or K]: whichever way it is walked, each token's decay is paid once."""
    B, T, H, _ = k.shape
    if log_decay is None:
        factor = torch.ones(B, H, 1, device=k.device, dtype=torch.float64 if k.dtype == torch.float64 else torch.float32)
    elif log_decay.ndim == 1:
        factor = (T * log_decay).exp().expand(B, H)[..., None]
    else:
        factor = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)).sum(1).exp()
        factor = factor[..., None] if log_decay.ndim == 3 else factor
    return factor if causal else factor.expand(2, *factor.shape)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(shard.size)]
        dist.all_gather(parts, x, group=shard.group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.shard.group)
        return grad[ctx.shard.rank], None


class _Exchange(torch.autograd.Function):
    """x [N ·]: row i for process i → what the others had for this one, by rank."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        x = x.contiguous()
        got = torch.empty_like(x)
        dist.all_to_all_single(got, x, group=shard.group)
        return got

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.forward(ctx, grad, ctx.shard), None

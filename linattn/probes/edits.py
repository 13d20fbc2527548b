"""What a probe does to a state or to the tensors that write and read it, and what came of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import State


class Change:
    """A change of one layer's state after token `at`: an int, or one per sequence of the batch.

    leak     largest change of a protected read-out, relative to its length; None where nothing was protected
    moved    ‖S' − S‖ / ‖S‖ over the sequences it reached
    """

    def __init__(self, kind: str, layer: str, at: int | Sequence[int], fn: Callable[[State], State], *, heads, direction, log: list):
        self.kind, self.layer, self.fn, self.direction, self.log = kind, layer, fn, direction, log
        self.at = at if isinstance(at, int) else list(at)
        self.positions = {at} if isinstance(at, int) else set(at)
        if not self.positions or not all(isinstance(t, int) and t >= 0 for t in self.positions):
            raise ValueError(f"at must be a token's position, an int >= 0, or one for each sequence; got {at!r}")
        # the last token that the scan from the left has behind it where the change is made
        self.last_seen = {t - 1 for t in self.positions} if direction == "right" else self.positions
        self.heads = heads
        self.protect: Tensor | None = None
        self._moved: Tensor | None = None
        self._leak: Tensor | None = None
        self.fired: set[int] = set()

    @property
    def moved(self) -> float | None:
        return None if self._moved is None else float(self._moved)

    @property
    def leak(self) -> float | None:
        return None if self._leak is None else float(self._leak)

    def __repr__(self) -> str:
        found = (
            "not fired" if self._moved is None else f"moved {self.moved:.3g}" + ("" if self._leak is None else f", leak {self.leak:.2g}")
        )
        return f"{self.kind} of {self.layer!r} at {self.at}: {found}"

    def apply(self, state: State, at: int, cu_seqlens: Tensor | None) -> State:
        """State kv [B H K V], z [B H K] with the change made in the sequences and heads that it is of."""
        kv, z = state
        rows = self.rows(kv, at, cu_seqlens)
        heads = torch.zeros(kv.shape[1], dtype=torch.bool, device=kv.device)
        heads[check_heads(self.heads, kv.shape[1])] = True
        with torch.autocast(kv.device.type, enabled=False):
            new = self.fn(state)
            if getattr(new.kv, "shape", None) != kv.shape:
                got = tuple(new.kv.shape) if isinstance(new.kv, Tensor) else repr(new.kv)
                raise ValueError(f"{self.kind} of {self.layer!r} must give a state of shape {tuple(kv.shape)}; got {got}")
            chosen = rows[:, None] & heads
            changed = torch.where(chosen[..., None, None], new.kv.to(kv), kv)
            self._measure(kv, changed, chosen)
        z = z if z is None or new.z is None else torch.where(chosen[..., None], new.z.to(z), z)
        self.fired.add(at)
        self.log.append(self)
        return State(changed, z)

    def rows(self, kv: Tensor, at: int, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            n = torch.arange(len(kv), device=kv.device)
            return n == torch.searchsorted(cu_seqlens[1:].long(), torch.tensor(at, device=kv.device), right=True)
        if isinstance(self.at, int):
            return torch.ones(len(kv), dtype=torch.bool, device=kv.device)
        if len(self.at) != len(kv):
            raise ValueError(f"at must be one position, or one for each of {len(kv)} sequences; got {len(self.at)}")
        return torch.tensor(self.at, device=kv.device) == at

    def _measure(self, kv: Tensor, changed: Tensor, chosen: Tensor) -> None:
        """In tensors of fixed shapes, and read later: torch.compile and a GPU need not wait for the figures."""
        with torch.no_grad():
            a, moved = kv * chosen[..., None, None], changed - kv
            self._moved = moved.norm() / a.norm().clamp_min(1e-30)
            if self.protect is not None:
                P = to_state_heads(self.protect, kv)
                lost = (P @ moved).norm(dim=-1) / (P @ kv).norm(dim=-1).clamp_min(1e-30)
                self._leak = (lost * chosen[..., None]).max()


class Knockout:
    """Tokens of one layer that write nothing ("write": k, v and beta are 0 there; decay goes on) or read nothing ("read": q is 0)."""

    kind = "knockout"

    def __init__(self, layer: str, tokens: int | Sequence[int], what: str, heads):
        if what not in ("write", "read"):
            raise ValueError(f"what must be 'write' or 'read'; got {what!r}")
        self.layer, self.what, self.heads = layer, what, heads
        self.positions = {tokens} if isinstance(tokens, int) else set(tokens)
        if not self.positions or not all(isinstance(t, int) and t >= 0 for t in self.positions):
            raise ValueError(f"tokens must be positions, ints >= 0, and at least one; got {tokens!r}")
        self.fired: set[int] = set()

    def __repr__(self) -> str:
        return f"knockout of {self.what}s of {self.layer!r} at {sorted(self.positions)}"

    def apply(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, start: int):
        here = [t - start for t in sorted(self.positions) if start <= t < start + q.shape[1]]
        if not here:
            return q, k, v, beta
        self.fired |= {t + start for t in here}
        H, G = k.shape[2], q.shape[2] // k.shape[2]
        out = torch.zeros(k.shape[1], H, dtype=torch.bool, device=k.device)
        for head in check_heads(self.heads, H):
            out[here, head] = True
        if self.what == "read":
            return q.masked_fill(out.repeat_interleave(G, 1)[..., None], 0.0), k, v, beta
        k, v = k.masked_fill(out[..., None], 0.0), v.masked_fill(out[..., None], 0.0)
        return q, k, v, None if beta is None else beta.masked_fill(out, 0.0)


def check_heads(heads: Sequence[int] | None, count: int) -> list[int]:
    """The heads of a state: all, or those named. ValueError for one that is not there."""
    if heads is None:
        return list(range(count))
    if bad := [h for h in heads if not (isinstance(h, int) and 0 <= h < count)]:
        raise ValueError(f"heads must lie in [0, {count}), the heads of the state; got {bad}")
    return list(heads)


def to_state_heads(readers: Tensor, kv: Tensor) -> Tensor:
    """readers [B HQ R K], [B H R K] or [B H K] of query heads → [B H R·G K], those of each head of kv [B H K V] together."""
    r = readers if readers.ndim == 4 else readers[:, :, None] if readers.ndim == 3 else readers
    B, H, K = kv.shape[:3]
    if r.ndim != 4 or r.shape[0] not in (1, B) or r.shape[1] % H or r.shape[3] != K:
        raise ValueError(f"readers must be [B H K] or [B H R K] to go with a state {tuple(kv.shape)}; got {tuple(readers.shape)}")
    r = r.to(kv).unflatten(1, (H, -1)).flatten(2, 3)
    return r.expand(B, -1, -1, -1)


def duals(erase: Tensor, protect: Tensor | None, ridge: float) -> Tensor:
    """W [… K R] with erase [… R K] @ W = 1 and protect [… P K] @ W = 0: the first R columns of the pseudo-inverse of both together.

    ridge > 0: of Rᵀ(R Rᵀ + ridge · mean(diag) · 1)⁻¹, where readers are many or nearly the same; protection is then not exact.
    """
    R = erase if protect is None else torch.cat([erase, protect], -2)
    if not ridge:
        return torch.linalg.pinv(R)[..., : erase.shape[-2]]
    gram = R @ R.mT
    size = R.square().sum(-1).mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (R.mT @ torch.linalg.inv(gram + ridge * size * eye))[..., : erase.shape[-2]]


def written(kv: Tensor, readers: Tensor, values: Tensor | None, protect: Tensor | None, ridge: float = 0.0) -> Tensor:
    """S' = S + W (V* − R S): the readers R now read V* (None: nothing), those to protect what they did before, W = duals(R, P)."""
    R = to_state_heads(readers, kv)
    P = None if protect is None else to_state_heads(protect, kv)
    wanted = torch.zeros_like(R @ kv) if values is None else to_values(values, R, kv)
    return kv + duals(R, P, ridge) @ (wanted - R @ kv)


def to_values(values: Tensor, R: Tensor, kv: Tensor) -> Tensor:
    """values that broadcast to [B H R V]: [V], [B V], [B H V] or [B H R V]."""
    v = values.to(kv)
    v = {1: lambda: v, 2: lambda: v[:, None, None], 3: lambda: v[:, :, None], 4: lambda: v}[v.ndim]()
    try:
        return v.expand(*R.shape[:3], kv.shape[3])
    except RuntimeError:
        raise ValueError(
            f"values must be [V], [B V], [B H V] or [B H R V] for a state {tuple(kv.shape)}; got {tuple(values.shape)}"
        ) from None


def without_value_direction(kv: Tensor, direction: Tensor) -> Tensor:
    """S (I − d̂ d̂ᵀ): no reader finds anything along `direction` [… V] any more. Difference-of-means ablation, on a whole memory."""
    d = torch.nn.functional.normalize(direction.to(kv), dim=-1)
    return kv - (kv @ d[..., :, None]) * d[..., None, :]


def without_key_direction(kv: Tensor, direction: Tensor) -> Tensor:
    """(I − d̂ d̂ᵀ) S: nothing is stored under `direction` [… K] any more."""
    return without_value_direction(kv.mT, direction).mT

"""Every check of the operator's arguments, in plain `if`, so that torch.compile reads them. All raise ValueError."""

import torch
from torch import Tensor

from .form import GATINGS, NORMALIZERS, accumulator

RECORDS = ("boundaries", "writes")


def step_is_plain(q, k, v, log_decay, beta, kv, z, normalizer) -> bool:
    """Whether the arguments fit together without a conversion and want no gradient; if not, the general path sees to them."""
    given = (q, k, v, kv, *(x for x in (log_decay, beta, z) if x is not None))
    for x in given:
        if not isinstance(x, Tensor) or x.device != given[0].device:
            return False
    if q.dtype != k.dtype or q.dtype != v.dtype or any(x.dtype != accumulator(q.dtype) for x in given[3:]):
        return False
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return False
    (B, H, K), V = k.shape, v.shape[2]
    return (
        kv.shape == (B, H, K, V)
        and v.shape[:2] == (B, H)
        and q.shape[0] == B
        and q.shape[2] == K
        and q.shape[1] % H == 0
        and (log_decay is None or log_decay.shape in ((H,), (B, H), (B, H, K)))
        and (beta is None or beta.shape == (B, H))
        and normalizer in NORMALIZERS
        and (z is None) == (normalizer == "none")
        and (z is None or z.shape == (B, H, K))
    )


def check_tensors(needed, optional):
    for name, x in needed.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    for name, x in optional.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor or None; got {type(x).__name__}")


def check_shapes(q, k, v, log_decay, beta, cu_seqlens):
    check_tensors({"q": q, "k": k, "v": v}, {"log_decay": log_decay, "beta": beta, "cu_seqlens": cu_seqlens})
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B T H {'V' if name == 'v' else 'K'}], of 4 dimensions; got shape {tuple(x.shape)}")
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    if min(HQ, H, K, V) == 0:
        raise ValueError(f"heads and widths must be at least 1; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if k.shape != (B, T, H, K):
        raise ValueError(f"k must be [B T H K] = {(B, T, H, K)} to go with q {tuple(q.shape)}; got {tuple(k.shape)}")
    if v.shape != (B, T, H, V):
        raise ValueError(f"v must be [B T H V] = {(B, T, H, V)} to go with k {tuple(k.shape)}; got {tuple(v.shape)}")
    if HQ % H:
        raise ValueError(f"q must have a multiple of the {H} heads of k and v; got {HQ} heads")
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q must be float64, float32, bfloat16 or float16; got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}; got {x.dtype}")
    if log_decay is not None and log_decay.shape not in ((H,), (B, T, H), (B, T, H, K)):
        raise ValueError(
            f"log_decay must be None, [H] = {(H,)}, [B T H] = {(B, T, H)} or [B T H K] = {(B, T, H, K)}; got {tuple(log_decay.shape)}"
        )
    if beta is not None and beta.shape != (B, T, H):
        raise ValueError(f"beta must be [B T H] = {(B, T, H)} to go with k {tuple(k.shape)}; got {tuple(beta.shape)}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be [N+1] int32 or int64 with N >= 1; got shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
            )
        if B != 1:
            raise ValueError(f"cu_seqlens needs the sequences packed into one row, B = 1; got q {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta), ("cu_seqlens", cu_seqlens)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")
        if x is not None and name in ("log_decay", "beta") and not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype; got {x.dtype}")


def check_options(causal, gating, log_decay, beta, normalizer, eps, offset, scale, record, stride):
    if gating is not None and gating not in GATINGS:
        raise ValueError(f"gating must be one of {list(GATINGS)}; got {gating!r}")
    if causal and gating is not None:
        raise ValueError(f"gating is a convention of bidirectional calls, causal=False; got gating={gating!r} with causal=True")
    if not causal and gating is None and log_decay is not None and log_decay.ndim > 1:
        raise ValueError(
            f"gating must be chosen from {list(GATINGS)} where causal=False and log_decay varies in time: the three differ; got None"
        )
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalize must be False, True, 'sum' or 'clamp'; got {normalizer!r}")
    for name, x in (("eps", eps), ("offset", offset), ("scale", 1.0 if scale is None else scale)):
        if not isinstance(x, (int, float)):
            raise ValueError(f"{name} must be a number; got {type(x).__name__}")
    if scale is not None and offset and scale == 0:
        raise ValueError("scale must not be 0 where offset is given")
    if offset and (beta is not None or (log_decay is not None and log_decay.ndim == 4)):
        raise ValueError("offset has no meaning with beta or with a channel log_decay [B T H K]: a constant has no channel to decay in")
    if not isinstance(record, (tuple, list)) or any(name not in RECORDS for name in record):
        raise ValueError(f"record must be a sequence of names out of {list(RECORDS)}; got {record!r}")
    if not isinstance(stride, int) or stride < 16 or stride % 16:
        raise ValueError(f"stride must be a positive multiple of 16; got {stride}")


def check_values(log_decay, cu_seqlens, T):
    if log_decay is not None and log_decay.numel() and (worst := log_decay.detach().amax().item()) > 0:
        raise ValueError(f"log_decay must be <= 0, a natural logarithm of a decay in (0, 1]; its largest value is {worst:.6g}")
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != T:
            raise ValueError(f"cu_seqlens must run from 0 to T = {T}; got {ends[0]} to {ends[-1]}")
        if any(a > b for a, b in zip(ends[:-1], ends[1:], strict=True)):
            raise ValueError(f"cu_seqlens must not decrease; got {ends if len(ends) < 20 else '…'}")


def initial_states(state, normalizer, causal, shape, device, acc) -> tuple[Tensor | None, Tensor | None]:
    """Initial state with its directions axis explicit: kv [D N H K V], z [D N H K]; None twice where none was given."""
    lead = (1, *shape) if causal else (2, *shape)
    normal = normalizer != "none"
    if state is None:
        return None, None
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"initial_state must be a linattn.State(kv, z); got {type(state).__name__}")
    kv, z = state
    check_tensors({"initial_state.kv": kv}, {"initial_state.z": z})
    wanted = shape if causal else lead
    dims = "B H K V" if causal else "2 B H K V"
    if kv.shape != wanted:
        raise ValueError(f"initial_state.kv must be [{dims}] = {tuple(wanted)}; got {tuple(kv.shape)}")
    if (z is None) == normal:
        raise ValueError(f"initial_state.z must be {'given' if normal else 'None'} with normalize={normalizer!r}; got the opposite")
    if z is not None and z.shape != wanted[:-1]:
        raise ValueError(f"initial_state.z must be [{dims[:-2]}] = {tuple(wanted[:-1])}; got {tuple(z.shape)}")
    for name, x in (("kv", kv), ("z", z)):
        if x is not None and (x.device != device or not x.is_floating_point()):
            raise ValueError(f"initial_state.{name} must be floating, on {device}; got {x.dtype} on {x.device}")
    z = torch.zeros(lead[:-1], device=device, dtype=acc) if z is None else z.to(acc).reshape(lead[:-1])
    return kv.to(acc).reshape(lead), z

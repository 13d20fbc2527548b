"""Run by test_context_parallel.py under torchrun: a sequence on two processes gives the outputs and gradients of one."""

import sys

import torch
import torch.distributed as dist

from linattn.layers import VARIANTS, LinearAttention, SoftmaxAttention
from linattn.layers.context_parallel import WAYS, shard_sequence

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
B, T, dim, heads = 2, 24 * size, 32, 4


def compare(what, one, two):
    try:
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    except AssertionError as error:
        sys.exit(f"{what}: {error}")


def check(name, by, **how):
    torch.manual_seed(0)
    kind = (lambda *sizes: SoftmaxAttention(*sizes, **how)) if name == "softmax" else (lambda *sizes: LinearAttention(*sizes, name, **how))
    layer = kind(dim, heads).double()
    for p in layer.parameters():  # away from starts at which a gate or a bias does nothing
        p.data.add_(torch.randn_like(p) * 0.1)
    x, weight = torch.randn(B, T, dim, dtype=torch.float64), torch.randn(B, T, dim, dtype=torch.float64)
    x.requires_grad_()
    y, _ = layer(x)
    (y * weight).sum().backward()
    wanted = [x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    layer.zero_grad()
    here = slice(rank * T // size, (rank + 1) * T // size)
    part = x.detach()[:, here].clone().requires_grad_()
    shard_sequence(layer, dist.group.WORLD, by)
    mine, _ = layer(part)
    (mine * weight[:, here]).sum().backward()
    compare(f"{name} by {by} {how}: y", mine, y[:, here])
    compare(f"{name} by {by} {how}: dx", part.grad, wanted[0][:, here])
    for (parameter, p), gradient in zip(((n, p) for n, p in layer.named_parameters() if p.grad is not None), wanted[1:], strict=True):
        dist.all_reduce(p.grad)
        compare(f"{name} by {by} {how}: d {parameter}", p.grad, gradient)


done = 0
for by in WAYS if heads % size == 0 else ["state"]:
    for name in VARIANTS:
        if not LinearAttention(dim, heads, name).whole_sequence(by):
            check(name, by, backend="eager")
            done += 1
    for gating, names in ((None, ("linear", "retnet")), ("source", ("gla", "mamba2", "gated_delta")), ("target", ("gla", "gated_delta")),
                          ("symmetric", ("gla", "gated_delta"))):  # fmt: skip
        for name in names:
            check(name, by, causal=False, gating=gating, backend="eager")
    for name in ("linear", "gla"):
        check(name, by, num_kv_heads=2, backend="eager") if by == "state" or size == 2 else None
for causal in (True, False) if heads % size == 0 else ():
    check("softmax", "heads", causal=causal)
if rank == 0:
    print(f"{done} variants as in one process")
dist.destroy_process_group()

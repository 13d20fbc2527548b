"""Run by test_context_parallel.py under torchrun: a sequence on two processes gives the outputs and gradients of one."""

import sys

import torch
import torch.distributed as dist

from linattn.layers import VARIANTS, LinearAttention
from linattn.layers.context_parallel import Shard

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
B, T, dim, heads = 2, 24 * size, 32, 4


def compare(what, one, two):
    try:
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    except AssertionError as error:
        sys.exit(f"{what}: {error}")


def check(name, **how):
    torch.manual_seed(0)
    layer = LinearAttention(dim, heads, name, **how).double()
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
    layer.shard = Shard.of(dist.group.WORLD)
    mine, _ = layer(part)
    (mine * weight[:, here]).sum().backward()
    compare(f"{name} {how}: y", mine, y[:, here])
    compare(f"{name} {how}: dx", part.grad, wanted[0][:, here])
    for (parameter, p), gradient in zip(((n, p) for n, p in layer.named_parameters() if p.grad is not None), wanted[1:], strict=True):
        dist.all_reduce(p.grad)
        compare(f"{name} {how}: d {parameter}", p.grad, gradient)


done = 0
for name in VARIANTS:
    if LinearAttention(dim, heads, name).whole_sequence:
        continue
    check(name, backend="eager")
    done += 1
for name, gating in (("linear", None), ("retnet", None), ("gla", "source"), ("gla", "target"), ("gla", "symmetric"), ("mamba2", "source")):
    check(name, causal=False, gating=gating, backend="eager")
for gating in ("source", "target", "symmetric"):
    check("gated_delta", causal=False, gating=gating, backend="eager")
if rank == 0:
    print(f"{done} variants as in one process")
dist.destroy_process_group()

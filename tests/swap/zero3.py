"""Run by test_swap_zero.py in a process of its own: attention transfer, all else frozen, under DeepSpeed ZeRO-3 and without it."""

import os
import socket

import torch

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.ops import __compatible_ops__
from swap_hosts import CAUSAL

import linattn
from linattn.swap import mode
from linattn.swap.swap import swapped_of

__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling for a collective nobody here calls
torch.set_num_threads(1)
batch = dict(input_ids=torch.randint(3, 50, (2, 16), generator=torch.Generator().manual_seed(0)), use_cache=False)


def prepared(window):
    model = CAUSAL["llama"]()
    report = linattn.swap_attention(model, "hedgehog", window=window)
    added = {id(p) for p in report.parameters("added").values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in added)
    model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else model.gradient_checkpointing_enable()
    return model


def transferred(call, model, backward):
    losses = []
    for _ in range(4):
        with mode(model, "transfer"):
            call(**batch)
            loss = sum(module.error for module in swapped_of(model).values())
        backward(loss)
        losses.append(float(loss.detach()))
    return losses


for window in (0, 4):
    plain = prepared(window)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)

    def step(loss, optimizer=optimizer):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    wanted = transferred(plain, plain, step)
    model = prepared(window)
    config = dict(train_micro_batch_size_per_gpu=2, zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    message = ""
    try:
        linattn.swap_attention(engine, "linear")
    except ValueError as error:
        message = str(error)
    assert "is wrapped by deepspeed" in message, message
    got = transferred(engine, engine.module, lambda loss, e=engine: (e.backward(loss), e.step()))
    assert wanted[-1] < wanted[0] and torch.allclose(torch.tensor(got), torch.tensor(wanted), rtol=1e-4), (got, wanted)
    print(f"window {window}: {got}")

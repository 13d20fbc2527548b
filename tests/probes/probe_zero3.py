"""Run by test_probe_models.py in two processes: a decoder under DeepSpeed ZeRO-3, probed, edited, trained, against the same one whole."""

import os
import sys
from pathlib import Path

import torch

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.ops import __compatible_ops__

import linattn
from linattn import Decoder, probes

__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling for a collective nobody here calls
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
ALL = ("final", "boundaries", "writes", "gates", "reads", "output", "conv", "inputs")


def fresh():
    torch.manual_seed(0)
    return Decoder.create("tiny", vocab_size=32, variant="gated_delta", dim=32, num_layers=2, num_heads=2)


class Count:
    """How often the layers were seen."""

    def __init__(self):
        self.calls = 0

    def update(self, layer, piece, how):
        self.calls += 1

    def result(self):
        return self.calls


tokens = torch.randint(0, 32, (2, 100), generator=torch.Generator().manual_seed(rank))  # each process its own
plain = fresh()
config = dict(train_micro_batch_size_per_gpu=2, zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0))
engine, *_ = deepspeed.initialize(model=(model := fresh()), optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)
assert all(p.numel() == 0 for p in model.parameters()), "no parameter is whole"

with torch.no_grad():
    want, _ = plain(tokens)
    unprobed, _ = engine(tokens)
    with linattn.probe(plain, keep=ALL) as whole:
        plain(tokens)
    count = Count()
    with linattn.probe(engine, keep=ALL, reduce=[count]) as p:
        estimate = p.estimate(2, 100)
        got, _ = engine(tokens)
    assert torch.equal(got, unprobed) and torch.allclose(got, want, atol=1e-6)
    assert count.calls == 2 and estimate == p.estimate(2, 100) == whole.estimate(2, 100)
    assert list(p) == ["module." + name for name in whole]
    for i in range(2):
        assert torch.allclose(p[i].state(50), whole[i].state(50), atol=1e-6)
        assert torch.allclose(p[i].attention([60]), whole[i].attention([60]), atol=1e-5)
        assert torch.allclose(p[i].snapshot(50).conv, whole[i].snapshot(50).conv, atol=1e-6)
    edited = []
    for runs in (plain, engine):
        with linattn.probe(runs) as q:
            q.edit(0, at=40, fn=lambda S: 0.5 * S)
            q.patch(1, at=60, source=whole[1].snapshot(30))
            edited.append(runs(tokens)[0])
    assert torch.allclose(*edited, atol=1e-6) and not torch.allclose(edited[1][:, 70:], got[:, 70:], atol=1e-4)
p.save(Path(sys.argv[1]) / "trace.safetensors")

for checkpointed in (False, True):  # a step of training inside the block
    count = Count()
    with linattn.probe(engine, keep="writes", reduce=[count, saturation := probes.Saturation()]) as p:
        loss = engine(tokens, checkpoint_activations=checkpointed)[0].square().mean()
        engine.backward(loss)
        engine.step()
    assert count.calls == 2 and len(saturation.result()) == 2 and p[0].length == 100
print("as without", flush=True)

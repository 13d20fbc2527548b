"""DeepSpeed's configuration: no "auto" is left in it, and nothing that contradicts the run or would train wrongly without a word."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from linattn.train import Config, loop, train
from linattn.train.ds_config import resolve, stage_of
from linattn.train.world import World

HOW = dict(processes=2, parameters=1000)


def config(**values):
    return Config(batch=8, **values)


def test_every_auto_is_resolved():
    given = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3, "overlap_comm": "auto", "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "contiguous_gradients": True,
        },
    }  # fmt: skip
    before = json.dumps(given)
    done = resolve(config(deepspeed=given, precision="bfloat16", accumulate=2, clip=0.5), **HOW)
    assert '"auto"' not in json.dumps(done) and json.dumps(given) == before
    assert (done["train_batch_size"], done["train_micro_batch_size_per_gpu"], done["gradient_accumulation_steps"]) == (8, 2, 2)
    assert done["gradient_clipping"] == 0.5 and done["bf16"] == {"enabled": True} and done["fp16"] == {"enabled": False}
    assert done["zero_optimization"]["reduce_bucket_size"] == 1000 and done["zero_optimization"]["contiguous_gradients"] is True
    assert "optimizer" not in done and "scheduler" not in done


def test_bfloat16_at_stage_0_is_autocast():
    done = resolve(config(zero=0, precision="bfloat16"), **HOW)
    assert done["bf16"] == {"enabled": False} and done["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert resolve(config(zero=1, precision="bfloat16"), **HOW)["torch_autocast"] == {"enabled": False}


def test_a_torch_optimizer_serves_offload():
    given = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolve(config(deepspeed=given), **HOW)["zero_force_ds_cpu_optimizer"] is False


def test_the_stage_comes_from_either():
    assert stage_of(config()) is None and stage_of(config(zero=2)) == 2 and stage_of(config(deepspeed={"steps_per_print": 5})) == 0
    assert stage_of(config(deepspeed={"zero_optimization": {"stage": 3}})) == 3
    assert stage_of(config(zero=1, deepspeed={"zero_optimization": {"stage": "auto"}})) == 1


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(zero=4), "zero must be a stage of DeepSpeed's ZeRO, 0, 1, 2 or 3; got 4"),
        (dict(zero=1, deepspeed={"zero_optimization": {"stage": 2}}), "stage is 2 in the DeepSpeed config, zero 1"),
        (dict(zero=1, deepspeed={"train_batch_size": 64}), "train_batch_size is 64 in the DeepSpeed config, 8 by the run's own options"),
        (dict(zero=1, deepspeed={"gradient_clipping": 0.3}), "gradient_clipping is 0.3 in the DeepSpeed config, 1.0 by"),
        (dict(zero=1, deepspeed={"bf16": {"enabled": True}}), "bf16.enabled is True in the DeepSpeed config, False by"),
        (dict(zero=0, deepspeed={"bf16": {"enabled": True}}), "starts Adam one step late"),
        (dict(zero=1, deepspeed={"fp16": {"enabled": True}}), "fp16 in the DeepSpeed config is not supported"),
        (dict(zero=1, deepspeed={"optimizer": {"type": "Lamb"}}), "optimizer.type in the DeepSpeed config must be AdamW; got 'Lamb'"),
        (dict(zero=1, deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 1}}}), 'optimizer.params .* must be "auto"'),
        (dict(zero=1, deepspeed={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}), "scheduler.params"),
        (dict(zero=1, deepspeed={"checkpoint": {"load_universal": True}}), "load_universal in the DeepSpeed config is ours to set"),
        (dict(zero=1, deepspeed={"zero_optimization": {"round_robin_gradients": "auto"}}), "zero_optimization.round_robin_gradients"),
        (dict(zero=1, deepspeed={"zero_optimisation": {"stage": 3}}), "what nothing here heeds: zero_optimisation; there are"),
        (dict(zero=1, deepspeed={"curriculum_learning": {"enabled": True}}), "nothing here heeds: curriculum_learning"),
        (
            dict(zero=3, deepspeed={"zero_optimization": {"offload_param": {"device": "nvme"}}}),
            'offload_param.device must be "cpu" or "none", .*; got \'nvme\'',
        ),
        (dict(zero=2, deepspeed={"zero_force_ds_cpu_optimizer": True}), "zero_force_ds_cpu_optimizer must be false"),
        (dict(zero=0, deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}), "grad_accum_dtype needs ZeRO stage 1, 2 or 3"),
        (dict(zero=1, accumulate=8), r"batch must be a multiple of processes · accumulate, 2 · 8.*; got 8"),
    ],
)
def test_what_contradicts_the_run_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        resolve(config(**change), **HOW)


@pytest.mark.parametrize(
    "size, change, said",
    [
        (2, {}, "started as 2 processes: say how they share the work"),
        (3, dict(zero=1, context_parallel=2), "context_parallel must divide the number of processes, 3; got 2"),
    ],
)
def test_processes_that_do_not_fit_the_run(monkeypatch, tmp_path, size, change, said):
    monkeypatch.setattr(loop.World, "join", lambda device, alone: World(0, size))
    with pytest.raises(ValueError, match=said):
        train(replace(config(), **change), tmp_path / "out", console=Console(file=StringIO()))
    assert not (tmp_path / "out").exists()

"""The only place that writes DeepSpeed's configuration: every "auto" is resolved or refused, and nothing in it contradicts the run's."""

import copy
from typing import Any

from .config import Config

BUCKET = 500_000_000  # elements: DeepSpeed's own default, which a small model need not reserve
DEFAULTS = {  # what an "auto" means where the run has nothing to say: DeepSpeed's own numbers
    "zero_optimization.stage3_prefetch_bucket_size": 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
    "zero_optimization.stage3_max_live_parameters": 1_000_000_000,
    "zero_optimization.stage3_max_reuse_distance": 1_000_000_000,
    "zero_optimization.sub_group_size": 1_000_000_000,
    "zero_optimization.overlap_comm": None,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,  # we gather them ourselves
}
HEEDED = (  # sections that DeepSpeed and this loop understand alike; it would ignore any other, a misspelt one too, without a word
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler"),
    *("bf16", "fp16", "torch_autocast", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "checkpoint", "compile", "comms_logger"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "tensorboard", "wandb", "csv_monitor"),
)
OURS = {  # section: what makes it
    "optimizer": "AdamW with --lr, --weight-decay and the groups of linattn.train.optimizer",
    "scheduler": "--schedule, --warmup and --lr",
}


def stage_of(config: Config) -> int | None:
    """The ZeRO stage that --zero or the DeepSpeed file asks for; None: no DeepSpeed. ValueError if they disagree, or it is none."""
    given = (config.deepspeed.get("zero_optimization") or {}).get("stage", "auto") if config.deepspeed else "auto"
    if given == "auto":
        given = None
    if config.zero is not None and given is not None and given != config.zero:
        raise ValueError(f"zero_optimization.stage is {given!r} in the DeepSpeed config, zero {config.zero}: give one of them, or the same")
    stage = config.zero if given is None else given
    if stage is None and config.deepspeed:
        return 0
    if stage is not None and (stage not in (0, 1, 2, 3) or isinstance(stage, bool)):
        raise ValueError(f"zero must be a stage of DeepSpeed's ZeRO, 0, 1, 2 or 3; got {stage!r}")
    return stage


def resolve(config: Config, *, processes: int, parameters: int) -> dict[str, Any]:
    """The configuration DeepSpeed is given: the user's, with what the run decides filled in. No "auto" is left in it.

    ValueError for a value that contradicts the run's, an "auto" nothing is known for, and what would train wrongly without a word.
    """
    stage = stage_of(config) or 0
    bf16 = config.precision == "bfloat16"
    ways = processes // config.context_parallel
    if config.batch % (ways * config.accumulate):
        raise ValueError(
            f"batch must be a multiple of processes · accumulate, {ways} · {config.accumulate}, so that every micro-batch is as large; "
            f"got {config.batch}"
        )
    decided: dict[str, Any] = {
        "train_batch_size": config.batch * config.context_parallel,  # DeepSpeed counts a row once for every process that has a part of it
        "train_micro_batch_size_per_gpu": config.batch // (ways * config.accumulate),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip if stage else 0.0,  # at stage 0 the engine clips, which must know whether the norm is finite
        "bf16.enabled": bf16 and stage > 0,  # at stage 0 DeepSpeed's bf16 starts Adam a step late: there autocast takes its place
        "fp16.enabled": False,
        "torch_autocast.enabled": bf16 and stage == 0,
        "zero_optimization.stage": stage,
    }
    chosen = copy.deepcopy(config.deepspeed)
    _refuse(chosen, stage, config)
    for path, value in decided.items():
        _put(chosen, path, value, config)
    if bf16 and stage == 0:
        chosen["torch_autocast"]["dtype"] = "bfloat16"
    if not chosen["fp16"]["enabled"]:
        chosen["fp16"] = {"enabled": False}
    zero = chosen["zero_optimization"]
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(name, "auto") == "auto":
            zero[name] = min(BUCKET, max(parameters, 1))
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        chosen.setdefault("zero_force_ds_cpu_optimizer", False)  # ours is torch's AdamW, which needs nothing compiled
    for path, value in DEFAULTS.items():
        section, name = path.split(".")
        if chosen.get(section, {}).get(name) == "auto":
            chosen[section].pop(name) if value is None else chosen[section].update({name: value})
    if left := list(_autos(chosen)):
        raise ValueError(f'the DeepSpeed config has "auto" where nothing decides it: {", ".join(left)}; give a value, or leave it out')
    return chosen


def _refuse(given: dict, stage: int, config: Config) -> None:
    if strange := [name for name in given if name not in HEEDED]:
        raise ValueError(f"the DeepSpeed config has what nothing here heeds: {', '.join(strange)}; there are {list(HEEDED)}")
    zero = given.get("zero_optimization") or {}
    for name in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(name) or {}).get("device", "none")) not in ("none", "cpu"):
            raise ValueError(f'zero_optimization.{name}.device must be "cpu" or "none", for which nothing is compiled; got {device!r}')
    if given.get("zero_force_ds_cpu_optimizer"):
        raise ValueError("zero_force_ds_cpu_optimizer must be false: the optimizer is torch's AdamW, for which nothing is compiled")
    if stage == 0 and (given.get("data_types") or {}).get("grad_accum_dtype"):
        raise ValueError("data_types.grad_accum_dtype needs ZeRO stage 1, 2 or 3")
    for section, what in OURS.items():
        values = given.pop(section, None) or {}
        fixed = {name: value for name, value in values.get("params", {}).items() if value != "auto"}
        if section == "optimizer" and values.get("type", "AdamW") not in ("AdamW", "Adam"):
            raise ValueError(f"optimizer.type in the DeepSpeed config must be AdamW; got {values['type']!r}")
        if fixed:
            raise ValueError(f'{section}.params in the DeepSpeed config must be "auto", {what} decide them; got {fixed}')
    if (given.get("fp16") or {}).get("enabled") is True:
        raise ValueError("fp16 in the DeepSpeed config is not supported: its range is too small for states that add up; use bf16")
    if (given.get("bf16") or {}).get("enabled") is True and stage == 0:
        raise ValueError(
            "bf16 with ZeRO stage 0 starts Adam one step late in DeepSpeed: use stage 1, or leave bf16 to --precision bfloat16"
        )
    if (given.get("checkpoint") or {}).get("load_universal"):
        raise ValueError("checkpoint.load_universal in the DeepSpeed config is ours to set: resuming converts by itself where it must")


def _put(chosen: dict, path: str, value: Any, config: Config) -> None:
    """Set chosen[path], unless something else than "auto" or the same stands there."""
    *sections, name = path.split(".")
    for section in sections:
        chosen = chosen.setdefault(section, {})
    found = chosen.get(name, "auto")
    same = found == value or (path == "gradient_clipping" and found == config.clip) or (path == "bf16.enabled" and not value and not found)
    if found != "auto" and not same:
        raise ValueError(f'{path} is {found!r} in the DeepSpeed config, {value!r} by the run\'s own options: make it "auto", or the same')
    chosen[name] = value


def _autos(node: Any, path: str = "") -> Any:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _autos(value, f"{path}.{name}" if path else name)
    elif node == "auto":
        yield path

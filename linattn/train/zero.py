"""The only place that touches DeepSpeed: the engine of one process or many, with ZeRO 0 to 3. Imported only where it was asked for."""

import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import ds_config, estimate, optimizer
from .config import Config
from .engine import Engine, Outcome, checkpoint_activations, mean
from .tasks import Task
from .world import World

FOLDER = "zero"  # of a checkpoint: DeepSpeed's own files
CLASSES = (  # all that its files hold besides tensors and plain values
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # it warns where it has to guess
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            from deepspeed.ops import __compatible_ops__
    except ModuleNotFoundError as error:
        raise ValueError(f"DeepSpeed is not installed ({error}): pip install 'linattn[deepspeed]'") from None
    __compatible_ops__["deepspeed_shm_comm"] = False  # C++ it compiles at the start, a minute long, for a collective nobody here calls
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")  # two for each of its collectives
    warnings.filterwarnings("ignore", category=UserWarning, module=r"deepspeed\..*")
    return deepspeed


class ZeroEngine(Engine):
    """`Engine` over DeepSpeed: gradients averaged over the processes, optimizer state (1), gradients (2) and weights (3) shared out.

    A step is skipped in all processes where the norm over all of them is not finite: stages 1 to 3 do that in DeepSpeed, 0 here.
    """

    def __init__(self, task: Task, config: Config, device: torch.device, world: World):
        deepspeed = _deepspeed()
        self.task, self.config, self.device, self.world = task, config, device, world
        self.stage = ds_config.stage_of(config)
        deepspeed.init_distributed(auto_mpi_discovery=False)  # it finds the group that `World` has made
        shared = self.stage == 3 and not task.starts_whole
        if shared:
            with torch.device("meta"), torch.random.fork_rng(devices=()):
                bare = task.create()
        else:
            bare = task.create()
        self.parameters = sum(p.numel() for p in bare.parameters())
        self.flops_per_token = estimate.flops_per_token(bare, task.tokens_per_row)
        self.resolved = ds_config.resolve(config, processes=world.size, parameters=self.parameters)
        with deepspeed.zero.Init(config_dict_or_path=self.resolved, enabled=shared):
            model = task.create() if shared else bare
        if config.context_parallel > 1:
            if not hasattr(model, "shard_sequence"):
                raise ValueError(f"context_parallel must be 1 for a {type(model).__name__}, which cannot be given part of a sequence")
            model.shard_sequence(world.neighbours(config.context_parallel), config.context_parallel_by)  # type: ignore[operator]
        if config.checkpoint_activations:
            checkpoint_activations(model)
        made = optimizer.make(model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=made, config=self.resolved, dist_init_required=False)
        self.engine.checkpoint_engine = _files(self.engine)
        self.model, self.called = self.engine.module, self.engine
        if config.compile:
            self.engine.compile()

    def step(self, step: int, lr: float) -> Outcome:
        self.engine.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        micro = self._micro_batches(step)
        shares, total = self._shares(micro), torch.zeros((), device=self.device)
        for i, (batch, share) in enumerate(zip(micro, shares, strict=True)):
            loss = mean(self._on_device(self.task.losses, batch), share)
            total = total + loss.detach() / len(micro)
            # a loss that is not finite makes no gradient finite, which all processes then see in their common norm
            self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
            norm = self._clipped() if self.stage == 0 and i == len(micro) - 1 else None
            self.engine.step()
        mean_loss = self.world.sum(float(total))[0] / self.world.size
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        return Outcome(mean_loss, norm, not (math.isfinite(mean_loss) and math.isfinite(norm)))

    def save(self, folder: Path) -> None:
        """All processes: DeepSpeed's files, each its own, and the first the model as one would without DeepSpeed."""
        import deepspeed

        self.engine.checkpoint_engine.error = None
        self.engine.save_checkpoint(str(folder), tag=FOLDER, save_latest=False)
        whole = list(self.model.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(whole, enabled=self.stage == 3):
            if self.world.first:
                self.model.save_pretrained(folder)  # type: ignore[operator]
        if self.engine.checkpoint_engine.error is not None:
            raise self.engine.checkpoint_engine.error

    def restore(self, folder: Path, *, processes: int = 1) -> None:
        """Put everything back where `save` left it. Saved by another number of processes, it is converted on the way, beside the run."""
        tag, beside = FOLDER, folder.parent / f".{folder.name}.universal"
        universal = processes != self.world.size and self.stage != 0  # at stage 0 the first process has written all there is
        if universal:
            tag = "converted"
            _all_or_none(self.world, lambda: _convert(folder / FOLDER, beside / tag), only_first=True)
        ours = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        self.engine._config.load_universal_checkpoint = universal
        try:
            found, _ = self.engine.load_checkpoint(str(beside if universal else folder), tag=tag, load_lr_scheduler_states=False)
        finally:
            self.engine._config.load_universal_checkpoint = False
            self.world.barrier()
            if universal and self.world.first:
                shutil.rmtree(beside, ignore_errors=True)
        # DeepSpeed 0.19.8 gives all groups the first one's weight decay, and at stage 3 all of them one and the same step counter
        for group, settings in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(settings)
        for state in self._adam().state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        if found is None:
            raise ValueError(f"{folder} holds nothing that DeepSpeed can go on from")

    def _adam(self) -> torch.optim.Optimizer:
        """torch's optimizer, inside DeepSpeed's or by itself."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _clipped(self) -> float:
        """Norm of the averaged gradients; they are clipped to `config.clip`, or dropped if it is not finite: None is not stepped on."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not torch.isfinite(norm):
            self.model.zero_grad(set_to_none=True)
        return float(norm)


def _files(engine: Any) -> Any:
    """How DeepSpeed reads and writes its files: nothing is unpickled but tensors and plain values, and a full disk stops no one alone."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Files(TorchCheckpointEngine):
        error: Exception | None = None

        def save(self, state_dict, path):
            try:
                super().save(state_dict, path)
            except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full; the others wait at a barrier
                self.error = error

        def load(self, path, map_location=None):
            with torch.serialization.safe_globals(_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)

    return Files(engine._config)


def _classes() -> list:
    from importlib import import_module

    return [getattr(import_module(module), name) for module, _, name in (path.rpartition(".") for path in CLASSES)]


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's universal format, which any number of processes can load. ValueError with its last words if it fails."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if name not in launcher}
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise ValueError(f"{source} cannot be converted for another number of processes: {(done.stderr.strip() or '?').splitlines()[-1]}")


def _convert_here(source: str, target: str) -> None:
    """DeepSpeed's own tool, in a process for nothing else: it asks to unpickle anything, and is given as little as `_files` is."""
    _deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    load = torch.load
    torch.load = lambda *args, **how: load(*args, **{**how, "weights_only": True})  # its workers are forks
    multiprocessing.set_start_method("fork")
    with torch.serialization.safe_globals(_classes()):
        sys.argv = ["ds_to_universal", "--inject_missing_state", "--input_folder", source, "--output_folder", target]
        ds_to_universal.main(ds_to_universal.parse_arguments())


def _all_or_none(world: World, call, *, only_first: bool) -> None:
    """Call, in the first process or in all; what goes wrong in one is raised in all."""
    error = None
    if world.first or not only_first:
        try:
            call()
        except (ValueError, OSError) as caught:
            error = caught
    for rank, wrong in enumerate(world.all(error and str(error))):
        if wrong:
            raise ValueError(f"process {rank}: {wrong}")


if __name__ == "__main__":
    _convert_here(*sys.argv[1:])

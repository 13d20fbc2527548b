"""The only place that knows of other processes: which one this is, and the few facts they tell each other on the way."""

import atexit
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)  # of any wait for another process; the first rank may be converting a checkpoint meanwhile


class World:
    """Process `rank` of `size`, the `local`-th on its machine. Alone, every question is answered at once and nothing is set up.

    What the processes tell each other goes over gloo, beside the collectives of the training: no GPU waits for a flag.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, group=None):
        self.rank, self.size, self.local, self.group = rank, size, local, group
        self.first = rank == 0
        self._launchers = _launchers()

    @classmethod
    def join(cls, device: str, *, alone: bool) -> "World":
        """The world that torchrun or the deepspeed launcher has set up: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        alone: a process without a launcher forms a group of its own too, which DeepSpeed needs.
        """
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        size = int(os.environ["WORLD_SIZE"]) if launched else 1
        if size == 1 and not alone:
            return cls()
        local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed looks there too
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if cuda:
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            backend = "nccl" if cuda else "gloo"
            if launched:
                dist.init_process_group(backend, timeout=TIMEOUT)
            else:
                dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size(), local, dist.new_group(backend="gloo", timeout=TIMEOUT) if cuda else None)

    def sum(self, *values: float) -> list[float]:
        """Each value, added up over the processes: the same bits in all of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def largest(self, value: int) -> int:
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def all(self, value) -> list:
        """Everyone's `value`, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value):
        """What `value` is in the first process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def neighbours(self, count: int):
        """The group of this process among groups of `count` in a row. All processes ask at once."""
        groups = [dist.new_group(range(i, i + count), timeout=TIMEOUT) for i in range(0, self.size, count)]
        return groups[self.rank // count]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    @property
    def orphaned(self) -> bool:
        """Whether the launcher that started this process is gone."""
        return self.size > 1 and _launchers() != self._launchers


def _launchers() -> tuple[int, ...]:
    """This process's parent; and where that is DeepSpeed's launcher, the runner that has started it, whose end it would not notice."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it is gone, or there is no /proc
        pass
    return (parent,)

"""The only place that knows what a training run can be told: one frozen dataclass, checked when made, stored as JSON."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .schedule import SCHEDULES

TOKENIZERS = ("bytes", "bpe")
REPORTS = ("tensorboard", "wandb")
PRECISIONS = ("float32", "bfloat16")
WAYS = ("state", "heads")
FREE_ON_RESUME = (
    "threads",
    "device",
    "backend",
    "eval_every",
    "save_every",
    "keep",
    "context_parallel",
    "context_parallel_by",
    "report",
)  # the rest defines the run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, whatever its task; what a task has no use for, it leaves alone.

    Two runs with equal configs, data and thread count give equal losses on a CPU.
    """

    # what is trained
    task: str = "decoder"  # a name in linattn.train.TASKS
    options: dict[str, object] = field(default_factory=dict)  # of the task's own, which it checks
    # the model
    preset: str = "tiny"
    variant: str = "gla"
    overrides: dict[str, object] = field(default_factory=dict)  # fields of the model's config set by name
    # the data
    data: tuple[str, ...] = ()  # files and folders, or one folder of `linattn data build`; none: the Python standard library
    tokenizer: str = "bytes"  # or "bpe", trained on the text, or a file of the package tokenizers
    vocab_size: int = 4096  # bpe only: bytes have 256 and an end of document
    packing: bool = False  # documents in a window do not see each other: states and convolutions start anew at each
    held_out: float = 0.05  # share of the documents kept for evaluation
    context: int = 512
    batch: int = 8  # rows per step, over all processes: windows of `context` tokens, images, …
    accumulate: int = 1  # micro-batches that a step's rows are taken in
    # the optimisation
    steps: int = 1000
    lr: float = 3e-3
    min_lr: float = 0.1  # the floor of the schedule, as a share of lr
    warmup: int = 50  # steps
    schedule: str = "cosine"
    cooldown: float = 0.2  # wsd only: share of the steps in which the rate falls
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm
    seed: int = 0
    # the machine
    precision: str = (
        "float32"  # bfloat16: autocast over float32 weights; under ZeRO 1 to 3 bfloat16 weights, their float32 originals in the optimizer
    )
    zero: int | None = None  # stage of DeepSpeed's ZeRO, 0 to 3; None: no DeepSpeed, unless `deepspeed` is given
    deepspeed: dict = field(default_factory=dict)  # a DeepSpeed configuration; see linattn.train.ds_config
    context_parallel: int = 1  # processes that share one sequence
    context_parallel_by: str = "state"  # what they tell each other: the "state" of their parts, or their "heads" of all tokens
    compile: bool = False  # torch.compile of the model
    checkpoint_activations: bool = False  # keep only what enters a block for the backward pass, and compute the rest again
    device: str = "auto"
    backend: str = "auto"
    threads: int = 0  # 0: torch's default
    # the records
    eval_every: int = 100
    eval_windows: int = 64
    save_every: int = 200
    keep: int = 2  # complete checkpoints kept
    report: tuple[str, ...] = ()  # besides log.csv: any of REPORTS

    def __post_init__(self):
        object.__setattr__(self, "data", tuple(str(path) for path in self.data))
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "report", tuple(self.report))
        if unknown := set(self.report) - set(REPORTS):
            raise ValueError(f"report must be of {list(REPORTS)}; got {sorted(unknown)}")
        if self.tokenizer not in TOKENIZERS and not self.tokenizer.endswith(".json"):
            raise ValueError(
                f"tokenizer must be one of {list(TOKENIZERS)}, or a .json file of the package tokenizers; got {self.tokenizer!r}"
            )
        for name, known in (("precision", PRECISIONS), ("context_parallel_by", WAYS), ("schedule", tuple(SCHEDULES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}; got {getattr(self, name)!r}")
        zero = dict(warmup=0, weight_decay=0, seed=0, threads=0)
        one = dict(context=1, batch=1, accumulate=1, context_parallel=1, steps=1, eval_every=1, eval_windows=1, save_every=1, keep=1)
        for name, least in (zero | one | dict(vocab_size=258)).items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("held_out", "cooldown"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)}")
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"min_lr is a share of lr and must lie in [0, 1]; got {self.min_lr}")
        if not isinstance(self.deepspeed, dict):
            raise ValueError(f"deepspeed must be the object of a DeepSpeed configuration; got {self.deepspeed!r}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate = {self.accumulate}; got {self.batch}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas}")

    def save(self, path: Path) -> None:
        beside = path.with_suffix(".tmp")
        try:
            beside.write_text(json.dumps(asdict(self), indent=2) + "\n")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "Config":
        """The config saved at `path`. ValueError if something else is there."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:  # of json, of the text's encoding, or our own
            raise ValueError(f"{path} is not the config of a linattn training run: {error}") from None

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        if not isinstance(values, dict):
            raise ValueError(f"a config must be an object; got {values!r}")
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"a config has no fields {sorted(unknown)}")
        return cls(**values)

    def differences(self, other: "Config") -> list[str]:
        """What keeps `other` from being the same run, one line for each field."""
        mine, theirs = asdict(self), asdict(other)
        fixed = [name for name in mine if name not in FREE_ON_RESUME]
        return [f"{name}: {mine[name]!r} here, {theirs[name]!r} asked" for name in fixed if mine[name] != theirs[name]]

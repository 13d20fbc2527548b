"""What is run on a GPU, and on what: forms, shapes and inputs, and each side's way to compute them. Timed by `gpu.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import linattn


@dataclass(frozen=True, kw_only=True)
class Form:
    decay: str
    delta: bool = False
    causal: bool = True
    normalize: bool = False

    @property
    def options(self) -> dict:
        gating = "target" if not self.causal and self.decay in ("scalar", "channel") else None
        return {"causal": self.causal, "gating": gating, "normalize": self.normalize, "check_values": False}


FORMS = {
    "scalar": Form(decay="scalar"),
    "none": Form(decay="none"),
    "head": Form(decay="head"),
    "channel": Form(decay="channel"),
    "delta": Form(decay="scalar", delta=True),
    "bidirectional none": Form(decay="none", causal=False, normalize=True),
    "bidirectional scalar": Form(decay="scalar", causal=False),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where it all runs, and on what shapes B T H D."""

    device: str
    dtype: torch.dtype
    long: tuple[tuple[int, ...], ...]  # the promised ones first
    longer: tuple[tuple[int, ...], ...]
    vision: tuple[tuple[int, ...], ...]
    crossing: tuple[tuple[int, ...], ...]  # where softmax attention is to be overtaken
    flush: int  # bytes written between calls: several second-level caches
    seconds: float  # per side

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


GPU = Stage(
    device="cuda", dtype=torch.bfloat16, flush=256 << 20, seconds=0.4,
    long=tuple((1, 32768, 16, D) for D in (64, 128)),
    longer=tuple((B, T, 16, D) for B, T in ((4, 32768), (1, 131072)) for D in (64, 128)),
    vision=tuple((65536 // T, T, 16, 64) for T in (197, 1024, 4096)),
    crossing=tuple((32768 // T, T, 16, D) for T, D in ((768, 64), (1024, 128))),
)  # fmt: skip
REHEARSAL = Stage(
    device="cpu", dtype=torch.bfloat16, flush=1 << 10, seconds=0.0,
    long=((1, 300, 1, 16), (1, 300, 1, 32)), longer=((2, 300, 1, 16),), vision=((1, 33, 2, 16),), crossing=((1, 40, 1, 16),),
)  # fmt: skip
CALLS = ("forward", "forward+backward")


def inputs(stage: Stage, form: Form, B: int, T: int, H: int, D: int, seed: int = 0) -> list[Tensor | None]:
    """q, k, v, log_decay, beta, do."""
    dtype, draw = stage.dtype, torch.Generator(stage.device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, device=stage.device)
    q, k = (F.normalize(normal(B, T, H, D), dim=-1) for _ in range(2))
    if form.normalize:
        q, k = q.abs(), k.abs()
    decays = {
        "none": lambda: None,
        "head": lambda: torch.log1p(-(2.0 ** (-5 - torch.arange(H, device=stage.device, dtype=torch.float32)))),
        "scalar": lambda: F.logsigmoid(normal(B, T, H)) / 16,
        "channel": lambda: F.logsigmoid(normal(B, T, H, D)) / 16,
    }
    beta = torch.sigmoid(normal(B, T, H)) if form.delta else None
    return [q.to(dtype), k.to(dtype), normal(B, T, H, D).to(dtype), decays[form.decay](), beta, normal(B, T, H, D).to(dtype)]


def ours(form: Form, backend: str = "triton") -> Callable[..., Tensor]:
    return lambda q, k, v, g, b: linattn.linear_attention(q, k, v, g, b, **form.options, backend=backend)[0]


def flipped(causal: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Both sides by a causal kernel on the sequence and on its flip."""

    def both(q, k, v, g, b):
        turned = [None if x is None else x.flip(1) if x.ndim > 1 else x for x in (q, k, v, g, b)]
        return causal(q, k, v, g, b) + causal(*turned).flip(1)

    return both


def fla(form: Form) -> Callable[..., Tensor]:
    """fla's kernel for the form; bidirectional forms by its causal kernel, flipped. Raises what fla raises."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if form.delta:
        return lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b)[0]
    if form.decay == "channel":
        return lambda q, k, v, g, b: chunk_gla(q, k, v, g)[0]
    if form.decay == "head":
        simple = lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g_gamma=g)[0]
    else:
        simple = lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g)[0]
    return simple if form.causal else flipped(simple)


def softmax(backend: str, causal: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q, k, v, g, b):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)

    return run


def floor_bytes(form: Form, call: str, B: int, T: int, H: int, D: int) -> int:
    """Every input read once, every output written once: forward 4 rows, backward 7 more, and the gates."""
    gate = {"none": 0, "head": 0, "scalar": 4, "channel": 4 * D}[form.decay] + 4 * form.delta
    rows = 2 * D
    return B * T * H * ((4 * rows + gate) + (call != "forward") * (7 * rows + 2 * gate))


def run_of(f: Callable[..., Tensor], call: str, sets: list[list]) -> list[Callable[[], object]]:
    """The call on each set of inputs."""

    def one(tensors, do):
        if call == "forward":
            return lambda: f(*tensors)
        leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
        wanted = [x for x in leaves if x is not None]
        return lambda: torch.autograd.grad(f(*leaves), wanted, do, allow_unused=True)

    return [one(tensors, do) for *tensors, do in sets]


def peers(name: str, shape: tuple) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    form, T = FORMS[name], shape[1]
    found = {"triton": lambda: ours(form), "fla": lambda: fla(form)}
    if not form.causal:
        found["flipped twice"] = lambda: flipped(ours(Form(decay=form.decay)))
    if T <= 32768 and name in ("scalar", "bidirectional none"):
        found |= {backend: lambda backend=backend: softmax(backend, form.causal) for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION")}
    return found


def copy_of(stage: Stage, size: int) -> list[Callable[[], object]]:
    """Reads and writes of `size` bytes in all."""
    source, into = torch.empty(2, size // 2, dtype=torch.int8, device=stage.device).unbind()
    return [lambda: into.copy_(source)]

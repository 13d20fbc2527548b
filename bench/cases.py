"""The table of what is measured: forms of the operator, sizes, and the inputs they are given."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

B, H, K, V = 1, 8, 64, 64
LENGTHS = (256, 1024, 4096, 16384, 65536)
STEPS = (8, 64, 512)  # B · H of the decoding calls
CALLS = ("forward", "forward+backward")


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to call the operator."""

    decay: str = "scalar"  # none | head | scalar | channel
    delta: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.float32

    def options(self) -> dict:
        return {} if self.causal else {"causal": False, "gating": "source"}


FORMS = {
    "none": Form(decay="none"),
    "head": Form(decay="head"),
    "scalar": Form(),
    "channel": Form(decay="channel"),
    "delta": Form(delta=True),  # with a scalar decay: the gated delta rule, the heavier of the two
    "bidirectional": Form(causal=False),
    "bf16": Form(dtype=torch.bfloat16),
}
STEP_FORMS = ("none", "scalar", "channel", "delta")


@dataclass(frozen=True)
class Inputs:
    """Tensors of one size in every kind a form may ask for; queries and keys of length 1, gates as trained models have them."""

    q: Tensor  # [B T H K]
    k: Tensor  # [B T H K]
    v: Tensor  # [B T H V]
    head: Tensor  # [H]         1 − 2^(−5−h), RetNet
    scalar: Tensor  # [B T H]   sigmoid^(1/16), GLA
    channel: Tensor  # [B T H K]
    beta: Tensor  # [B T H]
    do: Tensor  # [B T H V]     gradient of the output

    @staticmethod
    def create(*, B: int, T: int, H: int = H, K: int = K, V: int = V, seed: int = 0) -> "Inputs":
        g = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=g)
        return Inputs(
            q=F.normalize(normal(B, T, H, K), dim=-1),
            k=F.normalize(normal(B, T, H, K), dim=-1),
            v=normal(B, T, H, V),
            head=torch.log1p(-(2.0 ** (-5 - torch.arange(H, dtype=torch.float32)))),
            scalar=F.logsigmoid(normal(B, T, H)) / 16,
            channel=F.logsigmoid(normal(B, T, H, K)) / 16,
            beta=torch.sigmoid(normal(B, T, H)),
            do=normal(B, T, H, V),
        )

    def of(self, form: Form) -> tuple[Tensor | None, ...]:
        """q, k, v, log_decay, beta as `form` takes them."""
        q, k, v = (x.to(form.dtype) for x in (self.q, self.k, self.v))
        log_decay = None if form.decay == "none" else getattr(self, form.decay)
        return q, k, v, log_decay, self.beta if form.delta else None


def counted_flops(T: int, *, B: int = B, H: int = H, K: int = K, V: int = V) -> int:
    """FLOPs of a causal forward with chunks of 32, per token and head: 4KV to read and write the state, 2·32·(K+V) inside the chunk."""
    return B * T * H * (4 * K * V + 2 * 32 * (K + V))

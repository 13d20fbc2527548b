"""Our kernels beside fla's own, both in the interpreter. Run by test_triton_kernels.py, which turns the interpreter on."""

import warnings

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from bench.interpreter import run_autotuned, widen_bfloat16

widen_bfloat16()
run_autotuned()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fla's, on a machine without a GPU
    import fla.utils
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

import linattn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
B, T, H, K, V = 1, 80, 2, 16, 16


def draw(*shape):
    return torch.randn(shape)


def retention_gate():
    return torch.log(1 - 2.0 ** (-5 - torch.arange(H)))


NORMALIZED = {"normalize": True, "eps": 1e-10}
CASES = {
    "simple_gla": (lambda q, k, v, g, b: chunk_simple_gla(q, k, v, g), lambda: logsigmoid(draw(B, T, H)), None, {}),
    "retention": (lambda q, k, v, g, b: chunk_retention(q, k, v), retention_gate, None, {}),
    "gla": (lambda q, k, v, g, b: chunk_gla(q, k, v, g), lambda: logsigmoid(draw(B, T, H, K)), None, {}),
    "linear_attn": (lambda q, k, v, g, b: chunk_linear_attn(q, k, v, normalize=True), lambda: None, None, NORMALIZED),
    "gated_delta_rule": (
        lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b), lambda: logsigmoid(draw(B, T, H)), lambda: torch.rand(B, T, H), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_as_fla(name, monkeypatch):
    monkeypatch.setattr(fla.utils, "device", "cpu")
    theirs, gate, beta, options = CASES[name]
    q, k, v, do = draw(B, T, H, K), normalize(draw(B, T, H, K), dim=-1), draw(B, T, H, V), draw(B, T, H, V)
    if options:
        q, k = q.abs(), k.abs()
    g, b = gate(), None if beta is None else beta()
    learnt = [x for x in (q, k, v, g if g is not None and g.ndim > 1 else None, b) if x is not None]
    results = []
    for side in (theirs, lambda q, k, v, g, b: linattn.linear_attention(q, k, v, g, b, backend="triton", **options)):
        for x in learnt:
            x.grad = None
            x.requires_grad_()
        o = side(q, k, v, g, b)[0]
        o.backward(do)
        results.append([o.detach()] + [x.grad.clone() for x in learnt])
    for theirs_, ours in zip(*results, strict=True):
        assert ((ours - theirs_).norm() / theirs_.norm()).item() < 1e-5

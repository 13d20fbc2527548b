"""Every bad argument of the operator and of its step, and the words in which it is refused, before any work starts."""

import re

import pytest
import torch
from cases import PRESENT, Case, call

import linattn
from linattn import State

NAN = float("nan")
f = torch.zeros  # a tensor of a given shape; values do not matter
B, T, H, K, V = 2, 5, 2, 4, 3
GOOD = {"q": f(B, T, H, K), "k": f(B, T, H, K), "v": f(B, T, H, V)}
ONE = {"q": f(1, T, H, K), "k": f(1, T, H, K), "v": f(1, T, H, V)}  # B = 1, for packed calls
ends = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype)

# what is changed in a good call, and how the message begins
BAD = {
    # tensors
    "not a tensor": ({"q": [1.0]}, "q must be a torch.Tensor; got list"),
    "missing": ({"v": None}, "v must be a torch.Tensor; got NoneType"),
    "number for a decay": ({"log_decay": -0.1}, "log_decay must be a torch.Tensor or None; got float"),
    "number for beta": ({"beta": 1}, "beta must be a torch.Tensor or None; got int"),
    "list of ends": ({"cu_seqlens": [0, T]}, "cu_seqlens must be a torch.Tensor or None; got list"),
    "rank of q": ({"q": f(T, H, K)}, "q must be [B T H K], of 4 dimensions; got shape (5, 2, 4)"),
    "rank of v": ({"v": f(B, T, H, V, 1)}, "v must be [B T H V], of 4 dimensions; got shape (2, 5, 2, 3, 1)"),
    "T of k": ({"k": f(B, 6, H, K)}, "k must be [B T H K] = (2, 5, 2, 4) to go with q (2, 5, 2, 4); got (2, 6, 2, 4)"),
    "K of k": ({"k": f(B, T, H, 8)}, "k must be [B T H K] = (2, 5, 2, 4) to go with q (2, 5, 2, 4); got (2, 5, 2, 8)"),
    "B of v": ({"v": f(1, T, H, V)}, "v must be [B T H V] = (2, 5, 2, 3) to go with k (2, 5, 2, 4); got (1, 5, 2, 3)"),
    "heads of v": ({"v": f(B, T, 1, V)}, "v must be [B T H V] = (2, 5, 2, 3) to go with k (2, 5, 2, 4); got (2, 5, 1, 3)"),
    "heads of q": ({"q": f(B, T, 3, K)}, "q must have a multiple of the 2 heads of k and v; got 3 heads"),
    "fewer heads of q": ({"q": f(B, T, 1, K)}, "q must have a multiple of the 2 heads of k and v; got 1 heads"),
    "no heads": ({"k": f(B, T, 0, K), "v": f(B, T, 0, V)}, "heads and widths must be at least 1; got q (2, 5, 2, 4), k (2, 5, 0, 4)"),
    "no width": ({"v": f(B, T, H, 0)}, "heads and widths must be at least 1"),
    "integers": ({name: x.long() for name, x in GOOD.items()}, "q must be float64, float32, bfloat16 or float16; got torch.int64"),
    "complex": ({name: x.cfloat() for name, x in GOOD.items()}, "q must be float64, float32, bfloat16 or float16; got torch.complex64"),
    "mixed dtypes": ({"v": GOOD["v"].bfloat16()}, "v must have the dtype of q, torch.float32; got torch.bfloat16"),
    "mixed devices": ({"k": GOOD["k"].to("meta")}, "k must be on the device of q, cpu; got meta"),
    "decay elsewhere": ({"log_decay": f(H, device="meta")}, "log_decay must be on the device of q, cpu; got meta"),
    "beta elsewhere": ({"beta": f(B, T, H, device="meta")}, "beta must be on the device of q, cpu; got meta"),
    # log_decay, beta
    "shape of the decay": (
        {"log_decay": f(B, T)}, "log_decay must be None, [H] = (2,), [B T H] = (2, 5, 2) or [B T H K] = (2, 5, 2, 4); got (2, 5)"
    ),
    "decay of a single head": ({"log_decay": f(B, T, 1)}, "log_decay must be None, [H]"),
    "decay of values": ({"log_decay": f(B, T, H, V)}, "log_decay must be None, [H]"),
    "integer decay": ({"log_decay": f(H).long()}, "log_decay must be of a floating dtype; got torch.int64"),
    "positive decay": (
        {"log_decay": torch.tensor([-1.0, 0.25])}, "log_decay must be <= 0, a natural logarithm of a decay in (0, 1]; its largest"
    ),
    "shape of beta": ({"beta": f(B, T)}, "beta must be [B T H] = (2, 5, 2) to go with k (2, 5, 2, 4); got (2, 5)"),
    "beta of a channel": ({"beta": f(B, T, H, K)}, "beta must be [B T H] = (2, 5, 2)"),
    "integer beta": ({"beta": f(B, T, H).int()}, "beta must be of a floating dtype; got torch.int32"),
    # cu_seqlens
    "packed with B = 2": ({"cu_seqlens": ends(0, 5)}, "cu_seqlens needs the sequences packed into one row, B = 1; got q (2, 5, 2, 4)"),
    "floating ends": (
        ONE | {"cu_seqlens": f(2)}, "cu_seqlens must be [N+1] int32 or int64 with N >= 1; got shape (2,), torch.float32"
    ),
    "rank of ends": (ONE | {"cu_seqlens": ends(0, 5)[None]}, "cu_seqlens must be [N+1] int32 or int64 with N >= 1; got shape (1, 2)"),
    "one end": (ONE | {"cu_seqlens": ends(0)}, "cu_seqlens must be [N+1] int32 or int64 with N >= 1; got shape (1,)"),
    "short ends": (ONE | {"cu_seqlens": ends(0, 4)}, "cu_seqlens must run from 0 to T = 5; got 0 to 4"),
    "long ends": (ONE | {"cu_seqlens": ends(0, 2, 6)}, "cu_seqlens must run from 0 to T = 5; got 0 to 6"),
    "late start": (ONE | {"cu_seqlens": ends(1, 5)}, "cu_seqlens must run from 0 to T = 5; got 1 to 5"),
    "falling ends": (ONE | {"cu_seqlens": ends(0, 4, 3, 5)}, "cu_seqlens must not decrease; got [0, 4, 3, 5]"),
    "ends out of range": (ONE | {"cu_seqlens": ends(0, 9, 5, dtype=torch.int32)}, "cu_seqlens must not decrease; got [0, 9, 5]"),
    "negative ends": (ONE | {"cu_seqlens": ends(0, -1, 5)}, "cu_seqlens must not decrease; got [0, -1, 5]"),
    "ends elsewhere": (ONE | {"cu_seqlens": ends(0, 5).to("meta")}, "cu_seqlens must be on the device of q, cpu; got meta"),
    # options
    "gating needed, scalar": (
        {"causal": False, "log_decay": f(B, T, H)},
        "gating must be chosen from ['source', 'target', 'symmetric'] where causal=False and log_decay varies in time",
    ),
    "gating needed, channel": ({"causal": False, "log_decay": f(B, T, H, K)}, "gating must be chosen from"),
    "unknown gating": (
        {"causal": False, "gating": "left"}, "gating must be one of ['source', 'target', 'symmetric']; got 'left'"
    ),
    "gating where causal": ({"gating": "source"}, "gating is a convention of bidirectional calls, causal=False; got gating='source'"),
    "unknown normaliser": ({"normalize": "max"}, "normalize must be False, True, 'sum' or 'clamp'; got 'max'"),
    "eps no number": ({"eps": "small"}, "eps must be a number; got str"),
    "scale no number": ({"scale": f(1)}, "scale must be a number; got Tensor"),
    "offset no number": ({"offset": None}, "offset must be a number; got NoneType"),
    "offset with a channel decay": ({"offset": 1.0, "log_decay": f(B, T, H, K)}, "offset has no meaning with beta or with a channel"),
    "offset with the delta rule": ({"offset": 1.0, "beta": f(B, T, H)}, "offset has no meaning with beta or with a channel log_decay"),
    "offset without scale": ({"offset": 1.0, "scale": 0.0}, "scale must not be 0 where offset is given"),
    "unknown record": ({"record": ("states",)}, "record must be a sequence of names out of ['boundaries', 'writes']; got ('states',)"),
    "record a word": ({"record": "writes"}, "record must be a sequence of names out of ['boundaries', 'writes']; got 'writes'"),
    "record nothing": ({"record": None}, "record must be a sequence of names out of ['boundaries', 'writes']; got None"),
    "odd stride": ({"stride": 24}, "stride must be a positive multiple of 16; got 24"),
    "no stride": ({"stride": 0}, "stride must be a positive multiple of 16; got 0"),
    "negative stride": ({"stride": -16}, "stride must be a positive multiple of 16; got -16"),
    "broken stride": ({"stride": 16.0}, "stride must be a positive multiple of 16; got 16.0"),
    "unknown backend": ({"backend": "cudnn"}, f"backend must be 'auto' or one of {list(linattn.BACKENDS)}; got 'cudnn'"),
    # initial_state
    "a tensor for a state": ({"initial_state": f(B, H, K, V)}, "initial_state must be a linattn.State(kv, z); got Tensor"),
    "a state of no tensor": ({"initial_state": State(None)}, "initial_state.kv must be a torch.Tensor; got NoneType"),
    "shape of the state": ({"initial_state": State(f(B, H, V, K))}, "initial_state.kv must be [B H K V] = (2, 2, 4, 3); got (2, 2, 3, 4)"),
    "one state for two sides": (
        {"causal": False, "initial_state": State(f(B, H, K, V))}, "initial_state.kv must be [2 B H K V] = (2, 2, 2, 4, 3); got (2, 2, 4, 3)"
    ),
    "states of packed sequences": (
        ONE | {"cu_seqlens": ends(0, 2, 4, 5), "initial_state": State(f(1, H, K, V))},
        "initial_state.kv must be [B H K V] = (3, 2, 4, 3); got (1, 2, 4, 3)",
    ),
    "z missing": ({"normalize": True, "initial_state": State(f(B, H, K, V))}, "initial_state.z must be given with normalize='sum'"),
    "z not wanted": ({"initial_state": State(f(B, H, K, V), f(B, H, K))}, "initial_state.z must be None with normalize='none'"),
    "shape of z": (
        {"normalize": True, "initial_state": State(f(B, H, K, V), f(B, H, V))}, "initial_state.z must be [B H K] = (2, 2, 4); got (2, 2, 3)"
    ),
    "integer state": ({"initial_state": State(f(B, H, K, V).int())}, "initial_state.kv must be floating, on cpu; got torch.int32 on cpu"),
    "state elsewhere": ({"initial_state": State(f(B, H, K, V, device="meta"))}, "initial_state.kv must be floating, on cpu; got"),
    "state without the constant's row": (
        {"offset": 1.0, "initial_state": State(f(B, H, K, V))}, "initial_state.kv must be [B H K V] = (2, 2, 5, 3); got (2, 2, 4, 3)"
    ),
}  # fmt: skip

STEP = {"q": f(B, H, K), "k": f(B, H, K), "v": f(B, H, V), "state": State(f(B, H, K, V))}
BAD_STEP = {
    "not a tensor": ({"q": 1.0}, "q must be a torch.Tensor; got float"),
    "number for a decay": ({"log_decay": -0.1}, "log_decay must be a torch.Tensor or None; got float"),
    "a time axis": ({"q": f(B, 1, H, K)}, "q must be [B H K], of 3 dimensions: one token; got shape (2, 1, 2, 4)"),
    "rank of v": ({"v": f(B, V)}, "v must be [B H V], of 3 dimensions: one token; got shape (2, 3)"),
    "shape of k": ({"k": f(B, H, 5)}, "k must be [B T H K] = (2, 1, 2, 4)"),
    "shape of v": ({"v": f(3, H, V)}, "v must be [B T H V] = (2, 1, 2, 3)"),
    "heads of q": ({"q": f(B, 3, K)}, "q must have a multiple of the 2 heads"),
    "mixed dtypes": ({"k": f(B, H, K).half()}, "k must have the dtype of q, torch.float32; got torch.float16"),
    "mixed devices": ({"v": f(B, H, V, device="meta")}, "v must be on the device of q, cpu; got meta"),
    "shape of the decay": ({"log_decay": f(B, K)}, "log_decay must be None, [H] = (2,), [B T H] = (2, 1, 2)"),
    "shape of beta": ({"beta": f(H)}, "beta must be [B T H] = (2, 1, 2)"),
    "no state": ({"state": None}, "state must be a linattn.State(kv, z); got NoneType"),
    "a tensor for a state": ({"state": f(B, H, K, V)}, "state must be a linattn.State(kv, z); got Tensor"),
    "a state of no tensor": ({"state": State(None)}, "state.kv must be a torch.Tensor; got NoneType"),
    "shape of the state": ({"state": State(f(B, H, V, K))}, "initial_state.kv must be [B H K V] = (2, 2, 4, 3); got (2, 2, 3, 4)"),
    "state of two sides": ({"state": State(f(2, B, H, K, V))}, "initial_state.kv must be [B H K V] = (2, 2, 4, 3)"),
    "z missing": ({"normalize": "clamp"}, "initial_state.z must be given with normalize='clamp'"),
    "z not wanted": ({"state": State(f(B, H, K, V), f(B, H, K))}, "initial_state.z must be None with normalize='none'"),
    "shape of z": (
        {"normalize": True, "state": State(f(B, H, K, V), f(B, H, 1))},
        "initial_state.z must be [B H K] = (2, 2, 4); got (2, 2, 1)",
    ),
    "unknown normaliser": ({"normalize": "max"}, "normalize must be False, True, 'sum' or 'clamp'; got 'max'"),
    "unknown backend": ({"backend": "cudnn"}, f"backend must be 'auto' or one of {list(linattn.BACKENDS)}; got 'cudnn'"),
    "offset with the delta rule": ({"offset": 1.0, "beta": f(B, H)}, "offset has no meaning with beta"),
    "eps in words": ({"eps": "1e-6"}, "eps must be a number; got str"),
    "scale of one number": ({"scale": f(1)}, "scale must be a number; got Tensor"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_linear_attention_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        linattn.linear_attention(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "message"), BAD_STEP.values(), ids=BAD_STEP)
def test_step_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        linattn.step(**{**STEP, **change})


def test_the_good_calls_are_good():
    linattn.linear_attention(**GOOD)
    linattn.linear_attention(**ONE, cu_seqlens=ends(0, 0, 5, 5))
    linattn.step(**STEP)


def test_nothing_swallows_a_misspelt_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'normalise'"):
        linattn.linear_attention(**GOOD, normalise=True)
    with pytest.raises(TypeError, match="positional"):
        linattn.linear_attention(*GOOD.values(), None, None, True)


# -- refusals, names --------------------------------------------------------------------------------------------------------------------


def test_a_refusal_gives_the_reason_and_the_call():
    half = {name: x.half() for name, x in GOOD.items()}
    with pytest.raises(linattn.Refusal) as refused:
        linattn.linear_attention(**half, backend="cpu")
    words = "no backend takes this call\n  device=cpu dtype=float16 decay=none delta=False causal=True K=4 V=3\n  cpu: "
    assert str(refused.value).startswith(words)
    assert isinstance(refused.value, ValueError)


def test_a_refusal_gives_every_reason(monkeypatch):
    for name, backend in linattn.ops.backends.BY_NAME.items():
        monkeypatch.setattr(backend, "why_not", lambda call, name=name: f"K={call.K} is more than {name} takes")
    narrow = {name: x[..., :2] for name, x in GOOD.items()}
    with pytest.raises(linattn.Refusal) as refused:
        linattn.linear_attention(**narrow)
    for name in linattn.BACKENDS:
        assert f"\n  {name}: K=2 is more than {name} takes" in str(refused.value)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=re.escape(f"name must be one of {list(linattn.BACKENDS)}; got 'cudnn'")):
        linattn.why_not("cudnn")


def test_the_last_backends_run_anywhere():
    assert linattn.why_not("eager") is None
    assert linattn.why_not("reference") is None
    assert linattn.why_not("cpu") is None or "built" in linattn.why_not("cpu") or "load" in linattn.why_not("cpu")


# -- values are looked at only where that costs no wait ---------------------------------------------------------------------------------


def test_values_are_not_looked_at_on_request():
    o, _ = linattn.linear_attention(**GOOD, log_decay=torch.full((H,), 0.5), check_values=False)
    assert o.shape == (B, T, H, V)


def test_nan_is_no_bad_value():
    o, _ = linattn.linear_attention(**GOOD, log_decay=torch.tensor([NAN, -1.0]))
    assert o[:, :, 0].isnan().any() and o[:, :, 1].isfinite().all()


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(B, T, backend):
    tensors, options = Case(B=B, T=T, decay="channel", delta=True, groups=2).inputs()
    out = call(tensors, options, backend)
    assert out["o"].shape == (B, T, 4, 6)
    assert torch.equal(out["state.kv"], tensors["kv"])

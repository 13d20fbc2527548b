"""What must not matter: dirty memory, the number of threads, decays without end, a NaN elsewhere."""

import pytest
import torch
from cases import BACKEND, PRESENT, SOME, Case, all_agree, call, cotangent, some, whole

NOT_REFERENCE = pytest.mark.parametrize("backend", [name for name in PRESENT if name != "reference"])


def soil():
    """Leave NaN behind in the memory that the next allocations will get."""
    for n in (1, 8, 64, 512, 4096, 2**15, 2**18, 2**21):
        dirt = [torch.full((n,), torch.nan) for _ in range(8)]
        del dirt


@BACKEND
@some(SOME + [Case(T=700, B=1, H=1, record=("boundaries", "writes")), Case(T=300, dtype=torch.bfloat16, packed=True)])
def test_same_bits_twice(case, backend):
    """Whatever lies in the memory that the second run is given."""
    first = whole(case, backend)
    soil()
    second = whole(case, backend)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@NOT_REFERENCE
@some([Case(T=1000, B=1, H=1), Case(T=1000, B=1, H=1, decay="channel", delta=True), Case(T=1000, B=1, H=3, direction="source")])
def test_number_of_threads_changes_rounding_only(case, backend):
    threads, answers = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            answers.append(whole(case, backend))
    finally:
        torch.set_num_threads(threads)
    all_agree(answers[1], answers[0])
    all_agree(answers[2], answers[0])


@NOT_REFERENCE
@pytest.mark.parametrize("strength", [30.0, 1e4, torch.inf])
@some([case for case in SOME if case.decay != "none"], T=70)
def test_strong_decays_forget_and_stay_finite(case, strength, backend):
    """Every third token forgets by `strength`, in a channel decay half of its channels; float32 clocks keep three digits beside it."""
    tensors, options = case.inputs()
    log_decay = tensors["log_decay"]
    strong = log_decay[1:] if case.decay == "head" else log_decay[:, ::3, :, ::2] if case.decay == "channel" else log_decay[:, ::3]
    strong.fill_(-strength)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}
    answers = []
    for name in (backend, "reference"):
        out = call(leaves, options, name)
        grads = torch.autograd.grad(
            [out["o"], out["state.kv"]], [x for x in leaves.values() if x is not None],
            [cotangent("o", out["o"], case.dtype), cotangent("kv", out["state.kv"], case.dtype)],
        )  # fmt: skip
        answers.append(out | {f"d{i}": grad for i, grad in enumerate(grads)})
    assert all(x.isfinite().all() for x in answers[1].values())
    all_agree(*answers, slack=1e4)


@BACKEND
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "log_decay", "beta"])
@pytest.mark.parametrize(
    "case",
    [
        Case(decay=decay, delta=delta, direction=direction, T=90, packed=packed, dtype=torch.float32)
        for decay, delta, direction, packed in (
            ("scalar", False, "causal", False), ("channel", True, "causal", False), ("channel", False, "causal", True),
            ("scalar", True, "target", False), ("channel", False, "source", True),
        )
    ],
    ids=str,
)  # fmt: skip
def test_nan_stays_in_its_sequence_and_head(case, poisoned, backend):
    """It passes through to its own token, and reaches no other sequence or head, nor (causal) a chunk before its own; nor do gradients."""
    tensors, options = case.inputs()
    if tensors[poisoned] is None:
        tensors["beta"] = torch.rand(tensors["k"].shape[:3])
    at = 70  # packed: in the third of six sequences, tokens 31 to 89
    spoilt = tensors | {poisoned: tensors[poisoned].clone()}
    spoilt[poisoned][0, at, 1] = torch.nan
    first = (31 if case.packed else 0) if not case.causal else at if backend == "reference" else 31 if case.packed else 64
    reached = torch.zeros(tensors["k"].shape[:3], dtype=torch.bool)
    reached[0, first:, 1] = True
    answers = []
    for given in (tensors, spoilt):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items() if name in "qkv"}
        out = call(given | leaves, options, backend)["o"]
        out.sum().backward()
        answers.append({"o": out.detach()} | {name: x.grad for name, x in leaves.items()})
    clean, dirty = answers
    assert dirty["o"][0, at : at + 2, 1].isnan().any()  # "source": the gate is paid by the token after
    assert torch.equal(clean["o"][~reached], dirty["o"][~reached])
    mine = torch.zeros_like(reached)  # a gradient comes from the tokens after, so all of the sequence is reached
    mine[0, 31 if case.packed else 0 :, 1] = True
    for name in ("q", "k", "v"):
        assert torch.equal(clean[name][~mine], dirty[name][~mine]), name

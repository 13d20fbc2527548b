"""The run itself, on sizes that take no time: what is timed, what is left out and why, and the command that starts it."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import linattn
from bench import cpu, machine, memory, peers
from bench.__main__ import app
from bench.cases import CALLS, FORMS, Inputs
from bench.timing import Budget

TINY = Budget(seconds=1e-4, least=1, most=2, patience=1.0, cap=4.0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(peers, "MM", 64)
    monkeypatch.setattr(peers, "RING", 1 << 18)


def backend(monkeypatch, reason):
    """Backend cpu as it is on a machine that has it (reason None, played by eager) or has not."""
    monkeypatch.setattr(linattn, "why_not", lambda name: reason)
    if reason is None:
        real = linattn.linear_attention
        play = lambda *tensors, backend, **options: real(*tensors, backend="eager" if backend == "cpu" else backend, **options)
        monkeypatch.setattr(linattn, "linear_attention", play)


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_what_they_say(form):
    inputs = Inputs.create(B=1, T=20)
    q, k, v, log_decay, beta = inputs.of(FORMS[form])
    ndim = {"none": None, "head": 1, "scalar": 3, "channel": 4}[FORMS[form].decay]
    assert (None if log_decay is None else log_decay.ndim) == ndim
    assert (beta is not None) == FORMS[form].delta and q.dtype == FORMS[form].dtype
    forward, both = peers.operator(form, inputs, "eager")
    assert (forward.call, both.call) == CALLS
    assert forward.run().shape == v.shape
    assert [tuple(g.shape) for g in both.run()] == [tuple(x.shape) for x in (q, k, v, log_decay, beta) if x is not None]


def test_softmax_gets_its_best_layout_and_the_same_numbers():
    inputs = Inputs.create(B=1, T=12)
    forward, both = peers.sdpa(inputs, causal=True)
    weights = torch.einsum("bthk,bshk->bhts", inputs.q, inputs.k) / 8
    weights = weights.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(forward.run(), torch.einsum("bhts,bshv->bhtv", weights, inputs.v))
    assert len(both.run()) == 3


def test_step_goes_through_the_states_in_turn():
    side = peers.step("scalar", 8, "auto")[0]
    first, second = side.run(), side.run()
    assert first[1].kv.shape == (1, 8, 64, 64)
    assert not torch.equal(first[1].kv, second[1].kv)


def test_short_inputs_are_each_sides_own():
    inputs = Inputs.create(B=1, T=4)
    assert peers._own(inputs).q.data_ptr() != inputs.q.data_ptr()
    long = replace(inputs, q=torch.empty(peers.OWN_INPUTS // 4 + 1))
    assert peers._own(long) is long


def test_the_plan_is_every_size_on_every_number_of_threads():
    plan = [(group.label, group.threads) for group in cpu.groups(cpu.Options(lengths=(512, 256), threads=(1, 2)))]
    lengths = [(f"T={T}, {n} thread{'s' * (n > 1)}", n) for n in (1, 2) for T in (256, 512)]  # a short one before a long one
    assert plan == lengths + [(f"step, B·H={size}, {n} thread{'s' * (n > 1)}", n) for n in (1, 2) for size in (8, 64, 512)]
    assert [group.label for group in cpu.groups(cpu.Options(lengths=(16,), threads=(1,), only=("operator",)))] == ["T=16, 1 thread"]


def test_a_group_runs_on_its_threads_and_gives_them_back():
    before, seen = torch.get_num_threads(), set()
    side = peers.Side("copy", "", "forward", lambda: seen.add(torch.get_num_threads()))
    for n in (1, 3):
        cpu.time_group(cpu.Group("a group", n, dict(B=1, T=16), lambda: [side]), TINY, {}, None)
    assert seen == {1, 3} and torch.get_num_threads() == before


def test_a_run_measures_what_it_was_asked_for(monkeypatch):
    backend(monkeypatch, None)
    options = cpu.Options(lengths=(32, 16), threads=(1,), only=("scalar", "bidirectional", "bf16", "operator"), budget=TINY)
    heard = []
    record = cpu.run(options, "python -m bench cpu", lambda *what: heard.append(what))
    sides = {(row.peer, row.form) for row in record.rows}
    ours = {("cpu", form) for form in options.forms} | {("eager", "scalar"), ("eager", "bidirectional")}
    assert sides == ours | {("sdpa", "causal"), ("sdpa", "bidirectional"), ("copy", ""), ("mm", "")}
    assert [row.T for row in record.rows] == [16] * 17 + [32] * 17
    assert all(row.p20 <= row.p50 <= row.p80 for row in record.rows)
    ratios = {row.form: set(row.ratios) for row in record.rows if row.peer == "cpu"}
    assert ratios == {"scalar": {"eager", "sdpa", "copy"}, "bidirectional": {"eager", "sdpa", "copy"}, "bf16": {"float32"}}
    assert heard == [("T=16, 1 thread", 0, 2), ("T=32, 1 thread", 1, 2), ("done", 2, 2)]
    assert not record.memory and {check.form for check in record.checks} == set(options.forms)


def test_a_backend_that_is_not_there_is_said_once_per_row(monkeypatch):
    backend(monkeypatch, "the library is not built")
    options = cpu.Options(lengths=(16,), threads=(1,), only=("scalar",), budget=TINY)
    record = cpu.run(options, "python -m bench cpu")
    ours = [row for row in record.rows if row.peer == "cpu"]
    assert ours and {row.skipped for row in ours} == {"the library is not built"}
    assert {one.skipped for one in record.memory} == {"the library is not built"}
    assert {check.verdict for check in record.checks} == {"not measured"}
    assert any(row.peer == "copy" and row.call == "step" and row.p50 for row in record.rows)


def test_a_refusal_is_a_reason():
    group = cpu.Group("T=16, 1 thread", 1, dict(B=1, T=16), lambda: [peers.Side("cpu", "scalar", "forward", pytest.fail)])
    play = pytest.MonkeyPatch()
    with play.context() as patch:

        def refuses(*tensors, **options):
            raise linattn.Refusal("no backend takes this call\n  facts\n  cpu: K=64 is odd")

        patch.setattr(linattn, "linear_attention", refuses)
        (row,) = cpu.time_group(group, TINY, {}, None)
    assert row.skipped == "cpu: K=64 is odd"


def test_a_call_that_would_take_too_long_is_not_started():
    slow = lambda T: cpu.Group(f"T={T}", 1, dict(B=1, T=T), lambda: [peers.Side("sdpa", "causal", "forward", lambda: None, 2)])
    known = {("sdpa", "causal", "forward", 1): (1024, 600.0)}
    (row,) = cpu.time_group(slow(4096), TINY, known, None)
    assert row.skipped == "one call would take about 10 s (from T = 1024); the limit is 4 s"
    (row,) = cpu.time_group(slow(2048), TINY, known, None)
    assert row.skipped is None and known["sdpa", "causal", "forward", 1][0] == 2048


@pytest.mark.parametrize(
    "wrong, message",
    (
        (dict(only=("scaler",)), r"only must hold names out of \['operator', .*'bf16'\]; got \['scaler'\]"),
        (dict(threads=(0,)), r"threads must be one or more positive numbers; got \(0,\)"),
        (dict(lengths=()), r"lengths must be one or more positive numbers; got \(\)"),
    ),
)
def test_bad_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        cpu.Options(**wrong)


def test_quick_is_shorter():
    options = cpu.quick(cpu.Options())
    assert max(options.lengths) == 16384 and options.budget.seconds < cpu.FULL.seconds and options.quick


def test_the_command_writes_a_record(monkeypatch, tmp_path):
    backend(monkeypatch, "the library is not built")
    arguments = ["cpu", "--quick", "--lengths", "16", "--threads", "1", "--only", "operator", "--only", "none", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("cpu-quick-") and {"md", "png"} == {other.suffix[1:] for other in tmp_path.iterdir()} - {"json"}
    data = json.loads(path.read_text())
    assert data["options"] == {"lengths": [16], "threads": [1], "only": ["operator", "none"], "quick": True}
    assert data["machine"]["cores"] >= 1 and data["git"].keys() == {"commit", "dirty"}


def test_the_command_fails_where_a_check_fails(monkeypatch, tmp_path):
    backend(monkeypatch, None)  # eager plays cpu: at 1024 tokens it is not six times as fast as itself
    monkeypatch.setattr(cpu, "QUICK", TINY)
    arguments = ["cpu", "--quick", "--lengths", "1024", "--threads", "1", "--only", "operator", "--only", "none", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "fail" in done.output


def test_the_command_names_a_wrong_name(tmp_path):
    done = CliRunner().invoke(app, ["cpu", "--only", "scaler", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "scaler" in done.output and not list(tmp_path.iterdir())


def test_machine_facts():
    facts = machine.facts()
    assert facts["cpu"] != "" and facts["cores"] >= 1 and set(facts["flags"]) <= set(machine.FLAGS)
    assert set(machine.versions()) >= {"python", "torch", "linattn"}


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="resident memory is read from /proc")
def test_memory_of_a_call_is_seen():
    one = memory.measure("scalar", "forward", 8192, 1, "eager")
    token = 8 * 64 * 4  # bytes of one token of q
    assert one.skipped is None
    assert one.inputs == 8192 * (3 * token + 8 * 4) and one.outputs == 8192 * token
    assert one.extra > one.outputs  # eager holds the output in chunks and the state of every chunk at least


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="resident memory is read from /proc")
def test_memory_of_a_step_is_counted_to_the_byte():
    one = memory.measure("scalar", "step", 16, 1, "eager")
    assert one.skipped is None
    assert one.outputs == 4 * (16 * 64 * 64 + 16 * 64)  # the states and o
    assert one.extra > 0  # eager makes temporaries


def test_memory_that_cannot_be_measured_has_a_reason():
    assert memory.measure("scalar", "forward", 256, 1, "nonesuch").skipped.startswith("ValueError: backend must be")

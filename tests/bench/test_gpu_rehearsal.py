"""`python -m bench gpu` on a machine without a GPU: all of it, small, in Triton's interpreter."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from bench import gpu, records
from bench.gpu_peers import REHEARSAL
from bench.gpu_worker import Question, Worker
from bench.machine import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_to_measure_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_red_row_is_not_timed(monkeypatch):
    class Answers:
        """A worker: whatever is asked whether it is right is not, and all else takes a millisecond."""

        def __init__(self, rehearse):
            pass

        def ask(self, question, seconds):
            if not question.call:
                return "relative error 1 in dq", False
            assert (question.peer, question.call) != ("triton", "forward")
            return {"p50": 1.0}, False

        def stop(self):
            pass

    monkeypatch.setattr(gpu, "Worker", Answers)
    monkeypatch.setattr(gpu, "first_calls", lambda *_: {"cold": 1.0, "warm": 0.1})
    record = gpu.run(REHEARSAL, only=("scalar",), told=lambda line: None)
    ours = [row for row in record.rows if row.peer == "triton"]
    assert ours and all(row.p50 is None and row.skipped == "relative error 1 in dq" for row in ours)
    assert all(row.p50 == 1.0 for row in record.rows if row.peer != "triton")
    assert not any(check.cells for check in record.checks if check.promise != "first call")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_crash_or_a_hang_costs_one_question():
    copy = Question("scalar", (1, 16, 1, 16), "copy", "forward")
    worker = Worker(rehearse=True)
    try:
        assert worker.ask(copy._replace(peer="no such peer"), 60)[1]
        assert worker.ask(copy, 0)[0] == "no answer in 0 s"
        times, failed = worker.ask(copy, 60)
        assert not failed and times["p50"] > 0
        worker.process.kill()
        assert worker.ask(copy, 60) == ("the process died with status -9", True)
        assert not worker.ask(copy, 60)[1]
    finally:
        worker.stop()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_rehearsal_checks_times_and_records_every_row(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", "--rehearse", "--only", "scalar", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = records.read(next(tmp_path.glob("*.json")))
    ours = [row for row in record.rows if row.peer == "triton"]
    assert ours and all(row.p50 is not None for row in ours)
    assert record.options["correct"] and not any(record.options["correct"].values())
    assert {check.verdict for check in record.checks if check.promise == "first call"} <= {"pass", "fail"}

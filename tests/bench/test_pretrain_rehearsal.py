"""The comparison of decoders in training goes through on a CPU, and judges by its rows."""

import json

import pytest

from bench import pretrain_gpu


@pytest.mark.slow
def test_rehearsed():
    said = []
    assert pretrain_gpu.run(None, rehearse=True, command="", say=said.append) == 0
    assert len(said) == 2 * len(pretrain_gpu.SIDES) + len(pretrain_gpu.PROMISES)
    assert sum("tokens/s" in line for line in said) == 2 * (len(pretrain_gpu.SIDES) - 1)  # all but fla, which needs a GPU
    assert any("gla / fla gla at T = 128: not measured (1.3 wanted)" in line for line in said)


@pytest.mark.parametrize("rate, code", [(1.31, 0), (1.29, 1)])
def test_a_promise_is_kept_or_the_exit_says_so(monkeypatch, tmp_path, rate, code):
    speeds = {"gla": rate * 100, "fla gla": 100, "softmax, flash attention": 60, "mamba2": 1, "gated_delta": 1}
    monkeypatch.setattr(pretrain_gpu, "measure", lambda stage, name, *_: {"tokens_per_s": speeds[name], "mfu": None})
    monkeypatch.setattr(pretrain_gpu, "SIDES", {name: lambda stage, name=name: (name, None, None) for name in speeds})
    monkeypatch.setattr(pretrain_gpu, "GPU", pretrain_gpu.REHEARSAL)
    monkeypatch.setattr(pretrain_gpu.torch.cuda, "get_device_name", lambda *device: "none")
    assert pretrain_gpu.run(tmp_path, rehearse=False, command="as typed", say=lambda line: None) == code
    record = json.loads((tmp_path / "pretrain-gpu.json").read_text())
    assert record["command"] == "as typed" and [check["wanted"] for check in record["checks"]] == [1.3, 2.0]

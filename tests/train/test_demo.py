"""The demo and what it shows."""

import builtins
import gc
import json
import os
import signal
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from linattn.train import demo, figure, memory, recipes, throughput
from linattn.train.engine import Engine

FACTS = {"machine": {"processor": "a processor"}, "backends": {"cpu": "not built", "eager": "ready"}}
ROWS = [
    dict(variant=v, T=T, train_tokens_per_s=9e6 / T, decode_tokens_per_s=5e2 + n, train_peak_bytes=1e4 * T, state_bytes=1e3 * T**n)
    for n, v in enumerate(("gla", "softmax"))
    for T in (256, 1024)
]


def show(out):
    console = Console(file=StringIO(), width=120)
    code = demo.run(steps=2, lengths=[256, 1024], out=out, threads=1, command="linattn demo", facts=FACTS, console=console)
    return code, console.file.getvalue()


def test_the_demo_stops_goes_on_and_starts_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "table", lambda *_, **__: ROWS)
    usual = recipes.demo
    monkeypatch.setattr(recipes, "demo", lambda v, steps: replace(usual(v, steps=steps), context=32, batch=2, eval_windows=4))
    step, steps = Engine.step, []

    def counting(engine, tokens, lr):
        steps.append(engine.config.variant)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(engine, tokens, lr)

    monkeypatch.setattr(Engine, "step", counting)
    code, said = show(tmp_path)
    assert code == 130 and steps == ["gla", "gla", "softmax"] and "to go on: linattn demo" in said
    code, said = show(tmp_path)
    assert (
        code == 0
        and steps == ["gla", "gla", "softmax", "softmax"]
        and "after 2 steps" in said
        and "a processor, 1 threads" in said
        and "backend eager" in said
        and demo.PROMPT.strip() in said
    )
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["command"] == "linattn demo" and record["rows"] == ROWS
    curves = record["held_out_bits_per_byte"]
    assert record["held_out_ratio"] == curves["gla"][-1][1] / curves["softmax"][-1][1]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert show(tmp_path)[0] == 0 and len(steps) == 8


def test_no_matplotlib_is_said(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        figure.draw(tmp_path / "a.png", {}, ROWS, title="")


def test_peak_sees_what_came_and_went():
    gc.collect()  # what an earlier test left must not go while this one looks
    with memory.Peak(torch.device("cpu")) as peak:
        torch.ones(50 << 20).add_(1)
    assert 190 << 20 < peak.bytes < 220 << 20


def test_held_counts_every_storage_once():
    class Cache:
        def __init__(self, x):
            self.x, self.length = x, 3

    x = torch.zeros(100)
    assert memory.held((x, x[:10], None, [Cache(torch.zeros(5))])) == 420

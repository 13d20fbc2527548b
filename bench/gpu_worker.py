"""One process that computes on the GPU what it is asked for, and the parent's end of it: a crash or a hang costs one question."""

import multiprocessing
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from .gpu_peers import FORMS, GPU, REHEARSAL, Stage, copy_of, floor_bytes, inputs, ours, peers, run_of
from .records import spread

CORRECT = 1e-2  # relative error of outputs and gradients in bfloat16


class Watch:
    """A CUDA event's part in a rehearsal."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Watch") -> float:
        return 1e3 * (end.at - self.at)


def measure(stage: Stage, calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds per call."""
    flush = torch.empty(stage.flush, dtype=torch.int8, device=stage.device)
    for call in calls:
        call()
    stage.wait()
    begin = time.perf_counter()
    calls[0]()
    stage.wait()
    cost = time.perf_counter() - begin
    events = []
    for i in range(min(200, max(5 if stage.seconds else 1, int(stage.seconds / max(cost, 1e-4))))):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) if stage.device == "cuda" else Watch() for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        end.record()
        events.append((start, end))
    stage.wait()
    return [start.elapsed_time(end) for start, end in events]


def correct(stage: Stage, name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a form at a shape, or None."""
    form = FORMS[name]
    *tensors, do = inputs(stage, form, *shape)
    results = []
    for backend, cast in (("triton", lambda x: x), ("triton", lambda x: x), ("eager", lambda x: x.float())):
        xs = [x if x is None else cast(x).detach().requires_grad_() for x in tensors]
        o = ours(form, backend)(*xs)
        results.append([o.detach(), *torch.autograd.grad(o, [x for x in xs if x is not None], do.to(o.dtype))])
        del o, xs
    mine, again, gold = results
    if any(not torch.equal(a, b) for a, b in zip(mine, again, strict=True)):
        return "two runs differ in their bits"
    given = [part for part, x in zip(("dq", "dk", "dv", "dlog_decay", "dbeta"), tensors, strict=True) if x is not None]
    for part, a, b in zip(("o", *given), mine, gold, strict=True):
        # a head's gate is one sum of terms that cancel: its error is judged by the size of the terms
        size = b.float().norm() if b.ndim > 1 else gold[0].float().norm()
        error = ((a.float() - b.float()).norm() / size).item()
        if not error < CORRECT:
            return f"relative error {error:.2g} in {part}"
    return None


class Question(NamedTuple):
    name: str  # in FORMS
    shape: tuple[int, ...]
    peer: str = "triton"  # or "copy"
    call: str = ""  # "": is it right; "compile": forward and backward once, for the caches; else what to time


def answer(stage: Stage, question: Question) -> str | dict | None:
    """What is wrong, the times as fields of a Row, or nothing."""
    name, shape, peer, call = question
    form = FORMS[name]
    if not call:
        return correct(stage, name, shape)
    if peer == "copy":
        return spread(measure(stage, copy_of(stage, floor_bytes(form, call, *shape))))
    run = peers(name, shape)[peer]()
    if call == "compile":
        run_of(run, "forward+backward", [inputs(stage, form, *shape)])[0]()
        return stage.wait()
    return spread(measure(stage, run_of(run, call, [inputs(stage, form, *shape, seed=i) for i in range(2)])))


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:160]}"


def serve(pipe, rehearse: bool) -> None:
    """Answers questions until the pipe closes, or until the device is lost: then whoever asks next needs a new process."""
    stage = REHEARSAL if rehearse else GPU
    if rehearse:
        from .interpreter import run_autotuned, widen_bfloat16

        widen_bfloat16()
        run_autotuned()
        if find_spec("fla"):
            import fla.utils

            fla.utils.device = "cpu"
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            result, failed = answer(stage, question), False
        except Exception as error:  # a peer's refusal, of whatever kind, is the answer
            result, failed = in_words(error), True
        alive = True
        try:
            stage.wait()
            torch.cuda.empty_cache()
        except Exception:
            alive = False
        pipe.send((result, failed, alive))
        if not alive:
            os._exit(1)


class Worker:
    """The parent's end. After a crash or a timeout the next question starts a new process."""

    def __init__(self, rehearse: bool):
        self.rehearse, self.process = rehearse, None

    def ask(self, question: Question, seconds: float) -> tuple[str | dict | None, bool]:
        """→ the answer, and whether it is the reason why there is none."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.rehearse), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(question)
            if not self.pipe.poll(seconds):
                self.stop()
                return f"no answer in {seconds:.0f} s", True
            result, failed, alive = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            return f"the process died with status {code}", True
        if not alive:
            self.stop()
        return result, failed

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

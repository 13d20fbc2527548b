"""What the tests with real processes share: launch with a time limit, find and kill workers, and leave none behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from linattn.train.data import standard_library

ROOT = Path(__file__).parent.parent.parent
LIMIT = 240  # seconds: an order of magnitude above what is needed on a quiet machine


def some_text(folder):
    for i, document in enumerate(list(standard_library())[:40]):
        (folder / f"{i:02d}.txt").write_bytes(document[:3000])
    return folder


def command(processes, *arguments, program=("-m", "linattn")):
    """`arguments` for `program` under torchrun; without it where processes is 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return [sys.executable, *torchrun, *program, *map(str, arguments)]


@contextmanager
def launched(arguments, **how):
    """A process, which is killed at the end with all that came of it, whatever happened."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mark = f"{os.getpid()}-{time.monotonic_ns()}"  # inherited by all: torchrun gives each worker a session of its own
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "LINATTN_TEST": mark}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)
    process.mark = f"LINATTN_TEST={mark}".encode()
    try:
        yield process
    finally:
        for pid in [process.pid, *others(process)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()


def finish(arguments, **how):
    """(exit code, what was said) of a launch that ends by itself, and leaves no process behind."""
    with launched(arguments, **how) as process:
        said, _ = process.communicate(timeout=LIMIT)
        assert orphans(process) == []
        return process.returncode, said


def orphans(process, within=20.0):
    """What came of `process` and is still there after `within` seconds."""
    until = time.monotonic() + within
    while (left := others(process)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def workers(process):
    """The processes that torchrun has started as ranks."""
    return [pid for pid in others(process) if b"\0LOCAL_RANK=" in b"\0" + environment(pid)]


def others(process):
    return [pid for pid in pids() if pid != process.pid and process.mark in environment(pid).split(b"\0")]


def pids():
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def environment(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()  # empty for a zombie
    except OSError:
        return b""


def wait_for(condition, process):
    until = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=LIMIT)[0]
        time.sleep(0.02)

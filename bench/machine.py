"""The only place that asks the machine and the checkout what they are."""

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_bf16")
SOURCES = ("linattn", "csrc", "bench", "setup.py", "pyproject.toml", ":!bench/results")
SWITCHES = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "ATEN_", "TORCH_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # they change times


def facts() -> dict:
    """What a reader needs to judge a figure: chip, caches, huge pages, memory, and how busy the machine was at the start."""
    cpuinfo = _text("/proc/cpuinfo")
    field = lambda name: next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith(name)), "unknown")
    flags = set(field("flags").split())
    caches = {
        f"L{_text(cache / 'level')}{ {'Data': 'd', 'Instruction': 'i'}.get(_text(cache / 'type'), '') }": _text(cache / "size")
        for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    }
    huge = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    memory = next((line.split()[1] for line in _text("/proc/meminfo").splitlines() if line.startswith("MemTotal")), None)
    return {
        "cpu": platform.processor() or platform.machine() if field("model name") == "unknown" else field("model name"),
        "family_model_stepping": "/".join(field(name) for name in ("cpu family", "model\t", "stepping")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches": caches,
        "huge_pages": huge.split("[", 1)[1].split("]")[0] if "[" in huge else "unknown",
        "memory_gib": None if memory is None else round(int(memory) / 2**20, 1),
        "hypervisor": "hypervisor" in flags,
        "system": f"{platform.system()} {platform.release()}",
        "load_at_start": os.getloadavg()[0],
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)},
    }


def versions() -> dict:
    import torch

    import linattn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "linattn": linattn.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def git() -> dict:
    """Commit, and whether the sources differ from it; outside a checkout both are None."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", *SOURCES)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""

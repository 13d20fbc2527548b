"""The only place that asks the machine what it is: the facts that `linattn info` shows."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import linattn

from . import build

EXTRAS = {  # extra: the package of it that one can do nothing without
    "triton": "triton",
    "fla": "flash-linear-attention",
    "hf": "transformers",
    "vision": "mlxtend",
    "deepspeed": "deepspeed",
    "train": "pyarrow",
    "probe": "concept-erasure",
    "bench": "matplotlib",
    "dev": "pytest",
}
FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16", "amx_bf16")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def facts() -> dict[str, dict[str, str]]:
    """Section -> name -> what was found, in the order to show them. Loads the operator, no extra."""
    return {"versions": versions(), "machine": machine(), "backends": backends(), "kernels": kernels()}


def versions() -> dict[str, str]:
    found = {"linattn": linattn.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {f"[{extra}]": _version(package) for extra, package in EXTRAS.items()}


def machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable of {os.cpu_count()}",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "cpu features": f"{', '.join(_features()) or 'none known'}; torch uses {torch.backends.cpu.get_cpu_capability()}",
        "huge pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "unknown",
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }


def backends() -> dict[str, str]:
    """Every backend, in order of preference: "ready", or why it cannot run here."""
    from .ops.backends import BY_NAME

    reserve = {name: getattr(backend, "BY_NAME_ONLY", None) for name, backend in BY_NAME.items()}
    ready = {name: f"ready, by name only: {why}" if why else "ready" for name, why in reserve.items()}
    return {name: linattn.why_not(name) or ready[name] for name in linattn.BACKENDS}


def kernels() -> dict[str, str]:
    """The C++ library: built, loaded, and the instruction set it chose for this chip."""
    library = build.LIBRARY
    if not library.exists():
        return {"cpu": f"not built: {build.why_not() or 'run `linattn build`'}"}
    if str(library) not in torch.ops.loaded_libraries:
        return {"cpu": f"built, not loaded: {linattn.why_not('cpu') or 'nothing has asked for it yet'}", "file": str(library)}
    isas = ", ".join(unit.isa for unit in build.units() if unit.isa)
    return {"cpu": f"loaded, runs {torch.ops.linattn.isa()} (built for {isas})", "file": str(library)}


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def _features() -> list[str]:
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch since 2.10
    return [name for name in FEATURES if found.get(name)]

"""The only place that compiles C++: what is built from what, with which flags, and where the library lies.

setup.py and the Makefile load this file by its path, before torch is there to import, so it knows the standard library alone.
"""

import argparse
import filecmp
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "libcpu.so"
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has parallel_for; one build then serves every later one


class Unit(NamedTuple):
    source: str  # below csrc/
    isa: str | None  # instruction set: the C++ namespace of what the unit defines
    flags: tuple[str, ...]
    machine: str  # that has these instructions, as platform.machine() says it; "" for all


# Plainest first: of an inline function that two units hold, the linker keeps the first copy, and that one must run anywhere.
UNITS = (
    Unit("cpu/bindings.cpp", None, (), ""),
    Unit("cpu/kernels.cpp", "plain", (), ""),
    Unit("cpu/kernels.cpp", "avx2", ("-mavx2", "-mfma", "-mf16c"), "x86_64"),
    Unit("cpu/kernels.cpp", "avx512", ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"), "x86_64"),
)
FLAGS = ("-std=c++20", "-O2", "-funroll-loops", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra")
# no -ffast-math: a NaN must pass through.
SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class CannotBuild(RuntimeError):
    """The library cannot be built; the message says what is missing, or what the compiler said."""


def sources() -> Path | None:
    """csrc/, beside the package in a checkout, inside it where it was installed."""
    return next((place for place in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (place / UNITS[0].source).is_file()), None)


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, [*os.environ.get("CXX", "").split()[:1], "g++", "clang++"])), None)


def torch_home() -> Path | None:
    """The torch to build against: what this interpreter would import, else what it installs beside (which pip hides from a build)."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")] + [Path(site.getusersitepackages(), "torch")]
    return next((place for place in places if (place / "version.py").is_file()), None)


def torch_version(home: Path) -> str:
    found = re.search(r"__version__ = '([^']+)'", (home / "version.py").read_text())
    return found.group(1) if found else "0.0"


def why_not() -> str | None:
    """What is missing for a build, None if nothing is."""
    if platform.system() != "Linux":
        return f"the kernels are built on Linux only; this is {platform.system()}"
    if sources() is None:
        return f"there are no C++ sources in {PACKAGE.parent / 'csrc'}"
    if compiler() is None:
        return "there is no C++ compiler (on Debian: apt-get install g++)"
    home = torch_home()
    if home is None:
        return "there is no torch to take headers from: install torch first"
    version = torch_version(home)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        return f"torch must be at least {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}; got {version}"
    return None


def units() -> list[Unit]:
    """The rows of UNITS that this machine's compiler can build."""
    return [unit for unit in UNITS if unit.machine in ("", platform.machine())]


def flags_of(unit: Unit, home: Path, sanitize: bool = False) -> list[str]:
    """Every flag a unit is compiled with. The one without an instruction set gets the names of all, best first: LINATTN_EACH_ISA(X)."""
    isas = [other.isa for other in units() if other.isa]
    named = f"-DLINATTN_ISA={unit.isa}" if unit.isa else f"-DLINATTN_EACH_ISA(X)={' '.join(f'X({isa})' for isa in reversed(isas))}"
    target = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"
    # The prefix map keeps paths of the building machine out of the library, where error messages would show them.
    headers = ["-isystem", str(home / "include"), f"-ffile-prefix-map={home / 'include'}=.", target]
    return [*FLAGS, *(SANITIZE if sanitize else ()), *unit.flags, named, *headers]


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"the compiler failed: {' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()[:24]


@contextmanager
def cache() -> Iterator[Path]:
    """Where objects are kept by the hash of all that went into them: build/ of a checkout, nowhere for an installed package."""
    if (PACKAGE / "csrc").is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        folder = PACKAGE.parent / "build" / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name to write under first, so that neither a reader nor a second build ever meets half a file."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _parts() -> tuple[Path, str, Path]:
    """Sources, compiler and torch; CannotBuild says which is missing."""
    if reason := why_not():
        raise CannotBuild(reason)
    tree, cxx, home = sources(), compiler(), torch_home()
    assert tree and cxx and home, "why_not() has looked for them"
    return tree, cxx, home


def compile_units(folder: Path, sanitize: bool = False) -> dict[Path, bool]:
    """Object of every unit, in the order to link them -> whether it had to be compiled now. Two at a time."""
    tree, cxx, home = _parts()
    headers = [path.read_bytes() for path in sorted(tree.rglob("*.h"))]
    common = [subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout, torch_version(home)]

    def compile_unit(unit: Unit) -> tuple[Path, bool]:
        flags = flags_of(unit, home, sanitize)
        key = _digest(*common, *flags, (tree / unit.source).read_bytes(), *headers)
        target = folder / f"{unit.isa or 'bindings'}-{key}.o"
        if fresh := not target.exists():
            with _whole(target) as part:
                _run([cxx, *flags, "-c", unit.source, "-o", str(part)], tree)
        return target, fresh

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return dict(pool.map(compile_unit, units()))


def build(library: Path = LIBRARY, *, sanitize: bool = False, say: Callable[[str], None] = print) -> Path:
    """Compiles what changed, links, and puts the library at `library`. CannotBuild says what is in the way."""
    start = time.monotonic()
    tree, cxx, home = _parts()
    if not os.access(library.parent, os.W_OK):
        raise CannotBuild(f"{library.parent} cannot be written")
    with cache() as folder:
        objects = compile_units(folder, sanitize)
        linked = folder / f"libcpu-{_digest(*(path.name for path in objects))}.so"
        if not linked.exists():
            with _whole(linked) as part:  # torch's library by name alone: at run time it is open already
                flags = [*(SANITIZE[-2:] if sanitize else ()), f"-L{home / 'lib'}", "-ltorch_cpu"]
                _run([cxx, "-shared", *map(str, objects), *flags, "-o", str(part)], tree)
        if changed := not (library.exists() and filecmp.cmp(linked, library, shallow=False)):
            with _whole(library) as part:
                shutil.copyfile(linked, part)
    compiled, seconds = sum(objects.values()), time.monotonic() - start
    say(f"{library.name}: {f'{compiled} of {len(objects)} units compiled in {seconds:.0f} s' if changed else 'up to date'}")
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the C++ kernels of linattn.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="where the library goes (default: into the package)")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    options = parser.parse_args()
    try:
        build(options.output.resolve(), sanitize=options.sanitize)
    except CannotBuild as reason:
        print(f"linattn: the C++ kernels are not built: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

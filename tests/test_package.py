"""What is promised of the package before the first call: cheap to import, whole without its parts, built from what is there."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linattn
from linattn import build, info

ROOT = Path(__file__).parent.parent
CAN_BUILD = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def python(code: str, *flags: str, folder: Path = ROOT, **env: str) -> str:
    """Output of `code` in a new interpreter that imports the linattn of `folder`."""
    environment = {"PYTHONPATH": str(folder), **os.environ, **env}
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap_and_brings_no_extra():
    out = python("""
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import linattn
linattn.linear_attention, linattn.LinearAttention
print(time.perf_counter() - start, *{name.partition('.')[0] for name in set(sys.modules) - before})
""")
    seconds, *brought = out.split()
    assert float(seconds) < 1.0
    assert not {"triton", "fla", "transformers", "tokenizers", "sklearn", "matplotlib", "deepspeed", "typer", "rich"} & set(brought)


def test_works_without_library_compiler_and_extras(tmp_path):
    shutil.copytree(ROOT / "linattn", tmp_path / "linattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    out = python(
        """
import sys
for name in ("triton", "fla", "transformers", "tokenizers", "matplotlib"): sys.modules[name] = None
import torch, linattn
q = torch.randn(1, 5, 2, 4)
o, state = linattn.linear_attention(q, q, q, return_state=True)
print(tuple(o.shape), tuple(state.kv.shape), linattn.why_not("cpu"))
""",
        folder=tmp_path,
        PATH="",
    )
    assert out.startswith("(1, 5, 2, 4) (1, 2, 4, 4)")
    assert "not built" in out and "there are no C++ sources in" in out  # the reason, and the reason of the reason


def test_build_needs_the_standard_library_alone():
    tree = ast.parse((ROOT / "linattn" / "build.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_headers_are_found_where_pip_hides_torch():
    seen = python("""
import sys
sys.path = ["linattn", *(place for place in sys.path if not place.endswith("-packages"))]
import build
print(build.importlib.util.find_spec("torch"), build.torch_home())
""")
    if not Path(torch.__file__).is_relative_to(sys.prefix):
        pytest.skip("torch is not installed where this interpreter installs")
    assert seen == f"None {Path(torch.__file__).parent}"


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "sources", lambda: ROOT / "csrc")
    assert build.why_not() == "there is no C++ compiler (on Debian: apt-get install g++)"


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(build, "sources", lambda: ROOT / "csrc")
    monkeypatch.setattr(build, "compiler", lambda: "g++")
    monkeypatch.setattr(build, "torch_version", lambda home: "2.9.1+cpu")
    assert build.why_not() == "torch must be at least 2.10; got 2.9.1+cpu"


@pytest.fixture
def toy(tmp_path):
    """A checkout with sources that need no torch, and the build.py of this one."""
    (tmp_path / "linattn").mkdir()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    shutil.copy(ROOT / "linattn" / "build.py", tmp_path / "linattn")
    (tmp_path / "csrc" / "cpu" / "bindings.cpp").write_text('extern "C" __attribute__((visibility("default"))) int best() { return 1; }')
    (tmp_path / "csrc" / "cpu" / "kernels.h").write_text("#define NUMBER 1\n")
    (tmp_path / "csrc" / "cpu" / "kernels.cpp").write_text(
        '#include "kernels.h"\nnamespace LINATTN_ISA { int number() { return NUMBER; } }'
    )
    spec = importlib.util.spec_from_file_location("toy_build", tmp_path / "linattn" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@CAN_BUILD
def test_only_what_changed_is_compiled(toy):
    kernels, header, said = len(toy.units()) - 1, toy.PACKAGE.parent / "csrc" / "cpu" / "kernels.h", []
    toy.build(say=said.append)
    first = toy.LIBRARY.read_bytes()
    toy.build(say=said.append)
    source = toy.PACKAGE.parent / "csrc" / "cpu" / "kernels.cpp"
    source.write_text(source.read_text().replace("return NUMBER", "return 7 + NUMBER"))
    toy.build(say=said.append)
    header.write_text("#define NUMBER 2\n")
    toy.build(say=said.append)
    expected = [f"{kernels + 1} of {kernels + 1}", "up to date", f"{kernels} of {kernels + 1}", f"{kernels + 1} of {kernels + 1}"]
    assert all(want in line for want, line in zip(expected, said, strict=True)), said
    assert toy.LIBRARY.read_bytes() != first


@CAN_BUILD
def test_a_failed_build_says_why_and_keeps_the_old_library(toy):
    toy.build(say=str)
    before = toy.LIBRARY.read_bytes()
    (toy.PACKAGE.parent / "csrc" / "cpu" / "kernels.cpp").write_text("nonsense")
    with pytest.raises(toy.CannotBuild, match=r"the compiler failed: .*kernels\.cpp[\s\S]*nonsense"):
        toy.build(say=str)
    assert toy.LIBRARY.read_bytes() == before


@CAN_BUILD
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_wide_instructions_stay_in_their_unit():
    """Of a function that several units define one copy is linked: on an older chip the wrong one would be an illegal instruction."""
    with build.cache() as folder:
        objects = [path for path in build.compile_units(folder) if not path.name.startswith("bindings")]
    assert len(objects) == len(build.units()) - 1
    for path in objects:
        symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if re.match(r"\S+ [WVu] ", line) and f"{path.name.partition('-')[0]}::" not in line]
        assert not shared, f"{path.name} shares {shared[:3]} with other units; give them a namespace of their own"


@pytest.mark.skipif(not build.LIBRARY.exists(), reason="the library is not built")
def test_the_library_holds_no_path_of_the_machine_that_built_it():
    content = build.LIBRARY.read_bytes()
    assert str(ROOT).encode() not in content
    assert str(build.torch_home()).encode() not in content


def test_project_file():
    toml = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    project, extras = toml["project"], toml["project"]["optional-dependencies"]
    assert not any("torch" in name for name in toml["build-system"]["requires"])  # it would bring gigabytes of CUDA into every build
    assert {re.split(r"[\[><=]", name)[0] for name in project["dependencies"]} == {"torch", "einops", "safetensors", "typer", "rich"}
    assert set(extras) == {"triton", "fla", "hf", "vision", "deepspeed", "train", "probe", "bench", "dev"} == set(info.EXTRAS)
    assert all(any(name.startswith(package) for name in extras[extra]) for extra, package in info.EXTRAS.items())
    assert project["version"] == linattn.__version__


def test_info_names_every_backend_and_why_it_cannot_run():
    facts = info.facts()
    assert list(facts) == ["versions", "machine", "backends", "kernels"]
    assert list(facts["backends"]) == list(linattn.BACKENDS)
    assert facts["backends"]["reference"] == facts["backends"]["eager"] == "ready"
    assert all(isinstance(value, str) and value for section in facts.values() for value in section.values())
    assert facts["versions"]["torch"] == torch.__version__

"""Adds the C++ library to the build that pyproject.toml describes. It neither imports torch nor asks for it: see linattn/build.py."""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

spec = importlib.util.spec_from_file_location("build", Path(__file__).parent / "linattn" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildLibrary(build_ext):
    """Hands the work to linattn/build.py; a library that cannot be built is left out, for `linattn build` to make later."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"  # torch loads it, Python does not: no tag of a Python version

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.build(library)
        except build.CannotBuild as reason:
            print(f"linattn: installed without its C++ kernels: {reason}. `linattn build` makes them later.")

    def run(self):
        super().run()
        if not self.inplace and Path("csrc").is_dir():  # the sources go along, so that `linattn build` can work where there is no checkout
            shutil.copytree("csrc", Path(self.build_lib, "linattn", "csrc"), dirs_exist_ok=True)


library = Extension(
    "linattn.libcpu",
    sources=sorted({f"csrc/{unit.source}" for unit in build.UNITS}),
    depends=sorted(map(str, Path("csrc").rglob("*.h"))),  # an sdist takes them from here
    optional=True,
)
setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary})

"""Calls CMakeLists.txt, the one description of the native build; everything else is in pyproject.toml.

Environment switches:
    OBC_BUILD_CUDA=auto|0|1   CUDA kernels: where nvcc is found (default), never, or fail without it
    TORCH_CUDA_ARCH_LIST      their architectures, in torch's notation ("9.0;10.0+PTX")
    MAX_JOBS                  parallel compile jobs (default: one per processor)
    DEBUG=1                   an unoptimised build with debug symbols
    CXX                       the C++ compiler

Without a C++ compiler obc installs all the same, without its native kernels; ``obc info`` says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def missing_tool() -> str | None:
    """The first tool of the native build that this machine lacks."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"C++ compiler ({' or '.join(compilers)})"
    if not shutil.which("cmake"):
        return "cmake"
    return None if any(map(shutil.which, ("ninja", "make"))) else "ninja or make"


class CMakeBuild(build_ext):
    """Builds every native library in one run of CMake, into the wheel or, for an editable install, into python/obc."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        library_dir = ROOT / "python" / "obc" if in_place else Path(self.build_lib).resolve() / "obc"
        if tool := missing_tool():
            if os.environ.get("OBC_BUILD_CUDA") == "1":
                raise SystemExit(f"obc: OBC_BUILD_CUDA=1, but no {tool} was found")
            self.warn(f"obc: no {tool} found: installing without the native kernels (see `obc info`)")
            return
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # An isolated build's paths are gone by the next one, and so may be its generator.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        configure = {
            "BUILD_TESTING": "OFF",
            "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG", "0") not in ("", "0") else "Release",
            "OBC_BUILD_CUDA": os.environ.get("OBC_BUILD_CUDA", "auto"),
            "OBC_LIBRARY_DIR": str(library_dir),
            "Python_EXECUTABLE": sys.executable,
        }
        definitions = [f"-D{name}={value}" for name, value in configure.items()]
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        configure_command = ["cmake", "-S", ROOT, "-B", build_dir, "-G", generator, *definitions]
        subprocess.run(configure_command, check=True)
        build = ["cmake", "--build", build_dir, "-j", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
        if subprocess.run(build).returncode != 0:
            # They need another C++ standard and torch's own headers; gates in Python can replace them.
            self.warn("obc: building again without the gates in C++: scoring small networks will be slower")
            subprocess.run([*configure_command, "-DOBC_BUILD_GATES=0"], check=True)
            subprocess.run(build, check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "obc").glob("**/*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("obc._native", sources=[])], cmdclass={"build_ext": CMakeBuild})

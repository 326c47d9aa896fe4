"""CMake alone: the build that a C++ program uses, and its test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_cmake_alone_builds_and_tests_the_cpu_operators(tmp_path: Path) -> None:
    if missing := [tool for tool in ("cmake", "ctest", "ninja", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")
    build = tmp_path / "build"
    definitions = [
        "-DOBC_BUILD_CUDA=0",
        f"-DOBC_LIBRARY_DIR={tmp_path / 'out'}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *definitions],
        ["cmake", "--build", build, "--target", "obc_test_cpu"],
        ["ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_without_pythons_headers_the_operators_are_built(tmp_path: Path) -> None:
    if missing := [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")
    definitions = [
        "-DOBC_BUILD_CUDA=0",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={tmp_path}/none",
    ]
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *definitions]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no headers (Python.h)" in done.stderr
    command = ["cmake", "--build", tmp_path / "build", "--target", "help"]
    targets = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "obc_cpu:" in targets
    assert "obc_gates:" not in targets
    assert "obc_native:" not in targets

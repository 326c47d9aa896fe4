"""The wheel: built in isolation, repaired, installed into a fresh environment without a compiler, and used there.

``pytest -s tests/packaging/test_wheel.py`` prints its size, and the seconds of its installation and first score.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("wheel_smoke.py")
# The constraints of the oldest supported torch download gigabytes: OBC_WHEEL_OLDEST=1 asks for them.
CONSTRAINTS = ["constraints.txt", *(["constraints-oldest.txt"] if os.environ.get("OBC_WHEEL_OLDEST") == "1" else [])]


def run(*command: object, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel() -> Path:
    run("make", "wheel")
    (built,) = (ROOT / "dist").glob("*manylinux*.whl")
    return built


@pytest.mark.slow
def test_wheel_carries_no_library_of_torch_and_is_small(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("libobc_cpu.so") for name in names)
    assert not [name for name in names if "libtorch" in name or "libc10" in name or "libcuda" in name]
    assert wheel.stat().st_size < 10 * 2**20
    print(f"\n{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")


@pytest.mark.slow
def test_source_distribution_holds_what_the_build_reads(wheel: Path) -> None:
    (archive,) = (ROOT / "dist").glob("*.tar.gz")
    listed = run("tar", "tzf", archive)
    assert all(name in listed for name in ("CMakeLists.txt", "setup.py", "csrc/torch_cpu.cpp", "csrc/cuda/tiles.h"))


@pytest.mark.slow
@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_wheel_alone_in_a_fresh_environment(wheel: Path, constraints: str, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    run(sys.executable, "-m", "venv", environment)
    pinned = {"PIP_CONSTRAINT": str(ROOT / constraints), "PYTHONPATH": ""}
    started = time.perf_counter()
    run(environment / "bin/pip", "install", "--quiet", wheel, **pinned)
    seconds = time.perf_counter() - started
    # No compiler on the path: nothing is built when obc is used.
    output = run(environment / "bin/python", SMOKE, PYTHONPATH="", PATH=str(environment / "bin"))
    assert "operators, NumPy, scorer" in output
    print(f"\n{constraints}: installed with its dependencies in {seconds:.0f} s\n{output}")

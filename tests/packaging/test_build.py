"""The native build: its links and registrations, obc.info(), and obc without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import obc
from obc.backends import native_gates
from obc.backends.native import FOLDER
from obc.distribution import obc_version

ROOT = Path(__file__).resolve().parents[2]

if reason := obc.backends.BACKENDS["cpu"].why_unavailable():
    pytest.skip(f"the native build is not here: {reason}", allow_module_level=True)


def test_every_operator_of_the_library_can_be_called() -> None:
    """An arity that disagrees with its schema would show only here."""
    operators = obc.backends.BACKENDS["cpu"].load()
    ones = torch.ones(2, 3)
    assert operators.channel_dot(ones, ones, 1, False).tolist() == [2, 2, 2]
    out_dot, in_dot = operators.weight_dot(ones, ones, torch.ones(2), torch.ones(2), 1, False)
    assert (out_dot.tolist(), in_dot.tolist()) == ([4, 4], [2, 2, 2])
    out_dots, in_dots = operators.weight_dot_list([ones], [ones], [None], [None], [1], [True])
    assert (out_dots[0].tolist(), in_dots[0].tolist()) == ([2, 2, 2], [3, 3])
    assert [moment.tolist() for moment in operators.weight_moments(ones, ones)] == [[3, 3]] * 5
    scores, row = torch.zeros(1), torch.ones(2)
    assert operators.end_row(scores, row, 1.0, torch.tensor([0, 0])).item() is True
    assert (scores.tolist(), row.tolist()) == ([2], [0, 0])
    assert operators.fold(ones, torch.ones(1, 2), None, 1, 1).tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("name", ["channel_dot", "weight_dot", "weight_dot_list", "weight_moments", "end_row"])
def test_arguments_of_the_library_are_those_of_ops(name: str) -> None:
    schemas = [str(getattr(namespace, name).default._schema) for namespace in (torch.ops.obc_cpu, torch.ops.obc)]
    native, public = (schema.partition("::")[2].partition(" -> ")[0] for schema in schemas)
    assert native == public


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="reads ELF with readelf")
@pytest.mark.parametrize("library", [FOLDER / "libobc_cpu.so", native_gates.path()], ids=["operators", "gates"])
def test_library_names_torch_by_soname_without_a_path(library: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cpu.so]" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_gates_were_built_for_this_torch() -> None:
    assert native_gates.why_unavailable() is None
    assert obc.info()["gates"] == {"available": True}
    version = ".".join(torch.__version__.split(".")[:2])
    assert native_gates.path().name.startswith(f"gates-torch{version}.")


def test_info_names_versions_backends_and_build() -> None:
    facts = obc.info()
    assert facts["torch"] == torch.__version__
    assert obc.__version__ == (obc_version() or "0+unknown")
    assert facts["backends"]["reference"] == {"available": True}
    assert facts["build"]["available"] is True
    assert facts["build"]["compiler"]
    assert "-ffp-contract=off" in facts["build"]["flags"]
    assert "march=native" not in facts["build"]["flags"]
    assert facts["build"]["instruction_set"] in ("x86-64-v4", "x86-64-v3", "baseline")
    assert facts["environment"]["OBC_BACKEND"] == os.environ.get("OBC_BACKEND")


WITHOUT_NATIVE = """
import sys
# An editable install finds the parts that this copy lacks in the checkout it was made from.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
import torch, obc
facts = obc.info()
assert facts["build"]["available"] is False, facts["build"]
assert "was not built" in facts["build"]["reason"]
assert "compiler" in facts["build"]["remedy"]
assert facts["backends"]["cpu"]["available"] is False
assert "were not built" in facts["backends"]["cpu"]["reason"]
assert "cpu" not in obc.backends.available()
ones = torch.ones(2, 3)
assert obc.ops.channel_dot(ones, ones, 1).tolist() == [2, 2, 2]
try:
    import obc.integrations.numpy
except ImportError as error:
    assert "install a C++17 compiler" in str(error)
else:
    raise AssertionError("obc.integrations.numpy imported without its native module")
"""


def _copy_of_the_sources(folder: Path) -> Path:
    """The tracked files, as a fresh clone has them: no built libraries."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("python", "obc_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").touch()
    return folder


def _build_in_place(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_without_a_compiler_the_build_says_so_and_obc_works(tmp_path: Path) -> None:
    folder = _copy_of_the_sources(tmp_path)
    done = _build_in_place(folder, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "obc: no C++ compiler (no-such-compiler) found" in done.stdout + done.stderr
    assert not list(folder.glob("python/**/*.so"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "python"), str(folder)])}
    environment.pop("OBC_BACKEND", None)
    used = subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr


def test_cuda_asked_for_without_a_compiler_is_an_error(tmp_path: Path) -> None:
    done = _build_in_place(_copy_of_the_sources(tmp_path), CXX="no-such-compiler", OBC_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "OBC_BUILD_CUDA=1, but no C++ compiler" in done.stderr


def test_unknown_switch_is_an_error_that_names_it(tmp_path: Path) -> None:
    done = _build_in_place(_copy_of_the_sources(tmp_path), OBC_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "OBC_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in done.stdout + done.stderr

"""The choice of backend: explicit, from the environment, or best available; and what importing obc does not do."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import obc
from obc.backends import BACKENDS, Backend, BackendError
from obc.backends.operators import OPERATORS


def fake_backend(name: str, devices: set[str], reason: str | None = None) -> Backend:
    """A backend whose channel_dot returns its own name, or one that can't be loaded for ``reason``."""

    def load() -> SimpleNamespace:
        if reason:
            raise ImportError(reason)
        return SimpleNamespace(channel_dot=lambda *args: torch.tensor([ord(letter) for letter in name]))

    return Backend(name, lambda: frozenset(devices), load, f"pip install {name}")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """More backends: ``spy``, best for CPU tensors, ``broken``, which can't be loaded, and one for other devices."""
    monkeypatch.setitem(BACKENDS, "spy", fake_backend("spy", {"cpu"}))
    monkeypatch.setitem(BACKENDS, "broken", fake_backend("broken", {"cpu"}, "it lacks a wheel"))
    monkeypatch.setitem(BACKENDS, "elsewhere", fake_backend("elsewhere", {"moon", "mars"}))
    monkeypatch.setitem(obc.backends.PREFERENCE, "cpu", ("spy", "reference"))
    monkeypatch.setattr(obc.backends, "_environment", None)
    monkeypatch.setattr(obc.backends, "_resolved", {})
    obc.backends._log_fallback.cache_clear()
    yield monkeypatch
    obc.backends._log_fallback.cache_clear()


def served_by() -> str:
    """The name of the fake backend that runs channel_dot, or "another" (of the vector 1, 1)."""
    ones = torch.ones(2)
    result = torch.ops.obc.channel_dot(ones, ones, 0)
    return "another" if torch.equal(result, ones) else "".join(map(chr, result.tolist()))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with this process's import path."""
    path = os.pathsep.join(p for p in sys.path if p)
    env = {key: value for key, value in os.environ.items() if key != "OBC_BACKEND"}
    env |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    here = Path(__file__).parent  # holds no package, unlike the root of the repository
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=here, capture_output=True, text=True, timeout=900)


def test_the_best_available_backend_serves(registry: pytest.MonkeyPatch) -> None:
    assert served_by() == "spy"


def test_an_explicit_choice_beats_the_environment_which_beats_the_best(registry: pytest.MonkeyPatch) -> None:
    registry.setitem(BACKENDS, "other", fake_backend("other", {"cpu"}))
    registry.setattr(obc.backends, "_environment", "other")
    assert served_by() == "other"
    with obc.use_backend("reference"):
        assert served_by() == "another"
        with obc.use_backend("spy"):
            assert served_by() == "spy"
        assert served_by() == "another"
    assert served_by() == "other"


def test_use_backend_ends_with_an_exception(registry: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), obc.use_backend("reference"):
        raise ZeroDivisionError
    assert served_by() == "spy"


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'gpu'; known are .*cpu, cuda, reference, triton"):
        obc.use_backend("gpu").__enter__()


def test_an_unavailable_backend_is_refused_with_reason_and_remedy(registry: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="'broken' is not available: it lacks a wheel; to get it: pip install brok"):
        obc.use_backend("broken").__enter__()
    assert served_by() == "spy"
    assert "broken" not in obc.backends.available()
    assert obc.backends.describe()["broken"] == {
        "available": False,
        "reason": "it lacks a wheel",
        "remedy": "pip install broken",
    }


def test_a_backend_refuses_tensors_of_another_device(registry: pytest.MonkeyPatch) -> None:
    with (
        obc.use_backend("elsewhere"),
        pytest.raises(BackendError, match="'elsewhere' serves mars, moon tensors, got a tensor on 'cpu'"),
    ):
        served_by()


def test_an_automatic_fallback_is_logged_once_at_info(
    registry: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.setitem(obc.backends.PREFERENCE, "cpu", ("broken", "spy"))
    with caplog.at_level(logging.DEBUG, logger="obc"):
        for _ in range(3):
            assert served_by() == "spy"
            obc.backends._resolved.clear()
    records = [record for record in caplog.records if record.name == "obc"]
    assert [record.levelname for record in records] == ["INFO"]
    message = records[0].getMessage()
    assert "'broken' is not used for cpu tensors: it lacks a wheel; to get it: pip install broken" in message


def test_a_device_that_no_table_names_falls_to_the_reference() -> None:
    assert obc.backends.chosen("mars").name == "reference"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_every_operator_or_a_reason(name: str) -> None:
    backend = BACKENDS[name]
    reason = backend.why_unavailable()
    assert (name in obc.backends.available()) == (reason is None)
    if reason is None:
        assert all(callable(getattr(backend.load(), operator)) for operator in OPERATORS)
    else:
        assert reason
        assert backend.remedy


def test_the_cpu_kernels_are_built_where_a_compiler_is() -> None:
    """Otherwise the tests of the CPU backend would be skipped unnoticed."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if any(map(shutil.which, compilers)):
        assert BACKENDS["cpu"].why_unavailable() is None


def test_the_environment_chooses_for_the_whole_process() -> None:
    code = "import obc; print(obc.backends.chosen('cpu').name)"
    assert run(code, OBC_BACKEND="reference").stdout == "reference\n"
    best = next(name for name in obc.backends.PREFERENCE["cpu"] if name in obc.backends.available())
    assert run(code, OBC_BACKEND="").stdout == run(code).stdout == f"{best}\n"


def test_a_wrong_name_in_the_environment_is_an_error_at_the_first_operator() -> None:
    result = run("import obc, torch; obc.ops.channel_dot(torch.ones(2), torch.ones(2), 0)", OBC_BACKEND="nonsense")
    assert result.returncode == 1
    assert "BackendError: unknown backend 'nonsense'; known are cpu, cuda, reference, triton" in result.stderr


def test_importing_prints_nothing_and_builds_nothing() -> None:
    package = Path(obc.__file__).parent

    def files() -> set[Path]:
        return {path for path in package.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    result = run(
        "import sys; sys.modules['triton'] = None\n"  # as where triton is not installed
        "import obc\n"
        "late = {'torch.utils.cpp_extension', 'transformers', 'torch_pruning', 'matplotlib'} & set(sys.modules)\n"
        "assert not late, late"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert files() == before


def test_obc_works_without_its_library_and_without_triton(tmp_path: Path) -> None:
    """The reference is used with a copy of only the Python files, and the record says what is missing."""
    for package in ("obc", "obc_kernels"):
        origin = Path(obc.__file__).parent if package == "obc" else Path(obc.__file__).parents[2] / "obc_kernels"
        shutil.copytree(origin, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, obc\n"
        "print(obc.ops.channel_dot(torch.ones(2, 3), torch.ones(2, 3), 1).tolist(), obc.backends.chosen('cpu').name)\n"
        "print(obc.backends.available(), obc.backends.describe()['cpu']['reason'])",
        PYTHONPATH=str(tmp_path),
    )
    assert result.stderr == ""
    served, missing = result.stdout.splitlines()
    assert served == "[2.0, 2.0, 2.0] reference"
    assert missing.startswith("['reference'] the CPU kernels were not built")

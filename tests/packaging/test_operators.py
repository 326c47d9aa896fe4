"""Every operator of the table is in every place where it belongs, and a native library of another table is refused.

Whoever adds a name to :mod:`obc.backends.operators` is told by these tests what is still missing.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from obc import ops, reference
from obc.backends import BACKENDS, native
from obc.backends.native import LibraryMismatchError
from obc.backends.operators import LIBRARIES, TABLE, Operator, header

ROOT = Path(__file__).resolve().parents[2]

# The file that holds an operator where it is not its own: both share their kernels or their tests.
SHARED_FILE = {"weight_dot_list": "weight_dot"}
SHARED_TESTS = {"weight_dot_list": "weight_dot", "weight_moments": "weight_dot"}


def _says(path: str, pattern: str) -> bool:
    file = ROOT / path
    return file.exists() and re.search(pattern, file.read_text(), re.MULTILINE) is not None


def missing_places(operator: Operator) -> list[str]:
    """The places that lack the operator, each as a sentence."""
    name = operator.name
    source = SHARED_FILE.get(name, name)
    own = f"python/obc/ops/{name}.py"
    places = {
        f"python/obc/reference.py: its definition, def {name}": hasattr(reference, name),
        f"{own}: the public function, def {name}": _says(own, rf"^def {name}\("),
        f"{own}: register(...) with its check and fake": hasattr(torch.ops.obc, name)
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"obc::{name}", "CompositeExplicitAutograd"),
        f"python/obc/ops/__init__.py: the import of {name}": hasattr(ops, name) and name in ops.__all__,
        f"obc_kernels/{name}.py: the Triton launcher {name}_triton": _says(
            f"obc_kernels/{name}.py", rf"^def {name}_triton\("
        ),
        f"obc_kernels/{name}.py: CASES to compile ahead of time": _says(f"obc_kernels/{name}.py", "^CASES = "),
        f"python/obc/integrations/numpy.py: def {name}": _says("python/obc/integrations/numpy.py", rf"^def {name}\("),
        f"tests/ops/test_{SHARED_TESTS.get(name, name)}.py: def test_{name}_...": _says(
            f"tests/ops/test_{SHARED_TESTS.get(name, name)}.py", rf"^def test_{name}\w*\("
        ),
        f"tests/ops/: a hypothesis test, @given and def test_{name}...": any(
            re.search(rf"^@given\(.*\)\ndef test_{name}\w*\(", path.read_text(), re.MULTILINE)
            for path in (ROOT / "tests" / "ops").glob("test_*.py")
        ),
        f"benchmarks/bench_ops.py: def {source}": _says("benchmarks/bench_ops.py", rf"^def {source}\("),
        f"benchmarks/bench_ops.py: a call of {source} in CASES": _says(
            "benchmarks/bench_ops.py", rf'^    ".*": lambda: {source}\('
        ),
        f"benchmarks/gpu_smoke.py: its calls in operator_calls, '{name}'": _says(
            "benchmarks/gpu_smoke.py", rf'^        "{name}": \['
        ),
        f"tests/packaging/wheel_smoke.py: '{name}' in ARGUMENTS, or a call of its own": _says(
            "tests/packaging/wheel_smoke.py", rf'"{name}": \(|ops\.{name}\('
        ),
        f"README.md: `{name}` in the table of operators, by python docs/operators_table.py": _says(
            "README.md", rf"^\|.*`{name}`"
        ),
        f"CHANGELOG.md: `{name}`": _says("CHANGELOG.md", rf"`{name}`"),
    }
    for library, suffix in zip(LIBRARIES, ("cpp", "cu"), strict=True):
        if library in operator.libraries:
            folder = f"csrc/{library}"
            places[f"{folder}/{source}.{suffix}: its kernel"] = (ROOT / f"{folder}/{source}.{suffix}").exists()
            places[f"{folder}/kernels.h: its declaration"] = _says(f"{folder}/kernels.h", rf"\b{source}\(")
            places[f"csrc/torch_{library}.cpp: the function {name}"] = _says(
                f"csrc/torch_{library}.cpp", rf"^[\w:<>, ]+ {name}\("
            )
    if "cpu" in operator.libraries:
        places[f"csrc/module.cpp: {source} on NumPy arrays"] = _says(
            "csrc/module.cpp", rf'module\.def\("{name}(_list)?", '
        )
    if "cuda" in operator.libraries:
        places[f"benchmarks/sanitized_calls.py: a call, ops.{name}(...)"] = _says(
            "benchmarks/sanitized_calls.py", rf"\bops\.{source}\("
        )
    return [place for place, found in places.items() if not found]


@pytest.mark.parametrize("operator", TABLE, ids=lambda operator: operator.name)
def test_an_operator_stands_in_every_place(operator: Operator) -> None:
    missing = missing_places(operator)
    assert not missing, f"{operator.name} is missing in:\n" + "\n".join(missing)


def test_the_test_of_places_finds_what_is_missing() -> None:
    absent = Operator("no_such_operator", "(Tensor x) -> Tensor", "nothing")
    assert len(missing_places(absent)) == 23


@pytest.mark.parametrize("operator", TABLE, ids=lambda operator: operator.name)
def test_functions_have_the_arguments_of_the_schema(operator: Operator) -> None:
    """The public function and the reference agree in names, order and defaults."""
    schema = torch._C.parse_schema(f"obc::{operator.name}{operator.schema}")
    expected = [
        (argument.name, argument.default_value if argument.has_default_value() else inspect.Parameter.empty)
        for argument in schema.arguments
    ]
    for module in (ops, reference):
        parameters = inspect.signature(getattr(module, operator.name)).parameters.values()
        assert [(p.name, p.default) for p in parameters] == expected, module.__name__


def test_the_table_can_be_read_without_torch() -> None:
    """CMake runs it with nothing installed but what the build needs."""
    table = ROOT / "python" / "obc" / "backends" / "operators.py"
    done = subprocess.run([sys.executable, "-I", "-S", str(table)], capture_output=True, text=True, check=True)
    assert done.stdout == header()
    assert '#define OBC_CUDA_SCHEMA_channel_dot "channel_dot(Tensor activation' in done.stdout
    assert "fold" not in done.stdout


def test_a_library_of_another_version_is_refused_when_it_is_loaded() -> None:
    if reason := BACKENDS["cpu"].why_unavailable():
        pytest.skip(f"backend 'cpu' is not available: {reason}")
    native.check("cpu")
    other = Operator("channel_dot", "(Tensor activation, Tensor grad, int channel_dim) -> Tensor", "")
    with pytest.raises(LibraryMismatchError, match=r"it registers obc_cpu::channel_dot\(Tensor activation.*expected"):
        native.check("cpu", [other])
    absent = Operator("toy_dot", "(Tensor x) -> Tensor", "a toy")
    with pytest.raises(LibraryMismatchError, match=r"libobc_cpu.so was built from another version.*toy_dot is missing"):
        native.check("cpu", [absent])


def test_a_mismatch_is_no_reason_to_fall_back_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike a library that was not built."""
    if reason := BACKENDS["cpu"].why_unavailable():
        pytest.skip(f"backend 'cpu' is not available: {reason}")
    monkeypatch.setattr(native.check, "__defaults__", ([Operator("toy_dot", "(Tensor x) -> Tensor", "a toy")], None))
    from obc.backends import cpu

    with pytest.raises(LibraryMismatchError, match="Rebuild it: "):
        cpu.load()

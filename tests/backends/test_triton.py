"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time.

Whether kernels are interpreted is decided when Triton is imported, so the interpreted tests run in processes of their
own: the operators' common tests on the backend ``triton``, and ``triton_interpreted/`` for what only Triton has.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_models import llama_8b_layer, resnet50_weights

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def passed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]


# Per file, the tests that run interpreted. Left to a real GPU are those that the interpreter takes minutes for: drawn
# shapes, gradcheck, inputs of thousands of tiles, and the other dtypes where layouts multiply.
LARGE = "70001 or 8191 or 4099 or 1031"
INTERPRETED = {
    "test_channel_dot.py": f"bf16 and (matches or noncontiguous) and not ({LARGE})",
    "test_channel_moments.py": f"bf16 and (matches or noncontiguous) and not ({LARGE} or 8193 or 30001 or 1025)",
    "test_weight_dot.py": f"bf16 and matches and not ({LARGE})",
    "test_end_row.py": "(matches or leaves or version or divides) and f32",
    "test_fold.py": "matches or noncontiguous or opcheck or compiled",
}


@pytest.mark.slow
@pytest.mark.parametrize("file", INTERPRETED)
def test_operators_interpreted(file: str) -> None:
    selected = f"triton-cpu and ({INTERPRETED[file]})"
    arguments = ("-q", "-p", "no:cacheprovider", f"tests/ops/{file}", "-k", selected)
    passed(run_python("-m", "pytest", *arguments, interpret=True))


@pytest.mark.parametrize(
    ("file", "selected"),
    [
        ("launches.py", "not slow"),
        pytest.param("launches.py", "slow", marks=pytest.mark.slow),
        pytest.param("autotuning.py", "not slow", marks=pytest.mark.slow),
        pytest.param("autotuning.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_launchers_interpreted(file: str, selected: str) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    numpy = tuple(map(int, versions["numpy"].split(".")[:2]))
    # Its interpreter makes an integer of an array with one element.
    assert not (versions["triton"].startswith("3.6.") and numpy >= (2, 4)), (
        f"Triton 3.6 interprets loops with NumPy below 2.4 alone, found {versions}; install another of them"
    )
    arguments = ("-q", "-p", "no:cacheprovider", "-m", selected, f"tests/triton_interpreted/{file}")
    passed(run_python("-m", "pytest", *arguments, interpret=True))


@pytest.mark.slow
def test_kernels_compile_without_spills_and_load_16_bytes() -> None:
    operators = ["channel_dot", "channel_moments", "weight_dot", "weight_dot_list", "fold"]
    result = run_python(
        "-m", "obc_kernels.aot", "--arch", "90", "--dtypes", "bf16", "--operators", *operators, interpret=False
    )
    passed(result)
    assert result.stdout.rstrip().endswith("kernels compiled, 0 with faults")


FAULTS = """
from dataclasses import replace
from obc_kernels.aot import Report
good = Report("kernel", "case", "bf16", 90, registers=64, spills=0, shared=0, loads={16: 8, 4: 2}, exempt=False)
assert not good.faults
assert replace(good, spills=3).faults == ["3 spill instructions"]
assert replace(good, loads={8: 4}).faults == ["no 16-byte load"]
assert not replace(good, loads={8: 4}, exempt=True).faults
assert replace(good, loads={}).faults
"""


@pytest.mark.slow
def test_ahead_of_time_check_finds_faults() -> None:
    passed(run_python("-c", FAULTS, interpret=False))


@pytest.mark.parametrize(
    ("shapes", "most"), [(resnet50_weights(), 3), (llama_8b_layer(), 2)], ids=["ResNet-50", "Llama-8B layer"]
)
def test_a_models_weights_take_few_launches(shapes: list[tuple[int, ...]], most: int) -> None:
    """Counted, not run: the tensors have no memory. One launch for layers in vectors, one for others, one to finish."""
    from obc_kernels import weight_dot_list_triton
    from obc_kernels.launch import recording

    weights = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    none, count = [None] * len(shapes), len(shapes)
    with recording(dry=True) as launches:
        weight_dot_list_triton(weights, weights, none, none, [1] * count, [False] * count)
    assert len(launches) <= most
    assert sum("finish" in launch.kernel.__name__ for launch in launches) == 1


def test_more_steps_than_32_bits_count_are_refused() -> None:
    """Refusals come before any launch, shown on tensors without memory."""
    from obc_kernels import channel_dot_triton, weight_dot_list_triton
    from obc_kernels.launch import recording

    samples = torch.empty(2**31, 1, 2, device="meta")
    rows = torch.empty(2**31, 1, device="meta")
    with recording(dry=True):
        with pytest.raises(ValueError, match=r"obc::channel_dot: 2147483648 tiles are more than 2\^31"):
            channel_dot_triton(samples, samples, 1, per_sample=True)
        with pytest.raises(ValueError, match=r"obc::weight_dot_list: 2147483648 tiles are more than 2\^31"):
            weight_dot_list_triton([rows], [rows], [None], [None], [1], [False])


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import obc_kernels
try:
    obc_kernels.require()
except ImportError as error:
    assert "triton can't be imported" in str(error), error
else:
    raise AssertionError("require() accepted a missing triton")
"""

WITHOUT_GPU = """
import torch
torch.cuda.is_available = lambda: False
import obc_kernels
try:
    obc_kernels.require()
except ImportError as error:
    assert "torch sees no GPU" in str(error), error
else:
    raise AssertionError("require() accepted a machine without a GPU")
"""


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("program", [WITHOUT_TRITON, WITHOUT_GPU], ids=["no triton", "no gpu"])
def test_require_says_what_is_missing(program: str) -> None:
    result = run_python("-c", program, interpret=False)
    passed(result)
    assert result.stdout == result.stderr == ""


@pytest.mark.slow
def test_require_accepts_the_interpreter() -> None:
    passed(run_python("-c", "import obc_kernels; obc_kernels.require()", interpret=True))

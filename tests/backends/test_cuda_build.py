"""Checks of the CUDA kernels without a GPU: they compile as intended, and the table that chooses them is valid."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from obc.backends import BACKENDS, fastest
from obc.backends.native import FOLDER
from obc.backends.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = FOLDER / "libobc_cuda.so"
CHECK = ROOT / "csrc" / "cuda" / "check.py"

_spec = importlib.util.spec_from_file_location("cuda_check", CHECK)
assert _spec is not None
assert _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
sys.modules["cuda_check"] = check
_spec.loader.exec_module(check)


def _passes(capsys: pytest.CaptureFixture[str], arch: str, *arguments: str) -> None:
    """The check finds every kernel, and in none of them a fault."""
    if missing := check.missing_tools(compiles=not arguments):
        pytest.skip(f"no {' and no '.join(missing)} on this machine (the CUDA toolkit has them)")
    status = check.main(["--arch", arch, *arguments])
    printed = capsys.readouterr()
    assert status == 0, printed.out + printed.err
    for kernel in ("channel_dot", "weight_dot", "weight_dot_list", "rows", "end_row"):
        assert f"sm_{arch}  {kernel}_kernel " in printed.out
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert f"weight_dot_kernel {dtype} " in printed.out


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_librarys_kernels_have_no_spills_and_wide_loads(capsys: pytest.CaptureFixture[str], arch: str) -> None:
    """The library that was built with obc: compiling its kernels again would take a minute."""
    if not LIBRARY.exists():
        pytest.skip("libobc_cuda.so was not built (no nvcc was found when obc was installed)")
    _passes(capsys, arch, "--library", str(LIBRARY))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_compile_without_spills_and_with_wide_loads(capsys: pytest.CaptureFixture[str], arch: str) -> None:
    _passes(capsys, arch)


def test_a_library_without_code_for_an_architecture_is_refused() -> None:
    if not LIBRARY.exists() or check.missing_tools(compiles=False):
        pytest.skip("libobc_cuda.so was not built, or there is no cuobjdump")
    with pytest.raises(SystemExit, match=r"libobc_cuda\.so has no code for sm_61; TORCH_CUDA_ARCH_LIST chooses"):
        check.main(["--arch", "61", "--library", str(LIBRARY)])


def _kernel(name: str = "weight_dot_kernel float32", streaming: int = 128, count: int = 16, **fields: object) -> object:
    values = {"registers": 96, "stack": 0, "shared": 0} | fields
    return check.Kernel(name, "90", streaming=Counter({streaming: count}), **values)


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (_kernel(stack=8), "spills: 8 bytes of stack"),
        (_kernel(local=3), "3 accesses to local memory"),
        (_kernel(streaming=64), r"streaming loads of \[64\] bits, expected 128"),
        (_kernel(count=7), "7 streaming loads of 128 bits, expected at least 8"),
        (_kernel(double=2), "2 instructions in float64"),
        (_kernel(instructions=160_000), "10000 instructions per vector in its code, the budget is"),
        (_kernel(loops=[900.0, 1000.0]), "900 instructions per vector in its shortest loop, the budget is"),
        (_kernel(loops=[1.0, 1000.0]), "1000 instructions per vector in its longest loop, the budget is"),
        (_kernel("new_kernel float32", instructions=32), r"BUDGET should say \(2, 0, 0\)"),
    ],
)
def test_check_names_the_fault(kernel: object, fault: str) -> None:
    assert any(re.search(fault, found) for found in kernel.faults()), kernel.faults()


def test_check_finds_no_fault_in_what_is_meant() -> None:
    assert _kernel().faults() == []
    assert _kernel("rows_kernel float32 items=1 moments=5", count=0).faults() == []
    assert _kernel("end_row_kernel float32", count=0).faults() == []


def test_check_reads_names_and_widths() -> None:
    symbol = "_ZN3obc4cuda11rows_kernelI13__nv_bfloat16Li8ELi5EEEvNS0_4RowsEPNS0_13AccumulatorOfIT_E4typeEPjS7_"
    assert check.readable(symbol) == "rows_kernel bfloat16 items=8 moments=5"
    instructions = ("LDG.E.EF.128", "LDG.E.64.STRONG.GPU", "LDG.E", "LDG.E.U16")
    assert [check.width_of(instruction) for instruction in instructions] == [128, 64, 32, 16]


def test_check_counts_a_load_in_its_innermost_loop() -> None:
    """Two loads in a loop of four instructions, within one of eight; one load in the outer loop alone."""
    code = ["MOV R1, R2", "LDG.E.EF.128 R4, [R2.64]", "@P0 LDG.E.EF.128 R4, [R2.64]", "LDG.E.EF.128 R8, [R2.64+0x10]"]
    code += ["IADD3 R2, R2, 1", "@P1 BRA 0x20", "DADD R4, R4, R6", "@!P1 BRA P3, 0x0", "@P2 BRA 0xa0", "EXIT"]
    kernel = _kernel(count=0)
    kernel.read([(16 * place, instruction) for place, instruction in enumerate(code)])
    assert kernel.streaming[128] == 3
    assert kernel.loops == [4 / 2, 8 / 1]
    assert (kernel.instructions, kernel.double) == (10, 1)


def test_library_needs_nothing_of_torch_but_the_stable_abi() -> None:
    if not LIBRARY.exists():
        pytest.skip("libobc_cuda.so was not built (no nvcc was found when obc was installed)")
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine (binutils has it)")
    listed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    unstable = [symbol for symbol in symbols if "c10" in symbol and not symbol.startswith("torch_c10_cuda")]
    unstable += [symbol for symbol in symbols if "3c10" in symbol or "2at" in symbol or "5torch" in symbol]
    assert unstable == []


def test_order_of_backends_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest.order("cpu", "channel_dot", torch.float32, 1) == ("cpu", "reference")
    assert fastest.order("cuda", "channel_dot", torch.float32, 1) == ("cuda", "triton", "reference")
    monkeypatch.setitem(fastest.FASTEST, ("channel_dot", torch.bfloat16, "large"), "triton")
    large, small = 2**25, 2**10
    assert fastest.order("cuda", "channel_dot", torch.bfloat16, large) == ("triton", "cuda", "reference")
    assert fastest.order("cuda", "channel_dot", torch.bfloat16, small)[0] == "cuda"
    assert fastest.order("cuda", "channel_dot", torch.float32, large)[0] == "cuda"
    assert fastest.order("cuda", "weight_dot", torch.bfloat16, large)[0] == "cuda"


def test_table_names_operators_dtypes_sizes_and_backends_that_exist() -> None:
    sizes = {fastest.size_class(elements) for elements in (0, 2**18, 2**24)}
    for (operator, dtype, size), backend in fastest.FASTEST.items():
        assert operator in OPERATORS
        assert isinstance(dtype, torch.dtype)
        assert size in sizes
        assert backend in BACKENDS

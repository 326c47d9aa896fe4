"""Compile every kernel for absent GPUs and inspect the machine code: ``python -m obc_kernels.aot``.

The launchers run on tensors without memory (``meta``) while :mod:`obc_kernels.launch` records instead of launching, so
what is compiled is what would be launched: the same specialisations, block sizes and options. One line per kernel,
dtype, case and architecture: registers a thread, spill instructions, shared memory, how many global loads of which
width the machine code has. The exit code is 1 if

- any kernel spills, or
- a kernel that reads its inputs in an aligned case (adjacent in memory, sizes divisible by 16) has no 16-byte load.

Exempt from the second rule, and marked so, are the strided cases and the second stages, which read partial sums.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from obc_kernels.case import DTYPES, Case
from obc_kernels.launch import Launch, recording
from obc_kernels.layout import VECTOR_BYTES

FOLDER = [str(Path(__file__).parent)]
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
SECOND_STAGES = (
    "_sum_partials_kernel",
    "_channel_moments_finish_kernel",
    "_weight_dot_finish_kernel",
    "_weight_dot_list_finish_kernel",
)


@dataclass(frozen=True)
class Report:
    """The properties of one kernel's machine code."""

    kernel: str
    case: str
    dtype: str
    arch: int
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    exempt: bool

    @property
    def faults(self) -> list[str]:
        faults = [f"{self.spills} spill instructions"] if self.spills else []
        if not self.exempt and max(self.loads, default=0) < VECTOR_BYTES:
            faults.append(f"no {VECTOR_BYTES}-byte load")
        return faults

    def line(self) -> str:
        loads = " ".join(f"{count}x{width}" for width, count in sorted(self.loads.items(), reverse=True))
        verdict = "; ".join(self.faults) or ("exempt" if self.exempt else "ok")
        return (
            f"{self.kernel:<32}{self.case:<26}{self.dtype:<6}sm_{self.arch:<5}{self.registers:>4}{self.spills:>8}"
            f"{self.shared:>8}{max(self.loads, default=0):>8}  {verdict:<10}{loads}"
        )


HEADER = (
    f"{'kernel':<32}{'case':<26}{'dtype':<6}{'arch':<8}{'regs':>4}{'spills':>8}{'shared':>8}{'widest':>8}  "
    f"{'verdict':<10}loads x bytes"
)


def cases() -> list[Case]:
    """The cases in every operator's file, by operator."""
    modules = (importlib.import_module(f"obc_kernels.{found.name}") for found in pkgutil.iter_modules(FOLDER))
    return [case for module in modules for case in getattr(module, "CASES", ())]


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile one recorded launch for ``sm_<arch>``, specialised on its arguments as a launch would be."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    divisible = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", launch.constexprs[parameter.name]
            continue
        value = launch.args[index]
        if value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(index,)] = divisible  # torch allocates at multiples of 512 bytes
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = divisible
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def _dump(cubin: Path, *flags: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *flags, cubin], check=True, capture_output=True, text=True).stdout


def inspect(launch: Launch, case: Case, dtype: str, arch: int) -> Report:
    compiled = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _dump(cubin, "-res-usage"), _dump(cubin, "-sass")
    name = launch.kernel.__name__
    elementwise = launch.constexprs.get("VECTORS") is False
    return Report(
        kernel=name,
        case=case.name + (", by element" if elementwise else ""),
        dtype=dtype,
        arch=arch,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=compiled.metadata.shared,
        loads=dict(Counter(_width(load) for load in re.findall(r"\b(LDG(?:STS)?\.[\w.]*)", code))),
        exempt=not case.aligned or elementwise or name in SECOND_STAGES,
    )


def _width(load: str) -> int:
    """Bytes that one thread loads: ``LDG.E.128`` 16, ``LDG.E`` 4, ``LDG.E.U16`` 2."""
    if match := re.search(r"\.(128|64)\b", load):
        return int(match[1]) // 8
    return 2 if "16" in load else 1 if "8" in load else 4


def reports(found: list[Case], archs: list[int], dtypes: list[str], operators: list[str]) -> Iterator[Report]:
    """Compile each distinct launch of the cases once per architecture."""
    for case in found:
        for dtype in [dtype for dtype in case.dtypes if dtype in dtypes and case.operator in operators]:
            with recording(dry=True) as launches:
                case.run(DTYPES[dtype])
            for launch in launches:
                for arch in archs:
                    yield inspect(launch, case, dtype, arch)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 1 if a kernel has a fault."""
    found = cases()
    operators = list(dict.fromkeys(case.operator for case in found))
    parser = argparse.ArgumentParser(prog="python -m obc_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities without the dot")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--operators", nargs="+", choices=operators, default=operators)
    options = parser.parse_args(arguments)
    print(HEADER)
    count = faulty = 0
    for report in reports(found, options.arch, options.dtypes, options.operators):
        print(report.line(), flush=True)
        count, faulty = count + 1, faulty + bool(report.faults)
    print(f"{count} kernels compiled, {faulty} with faults")
    return 1 if faulty or not count else 0


if __name__ == "__main__":
    sys.exit(main())

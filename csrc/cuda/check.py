"""Compiles csrc/cuda for each architecture, without a GPU, and prints what each kernel is made of.

    python csrc/cuda/check.py [--arch 80 90] [--library libobc_cuda.so]

With --library it reads the code in that library, and compiles nothing.

A row is one kernel: registers, spills and shared memory from the compiler, loads from global memory by width in bits
from the machine code. Inputs are read with 16-byte streaming loads wherever they allow it; in machine code those are
the loads marked EF (evict first), and no other load is. "per vector" is the number of machine instructions in the
kernel's code for each of these loads. The exit code is 1 where a kernel spills to local memory, where a streaming load
is narrower than 128 bits, where a kernel that should have eight of them has fewer, or where its instructions per vector
exceed their budget (BUDGET, measured; a change that needs more must say so there).

Needs nvcc, unless a library is given, and cuobjdump: the toolkit's, or the one that comes with Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90")

# Loads of the two inputs that a thread has under way at once: four of each.
LOADS_AT_ONCE = 8

TYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}

# Machine instructions per streaming 16-byte load: of the whole code, of the loop with such loads that has fewest, and
# of the one that has most; the larger count of sm_80 and sm_90, by nvcc 13. Prologue and last sums count in the first,
# every branch of a loop in the others: this bounds growth, and a loop executes less. At 3 TB/s an H100 has time for 158
# of them (132 multiprocessors, 128 lanes, 1.755 GHz).
BUDGET = {
    "channel_dot_kernel bfloat16": (303, 60, 100),
    "channel_dot_kernel float16": (299, 56, 96),
    "channel_dot_kernel float32": (278, 26, 85),
    "channel_dot_kernel float64": (280, 26, 90),
    "columns_kernel bfloat16 items=8": (254, 174, 174),
    "columns_kernel float16 items=8": (250, 170, 170),
    "columns_kernel float32 items=4": (230, 151, 151),
    "columns_kernel float64 items=2": (223, 144, 144),
    "rows_kernel bfloat16 items=8 moments=1": (109, 22, 139),
    "rows_kernel bfloat16 items=8 moments=5": (129, 42, 98),
    "rows_kernel float16 items=8 moments=1": (105, 18, 135),
    "rows_kernel float16 items=8 moments=5": (125, 38, 94),
    "rows_kernel float32 items=4 moments=1": (60, 7, 326),
    "rows_kernel float32 items=4 moments=5": (105, 18, 74),
    "rows_kernel float64 items=2 moments=1": (63, 10, 337),
    "rows_kernel float64 items=2 moments=5": (116, 12, 74),
    "rows_of_positions_kernel bfloat16 items=8": (223, 140, 236),
    "rows_of_positions_kernel float16 items=8": (219, 136, 232),
    "rows_of_positions_kernel float32 items=4": (185, 117, 173),
    "rows_of_positions_kernel float64 items=2": (191, 118, 156),
    "weight_dot_kernel bfloat16": (542, 69, 111),
    "weight_dot_kernel float16": (536, 65, 107),
    "weight_dot_kernel float32": (498, 31, 95),
    "weight_dot_kernel float64": (517, 31, 100),
    "weight_dot_list_kernel bfloat16": (584, 67, 110),
    "weight_dot_list_kernel float16": (578, 63, 106),
    "weight_dot_list_kernel float32": (532, 30, 92),
    "weight_dot_list_kernel float64": (550, 29, 96),
}
# Other versions of the compiler differ by so much.
SLACK = 0.1


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit on the path, under CUDA_HOME, or in the wheel of Triton."""
    folders = [Path(os.environ[variable]) / "bin" for variable in ("CUDA_HOME", "CUDA_PATH") if variable in os.environ]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def missing_tools(compiles: bool = True) -> list[str]:
    """Which of the tools that this check needs are not on this machine; nvcc only where it compiles."""
    return [name for name in ("nvcc", "cuobjdump")[not compiles :] if find_tool(name) is None]


@dataclass
class Kernel:
    """What the compiler made of one kernel for one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    loads: Counter[int] = field(default_factory=Counter)  # by width in bits, the streaming ones apart
    streaming: Counter[int] = field(default_factory=Counter)
    local: int = 0  # instructions that read or write local memory
    double: int = 0  # instructions that calculate in float64
    instructions: int = 0
    loops: list[float] = field(default_factory=list)  # instructions per streaming load, of each loop that has any

    def read(self, code: Sequence[tuple[int, str]]) -> None:
        """Count the instructions of the machine code, (address, instruction) each."""
        self.instructions = len(code)
        loops, vectors = loops_of(code), Counter[tuple[int, int]]()
        for address, instruction in code:
            name = re.sub(r"^@!?U?P\w+ +", "", instruction).split()[0]
            self.double += re.search(r"\b(?:DADD|DMUL|DFMA)\b|\.F64\b", instruction) is not None
            if name.startswith(("LDL", "STL")):
                self.local += 1
            elif name.startswith("LDG"):
                width = width_of(name)
                (self.streaming if ".EF" in name else self.loads)[width] += 1
                if ".EF" in name and width == 128:
                    vectors[next((loop for loop in loops if loop[0] <= address <= loop[1]), (0, code[-1][0]))] += 1
        size = {loop: sum(loop[0] <= address <= loop[1] for address, _ in code) for loop in vectors}
        self.loops = sorted(size[loop] / count for loop, count in vectors.items())

    @property
    def per_vector(self) -> float:
        """Machine instructions in the kernel's code for each of its streaming 16-byte loads."""
        return self.instructions / max(1, self.streaming[128])

    @property
    def costs(self) -> tuple[float, float, float]:
        """Instructions per vector: of the whole code, of the loop that has fewest, of the one that has most."""
        loops = self.loops or [0.0]
        return self.per_vector, loops[0], loops[-1]

    @property
    def reads_vectors(self) -> bool:
        """Whether this kernel reads its inputs by 16-byte loads where they allow it."""
        items = re.search(r"items=(\d+)", self.name)
        others = ("end_row", "finish")  # vectors of scores, partial sums
        return not any(word in self.name for word in others) and not (items and items[1] == "1")

    def faults(self) -> list[str]:
        faults = []
        if self.double and "float64" not in self.name:
            faults.append(f"{self.double} instructions in float64")
        if self.stack or self.local:
            faults.append(f"spills: {self.stack} bytes of stack, {self.local} accesses to local memory")
        if narrow := sorted(width for width in self.streaming if width < 128):
            faults.append(f"streaming loads of {narrow} bits, expected 128")
        if self.reads_vectors and self.streaming[128] < LOADS_AT_ONCE:
            faults.append(f"{self.streaming[128]} streaming loads of 128 bits, expected at least {LOADS_AT_ONCE}")
        budget = BUDGET.get(self.name)
        if self.reads_vectors and budget is None:
            faults.append(
                f"no budget of instructions per vector; BUDGET should say {tuple(map(math.ceil, self.costs))}"
            )
        elif budget is not None:
            for cost, allowed, where in zip(self.costs, budget, ("code", "shortest loop", "longest loop"), strict=True):
                if cost > allowed * (1 + SLACK) + 1:
                    faults.append(f"{cost:.0f} instructions per vector in its {where}, the budget is {allowed}")
        return [f"sm_{self.arch} {self.name}: {fault}" for fault in faults]

    def row(self) -> str:
        loads = [f"{count}x{width}" for width, count in sorted(self.streaming.items(), reverse=True)]
        others = [f"{count}x{width}" for width, count in sorted(self.loads.items(), reverse=True)]
        return (
            f"sm_{self.arch}  {self.name:42} {self.registers:9} {self.stack + self.local:7} {self.shared:7}  "
            f"{self.per_vector if self.reads_vectors else 0:10.0f}  "
            f"{' '.join(f'{loop:.0f}' for loop in self.loops) or '-':12}  {' '.join(loads) or '-':14} "
            f"{' '.join(others) or '-'}"
        )


def readable(symbol: str) -> str:
    """``rows_kernel float32 items=4 moments=1`` for a mangled name."""
    found = re.search(r"\d([a-z_]+_kernel)(?:I(.+?)E?Ev)?", symbol)
    if found is None:
        raise ValueError(f"no kernel's name in {symbol!r}")
    name, arguments = found[1], found[2] or ""
    words = [name]
    words += [word for code, word in TYPES.items() if re.match(rf"{code}(?:L|E|$)", arguments)]
    words += [
        f"{label}={n}" for label, n in zip(("items", "moments"), re.findall(r"Li(\d+)E?", arguments), strict=False)
    ]
    return " ".join(words)


def width_of(instruction: str) -> int:
    """Bits of one load: LDG.E.EF.128 -> 128."""
    for modifier, bits in ((".128", 128), (".64", 64), (".U16", 16), (".S16", 16), (".U8", 8), (".S8", 8)):
        if modifier in instruction:
            return bits
    return 32


def inspect(source: Path, arch: str) -> list[Kernel]:
    """Compile one file and read its kernels."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc on this machine")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{HERE.parent}", "-cubin", "-o", cubin, source]
        subprocess.run(command, check=True)
        return kernels_in(cubin, arch)


def kernels_in(binary: Path, arch: str) -> list[Kernel]:
    """The kernels of a cubin, or those of a library for one architecture."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        raise FileNotFoundError("no cuobjdump on this machine")

    def show(*what: str) -> str:
        return subprocess.run([cuobjdump, *what, binary], check=True, capture_output=True, text=True).stdout

    if binary.suffix == ".cubin":
        chosen: tuple[str, ...] = ()
    elif f".sm_{arch}." in show("-lelf"):
        chosen = ("-arch", f"sm_{arch}")
    else:
        raise SystemExit(f"cuda-check: {binary} has no code for sm_{arch}; TORCH_CUDA_ARCH_LIST chooses its code")
    usage, code = show("-res-usage", *chosen), show("-sass", *chosen)
    kernels: dict[str, Kernel] = {}
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for symbol, registers, stack, shared in re.findall(pattern, usage):
        kernels[symbol] = Kernel(readable(symbol), arch, int(registers), int(stack), int(shared))
    for symbol, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL):
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S[^;]*);", body)
        kernels[symbol].read([(int(address, 16), instruction.strip()) for address, instruction in lines])
    return list(kernels.values())


def loops_of(code: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of every loop, the innermost first: what lies between a branch back and its target."""
    found = set()
    for address, instruction in code:
        if (target := re.search(r"\bBRA(?:\.\S+)? .*?(0x[0-9a-f]+)$", instruction)) and int(target[1], 16) < address:
            found.add((int(target[1], 16), address))
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="compute capabilities without the dot")
    parser.add_argument("--library", type=Path, help="read the code in this library, and compile nothing")
    given = parser.parse_args(arguments)
    if missing := missing_tools(compiles=given.library is None):
        print(f"cuda-check: no {' and no '.join(missing)} on this machine; install the CUDA toolkit", file=sys.stderr)
        return 2
    read, sources = (inspect, sorted(HERE.glob("*.cu"))) if given.library is None else (kernels_in, [given.library])
    jobs = [(source, arch) for arch in given.arch for source in sources]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(lambda job: read(*job), jobs) for kernel in found]
    print(f"arch   {'kernel':42} registers  spills  shared  per vector  in loops      streaming      other loads")
    for kernel in sorted(kernels, key=lambda kernel: (kernel.arch, kernel.name)):
        print(kernel.row())
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(kernels)} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Builds ``csrc/cuda`` with the host's C++ compiler into an emulated ``libobc_cuda``, registered for CPU tensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from obc.backends.operators import header

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# -O1 is where compiling and running together take least time. FORTIFY's longjmp refuses to change stacks.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DOBC_CUDA_DISPATCH_KEY=CPU"]
FLAGS += ["-DOBC_CUDA_RESERVE=1024"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build() -> Path:
    """The library, rebuilt if a source has changed."""
    torch_root = Path(torch.__file__).parent
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources += [ROOT / "csrc" / "torch_cuda.cpp", HERE / "emulation.cpp"]
    schemas = ROOT / "python" / "obc" / "backends" / "operators.py"
    read = sorted({*sources, schemas, *HERE.glob("*.h"), *(ROOT / "csrc").glob("**/*.h"), Path(__file__)})
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read) + torch.__version__.encode())
    folder = ROOT / "build" / f"cuda-emulation-{digest.hexdigest()[:16]}"
    library = folder / "libobc_cuda_emulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    tool = compiler()
    assert tool is not None, "no C++ compiler"
    (folder / "obc_schemas.h").write_text(header())
    include = ["-I", str(folder), "-I", str(HERE), "-I", str(ROOT / "csrc"), "-isystem", str(torch_root / "include")]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [tool, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    # Symbolic binding: the emulation's own symbols come before torch's of the same name.
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    unfinished = library.with_suffix(f".{os.getpid()}")
    subprocess.run([tool, *map(str, objects), *link, "-o", str(unfinished)], check=True)
    unfinished.rename(library)
    return library

"""Three kernels for Nsight Compute: channel_dot of tokens, weight_dot and weight_dot_list, in bfloat16 from memory.

    ncu --profile-from-start off python -m benchmarks.profiled_calls        (benchmarks/gpu.sh does it)

Each runs once unprofiled, which compiles it, and once profiled. ``summary`` reads what ``ncu --csv`` printed.
"""

from __future__ import annotations

import csv
import io
from typing import Any

# What one wants to know of a kernel that should be bound by memory.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "launch__grid_size",
)


def summary(printed: str) -> list[dict[str, Any]]:
    """One entry a kernel, of ncu's CSV with one metric a line: {"kernel": name, metric: value}."""
    lines = printed.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name"):
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def main() -> None:
    """Run the calls on both backends."""
    # Here, so that the GPU run can read ``summary`` where torch or obc can't be imported.
    import torch

    import obc
    from benchmarks.gpu_models import llama_8b_layer
    from obc import ops

    tokens = [torch.randn(8, 4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    weights = [torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    layers = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in llama_8b_layer()] for _ in range(2)]
    calls = (
        lambda: ops.channel_dot(*tokens, -1),
        lambda: ops.weight_dot(*weights),
        lambda: ops.weight_dot_list(*layers),
    )
    for backend in (name for name in ("cuda", "triton") if name in obc.backends.available()):
        with obc.use_backend(backend):
            for call in calls:
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()

#!/bin/sh
# Everything that needs a GPU, in under nine minutes and without the network, for any machine with one:
#
#   benchmarks/gpu.sh [FOLDER] [--seconds 525] [--parts build benchmarks tests sanitizer] [--dry-run]
#   PYTHON=python3.12                 the Python that has torch (2.11 or newer), triton (3.6 or newer) and pytest
#   OBC_BUILD_CUDA=auto|0|1           whether the CUDA C++ kernels are built: where nvcc is found (default), never, or must be
#   TORCH_CUDA_ARCH_LIST=8.0;9.0      for which architectures, by default this GPU's
#
# Builds the native kernels in place, runs the benchmarks, `pytest -m gpu`, and compute-sanitizer where it is installed.
# FOLDER, by default benchmarks/results, gets what each part found as it ends: gpu-run.json, gpu-<GPU's name>.json and
# .txt, and a log each. The exit code is 1 where a part failed; the others run all the same.
set -eu

cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu_run "$@"

#!/bin/sh
# Everything that needs a GPU, in under nine minutes and without the network, for any machine with one:
#
#   benchmarks/gpu.sh [FOLDER] [--seconds 525] [--parts build smoke-cuda smoke-triton tests profile benchmarks] [--dry-run]
#   PYTHON=python3.12                 the Python that has torch (2.11 or newer), triton (3.6 or newer) and pytest
#   OBC_BUILD_CUDA=auto|0|1           whether the CUDA C++ kernels are built: where nvcc is found (default), never, or must be
#   TORCH_CUDA_ARCH_LIST=8.0;9.0      for which architectures, by default this GPU's
#
# Builds the native kernels in place, tries every operator once, runs `pytest -m gpu`, profiles three kernels where ncu is
# installed, and runs the benchmarks. FOLDER, by default benchmarks/results, gets four files, kept up to date: gpu-run.json
# (what each part found), gpu-<GPU's name>.json and .txt (the benchmarks), and gpu-logs.tar.gz. The exit code is 1 where a
# part failed; the others run all the same. compute-sanitizer has a script of its own: benchmarks/sanitize_gpu.sh.
#
# On a machine that is lent for half an hour, ten minutes a command, and may be a new one at every command, these three
# in this order take at most 25 minutes; each brings back four files. The third runs more of the tests than the first
# has time for: its worth is in `not_run` of the first gpu-run.json.
#
#   benchmarks/gpu.sh FOLDER
#   benchmarks/gpu.sh FOLDER --parts build --seconds 90; SECONDS_PER_TOOL=225 benchmarks/sanitize_gpu.sh FOLDER
#   benchmarks/gpu.sh FOLDER --parts build tests --seconds 400
set -eu

cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
# nvcc, ncu, cmake and ninja are often beside the path.
for folder in "$(dirname "$(command -v "$python")")" "${CUDA_HOME:-/usr/local/cuda}/bin" /opt/nvidia/nsight-compute/*; do
    [ ! -d "$folder" ] || PATH="$PATH:$folder"
done
export PATH
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu_run "$@"

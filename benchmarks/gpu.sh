#!/bin/sh
# Everything that needs a GPU, in under nine minutes and without the network, for any machine with one:
#
#   benchmarks/gpu.sh [FOLDER]        results go to FOLDER, by default benchmarks/results
#   PYTHON=python3.12                 the Python that has torch (2.11 or newer) and triton (3.6 or newer)
#   OBC_BUILD_CUDA=auto|0|1           whether the CUDA C++ kernels are built: where nvcc is found (default), never, or must be
#
# Builds the native kernels in place, runs `pytest -m gpu`, then the benchmarks, and writes one JSON and one table.
# The exit code is the first failure's: a red test is reported and the benchmarks still run.
set -u

cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${1:-benchmarks/results}"
mkdir -p "$out"
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"

# Seconds: 150 for the build, 170 for the tests, 210 for the benchmarks: 530 in all.
timeout 150 "$python" setup.py build_ext --inplace >"$out/gpu-build.log" 2>&1
build=$?
[ "$build" -eq 0 ] || echo "The native kernels were not built (exit code $build): see $out/gpu-build.log"

timeout 170 "$python" -m pytest -q -m gpu -p no:cacheprovider tests >"$out/gpu-tests.log" 2>&1
tests=$?
tail -n 15 "$out/gpu-tests.log"

timeout 210 "$python" -m benchmarks.bench_gpu --seconds 190 --out "$out"
benchmarks=$?

for code in "$build" "$tests" "$benchmarks"; do
    [ "$code" -eq 0 ] || exit "$code"
done

#!/bin/sh
# compute-sanitizer over the CUDA operators at small sizes, for any machine with a GPU and the CUDA toolkit:
#
#   benchmarks/sanitize_gpu.sh [FOLDER]   the log of each tool and their summary go to FOLDER, by default benchmarks/results
#   PYTHON=python3.12                     the Python that has torch
#   SECONDS_PER_TOOL=130                  after which a tool is ended, which counts as a failure
#
# memcheck finds accesses outside of allocations, racecheck unordered ones of shared memory, initcheck reads of what
# nothing wrote, synccheck barriers that not all threads reach. The exit code is 1 where one of them found something.
set -u

cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${1:-benchmarks/results}"
mkdir -p "$out"
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
# Every tensor is an allocation of its own: an access beyond its end is then outside of any.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

summary="$out/gpu-sanitizer.txt"
: >"$summary"
failed=0
for tool in memcheck racecheck initcheck synccheck; do
    log="$out/gpu-$tool.log"
    # Kernels of torch run under the tool too: initcheck must see what they write.
    timeout "${SECONDS_PER_TOOL:-130}" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" benchmarks/sanitized_calls.py >"$log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    echo "$tool: exit code $code; $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|calls checked' "$log" | tr '\n' ' ')" | tee -a "$summary"
done
exit "$failed"

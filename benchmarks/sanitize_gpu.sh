#!/bin/sh
# compute-sanitizer over the CUDA operators at small sizes, for any machine with a GPU and the CUDA toolkit:
#
#   benchmarks/sanitize_gpu.sh [FOLDER]   the log of each tool and their summary go to FOLDER, by default benchmarks/results
#   PYTHON=python3.12                     the Python that has torch
#   DTYPE=bf16                            of f32, f64, bf16 and f16, by default bf16: the vectors are the longest there
#   TOOLS="memcheck racecheck"            the default; initcheck and synccheck besides
#   SECONDS_PER_TOOL=270                  after which a tool is ended, which counts as a failure: both in one call of 10 min
#
# After benchmarks/gpu.sh, which builds the kernels. memcheck finds accesses outside of allocations, racecheck unordered
# ones of shared memory, initcheck reads of what nothing wrote, synccheck barriers that not all threads reach. The exit
# code is 1 where one of them found something. FOLDER gets two files, gpu-sanitizer.txt and gpu-sanitizer.tar.gz.
set -u

cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${1:-benchmarks/results}"
mkdir -p "$out"
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer on the path (the CUDA toolkit has it)" >&2
    exit 1
fi
logs="$(mktemp -d)"
keep() { tar -czf "$out/gpu-sanitizer.tar.gz" -C "$logs" .; }
# What is there is kept where this script is told to end, too.
trap 'keep; rm -rf "$logs"' EXIT
trap 'exit 143' TERM INT HUP
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
# Every tensor is an allocation of its own: an access beyond its end is then outside of any.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

summary="$out/gpu-sanitizer.txt"
: >"$summary"
failed=0
for tool in ${TOOLS:-memcheck racecheck}; do
    log="$logs/gpu-$tool.log"
    # Kernels of torch run under the tool too: initcheck must see what they write.
    timeout "${SECONDS_PER_TOOL:-270}" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" benchmarks/sanitized_calls.py --dtype "${DTYPE:-bf16}" >"$log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    echo "$tool: exit code $code; $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|calls checked' "$log" | tr '\n' ' ')" | tee -a "$summary"
    [ "$code" -eq 0 ] || tail -n 40 "$log"
    keep
done
exit "$failed"

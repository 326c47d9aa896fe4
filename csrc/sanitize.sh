#!/usr/bin/env bash
# The CPU operators under sanitizers and valgrind: `make sanitize`. Builds into build/sanitize-*, installs nothing.
#
#   address, undefined   the C++ test, then the operators' Python tests over a copy of obc with the instrumented
#                        libraries: every tensor is a heap block of its own, so a read beyond one is seen
#   thread               the C++ test alone: torch's own thread pool reports races where there are none
#   memcheck             valgrind over the C++ test, where valgrind is installed
#
# Ends with one line a tool; the exit code is 1 where one of them found something.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
failed=0
summary=()

note() { # name, exit code, what was run
  if [ "$2" -eq 0 ]; then summary+=("$1: clean, $3"); else failed=1 && summary+=("$1: FAILED ($2), $3"); fi
}

build() { # folder, sanitizers, target...
  local folder="build/sanitize-$1" sanitizers="$2"
  shift 2
  cmake -S . -B "$folder" -G Ninja -DOBC_SANITIZE="$sanitizers" -DOBC_BUILD_CUDA=0 -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DOBC_LIBRARY_DIR="$PWD/$folder/python/obc" -DPython_EXECUTABLE="$(command -v "$python")" >"$folder.log" 2>&1 &&
    cmake --build "$folder" --target "$@" >>"$folder.log" 2>&1 || { cat "$folder.log" && exit 1; }
}

mkdir -p build

build address address,undefined obc_cpu obc_native obc_test_cpu
build/sanitize-address/obc_test_cpu
note "address and undefined behaviour, C++ test" $? "leaks included"

# The interpreter isn't instrumented, so the runtime must be there before it, and libstdc++ for the exceptions that the
# runtime watches. What Python and torch still hold at exit is no leak of ours: the C++ test looks for those.
copy="$PWD/build/sanitize-address/python"
tar -C python/obc --exclude='*.so' -cf - . | tar -C "$copy/obc" -xf -
tests=(tests/ops/test_channel_dot.py tests/ops/test_channel_moments.py tests/ops/test_weight_dot.py tests/ops/test_end_row.py tests/integrations/test_numpy.py tests/ops/test_fuzz_ops.py)
(
  rm -f build/sanitize-address/fault.*
  # Reports go into files, for pytest keeps what a test prints.
  report="log_path=$PWD/build/sanitize-address/fault"
  export PYTHONPATH="$copy:$PWD" ASAN_OPTIONS="detect_leaks=0:$report" UBSAN_OPTIONS="print_stacktrace=1:$report"
  export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
  "$python" -c "import obc, sys; sys.exit(not obc.__file__.startswith('$copy'))" &&
    "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}" ${ARGS:-} | tail -n 30
)
code=$?
cat build/sanitize-address/fault.* 2>/dev/null
note "address and undefined behaviour, operator tests" $code "${tests[*]}"

build thread thread obc_test_cpu
build/sanitize-thread/obc_test_cpu
note "threads, C++ test" $? "three threads started for each call"

if command -v valgrind >/dev/null; then
  build plain "" obc_test_cpu
  # Its processor has no AVX-512, so the AVX2 leaves run.
  valgrind --quiet --leak-check=full --error-exitcode=9 build/sanitize-plain/obc_test_cpu
  note "valgrind, C++ test" $? "memcheck with leaks"
else
  summary+=("valgrind: not installed, not run")
fi

printf '%s\n' "${summary[@]}"
exit "$failed"

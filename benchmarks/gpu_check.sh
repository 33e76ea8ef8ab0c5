#!/usr/bin/env bash
# Everything that one visit to a machine with an NVIDIA GPU should do: tests, sanitizers, benchmarks.
#   benchmarks/gpu_check.sh OUTDIR        logs and JSON go to OUTDIR; under 10 minutes
# Needs a checkout, and numpy, numba, pydantic, cupy, pytest in the Python that $PYTHON names; nilearn for the GLM's tests.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUTDIR}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD RTFMRI_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
failed=()

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then echo "   ok"; else
        echo "   FAILED ($?), see $name.log"
        failed+=("$name")
        tail -n 15 "$out/$name.log"
    fi
}

# Every operation once, without CuPy's memory pool: the pool would hide a step past an array's end.
once='
import cupy
cupy.cuda.set_allocator(None)
from benchmarks.kernels import cases
from rtfmri.backends import open_backend
backend = open_backend("cuda")
for case in cases(backend, (17, 13, 11)):
    case.call()
    print(case.operation, case.dtype)
backend.synchronize()
'
step machine 20 "$python" -c 'from rtfmri.machine import inspect; print(*inspect(), sep="\n")'
step tests 240 "$python" -m pytest -q tests/test_moments.py tests/test_roi.py tests/test_smoothing.py \
    tests/test_reslice.py tests/test_motion.py tests/test_quality.py tests/test_slice_timing.py \
    tests/test_glm.py tests/test_detrend.py tests/test_kernels.py
# What a transport costs, a GPU does not change.
step benchmarks 240 "$python" -m benchmarks --device cuda --out "$out" \
    --suites kernels baseline motion glm chain latency
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step $tool 60 compute-sanitizer --tool $tool --error-exitcode 1 "$python" -c "$once"
    done
else
    echo "== memcheck, racecheck: left out, compute-sanitizer is not on PATH"
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }

#!/usr/bin/env bash
# Everything that one visit to a machine with an NVIDIA GPU should do: tests, sanitizers, benchmarks,
# counters of the three slowest operations.
#   benchmarks/gpu_check.sh OUTDIR        logs and JSON go to OUTDIR; under 8 minutes
# Needs a checkout, and numpy, numba, pydantic, cupy, h5py, pytest in the Python that $PYTHON names.
# With scipy, nilearn and pydicom more tests run.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUTDIR}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD RTFMRI_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
failed=()

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout --kill-after=3 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    if ((status == 0)); then echo "$name: ok, $((SECONDS - started)) s"; else
        echo "$name: FAILED ($status) after $((SECONDS - started)) s of $limit, see $name.log"
        failed+=("$name")
        tail -n 15 "$out/$name.log"
    fi
    return $status
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
# The three operations that took longest on the largest grid, once each, between start and stop.
slowest='
import json, sys
from pathlib import Path
from cupy.cuda import profiler
from benchmarks.kernels import cases
from rtfmri.backends import open_backend
report = max(Path(sys.argv[1]).glob("*_cuda.json"), key=lambda path: path.stat().st_mtime)
rows = json.loads(report.read_text())["tables"]["kernels"]
shape = [int(size) for size in rows[-1]["grid"].split("x")]
rows = [row for row in rows if row["grid"] == rows[-1]["grid"]]
rows.sort(key=lambda row: row["cold"]["median_ms"], reverse=True)
slowest = [(row["operation"], row["dtype"]) for row in rows[:3]]
print(rows[0]["grid"], slowest, file=sys.stderr)
backend = open_backend("cuda")
for case in cases(backend, shape):
    if (case.operation, case.dtype) in slowest:
        case.call()  # compiles it
        backend.synchronize()
        profiler.start()
        case.call()
        backend.synchronize()
        profiler.stop()
'
tests=(tests/test_{detrend,glm,launch,moments,motion,quality,reslice,roi,slice_timing,smoothing}.py
    tests/test_smoothing_mask.py)
"$python" -c 'import pydicom' 2>/dev/null && tests+=(tests/test_quality_stage.py)

# All limits together are 440 s; what was measured is written after each suite.
step machine 15 "$python" -c 'from rtfmri.machine import inspect; print(*inspect(), sep="\n")'
step tests 100 "$python" -m pytest -q -m gpu "${tests[@]}"
step benchmarks 200 "$python" -m benchmarks --device cuda --out "$out" --rounds 4 --minutes 0.1 \
    --grids 64x64x36 104x104x72 --suites kernels chain peers scaling latency soak
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step $tool 45 compute-sanitizer --tool $tool --error-exitcode 1 "$python" -c "$once"
    done
else
    echo "memcheck, racecheck: left out, compute-sanitizer is not on PATH"
fi
if command -v ncu >/dev/null; then
    counters=(--section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy)
    step ncu 35 ncu --csv --profile-from-start off --launch-count 12 "${counters[@]}" \
        "$python" -c "$slowest" "$out" ||
        if grep -q ERR_NVGPUCTRPERM "$out/ncu.log"; then
            echo "ncu: left out, this user may not read the GPU's counters"
            unset 'failed[-1]'
        fi
else
    echo "ncu: left out, it is not on PATH"
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }

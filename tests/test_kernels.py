"""The CUDA sources compile for every GPU, and running them on the CPU sees the bugs it should."""

import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cuda_on_cpu import ORDERS, CompileError, Module
from rtfmri.backends.cuda import compile_options
from rtfmri.backends.cuda._sources import KERNELS, cuda_source

TESTS = Path(__file__).parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
VOXELS = ("short", "unsigned short", "float")
FILES = sorted(path.name for path in KERNELS.glob("*.cu"))
MAX_REGISTERS = 64  # four blocks of 256 threads fill the 65536 registers of a multiprocessor


def edited(file: str, old: str, new: str) -> str:
    """Return the source with one bug in it."""
    source = cuda_source(file)
    assert source.count(old) == 1
    return source.replace(old, new)


# --- the product's compiler


def nvrtc(source: str, voxel: str, architecture: str) -> str:
    """Compile as the product does and return what the compiler and the assembler said."""
    core = pytest.importorskip("cuda.core")
    log = io.StringIO()
    options = core.ProgramOptions(
        arch=architecture,
        std="c++17",
        lineinfo=True,
        fma=False,
        ftz=True,
        define_macro=("RTFMRI_VOXEL", voxel),
        ptxas_options=["-v"],
    )
    core.Program(source, "c++", options).compile("cubin", logs=log)
    return log.getvalue()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("voxel", VOXELS)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_spills(file: str, voxel: str, architecture: str) -> None:
    log = nvrtc(cuda_source(file), voxel, architecture)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert len(registers) == cuda_source(file).count("__global__")
    assert max(registers) <= MAX_REGISTERS
    assert spilled
    assert not any(spilled), log


@pytest.mark.parametrize("voxel", VOXELS)
def test_nvrtc_takes_the_options_as_they_are_written(voxel: str) -> None:
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    # What CuPy adds to them.
    options = (*compile_options({"RTFMRI_VOXEL": voxel}), "-ftz=true", "-arch=sm_80")
    source = cuda_source("moments.cu").encode()
    _, program = bindings.nvrtcCreateProgram(source, b"moments.cu", 0, [], [])
    (status,) = bindings.nvrtcCompileProgram(
        program, len(options), [option.encode() for option in options]
    )
    assert status == bindings.nvrtcResult.NVRTC_SUCCESS
    _, size = bindings.nvrtcGetProgramLogSize(program)
    assert size == 1  # an empty log: no warning


def where(source: str, line: str) -> tuple[str, int]:
    """Find *line* in the kernel file that *source* says it is from."""
    file, number = "", 0
    for text in source.splitlines():
        if mark := re.fullmatch(r'#line (\d+) "(.+)"', text):
            file, number = mark[2], int(mark[1])
        elif text == line:
            return file, number
        else:
            number += 1
    raise AssertionError(f"no such line: {line}")


@pytest.mark.parametrize("compiler", ["nvrtc", "g++"])
@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("moments.cuh", "    const float step = gain * d;"),
        ("moments.cu", "    slot[v] = raw;"),
        ("common.cuh", "typedef RTFMRI_VOXEL Voxel;"),
    ],
)
def test_errors_name_the_file_and_the_line(compiler: str, file: str, line: str) -> None:
    lines = (KERNELS / file).read_text().splitlines()
    number = lines.index(line) + 1
    source = edited("moments.cu", line, line.replace(";", " ?;"))
    assert where(cuda_source("moments.cu"), line) == (file, number)
    if compiler == "nvrtc":
        with pytest.raises(Exception, match=rf"{file}\({number}\): error") as error:
            nvrtc(source, "short", "sm_90")
        assert "NVRTC" in type(error.value).__name__
    else:
        with pytest.raises(CompileError, match=f"{file}:{number}:.*error"):
            Module(source)


def test_the_kernel_folder_holds_no_python() -> None:
    # An importable "kernels" would hide an unrelated project's package of that name.
    assert not [path for path in KERNELS.rglob("*") if path.suffix in {".py", ".pyi"}]


def test_every_kernel_has_its_contract_in_the_readme() -> None:
    contracts = (KERNELS / "README.md").read_text(encoding="utf-8").partition("## Contracts")[2]
    for file in FILES:
        for name in re.findall(r"__global__ void (\w+)", cuda_source(file)):
            assert f"| `{name}` |" in contracts


def test_sources_need_no_include_path() -> None:
    for file in FILES:
        assert "#include" not in cuda_source(file)


# --- the execution on the CPU


def roi_mean(source: str, order: str) -> float:
    """Run ``roi_means`` on 4096 ones in one ROI, whose mean is 1."""
    ones, voxels = np.ones(4096, np.float32), np.arange(4096, dtype=np.int32)
    mean = np.zeros(1)
    kernel = Module(source, {"RTFMRI_VOXEL": "float"}, order=order).get_function("roi_means")
    kernel((1,), (256,), (ones, np.array([0, 4096], np.int32), voxels, ones / 4096, mean))
    return float(mean[0])


def test_a_missing_barrier_shows() -> None:
    broken = edited("roi.cu", "sums[t] = sum;\n    __syncthreads();", "sums[t] = sum;")
    assert {roi_mean(cuda_source("roi.cu"), order) for order in ORDERS} == {1.0}
    assert {roi_mean(broken, order) for order in ORDERS} != {1.0}


LAST_BARRIER = "if (t < half) sums[t] += sums[t + half];\n        __syncthreads();"


def test_a_barrier_that_some_threads_miss_is_reported() -> None:
    broken = edited(
        "roi.cu", LAST_BARRIER, "if (t < half) { sums[t] += sums[t + half]; __syncthreads(); }"
    )
    with pytest.raises(RuntimeError, match=r"128 threads returned .* in block \(0,0,0\)"):
        roi_mean(broken, "forward")


def test_two_barriers_for_one_are_reported() -> None:
    broken = edited(
        "roi.cu",
        LAST_BARRIER,
        "if (t < half) { sums[t] += sums[t + half]; __syncthreads(); }\n else __syncthreads();",
    )
    with pytest.raises(RuntimeError, match="different __syncthreads"):
        roi_mean(broken, "forward")


@pytest.mark.parametrize(
    "wrong",
    [0.5, np.float64(0.5), np.int32(1), np.zeros(8, np.float32)],
    ids=["python-float", "float64", "int32", "array"],
)
def test_a_parameter_of_the_wrong_type_is_refused(wrong: object) -> None:
    kernel = Module(cuda_source("moments.cu"), {"RTFMRI_VOXEL": "short"}).get_function("fold")
    volume, state, usable = np.zeros(8, np.int16), np.zeros(8, np.float32), np.ones(1, np.float32)
    arrays = (state, state.copy(), usable)
    kernel((1,), (32,), (volume, *arrays, np.float32(0.5), np.int32(8)))
    with pytest.raises(TypeError, match="fold: parameters are"):
        kernel((1,), (32,), (volume, *arrays, wrong, np.int32(8)))
    with pytest.raises(TypeError, match="fold: parameters are"):
        kernel((1,), (32,), (state, *arrays, np.float32(0.5), np.int32(8)))


PLACES = """
extern "C" __global__ void places(int* seen, int nx, int ny)
{
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    const int z = blockIdx.z * blockDim.z + threadIdx.z;
    seen[x + nx * (y + ny * z)] += 1 + x + 100 * y + 10000 * z;
}
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("grid", "block"),
    [((3, 2), (4, 8)), ((2, 3, 4), (4, 2, 3)), ((1, 1, 5), (1, 1, 64)), ((7,), (5,))],
)
def test_grids_and_blocks_of_one_to_three_dimensions(
    grid: tuple[int, ...], block: tuple[int, ...], order: str
) -> None:
    sizes = [g * b for g, b in itertools.zip_longest(grid, block, fillvalue=1)] + [1, 1]
    nx, ny, nz = sizes[:3]
    seen = np.zeros((nz, ny, nx), np.int32)
    kernel = Module(PLACES, order=order).get_function("places")
    kernel(grid, block, (seen, np.int32(nx), np.int32(ny)))
    z, y, x = np.indices(seen.shape)
    assert np.array_equal(seen, 1 + x + 100 * y + 10000 * z)


@pytest.mark.parametrize(("grid", "block"), [((0,), (32,)), ((1,), (0,)), ((1,), (32, 33))])
def test_what_a_gpu_would_not_launch_is_refused(
    grid: tuple[int, ...], block: tuple[int, ...]
) -> None:
    with pytest.raises(RuntimeError, match="at most 1024 threads"):
        Module(PLACES).get_function("places")(
            grid, block, (np.zeros(1, np.int32), np.int32(1), np.int32(1))
        )


WARPS = """
extern "C" __global__ void warps(const int* values, int* down, int* sums, int* total)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    int value = values[i];
    down[i] = __shfl_down_sync(0xffffffffu, value, 3);
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    sums[i] = value;
    __syncwarp();
    if (threadIdx.x % 32 == 0) atomicAdd(total, value);
}
"""


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_atomics(order: str) -> None:
    values = np.random.default_rng(0).integers(0, 1000, 256, dtype=np.int32)
    down, sums, total = np.zeros_like(values), np.zeros_like(values), np.zeros(1, np.int32)
    kernel = Module(WARPS, order=order).get_function("warps")
    kernel((2,), (128,), (values, down, sums, total))
    warps = values.reshape(-1, 32)
    shifted = np.hstack([warps[:, 3:], warps[:, -3:]])  # the last three have no source
    assert np.array_equal(down, shifted.ravel())
    assert np.array_equal(sums, np.repeat(warps.sum(1), 32))
    assert total[0] == values.sum()


# --- under the sanitizers

CATCH_UP = """
import sys
import numpy as np
from cuda_on_cpu import Module
source = sys.stdin.read()
kernel = Module(source, {"RTFMRI_VOXEL": "short"}).get_function("fold")
state = [np.zeros(1000, np.float32) for _ in range(2)] + [np.ones(1, np.float32)]
kernel((4,), (256,), (np.zeros(1000, np.int16), *state, np.float32(1), np.int32(1000)))
print("no complaint")
"""


def under_sanitizers(
    command: list[str], source: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with the kernels instrumented by ASan and UBSan."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("g++ has no libasan.so")
    environment: Mapping[str, str] = {
        **os.environ,
        "LD_PRELOAD": str(runtime),  # Python itself is not instrumented, so it must come first
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",  # so that NumPy's arrays have guarded ends
        "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)]),
        "RTFMRI_HOST_FLAGS": "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    }
    return subprocess.run(
        [sys.executable, *command],
        env=environment, input=source, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ("if (v >= (n_voxels)) return", "if (v > (n_voxels)) return", "heap-buffer-overflow"),
        ("const float step = gain * d;", "const float step = gain * (1 << n_bits) * d;", "shift"),
    ],
    ids=["none", "one-past-the-end", "undefined-shift"],
)
def test_sanitizers_see_a_bug(old: str, new: str, complaint: str | None) -> None:
    source = edited("moments.cu", old, new) if old else cuda_source("moments.cu")
    source = source.replace(
        "struct VoxelMoments", "static int n_bits = 40; struct VoxelMoments", 1
    )
    done = under_sanitizers(["-c", CATCH_UP], source)
    if complaint is None:
        assert done.returncode == 0, done.stderr
        assert "no complaint" in done.stdout
    else:
        assert done.returncode != 0
        assert complaint in done.stderr


def test_every_operation_under_sanitizers() -> None:
    families = ("detrend", "glm", "moments", "quality", "reslice", "roi", "slice_timing")
    files = [f"test_{family}.py" for family in (*families, "smoothing", "smoothing_mask")]
    tests = [str(TESTS / name) for name in files]
    # In one order, without the longest: what is read and written does not depend on either.
    longest = ("numba", "20011", "thousand", "batch", "ridge", "generalised")
    chosen = " and not ".join(["shuffled", *longest])
    done = under_sanitizers(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)

import importlib
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rtfmri.backends import PART_VOXELS, POSE_FIELDS, Backend, gpu_problem, open_backend
from rtfmri.cli import load_benchmarks
from rtfmri.errors import ConfigError, DeviceError

GRIDS = ((16, 16, 12), (20, 18, 14))
EPS = float(np.finfo(np.float32).eps)


benchmarks = load_benchmarks()
kernels, measure, phantom, tables = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("kernels", "measure", "phantom", "tables")
)


@pytest.fixture(scope="module")
def short():
    """Let the suites do little: what they tell is not looked at for its size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "HOT_TURN", 2)
        patch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
        yield


@pytest.fixture(scope="module")
def report(short):
    # These have tests of their own.
    elsewhere = ("latency", "soak", "chain", "scaling", "peers", "outputs")
    suites = [name for name in benchmarks.SUITES if name not in elsewhere]
    return benchmarks.run(device="cpu", grids=GRIDS, rounds=1, suites=suites)


def test_every_suite_gives_rows_for_every_grid(report):
    assert report["device"] == "cpu"
    assert set(report["tables"]) <= set(benchmarks.LAYOUTS)
    grids = {"16x16x12", "20x18x14"}
    for name in report["tables"]:
        assert {row["grid"] for row in report["tables"][name]} == grids


def test_ratios_are_those_of_the_medians_beside_them(report):
    for row in report["tables"]["kernels"]:
        for caches in (row["hot"], row["cold"]):
            rate = 1e-6 * row["bytes_per_voxel"] * row["n"] / caches["median_ms"]
            assert caches["gb_s"] == pytest.approx(rate)
            assert caches["share"] == pytest.approx(rate / caches["stream_gb_s"])
            assert caches["min_ms"] <= caches["median_ms"] <= caches["p95_ms"]
        assert row["memory_gb_s"] > 0


def test_report_is_json_without_paths_and_makes_the_same_tables_again(report):
    text = json.dumps(report, allow_nan=False)
    assert str(Path.home()) + os.sep not in text
    assert str(Path.cwd()) not in text
    assert tables.markdown(json.loads(text), benchmarks.LAYOUTS) == tables.markdown(
        report, benchmarks.LAYOUTS
    )
    shown = benchmarks.table(report)
    assert [table.row_count for table in shown] == [
        len(rows) for rows in report["tables"].values()
    ]


def test_only_the_suites_asked_for_run_and_progress_is_told(short):
    steps = []
    report = benchmarks.run(
        device="cpu", grids=GRIDS[:1], suites=["kernels"], progress=steps.append, rounds=1
    )
    assert list(report["tables"]) == ["kernels"]
    assert steps == ["kernels, 16x16x12"]


def test_a_suite_that_is_none_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"suites must be of kernels, .* got speed"):
        benchmarks.run(device="cpu", suites=["speed"], progress=pytest.fail)


def test_cuda_without_a_gpu_is_refused():
    if gpu_problem() is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="'cuda' was asked for"):
        benchmarks.run(device="cuda", grids=GRIDS[:1], suites=["kernels"])


# What the contract in rtfmri.backends makes of int16, float32, int32 and float64 on a grid of
# 24 x 22 x 14: reads + writes.
N_PLANE, N_VOXELS, N_ENTRIES, N_MEASURED = 24 * 22, 24 * 22 * 14, 160, 14 + 2 + 4 * 15
RUN = 12 / 24
# Of 12 columns: the row as it was known, the pose, one contrast, the row; then what each class
# has: factor, squares, previous, counts twice, whitening, what the step says.
UPDATE_DESIGN = 12 * 8 + 14 * 8 + (12 * 8 + 8 + 4) + 12 * 8
OF_A_CLASS = 2 * 8 * (144 + 12 + 12 + 2) + 2 * 8 + 8 * (12 + 1) + 4 * (24 + 12 + 4)


def glm_parts_bytes(n_classes):
    """Return the bytes of an `update_glm` that do not grow with the voxels."""
    voxels = np.bincount(kernels.in_classes((24, 22, 14), n_classes))
    n_parts = int((-(-voxels // 1024)).sum())
    return 3 * 4 * n_parts + n_classes * 4 * (24 + 12 + 4) + 8 + 4


BYTES_PER_VOXEL = {
    ("subtract + fold", "int16"): 2 + 8 + 12 + 8,
    ("subtract + fold", "uint16"): 2 + 8 + 12 + 8,
    ("subtract + fold", "float32"): 4 + 8 + 12 + 8,
    ("subtract", "int16"): 2 + 8 + 12,
    ("subtract + fold elsewhere", "int16"): 2 + 16 + 12 + 8,
    ("fold", "int16"): 2 + 8 + 8,
    ("slide", "int16"): 2 + 8 + 2 + 12 + 8 + 2,
    ("refresh", "int16"): 20 * 2 + 8,
    ("contrast", "-"): 16 + 12,
    ("roi_means", "int16"): 2 + 4 + 4 + 8 / N_ENTRIES,
    ("smooth", "int16"): 2 + 4,
    ("smooth, every 2nd voxel", "int16"): 2 + 4 / 8,
    ("reslice trilinear", "int16"): 2 + RUN + 4,
    ("reslice catmull-rom", "int16"): 2 + RUN + 4,
    ("reslice bspline", "float32"): 4 + RUN + 4,
    ("gather", "float32"): 4 + RUN + 4 + 4,
    ("retime", "int16"): 2 + 3 * 2 + 4 * 4 / N_PLANE + 2 + 4,
    ("inspect", "int16"): 2 + 15 * 4 * 8 / N_VOXELS,
    ("compare", "float32"): 4 + 4 + 2 * 8 / N_VOXELS,
    ("judge", "-"): 8 + 16 + 4 / N_MEASURED,
    ("track", "float32"): 5 * 4 + 4 / N_VOXELS + 4 * 4,
    ("remove_slow", "float32"): 4 + 8 + 4 + 8 + 2 * 8 / N_VOXELS,
    ("remove_fit", "float32"): 4 + 12 * 4 + 4 + (12 * 4 + 8) / N_VOXELS,
    ("update_design", "-"): (UPDATE_DESIGN + OF_A_CLASS) / 144,
    ("update_design, 20 classes", "-"): (UPDATE_DESIGN + 20 * OF_A_CLASS) / (20 * 144),
    ("update_glm", "float32"): 4 + 2 * 12 * 4 + 2 * 4 + 4 + 4 + glm_parts_bytes(1) / N_VOXELS,
    ("update_glm, 20 classes", "float32"): (
        4 + 2 * 12 * 4 + 2 * 4 + 4 + 2 * 4 + 4 + 4 + glm_parts_bytes(20) / N_VOXELS
    ),
    ("register, 3 steps", "-"): 3 * (12 + 4 + 28),
}


def test_bytes_per_voxel_are_the_contracts():
    cases = list(kernels.cases(open_backend("cpu"), (24, 22, 14)))
    found = {(case.operation, case.dtype): case.moved_bytes / case.n for case in cases}
    assert found == pytest.approx(BYTES_PER_VOXEL)


MORE_THAN_THEY_GO_THROUGH = (
    *("slide", "refresh", "roi", "smooth", "reslice", "gather", "update_glm"),
)


def test_bytes_held_are_those_of_the_arrays_that_the_backend_gets():
    given = []

    class Spy:
        def __init__(self):
            self._backend = open_backend("cpu")

        def __getattr__(self, name):
            operation = getattr(self._backend, name)
            if name == "name":
                return operation

            def note(*args, **kwargs):
                given[:] = [*args, *kwargs.values()]
                return operation(*args, **kwargs)

            return note

    n_checked = 0
    for case in kernels.cases(Spy(), (8, 6, 5)):
        if case.operation.startswith(MORE_THAN_THEY_GO_THROUGH):
            continue
        case.call()
        arrays = {}
        for item in given:
            for part in item if isinstance(item, tuple) else (item,):
                if isinstance(part, np.ndarray):
                    arrays[part.ctypes.data] = part.nbytes
        assert case.held_bytes == sum(arrays.values())
        n_checked += 1
    assert n_checked == 16


def test_every_operation_of_the_protocol_is_measured():
    around = {"upload", "copy", "download", "fetch", "zeros", "warm", "synchronize", "record"}
    around.add("undisturbed")
    operations = {name for name in vars(Backend) if not name.startswith("_")} - around
    cases = kernels.cases(open_backend("cpu"), (24, 22, 14))
    assert {re.split("[ ,]", case.operation)[0] for case in cases} == operations


@pytest.mark.parametrize("n_classes", [1, 20])
def test_glm_that_is_timed_turns_every_column_for_every_voxel_of_every_class(n_classes):
    backend = open_backend("cpu")
    name = "update_glm" if n_classes == 1 else "update_glm, 20 classes"
    case = next(c for c in kernels.cases(backend, (24, 22, 14)) if c.operation == name)
    _, fit, _, step, statistics = case.call.args
    assert np.abs(step.rotations).min() > 0
    assert sorted(fit.order) == list(range(N_VOXELS))
    labels, starts, stops = fit.parts.T
    assert [*starts, N_VOXELS] == [0, *stops]
    assert (stops - starts).max() <= PART_VOXELS
    np.testing.assert_array_equal(np.repeat(labels, stops - starts), fit.labels)
    before = fit.coordinates.copy()
    case.call()
    assert (fit.coordinates != before).mean() > 0.99
    assert np.count_nonzero(statistics) == N_VOXELS


def test_registration_that_is_timed_takes_its_steps_at_each_call_anew():
    *_, case = kernels.cases(open_backend("cpu"), (24, 22, 14))
    pose = case.call.args[3]
    fields = []
    for _ in range(2):
        case.call()
        fields.append(dict(zip(POSE_FIELDS, pose.fields.tolist(), strict=False)))
    assert fields[0] == fields[1]
    assert fields[0]["n_iterations"] == kernels.N_STEPS
    assert fields[0]["converged"] == 0


def test_a_grid_too_small_for_motion_has_no_register():
    names = {case.operation for case in kernels.cases(open_backend("cpu"), (7, 6, 5))}
    assert not {name for name in names if name.startswith("register")}


@pytest.mark.parametrize(
    ("cold", "order"), [(False, ["a"] * 11 + ["b"] * 11), (True, ["a", "a", "b", "b"])]
)
def test_what_is_compared_takes_turns_and_the_first_hot_call_does_not_count(
    monkeypatch, cold, order
):
    ran = []

    def timer(name):
        def once():
            ran.append(name)
            return float(len(ran))

        return once

    monkeypatch.setattr(measure, "HOT_TURN", 10)
    seconds = measure.take_turns({"a": timer("a"), "b": timer("b")}, rounds=2, cold=cold)
    assert ran == 2 * order
    assert len(seconds["a"]) == len(seconds["b"]) == 2 * (2 if cold else 10)
    assert (1.0 in seconds["a"]) == cold


@pytest.mark.parametrize("cold", [True, False])
def test_what_is_slow_runs_once_in_every_second_turn(cold):
    ran = []
    timers = {name: lambda name=name: float(ran.append(name) is None) for name in "ab"}
    seconds = measure.take_turns(timers, rounds=5, cold=cold, slow=("b",))
    assert ran.count("b") == (3 if cold else 6)
    assert len(seconds["b"]) == 3
    assert len(seconds["a"]) == 5 * (measure.COLD_TURN if cold else measure.HOT_TURN)


def test_a_listener_repeats_the_last_call_of_its_operation_alone():
    did = []
    backend = SimpleNamespace(fold=lambda *args, **kwargs: did.append((args, kwargs)), name="x")
    heard = measure.Listener(backend, "fold")
    heard.fold(1, gain=2)
    heard.fold(3, gain=4)
    heard.call()
    assert heard.name == "x"
    assert did == [((1,), {"gain": 2}), ((3,), {"gain": 4}), ((3,), {"gain": 4})]


@pytest.mark.parametrize("cold", [True, False])
def test_caches_are_emptied_before_a_cold_call_only(cold):
    clock = measure.HostClock()
    ran = []
    clock.largest = lambda: ran.append("largest")
    assert clock.timer(lambda: ran.append("call"), cold=cold)() > 0
    assert ran == (["largest", "call"] if cold else ["call"])


def test_the_large_stream_that_empties_the_caches_is_timed_itself():
    clock = measure.HostClock()
    ran = []
    clock.largest = lambda: ran.append("largest")
    assert min(clock.after_largest(lambda: ran.append("call"))) > 0
    assert ran == ["largest", "call"]


class FakeCupy:
    """The few names of CuPy that the clock needs; a queue in place of time."""

    def __init__(self, queue):
        self.ones = np.ones
        self.cuda = SimpleNamespace(
            Event=lambda: SimpleNamespace(
                record=lambda stream: queue.append("event"), synchronize=lambda: None
            ),
            get_elapsed_time=lambda start, stop: 500.0,
            Device=lambda: SimpleNamespace(mem_info=(1 << 16, 1 << 17)),
        )


def cuda_clock(monkeypatch, queue):
    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(queue))
    return measure.CudaClock(SimpleNamespace(_staging=SimpleNamespace(stream=Stream())))


@pytest.mark.parametrize(("cold", "before", "between"), [(True, 0, 1), (False, 1, 10)])
def test_cuda_events_enclose_the_calls_and_a_long_copy_goes_before(
    monkeypatch, cold, before, between
):
    queue = []
    clock = cuda_clock(monkeypatch, queue)
    assert clock.largest.n_bytes == 1 << 14
    clock.largest = lambda: queue.append("copy")
    seconds = clock.timer(lambda: queue.append("call"), cold=cold)()
    assert queue == ["copy", *["call"] * before, "event", *["call"] * between, "event"]
    assert seconds == pytest.approx(0.5 / between)


def test_cuda_events_stand_before_between_and_after_the_large_copy_and_a_call(monkeypatch):
    queue = []
    clock = cuda_clock(monkeypatch, queue)
    clock.largest = lambda: queue.append("copy")
    assert clock.after_largest(lambda: queue.append("call")) == (0.5, 0.5)
    assert queue == ["copy", "event", "copy", "event", "call", "event"]


def test_table_of_operations_says_where_memory_should_set_the_pace_and_does_not():
    def last_cell(hot, cold, memory_bound=True):
        caches = {"median_ms": 1, "min_ms": 1, "p95_ms": 1, "gb_s": 1, "stream_gb_s": 1}
        row = {"grid": "", "operation": "", "dtype": "", "bytes_per_voxel": 1}
        row |= {"hot": {**caches, "share": hot}, "cold": {**caches, "share": cold}}
        row["memory_bound"] = memory_bound
        return tables.cells(benchmarks.LAYOUTS["kernels"], [row])[0][-1]

    assert last_cell(0.69, 0.7) == "hot"
    assert last_cell(0.5, 0.5) == "hot, cold"
    assert last_cell(1.3, 0.7) == "no"
    assert last_cell(0.1, 0.1, memory_bound=False) == "-"


@pytest.mark.parametrize(
    ("device", "cpu", "gpu", "expected"),
    [
        ("cpu", "AMD EPYC", None, "2026-11-22_amd-epyc-2c_cpu.json"),
        ("cpu", "Intel(R) Xeon(R) @ 2.20GHz", None, "2026-11-22_intel-xeon-2-20ghz-2c_cpu.json"),
        ("cuda", "x", {"name": "NVIDIA H200"}, "2026-11-22_nvidia-h200-2c_cuda.json"),
    ],
)
def test_file_name_says_date_machine_and_device(device, cpu, gpu, expected):
    host = {"cpu": cpu, "gpu": gpu, "threads": 2}
    report = {"date": "2026-11-22", "device": device, "machine": host}
    assert tables.file_name(report) == expected


def test_newest_report_of_each_machine_is_the_one_shown(tmp_path):
    for date, name in pairwise(["2026-01-01", "a", "2026-02-01", "a", "2026-01-15", "b"]):
        if name in "ab":
            written = {"format": tables.FORMAT, "date": date}
            (tmp_path / f"{date}_{name}_cpu.json").write_text(json.dumps(written))
    (tmp_path / "2026-03-01_c_cpu.json").write_text('{"format": "rtfmri-benchmark-1"}')
    found = [report["date"] for report in tables.newest_reports(tmp_path)]
    assert sorted(found) == ["2026-01-15", "2026-02-01"]


def test_readme_holds_the_tables_that_its_results_make():
    text = (tables.FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == tables.readme(
        text, tables.newest_reports(tables.FOLDER / "results"), benchmarks.LAYOUTS
    )


def test_phantom_is_sampled_where_the_head_moved():
    head = phantom.Phantom((24, 24, 14))
    size_x_mm = head.grid.voxel_size_mm[0]
    at_rest = head.signal(np.zeros(6))
    shifted = head.signal(np.array([2 * size_x_mm, 0, 0, 0, 0, 0]))
    # Places differ by a rounding of 100 mm in float64, and the steepest edge has 1000 a mm.
    np.testing.assert_allclose(shifted[2:], at_rest[:-2], rtol=EPS, atol=1e-9)
    turned = head.signal(np.array([0, 0, 0, 0, 0, 90.0]))
    # Counter-clockwise about z: what was at (x, y) is at (-y, x).
    np.testing.assert_allclose(np.rot90(turned, axes=(1, 0)), at_rest, rtol=EPS, atol=1e-9)
    assert at_rest.std() > 200
    assert at_rest[0].max() < 0.01  # the head ends within the field of view


def test_phantom_volume_is_signal_and_noise_of_its_index_and_seed():
    head = phantom.Phantom((24, 24, 14))
    volume = head.volume(3, np.zeros(6))
    assert volume.dtype == np.int16
    assert volume.flags.f_contiguous
    np.testing.assert_array_equal(volume, head.volume(3, np.zeros(6)))
    signal = head.signal(np.zeros(6))
    bright = signal > 500
    noise = volume[bright] - signal[bright]
    # 2000 voxels tell a standard deviation to 2 %; 15 is the noise of voxels this large or more.
    assert bright.sum() > 2000
    assert noise.std() == pytest.approx(15, rel=0.08)
    other = head.volume(4, np.zeros(6))[bright] - signal[bright]
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.1
    assert np.abs(phantom.Phantom((24, 24, 14), seed=1).signal(np.zeros(6)) - signal).max() > 100


def test_phantom_activation_is_four_percent_in_its_middle_and_one_sided():
    head = phantom.Phantom((64, 64, 36))
    rest = head.signal(np.zeros(6))
    active = head.signal(np.zeros(6), active=True)
    change = np.divide(active, rest, where=rest > 500, out=np.ones_like(rest)) - 1
    # The nearest voxel is 1.5 mm off the middle along each axis at most, of a blob of 13 mm.
    assert change.max() == pytest.approx(phantom.ACTIVATION, rel=0.05)
    assert change[:32].max() < 1e-4


def test_motion_of_the_phantom_stays_within_its_limits():
    motion_of_head = phantom.walk(40)
    assert not motion_of_head[0].any()
    np.testing.assert_allclose(np.abs(motion_of_head).max(axis=0), 1)
    jumps = phantom.jumps()
    np.testing.assert_allclose(np.linalg.norm(jumps[:, :3], axis=1), 6)
    np.testing.assert_allclose(np.linalg.norm(jumps[:, 3:], axis=1), 6)


def test_rigid_has_the_convention_of_the_simulator():
    # Truth.motion: Rz Ry Rx. x first: (0, 1, 0) goes to z, then about y to x, then about z to y.
    turned = phantom.rigid(np.array([1, 2, 3, 90, 90, 90.0]))
    np.testing.assert_allclose(turned @ [0, 1, 0, 1], [1, 3, 3, 1], atol=1e-12)


def test_deviation_is_the_root_mean_square_over_a_ball():
    rng = np.random.default_rng(0)
    a, b = (phantom.rigid(motion_of) for motion_of in rng.uniform(-3, 3, (2, 6)))
    points = rng.uniform(-50, 50, (400_000, 3))
    points = points[np.linalg.norm(points, axis=1) <= 50]
    moved = [points @ t[:3, :3].T + t[:3, 3] for t in (a @ np.linalg.inv(b), np.eye(4))]
    by_points = np.sqrt(((moved[0] - moved[1]) ** 2).sum(axis=1).mean())
    # 2e5 points: the mean square is known to 0.2 %.
    assert phantom.deviation_mm(a, b) == pytest.approx(by_points, rel=5e-3)
    assert phantom.deviation_mm(a, a) < 1e-9

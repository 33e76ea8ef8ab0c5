import importlib
import importlib.util
import io
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
from rtfmri.pipeline import STAGES
from rtfmri.stages.smoothing import SmoothingStage

GRIDS = ((16, 16, 12), (20, 18, 14))
EPS = float(np.finfo(np.float32).eps)


benchmarks = load_benchmarks()
chain, kernels, latency, measure, phantom, scaling, tables, transports = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in (
        *("chain", "kernels", "latency", "measure"),
        *("phantom", "scaling", "tables", "transports"),
    )
)
baseline, glm, motion = (
    importlib.import_module(f"{benchmarks.__name__}.peers.{name}")
    for name in ("baseline", "glm", "motion")
)
PEERS = motion.PEERS


@pytest.fixture(scope="module")
def short():
    """Let the suites do little: what they tell is not looked at for its size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "FLAT_AT", (10, 20, 30))
        patch.setattr(chain, "N_PUSHES", 3)
        patch.setattr(motion, "MOST_VOLUMES", 3)
        patch.setattr(motion, "PEERS", (motion.Tool("absent", "no_such_package", None),))
        patch.setattr(latency, "N_VOLUMES", 12)
        patch.setattr(latency, "PACE_S", 0.002)
        patch.setattr(transports, "SHAPES", GRIDS)
        patch.setattr(transports, "N_VOLUMES", 8)
        patch.setattr(transports, "N_DECODED", 8)
        patch.setattr(transports, "PACE_S", 0.02)
        patch.setattr(transports, "TRANSPORTS", transports.TRANSPORTS[:3])
        patch.setattr(measure, "HOT_TURN", 2)
        patch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
        yield


@pytest.fixture(scope="module")
def report(short):
    return benchmarks.run(device="cpu", grids=GRIDS, rounds=1)


def test_every_suite_gives_rows_for_every_grid(report):
    assert report["device"] == "cpu"
    assert set(report["tables"]) == set(benchmarks.LAYOUTS)
    grids = {"16x16x12", "20x18x14"}
    for name in set(benchmarks.LAYOUTS) - {"flat"}:
        assert {row["grid"] for row in report["tables"][name]} == grids
    assert [row["baseline"] for row in report["tables"]["flat"]] == [
        "cumulative",
        "exponential",
        "sliding",
        "fixed",
    ]
    assert {row["recorded"] for row in report["tables"]["latency"]} == {True, False}


def test_transports_are_measured_at_both_ends(report):
    rows = report["tables"]["transports"]
    names = [transport.name for transport in transports.TRANSPORTS]
    assert [row["transport"] for row in rows] == names * len(GRIDS)
    for row in rows:
        assert row["lost"] == 0
        assert 0 < row["last_byte"]["p50_ms"] <= row["last_byte"]["p95_ms"] < 1000
        assert row["last_byte"]["p50_ms"] < row["first_byte"]["p50_ms"]
    for row in report["tables"]["decode"]:
        assert row["times"] == pytest.approx(row["median_ms"] / row["bare_ms"])


def test_ratios_are_those_of_the_medians_beside_them(report):
    for row in report["tables"]["kernels"]:
        for caches in (row["hot"], row["cold"]):
            rate = 1e-6 * row["bytes_per_voxel"] * row["n"] / caches["median_ms"]
            assert caches["gb_s"] == pytest.approx(rate)
            assert caches["share"] == pytest.approx(rate / caches["stream_gb_s"])
            assert caches["min_ms"] <= caches["median_ms"] <= caches["p95_ms"]
    for row in report["tables"]["baseline"]:
        n = np.prod([int(size) for size in row["grid"].split("x")])
        assert row["allowed_ms"] == pytest.approx(1e-6 * 26 * n / row["stream_gb_s"])
        assert row["of_allowed"] == pytest.approx(row["median_ms"] / row["allowed_ms"])
    for row in report["tables"]["glm"]:
        n = np.prod([int(size) for size in row["grid"].split("x")])
        allowed_ms = 1e-6 * row["bytes_per_voxel"] * n / row["stream_gb_s"]
        assert row["allowed_ms"] == pytest.approx(allowed_ms)
        assert row["of_allowed"] == pytest.approx(row["median_ms"] / row["allowed_ms"])
    for row in (*report["tables"]["baseline"], *report["tables"]["glm"]):
        for name, times in row["times_faster"].items():
            assert times == pytest.approx(row[f"{name}_ms"] / row["median_ms"])


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


def test_latency_is_skipped_with_its_reason_without_h5py(monkeypatch):
    monkeypatch.setattr(latency, "find_spec", lambda name: None)
    report = benchmarks.run(device="cpu", grids=GRIDS[:1], suites=["latency"])
    assert report["tables"]["latency"] == [{"skipped": "h5py is not installed"}]
    assert "skipped: h5py is not installed" in benchmarks.table(report)[0].title
    assert "skipped: h5py is not installed" in tables.markdown(report, benchmarks.LAYOUTS)


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
    rows = motion.compare_correctors(open_backend("cpu"), (7, 6, 5))
    assert rows == [{"skipped": "7x6x5 is too small a grid"}]


def test_numpy_peers_do_what_the_fused_pass_does():
    n, n_before = 1000, baseline.N_BEFORE
    rng = np.random.default_rng(3)
    mean = rng.normal(1000, 50, n).astype(np.float32)
    variance = rng.uniform(200, 600, n).astype(np.float32)
    volume = (mean + rng.normal(0, 20, n)).astype(np.int16)
    fused = baseline.Fused(open_backend("cpu"), mean, variance)
    in_place = baseline.InPlace(mean.copy(), variance.copy())
    textbook = [form(mean, variance, n_before) for form in (baseline.Plain, baseline.Guarded)]
    for peer in (fused, in_place, *textbook):
        peer(volume, n_before)
    # A dozen roundings; the difference itself is exact to half an ulp of the mean in all.
    close = {"rtol": 12 * EPS, "atol": 0}
    for peer in (in_place, *textbook):
        np.testing.assert_array_equal(peer.difference, fused.out.difference)
        np.testing.assert_allclose(peer.psc, fused.out.psc, **close)
        np.testing.assert_allclose(peer.z, fused.out.z, **close)
        np.testing.assert_allclose(peer.mean, fused.moments.mean, **close)
    np.testing.assert_allclose(in_place.variance, fused.moments.variance, **close)
    # x - mean loses half an ulp of the mean, times d: 100 * 1200 * eps / 2e5 of m2 at most.
    for peer in textbook:
        peer_variance = peer.m2 / (n_before + 1)
        np.testing.assert_allclose(peer_variance, fused.moments.variance, rtol=13 * EPS)


def test_guarded_numpy_gives_our_answers_outside_the_head_too():
    mean, variance = np.float32([0, -3, 5, 5]), np.float32([0, 4, 0, 4])
    volume = np.int16([7, 7, 7, 7])
    fused = baseline.Fused(open_backend("cpu"), mean, variance)
    in_place = baseline.InPlace(mean.copy(), variance.copy())
    fused(volume, 10)
    guarded = baseline.Guarded(mean, variance, 10)
    for peer in (in_place, guarded):
        peer(volume, 10)
        np.testing.assert_allclose(peer.psc, fused.out.psc, rtol=4 * EPS)
        np.testing.assert_allclose(peer.z, fused.out.z, rtol=4 * EPS)


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


@pytest.mark.parametrize(("cold", "before", "between"), [(True, 0, 1), (False, 1, 10)])
def test_cuda_events_enclose_the_calls_and_a_long_copy_goes_before(
    monkeypatch, cold, before, between
):
    queue = []

    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(queue))
    clock = measure.CudaClock(SimpleNamespace(_staging=SimpleNamespace(stream=Stream())))
    assert clock.largest.n_bytes == 1 << 14
    clock.largest = lambda: queue.append("copy")
    seconds = clock.timer(lambda: queue.append("call"), cold=cold)()
    assert queue == ["copy", *["call"] * before, "event", *["call"] * between, "event"]
    assert seconds == pytest.approx(0.5 / between)


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


def test_motion_rows_hold_what_they_compare_and_say_which_peer_is_missing(report):
    for grid in ("16x16x12", "20x18x14"):
        ours, absent = (row for row in report["tables"]["motion"] if row["grid"] == grid)
        assert ours["tool"] == "rtfmri"
        assert ours["n_volumes"] == 3
        # Voxels of 10 mm and more: a tenth of the motion there is, not zero.
        assert 0 < ours["rms_mm"] <= ours["max_mm"] < 0.5
        assert ours["jump_mm"] < 1.5
        assert ours["together_ms"] == ours["estimate_ms"] + ours["reslice_ms"]
        assert ours["times_ours"] == 1
        assert absent["tool"] == "no_such_package is not installed"
        assert tables.cells(benchmarks.LAYOUTS["motion"], [absent])[0][2:] == ["-"] * 9


@pytest.mark.parametrize("package", ["rtspm", "SimpleITK"])
def test_peers_find_the_motion_that_is_there(package):
    pytest.importorskip(package)
    head, moved = phantom.Phantom((32, 32, 18)), np.array([0.8, -0.5, 0.6, 0.9, -0.7, 1.0])
    reference, volume = head.volume(0, np.zeros(6)), head.volume(1, moved)
    peers = [peer for peer in PEERS if peer.package == package]
    assert len(peers) == 2
    for peer in peers:
        corrector = peer.make(head.grid, reference)
        corrector.load(volume)
        corrector.estimate()
        corrector.reslice()
        # A tenth of the motion: voxels of 6 mm, twice as large as they are made for.
        assert phantom.deviation_mm(corrector.transform(), phantom.rigid(moved)) < 0.17


def test_smoothing_is_compared_with_what_gives_the_same(report):
    gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter
    head = phantom.Phantom((20, 18, 14))
    volume, backend = head.volume(0, np.zeros(6)), open_backend("cpu")
    sigmas = motion.FWHM_MM / np.sqrt(8 * np.log(2)) / np.array(head.grid.voxel_size_mm)
    by_scipy = gaussian_filter(volume, sigmas, output=np.float32, mode="reflect", truncate=4.0)
    stage = SmoothingStage(backend, head.grid, motion.FWHM_MM)
    ours = stage.push(volume.reshape(-1, order="F")).reshape(volume.shape, order="F")
    # A weighted mean of values to 2000, over 3 axes of at most 5 taps.
    np.testing.assert_allclose(ours, by_scipy, atol=2000 * 15 * EPS)
    for row in report["tables"]["smoothing"]:
        assert row["times_faster"] == pytest.approx(row["scipy_ms"] / row["median_ms"])


SMALL = (9, 8, 7)


@pytest.fixture(scope="module")
def fits():
    """Ours with both kinds of noise and the peers, after the same volumes; and these."""
    backend, n_voxels = open_backend("cpu"), int(np.prod(SMALL))
    ols, ar1 = glm.Fit(backend, SMALL, 4), glm.Fit(backend, SMALL, 1, "ar1")
    peers = glm.Peers(n_voxels, ols.design.contrasts[0].weights[0])
    series = list(glm.volumes(SMALL, glm.N_VOLUMES))
    for volume, pose in zip(series, glm.poses(glm.N_VOLUMES), strict=True):
        for fit in (ols, ar1):
            fit.take(volume, pose)
        peers.take(volume, ols.rows[-1])
    return ols, ar1, peers, np.array(series, np.float64)


def t_by_least_squares(series, rows, contrast):
    coefficients, squares, rank, _ = np.linalg.lstsq(rows, series)
    dof = len(rows) - rank
    scale = contrast @ np.linalg.inv(rows.T @ rows) @ contrast
    return contrast @ coefficients / np.sqrt(squares / dof * scale)


def test_incremental_glms_of_numpy_are_least_squares_after_every_volume(fits):
    ols, *_, series = fits
    rows, contrast = np.array(ols.rows), ols.design.contrasts[0].weights[0]
    peers = [form(series.shape[1], contrast) for form in (glm.Iglm, glm.InPlaceIglm)]
    for n, (volume, row) in enumerate(zip(series, rows, strict=True), start=1):
        for peer in peers:
            peer.take(volume, row)
        # Until some volumes after the 12th the design is as good as singular.
        if n in (30, 60, 100):
            expected = t_by_least_squares(series[:n], rows[:n], contrast)
            for peer in peers:
                # A mean square of 1e6 less what is explained leaves 400; the design's condition
                # number, squared by X'X, is some 1e5: 1e9 float64 roundings of 1e-16 each.
                np.testing.assert_allclose(peer.t(), expected, rtol=0, atol=1e-6)


def test_ours_and_the_peers_tell_the_same_t(fits):
    ols, _, peers, series = fits
    rows = np.array(ols.rows)
    weights = [contrast.weights[0] for contrast in ols.design.contrasts[:3]]
    expected = [t_by_least_squares(series, rows, w) for w in weights]
    # Each of 100 volumes rotates 12 coordinates, of some 300 against a noise of 20, in float32.
    np.testing.assert_allclose(ols.statistics()[:3], expected, rtol=0, atol=1200 * 15 * EPS)
    assert np.abs(expected).max() > 2
    if importlib.util.find_spec("nilearn"):
        assert set(peers.calls()) == {"iglm", "iglm_in_place", "nilearn"}
        t = glm.refit(series, rows, weights[0])
        np.testing.assert_allclose(t, expected[0], rtol=0, atol=1e-9)
    for name in ("iglm", "iglm_in_place"):
        rows, series = (np.vstack([array, array[-1:]]) for array in (rows, series))
        t = peers.calls()[name]()
        expected = t_by_least_squares(series, rows, weights[0])
        np.testing.assert_allclose(t, expected, rtol=0, atol=1e-6)


def test_glm_that_is_timed_has_twelve_columns_that_all_matter(fits):
    ols = fits[0]
    assert len(ols.design.columns) == glm.N_COLUMNS == 12
    assert [contrast.kind for contrast in ols.design.contrasts] == ["t", "t", "t", "F"]
    rows = np.array(ols.rows)
    assert np.linalg.cond(rows / np.linalg.norm(rows, axis=0)) < 1000
    motion_columns = rows[:, ols.design.motion_at :][:, :6]
    wander = phantom.walk(glm.N_VOLUMES) * ([1] * 3 + [np.pi / 180] * 3)
    # Small angles about three axes at once: order matters by their product, 3e-4.
    np.testing.assert_allclose(motion_columns, wander, rtol=0, atol=5e-4)


def test_glm_with_ar1_has_many_classes_of_noise_after_its_warm_up(fits):
    ols, ar1, *_ = fits
    assert ols.n_classes() == 1
    assert ar1.n_classes() > 5
    assert ar1.longest_catch_up_ms > 0


def test_volumes_remember_most_in_the_middle():
    series = np.array(list(glm.volumes((15, 15, 15), 200)), np.float64)
    series -= series.mean(axis=0)
    lag_one = (series[1:] * series[:-1]).sum(axis=0) / (series**2).sum(axis=0)
    where = glm.central((15, 15, 15))
    assert where.min() < 0.15
    assert where.max() == pytest.approx(1)
    # Some 100 voxels of 200 volumes each: a standard error of 0.007.
    assert lag_one[where > 0.95].mean() == pytest.approx(0.5, abs=0.03)
    assert lag_one[where < 0.35].mean() == pytest.approx(0.2, abs=0.04)


def test_peers_are_timed_on_one_thread_of_blas_too():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def timer():
        info = threadpoolctl.threadpool_info()
        return max(lib["num_threads"] for lib in info if lib["user_api"] == "blas")

    before = timer()
    assert glm.on_one_blas_thread(timer)() == 1
    assert timer() == before


def test_glm_is_timed_without_nilearn_and_leaves_its_refit_out(monkeypatch, short):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    monkeypatch.setattr(glm, "find_spec", lambda name: None)
    report = benchmarks.run(device="cpu", grids=[SMALL], suites=["peers"], rounds=1)
    first = report["tables"]["glm"][0]
    assert set(first["times_faster"]) == {"iglm", "iglm_in_place"}
    assert tables.cells(benchmarks.LAYOUTS["glm"], [first])[0][-2:] == ["-", "-"]


def test_series_too_large_for_memory_are_not_refitted(monkeypatch):
    monkeypatch.setattr(glm, "MOST_SERIES_BYTES", 8 * glm.N_VOLUMES * 10)
    assert len(glm.Peers(11, np.eye(12)[0]).calls()) == 2


def test_glm_rows_say_what_is_asked_and_what_it_costs(report):
    rows = [row for row in report["tables"]["glm"] if row["grid"] == "16x16x12"]
    assert [(row["caches"], row["contrasts"], row["bytes_per_voxel"]) for row in rows] == [
        ("hot", "1 t", 116),
        ("hot", "3 t + 1 F", 128),
        ("cold", "1 t", 116),
        ("cold", "3 t + 1 F", 128),
    ]
    assert tables.cells(benchmarks.LAYOUTS["glm"], [rows[1]])[0][-6:] == ["-"] * 6
    for row in report["tables"]["glm_cost"]:
        assert row["times_ols"] == pytest.approx(row["ar1"]["push_ms"] / row["ols"]["push_ms"])
        assert row["n_classes"] > 5
        for noise in ("ols", "ar1"):
            assert 1e-3 * row[noise]["design_us"] < row[noise]["push_ms"]
            assert row[noise]["told_us"] > 0


def test_chain_takes_a_mosaic_apart_as_the_reader_does():
    volume = np.arange(6 * 5 * 7, dtype=np.int16).reshape((6, 5, 7), order="F")
    mosaic = chain.tiled(volume)
    assert mosaic.shape == (15, 18)
    np.testing.assert_array_equal(chain.untiled(mosaic, volume.shape), volume)
    assert chain.untiled(mosaic, volume.shape).flags.f_contiguous
    dicom = pytest.importorskip("rtfmri.readers.dicom")
    simulated = importlib.import_module("rtfmri.simulator.dicom")
    grid = phantom.Phantom(volume.shape).grid
    dataset = simulated.mosaic_dataset(volume, grid, index=0, tr_s=1.0, series_uid="1.2.3")
    np.testing.assert_array_equal(dataset.pixel_array, mosaic)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    np.testing.assert_array_equal(dicom.decode(file.getvalue()).volume.data, volume)


def test_chain_tells_every_step_and_the_total(report):
    for grid in ("16x16x12", "20x18x14"):
        rows = {row["step"]: row for row in report["tables"]["chain"] if row["grid"] == grid}
        steps = {"decode", "motion", "reslice", "smooth", "glm", "baseline", "roi", "total"}
        assert steps <= set(rows)
        for caches in ("hot", "cold"):
            steps = [row[caches] for step, row in rows.items() if step in STAGES]
            total = rows["total"][caches]
            assert total["min_ms"] <= total["p50_ms"] <= total["p99_ms"]
            assert max(step["p50_ms"] for step in steps) <= total["p99_ms"]
            assert sum(step["min_ms"] for step in steps) <= total["p99_ms"]

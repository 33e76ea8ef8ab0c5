import importlib
import importlib.util
import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rtfmri.backends import gpu_problem, open_backend
from rtfmri.cli import load_benchmarks
from rtfmri.errors import ConfigError, DeviceError

GRIDS = ((6, 5, 4), (8, 4, 4))
EPS = float(np.finfo(np.float32).eps)


benchmarks = load_benchmarks()
baseline, kernels, latency, measure, tables = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("baseline", "kernels", "latency", "measure", "tables")
)


@pytest.fixture(scope="module")
def short():
    """Let the suites do little: what they tell is not looked at for its size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "FLAT_AT", (10, 20, 30))
        patch.setattr(latency, "N_VOLUMES", 12)
        patch.setattr(latency, "PACE_S", 0.002)
        patch.setattr(measure, "HOT_TURN", 2)
        patch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
        yield


@pytest.fixture(scope="module")
def report(short):
    return benchmarks.run(device="cpu", grids=GRIDS, rounds=1)


def test_every_suite_gives_rows_for_every_grid(report):
    assert report["device"] == "cpu"
    assert set(report["tables"]) == set(tables.LAYOUTS)
    grids = {"6x5x4", "8x4x4"}
    for name in ("kernels", "baseline", "latency"):
        assert {row["grid"] for row in report["tables"][name]} == grids
    assert [row["baseline"] for row in report["tables"]["flat"]] == [
        "cumulative",
        "exponential",
        "sliding",
        "fixed",
    ]
    assert {row["recorded"] for row in report["tables"]["latency"]} == {True, False}


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
        for name, times in row["times_faster"].items():
            assert times == pytest.approx(row[f"{name}_ms"] / row["median_ms"])


def test_report_is_json_without_paths_and_makes_the_same_tables_again(report):
    text = json.dumps(report, allow_nan=False)
    assert str(Path.home()) + os.sep not in text
    assert str(Path.cwd()) not in text
    assert tables.markdown(json.loads(text)) == tables.markdown(report)
    shown = benchmarks.table(report)
    assert [table.row_count for table in shown] == [
        len(rows) for rows in report["tables"].values()
    ]


def test_only_the_suites_asked_for_run_and_progress_is_told(short):
    steps = []
    report = benchmarks.run(
        device="cpu", grids=GRIDS[:1], suites=["latency"], progress=steps.append, rounds=1
    )
    assert list(report["tables"]) == ["latency"]
    assert steps == ["latency, 6x5x4"]


def test_latency_is_skipped_with_its_reason_without_h5py(monkeypatch):
    monkeypatch.setattr(latency, "find_spec", lambda name: None)
    report = benchmarks.run(device="cpu", grids=GRIDS[:1], suites=["latency"])
    assert report["tables"]["latency"] == [{"skipped": "h5py is not installed"}]
    assert "skipped: h5py is not installed" in benchmarks.table(report)[0].title
    assert "skipped: h5py is not installed" in tables.markdown(report)


def test_a_suite_that_is_none_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"suites must be of kernels, .* got speed"):
        benchmarks.run(device="cpu", suites=["speed"], progress=pytest.fail)


def test_cuda_without_a_gpu_is_refused():
    if gpu_problem() is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="'cuda' was asked for"):
        benchmarks.run(device="cuda", grids=GRIDS[:1], suites=["kernels"])


# What the contract in rtfmri.backends makes of int16, float32 and int32: reads + writes.
BYTES_PER_VOXEL = {
    ("subtract + fold", "int16"): 2 + 8 + 12 + 8,
    ("subtract + fold", "uint16"): 2 + 8 + 12 + 8,
    ("subtract + fold", "float32"): 4 + 8 + 12 + 8,
    ("subtract", "int16"): 2 + 8 + 12,
    ("subtract + fold elsewhere", "int16"): 2 + 16 + 12 + 8,
    ("fold", "int16"): 2 + 8 + 8,
    ("slide", "int16"): 2 + 8 + 2 + 12 + 8 + 2,
    ("refresh", "int16"): 20 * 2 + 8,
    ("smooth", "int16"): 2 + 4,
    ("contrast", "-"): 16 + 12,
    ("roi_means", "int16"): 2 + 4 + 4,
}


def test_bytes_per_voxel_are_the_contracts():
    cases = list(kernels.cases(open_backend("cpu"), (8, 6, 5)))
    found = {(case.operation, case.dtype): case.moved_bytes / case.n for case in cases}
    assert found == BYTES_PER_VOXEL


def test_bytes_held_are_those_of_the_arrays_that_the_backend_gets():
    given = []

    class Spy:
        def __init__(self):
            self._backend = open_backend("cpu")

        def __getattr__(self, name):
            operation = getattr(self._backend, name)

            def note(*args, **kwargs):
                given[:] = [*args, *kwargs.values()]
                return operation(*args, **kwargs)

            return note

    n_checked = 0
    for case in kernels.cases(Spy(), (8, 6, 5)):
        if case.operation in ("slide", "refresh", "roi_means", "smooth"):
            continue  # these get more than they go through
        case.call()
        arrays = {}
        for item in given:
            for part in item if isinstance(item, tuple) else (item,):
                if isinstance(part, np.ndarray):
                    arrays[part.ctypes.data] = part.nbytes
        assert case.held_bytes == sum(arrays.values())
        n_checked += 1
    assert n_checked == 7


def test_every_operation_of_the_protocol_is_measured():
    operations = {"subtract", "fold", "slide", "refresh", "contrast", "roi_means", "smooth"}
    cases = kernels.cases(open_backend("cpu"), (8, 6, 5))
    assert {case.operation.split(" ")[0] for case in cases} == operations


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
            (tmp_path / f"{date}_{name}_cpu.json").write_text(json.dumps(f"{date} {name}"))
    assert sorted(tables.newest_reports(tmp_path)) == ["2026-01-15 b", "2026-02-01 a"]


def test_readme_holds_the_tables_that_its_results_make():
    text = (tables.FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == tables.readme(text, tables.newest_reports(tables.FOLDER / "results"))

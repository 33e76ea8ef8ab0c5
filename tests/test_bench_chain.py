import importlib
import io
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rtfmri.backends import open_backend
from rtfmri.cli import load_benchmarks
from rtfmri.pipeline import STAGES

GRIDS = ((16, 16, 12), (20, 18, 14))
STEPS = {"motion", "reslice", "smooth", "quality", "glm", "baseline", "roi", "fetch", "total"}
N_FLOATS = 100_000

benchmarks = load_benchmarks()
chain, measure, phantom, scaling, tables = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("chain", "measure", "phantom", "scaling", "tables")
)


@pytest.fixture(scope="module")
def short():
    """Let the suites do little: what they tell is not looked at for its size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "N_PUSHES", 8)
        patch.setattr(chain, "N_COLD", 4)
        patch.setattr(chain, "N_GROWTH", 6)
        patch.setattr(chain, "N_TRACED", 2)
        patch.setattr(scaling, "FLAT_AT", (10, 20, 40, 80))
        patch.setattr(scaling, "SHAPES", ((16, 16, 9), (24, 24, 14), (32, 32, 18)))
        patch.setattr(scaling, "TURN", 2)
        patch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
        yield


@pytest.fixture(scope="module")
def report(short):
    return benchmarks.run(device="cpu", grids=GRIDS, rounds=2, suites=["chain", "scaling"])


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


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
        assert {"decode", *STEPS} <= set(rows)
        for caches, n in (("hot", 8), ("cold", 4)):
            steps = [row[caches] for step, row in rows.items() if step in STAGES]
            total = rows["total"][caches]
            assert total["n"] == n
            assert total["min_ms"] <= total["p50_ms"] <= total["p95_ms"] <= total["p99_ms"]
            assert total["p99_ms"] <= total["max_ms"]
            assert total["p99_over_p50"] == total["p99_ms"] / total["p50_ms"]
            assert max(step["p50_ms"] for step in steps) <= total["p99_ms"]
            assert sum(step["min_ms"] for step in steps) <= total["min_ms"]


def test_cold_volumes_are_fewer_where_emptying_the_caches_takes_long(short, monkeypatch):
    monkeypatch.setattr(chain, "COLD_S", 0.0)
    monkeypatch.setattr(chain, "LEAST_COLD", 3)
    emptied = []
    clock = measure.HostClock()
    clock.largest = lambda: emptied.append(True)
    plan = measure.Plan(open_backend("cpu"), clock, GRIDS[:1], 1, 0.0, lambda _: None)
    total = next(row for row in chain.run(plan)["chain"] if row["step"] == "total")
    assert total["cold"]["n"] == len(emptied) == 3


def test_memory_of_a_chain_is_its_arrays_and_does_not_grow(report):
    for row, shape in zip(report["tables"]["chain_memory"], GRIDS, strict=True):
        n_voxels = int(np.prod(shape))
        # Motion's scratch alone is 8 bytes a voxel, reslicing's as much; the GLM has 15 columns.
        assert row["array_bytes"] > 16 * n_voxels + 4 * 15 * row["brain_voxels"]
        assert row["array_bytes"] < 1000 * n_voxels + 1_000_000
        assert 0 < row["brain_voxels"] <= n_voxels
        # A copy of the mosaic, int16, whose last tiles may be empty.
        assert 2 * n_voxels <= row["decode_bytes"] < 4 * n_voxels + 10_000
        assert row["push_bytes"] > 0
        assert row["n_volumes"] == 6
        assert abs(row["growth_arrays"]) <= 2
        assert row["growth_bytes"] < 10_000
        assert "device_bytes" not in row


def test_memory_is_looked_at_on_one_thread_and_the_others_come_back(short):
    numba = pytest.importorskip("numba")
    backend = open_backend("cpu")
    chain._memory(backend, GRIDS[0])
    assert numba.get_num_threads() == backend.threads
    assert not tracemalloc.is_tracing()


def allocates(where):
    where.append(np.ones(N_FLOATS))
    where.append(len([np.empty(N_FLOATS), np.empty(N_FLOATS)]))
    where.append(np.ones(10))


def calls_it(where):
    where.append(0)
    allocates(where)


def test_tally_finds_what_is_kept_and_what_is_gone_by_the_line(traced):
    tally = chain.Tally(8 * N_FLOATS, Path(__file__).parent)
    where = []
    trace = sys.gettrace()
    tally.run(lambda: calls_it(where))
    assert sys.gettrace() is trace
    assert len(where) == 4
    first = allocates.__code__.co_firstlineno
    lines = [f"{Path(__file__).name}:{first + k}" for k in (1, 2)]
    assert [line for line, _ in tally.found] == lines
    kept, gone = (n_bytes for _, n_bytes in tally.found)
    assert 8 * N_FLOATS <= kept < 9 * N_FLOATS
    assert 16 * N_FLOATS <= gone < 17 * N_FLOATS


def test_tally_leaves_what_is_small_and_lays_the_rest_on_the_package(traced):
    small = chain.Tally(20 * N_FLOATS, Path(__file__).parent)
    small.run(lambda: calls_it([]))
    assert small.found == []
    elsewhere = chain.Tally(8 * N_FLOATS, Path(np.__file__).parent / "_core")
    elsewhere.run(lambda: np.ones(N_FLOATS))
    (line, _) = elsewhere.found[0]
    assert line.startswith("numeric.py:")


def test_peak_is_what_there_was_at_once(traced):
    kept = []
    assert chain.peak_bytes(lambda: kept.append(np.ones(N_FLOATS))) >= 8 * N_FLOATS
    peak = chain.peak_bytes(lambda: [np.ones(N_FLOATS) for _ in range(3)] and None)
    assert 24 * N_FLOATS <= peak < 25 * N_FLOATS


def test_requests_for_memory_of_a_gpu_are_counted_a_push(monkeypatch):
    hooks = []

    class MemoryHook:
        def __enter__(self):
            hooks.append(self)

        def __exit__(self, *exception):
            hooks.remove(self)

    cupy = SimpleNamespace(cuda=SimpleNamespace(MemoryHook=MemoryHook))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    told = SimpleNamespace(push=lambda: [hooks[0].malloc_postprocess(size=n) for n in (512, 1024)])
    assert chain._on_device(told) == {"device_allocations": 2, "device_allocated_bytes": 1536}
    assert not hooks


def test_chain_has_a_glm_of_as_many_columns_without_nilearn(monkeypatch):
    head = phantom.Phantom((24, 24, 14))
    columns = []
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(sys.modules, "nilearn", None)
            for module in (chain, phantom):
                monkeypatch.setattr(module, "find_spec", lambda name: None)
        else:
            pytest.importorskip("nilearn")
        pipeline = chain.new_pipeline(open_backend("cpu"), head)
        for index, image in enumerate(phantom.drifting(head)):
            result = pipeline.push(chain.Volume(image, head.grid, index, tr_s=chain.TR_S))
        assert set(result.roi["left"].t) == set(pipeline.glm_maps())
        columns.append(result.design.size)
        assert len(pipeline.glm_maps()) == 2
    assert columns[0] == columns[1]


@pytest.mark.parametrize("n_waves", [1, 10, 39])
def test_waves_never_rest_and_can_be_told_apart(n_waves):
    plain = chain.GlmSettings(drift="none", motion=False)
    design = chain.Waves(n_waves, 3, plain)
    rows = design.rows(200)
    assert rows.shape == (200, 1 + n_waves) == (200, len(design.columns))
    assert np.linalg.cond(rows) < 30
    assert np.abs(design.row(5000)[1:]).min() > 1e-6
    weights = np.concatenate([contrast.weights for contrast in design.contrasts])
    assert weights.shape == (3, 1 + n_waves)
    assert not weights[:, :-2].any()
    assert weights[:, -1].all()


def test_exponent_is_the_slope_of_a_line_through_the_logarithms():
    slope, error = scaling.exponent([1, 10, 100], [3, 3e2, 3e4])
    assert slope == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-12)
    sizes = np.array([2.0, 5, 10, 20, 40])
    costs = sizes**0.7 * np.array([1.1, 0.9, 1.05, 1.0, 0.97])
    coefficients, covariance = np.polyfit(np.log(sizes), np.log(costs), 1, cov=True)
    expected = coefficients[0], np.sqrt(covariance[0, 0])
    assert scaling.exponent(sizes, costs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_threads_are_powers_of_two_and_all(most, counts):
    assert scaling.thread_counts(most) == counts


def test_regions_are_boxes_within_the_head():
    inside = np.zeros((20, 20, 12), bool)
    inside[5:15, 4:16, 3:9] = True
    rois = scaling.regions(inside, 30)
    assert len(rois) == 30
    for roi in rois.values():
        assert 0 < roi.sum() <= 100
        assert not (roi & ~inside).any()


def test_every_axis_has_a_row_for_each_size_and_each_step(report):
    rows = report["tables"]["scaling"]
    sizes = {}
    for row in rows:
        assert set(row["steps"]) >= STEPS
        assert row["n"] == 4
        for cost in row["steps"].values():
            assert 0 < cost["min_ms"] <= cost["p50_ms"] <= cost["p99_ms"]
        sizes.setdefault((row["axis"], row["grid"]), []).append(row["size"])
    n_threads = scaling.thread_counts(scaling.usable_threads())
    assert sizes == {
        **{("voxels", measure.grid_name(s)): [int(np.prod(s))] for s in scaling.SHAPES},
        ("regressors", "16x16x12"): [2, 5, 10, 20, 40],
        ("contrasts", "16x16x12"): [1, 4, 16, 64],
        ("regions", "16x16x12"): [1, 10, 100, 1000],
        ("threads", "16x16x12"): n_threads,
        ("threads", "20x18x14"): n_threads,
    }
    # What grows is that alone.
    others = {row["brain_voxels"] for row in rows if row["grid"] == "16x16x12"}
    assert len(others) == 1


def test_threads_are_held_against_one(report):
    rows = [row for row in report["tables"]["scaling"] if row["axis"] == "threads"]
    one = {row["grid"]: row["steps"] for row in rows if row["size"] == 1}
    for row in rows:
        for step, cost in row["steps"].items():
            times = one[row["grid"]][step]["p50_ms"] / cost["p50_ms"]
            assert cost["efficiency"] == pytest.approx(times / row["size"])


def test_exponents_are_those_of_the_medians(report):
    exponents = report["tables"]["exponents"]
    assert [row["axis"] for row in exponents][:4] == [
        *("voxels", "regressors", "contrasts", "regions")
    ]
    for row in exponents:
        line = [r for r in report["tables"]["scaling"] if r["axis"] == row["axis"]]
        if row["axis"] == "threads":
            line = [r for r in line if r["grid"] == row["grid"]]
        assert row["n_points"] == len(line)
        assert (row["smallest"], row["largest"]) == (line[0]["size"], line[-1]["size"])
        sizes = [r["size"] for r in line]
        costs = [r["steps"]["total"]["p50_ms"] for r in line]
        fit = row["steps"]["total"]
        found = fit["exponent"], fit["standard_error"]
        assert found == pytest.approx(scaling.exponent(sizes, costs))


def test_two_points_make_no_exponent():
    cost = {"total": {"p50_ms": 1.0}}
    rows = [{"axis": "threads", "grid": "1x1x1", "size": n, "steps": cost} for n in (1, 2, 4)]
    assert scaling.fitted(rows[:2]) == []
    assert [row["n_points"] for row in scaling.fitted([{"skipped": "x"}, *rows])] == [3]


def test_flat_tells_the_cost_at_each_of_its_volumes_for_each_baseline(report):
    rows = report["tables"]["flat"]
    assert [row["baseline"] for row in rows] == ["cumulative", "exponential", "sliding", "fixed"]
    for row in rows:
        ratios = [row["push_ms"][n] / row["young_ms"][n] for n in ("10", "20", "40", "80")]
        assert list(row["times_young"].values()) == pytest.approx(ratios)
        found = row["exponent"], row["standard_error"]
        assert found == pytest.approx(scaling.exponent((10, 20, 40, 80), ratios))


def test_a_long_run_is_looked_at_around_its_numbers_beside_young_ones(short, monkeypatch):
    pushed = []

    class Spy(scaling.Case):
        def push(self):
            pushed.append(self)
            return super().push()

    monkeypatch.setattr(scaling, "Case", Spy)
    scaling.cost_per_volume(open_backend("cpu"), GRIDS[0], "cumulative")
    old, *young = dict.fromkeys(pushed)
    # Until 8 volumes behind the last, and after the 5 with which each begins 9, 9, 9 and 17.
    assert pushed.count(old) == 88
    assert [pushed.count(case) for case in young] == [14, 14, 14, 22]
    assert pushed[-2:] == [old, young[-1]]


def test_threads_are_skipped_by_name_where_they_are_not_what_computes(short, monkeypatch):
    class Elsewhere(type(open_backend("cpu"))):
        name = "cuda"

    monkeypatch.setattr(scaling, "get_args", lambda _: ())
    monkeypatch.setattr(scaling, "new_pipeline", on_the_cpu)
    plan = measure.Plan(Elsewhere(), measure.HostClock(), GRIDS[:1], 1, 0.0, lambda _: None)
    rows = scaling.run(plan)["scaling"]
    assert rows[-1] == {"skipped": "threads are the CPU's"}
    assert {row["axis"] for row in rows[:-1]} == {"voxels", "regressors", "contrasts", "regions"}


def on_the_cpu(backend, *args, **changes):
    return chain.new_pipeline(open_backend("cpu"), *args, **changes)


def test_report_is_json_without_paths_and_makes_tables(report):
    text = json.dumps(report, allow_nan=False)
    assert str(Path.cwd()) not in text
    for name, rows in report["tables"].items():
        if name != "flat":  # whose columns are the numbers of a long run
            layout = benchmarks.LAYOUTS[name]
            cells = tables.cells(layout, rows)
            assert len(cells) == len(rows)
            assert {len(line) for line in cells} == {len(layout.columns)}

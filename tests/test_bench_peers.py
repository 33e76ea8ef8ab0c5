import importlib
import importlib.util
import math

import numpy as np
import pytest

from rtfmri.backends import open_backend
from rtfmri.cli import load_benchmarks

EPS = float(np.finfo(np.float32).eps)
GRID = (20, 20, 14)

benchmarks = load_benchmarks()
measure, phantom, tables = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("measure", "phantom", "tables")
)
peers_suite = importlib.import_module(f"{benchmarks.__name__}.peers")
baseline, decode, glm, motion, reslice, roi, smoothing, whole = (
    importlib.import_module(f"{benchmarks.__name__}.peers.{name}")
    for name in ("baseline", "decode", "glm", "motion", "reslice", "roi", "smoothing", "whole")
)
PEERS = motion.PEERS


@pytest.fixture(scope="module")
def short():
    """Let the suite do little: what it tells is not looked at for its size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(motion, "MOST_VOLUMES", 3)
        patch.setattr(motion, "PEERS", (motion.Tool("absent", "no_such_package", None),))
        patch.setattr(whole, "MOST_VOLUMES", whole.N_BEFORE + 4)
        patch.setattr(decode, "N_FILES", 4)
        patch.setattr(measure, "HOT_TURN", 2)
        patch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
        yield


@pytest.fixture(scope="module")
def report(short):
    return benchmarks.run(device="cpu", grids=[GRID], rounds=1, suites=["peers"])


def summed(report):
    return [row for row in report["tables"]["peers"] if "skipped" not in row]


def test_every_stage_has_a_table_and_the_summary_comes_first(report):
    assert next(iter(report["tables"])) == "peers"
    assert set(report["tables"]) == set(peers_suite.LAYOUTS)
    stages = {row["stage"] for row in summed(report)}
    assert {"decode", "smoothing", "baseline, hot caches", "GLM, cold caches"} <= stages
    assert {"motion, reslice", "means of regions"} <= stages
    assert ("whole chain" in stages) == bool(importlib.util.find_spec("rtspm"))


def test_the_summary_names_each_missing_peer_once(report):
    names = [row["skipped"] for row in report["tables"]["peers"] if "skipped" in row]
    assert names.count("no_such_package is not installed") == 1
    packages = {"rtspm": "python-rtspm", "SimpleITK": "SimpleITK", "dicomsdl": "dicomsdl"}
    for package, name in packages.items():
        is_missing = importlib.util.find_spec(package) is None
        assert any(name in told for told in names) == is_missing


def test_the_summary_says_why_wherever_less_is_reached_than_asked_and_nowhere_else(report):
    for row in summed(report):
        assert row["times"] == pytest.approx(row["peer_ms"] / row["median_ms"])
        assert row["asked"] == (40 if row["stage"] == "whole chain" else 5)
        assert bool(row["why"]) == (row["times"] < row["asked"])


def only(**tables):
    names = ("whole", "decode", "motion", "reslice", "smoothing", "baseline", "glm", "roi")
    return list(peers_suite.summary({**{name: [] for name in names}, **tables}))


def test_where_memory_is_the_reason_the_summary_says_what_it_allows():
    row = {"grid": "g", "caches": "hot", "median_ms": 2.0, "numpy_plain_ms": 6.0}
    row |= {"times_faster": {"numpy_plain": 3.0}, "z_error": {"fused": 1, "numpy_plain": 2}}
    row |= {"stream_gb_s": 40.0, "allowed_ms": 1.6, "of_allowed": 1.25}
    (found,) = only(baseline=[row])
    assert (found["peer"], found["error"], found["peer_error"]) == ("NumPy plain", 1, 2)
    assert found["why"] == (
        "memory: at 40 GB/s of the stream the least bytes take 1.600 ms, so that at most "
        "3.8 times are possible; ours takes 1.25 times as long as they"
    )
    (found,) = only(baseline=[row | {"numpy_plain_ms": 10.0}])
    assert found["why"] == ""


def test_where_starting_is_the_reason_the_summary_says_how_long_that_takes():
    ours = {"grid": "g", "tool": "rtfmri", "median_ms": 0.003, "error_ppb": 20.0}
    ours |= {"start_us": 1.0, "n_voxels": 1000}
    slow, fast = (
        {"grid": "g", "tool": name, "median_ms": ms, "error_ppb": 0.0}
        for name, ms in (("slow", 0.03), ("fast", 0.009))
    )
    (found,) = only(roi=[ours, slow, fast])
    assert (found["peer"], found["times"]) == ("fast", pytest.approx(3))
    assert found["why"] == (
        "starting: a call for one voxel takes 1.0 of the 3.0 µs, each voxel with its weight "
        "2.00 ns"
    )


def test_where_nothing_was_measured_the_summary_does_not_make_up_a_reason():
    ours, peer = (
        {"grid": "g", "tool": tool, "estimate_ms": ms, "rms_mm": 0.01}
        for tool, ms in (("rtfmri", 1.0), ("SimpleITK", 4.0))
    )
    (found,) = only(motion=[ours, peer])
    assert found["why"].startswith("not known")


def test_why_the_whole_is_slow_is_told_by_its_slowest_steps():
    row = {"grid": "g", "median_ms": 4.0, "min_ms": 2.0, "peer_ms": 100.0, "effect_error": 0.1}
    row |= {"peer_effect_error": 0.2, "still_effect_error": 0.05}
    row |= {"steps_ms": {"motion": 0.5, "decode": 0.1, "reslice": 2.0, "fetch": 1.0}}
    (found,) = only(whole=[row])
    assert found["measure"] == "activation, rms %; noise alone 0.050"
    assert found["why"] == (
        "most of ours is reslice 2.00 ms, fetch 1.00 ms, motion 0.50 ms; its fastest volume "
        "took 2.00 ms, 50 times less"
    )


def test_ratios_are_those_of_the_medians_beside_them(report):
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


def test_decoders_find_the_same_voxels(report):
    rows = {row["tool"]: row for row in report["tables"]["decode"]}
    present = [row for row in rows.values() if "median_ms" in row]
    assert {"rtfmri", "read + cut alone", "pydicom", "nibabel"} <= {r["tool"] for r in present}
    assert {row["voxels"] for row in present} == {"identical"}
    assert rows["rtfmri"]["times_ours"] == 1
    if not importlib.util.find_spec("dicomsdl"):
        assert "dicomsdl is not installed" in rows


def test_a_decoder_that_finds_other_voxels_is_told(monkeypatch):
    real = decode.tools((8, 8, 4))
    wrong = ("numpy", ".nii", lambda: lambda path: np.zeros((8, 8, 4), np.int16))
    monkeypatch.setattr(decode, "tools", lambda shape: {**real, "wrong": wrong})
    rows = {row["tool"]: row for row in decode.compare((8, 8, 4), 1)}
    assert rows["wrong"]["voxels"] == "different"
    assert rows["rtfmri"]["voxels"] == "identical"


def test_whole_chain_is_their_stages_together(report):
    pytest.importorskip("rtspm")
    (row,) = report["tables"]["whole"]
    assert row["n"] == 4
    parts = [row[f"{stage}_ms"] for stage in whole.PEER_STAGES]
    assert min(parts) > 0
    assert row["peer_ms"] == pytest.approx(sum(parts))
    assert row["times"] == pytest.approx(row["peer_ms"] / row["median_ms"])
    of_brain_ms = row["peer_ms"] - row["glm_ms"] + row["brain_glm_ms"]
    assert row["times_of_brain"] == pytest.approx(of_brain_ms / row["median_ms"])
    # A twentieth of a voxel, which is 10 mm large.
    assert 0 < row["rms_mm"] < 0.5
    assert 0 < row["peer_rms_mm"] < 0.5


@pytest.fixture(scope="module")
def head():
    return whole.Run((24, 24, 14), 40)


def test_head_of_the_whole_chain_is_active_in_the_second_task_alone(head):
    assert head.design.columns[-2:] == ("left", "right")
    assert len(head.design.columns) == 15
    signals = [volume[15:17, 9:11, 8:10].mean() for volume in head.volumes()]
    right, left = head.design.rows(40)[:, [-1, -2]].T
    # 40 per mille of change against noise of 15 in each of 8 voxels, and what motion adds.
    assert np.corrcoef(signals, right)[0, 1] > 0.6
    assert np.corrcoef(signals, left)[0, 1] < 0.2


def test_motion_fills_its_columns_of_the_row(head):
    found = head.row(3, phantom.rigid(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])))
    at = head.design.motion_at
    expected = [0.1, 0.2, 0.3, *np.radians([0.4, 0.5, 0.6])]
    # Products of the other two angles, 1e-4.
    np.testing.assert_allclose(found[at : at + 6], expected, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(
        np.delete(found, range(at, at + 6)), np.delete(head.design.row(3), range(at, at + 6))
    )


def test_error_of_an_effect_is_in_percent_of_the_signal(head):
    rest, active = (
        smoothing.exactly_smoothed(head.phantom.signal(np.zeros(6), active=on), head.phantom.grid)
        for on in (0.0, 1.0)
    )
    largest = (head.design.rows(40)[:, -1]).max()
    assert head.effect_error((active - rest) / largest) < 1e-9
    assert head.effect_error((active - rest + 0.01 * rest) / largest) == pytest.approx(1)
    # Volumes of noise 15 of 1000, some 15 of them in each state, smoothed little.
    assert 0.1 < head.effect_error(head.still_effect()) < 1.5


def test_effect_of_the_incremental_glm_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    rows, series = rng.normal(size=(30, 4)), rng.normal(size=(30, 7))
    contrast = np.array([1.0, -1.0, 0.0, 2.0])
    peer = glm.Iglm(7, contrast)
    for volume, row in zip(series, rows, strict=True):
        peer.take(volume, row)
    expected = contrast @ np.linalg.lstsq(rows, series)[0]
    # Well conditioned: a few roundings of float64.
    np.testing.assert_allclose(peer.effect(), expected, rtol=0, atol=1e-12)


def test_whole_chain_is_left_out_by_name_without_its_peer(monkeypatch):
    monkeypatch.setattr(whole, "find_spec", lambda name: None)
    plan = measure.Plan(open_backend("cpu"), None, [GRID], 1, 1.0, pytest.fail)
    assert whole.run(plan) == {"whole": [{"skipped": "python-rtspm is not installed"}]}


def test_a_grid_that_python_rtspm_cannot_reslice_is_left_to_the_others():
    pytest.importorskip("rtspm")
    plan = measure.Plan(open_backend("cpu"), None, [(20, 18, 14)], 1, 1.0, lambda step: None)
    reason = "20x18x14: python-rtspm reslices only what is as wide as it is high"
    assert whole.run(plan) == {"whole": [{"skipped": reason}]}


def test_smoothing_is_compared_with_what_gives_the_same(report):
    rows = {row["tool"]: row for row in report["tables"]["smoothing"]}
    # A weighted mean over 3 axes of at most 5 taps, in float32.
    limit_ppm = 1e6 * 15 * EPS
    for tool in ("rtfmri", "scipy.ndimage", "nilearn"):
        assert rows[tool]["deviation_ppm"] < limit_ppm
    for tool in ("python-rtspm", "SimpleITK, recursive"):
        if tool in rows:
            assert rows[tool]["deviation_ppm"] > limit_ppm
    for row in rows.values():
        if "median_ms" in row:
            times = row["median_ms"] / rows["rtfmri"]["median_ms"]
            assert row["times_ours"] == pytest.approx(times)


def test_reslicing_with_the_true_motion_brings_the_head_back(report):
    rows = {row["tool"]: row for row in report["tables"]["reslice"] if "error" in row}
    unmoved = phantom.Phantom(GRID)
    moved, at_rest = (unmoved.signal(m) for m in (reslice.MOTION, np.zeros(6)))
    left_alone = np.sqrt(np.mean((moved - at_rest)[at_rest > 500] ** 2))
    for row in rows.values():
        # Voxels of 10 mm see half of a texture of 12 mm and more.
        assert 0 < row["error"] < 0.8 * left_alone
        assert row["times_ours"] == pytest.approx(row["median_ms"] / rows["rtfmri"]["median_ms"])
    # Cubic splines are cubic splines; int16 in, and the edges of the grid are far away.
    for tool in ("scipy.ndimage, cubic", "SimpleITK, cubic"):
        if tool in rows:
            assert rows[tool]["error"] == pytest.approx(rows["rtfmri"]["error"], rel=0.02)


def test_all_average_the_same_voxels(report):
    rows = {row["tool"]: row for row in report["tables"]["roi"]}
    # Each weight, 1 / n, is rounded once, and all of a region alike.
    assert rows["rtfmri"]["error_ppb"] < 1e9 * EPS
    for tool in ("NumPy", "scipy.ndimage"):
        if "error_ppb" in rows.get(tool, ()):
            assert rows[tool]["error_ppb"] < 1e-3
    assert rows["rtfmri"]["n_voxels"] == rows["NumPy"]["n_voxels"] > 3
    assert rows["rtfmri"]["start_us"] > 0


def test_motion_rows_hold_what_they_compare_and_say_which_peer_is_missing(report):
    ours, absent = report["tables"]["motion"]
    assert ours["tool"] == "rtfmri"
    assert ours["n_volumes"] == 3
    # Voxels of 10 mm and more: a tenth of the motion there is, not zero.
    assert 0 < ours["rms_mm"] <= ours["max_mm"] < 0.5
    assert ours["jump_mm"] < 1.5
    assert ours["together_ms"] == ours["estimate_ms"] + ours["reslice_ms"]
    assert ours["times_ours"] == 1
    assert absent["tool"] == "no_such_package is not installed"
    assert tables.cells(motion.LAYOUTS["motion"], [absent])[0][2:] == ["-"] * 9


def test_a_grid_too_small_for_motion_correction_is_skipped():
    rows = motion.compare_correctors(open_backend("cpu"), (7, 6, 5))
    assert rows == [{"skipped": "7x6x5 is too small a grid"}]


def test_recursive_least_squares_are_least_squares(fits):
    ols, *_, series = fits
    rows, contrast = np.array(ols.rows), ols.design.contrasts[0].weights[0]
    peer = glm.Rls(series.shape[1], contrast)
    for volume, row in zip(series, rows, strict=True):
        peer.take(volume, row)
    expected = glm.t_by_least_squares(series, rows, contrast)
    # The prior of 1e8 weighs 1e-8 of a volume, of coefficients of 1000 against noise of 20.
    np.testing.assert_allclose(peer.t(), expected, rtol=0, atol=1e-3)
    assert math.isfinite(float(np.abs(expected).max()))


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


def test_incremental_glms_of_numpy_are_least_squares_after_every_volume(fits):
    ols, *_, series = fits
    rows, contrast = np.array(ols.rows), ols.design.contrasts[0].weights[0]
    peers = [form(series.shape[1], contrast) for form in (glm.Iglm, glm.InPlaceIglm)]
    for n, (volume, row) in enumerate(zip(series, rows, strict=True), start=1):
        for peer in peers:
            peer.take(volume, row)
        # Until some volumes after the 12th the design is as good as singular.
        if n in (30, 60, 100):
            expected = glm.t_by_least_squares(series[:n], rows[:n], contrast)
            for peer in peers:
                # A mean square of 1e6 less what is explained leaves 400; the design's condition
                # number, squared by X'X, is some 1e5: 1e9 float64 roundings of 1e-16 each.
                np.testing.assert_allclose(peer.t(), expected, rtol=0, atol=1e-6)


def test_ours_and_the_peers_tell_the_same_t(fits):
    ols, _, peers, series = fits
    rows = np.array(ols.rows)
    weights = [contrast.weights[0] for contrast in ols.design.contrasts[:3]]
    expected = [glm.t_by_least_squares(series, rows, w) for w in weights]
    # Each of 100 volumes rotates 12 coordinates, of some 300 against a noise of 20, in float32.
    np.testing.assert_allclose(ols.statistics()[:3], expected, rtol=0, atol=1200 * 15 * EPS)
    assert np.abs(expected).max() > 2
    if importlib.util.find_spec("nilearn"):
        assert set(peers.calls()) == {"iglm", "iglm_in_place", "rls", "nilearn"}
        t = glm.refit(series, rows, weights[0])
        np.testing.assert_allclose(t, expected[0], rtol=0, atol=1e-9)
    for name in ("iglm", "iglm_in_place"):
        rows, series = (np.vstack([array, array[-1:]]) for array in (rows, series))
        t = peers.calls()[name]()
        expected = glm.t_by_least_squares(series, rows, weights[0])
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


def test_series_too_large_for_memory_are_not_refitted(monkeypatch):
    monkeypatch.setattr(glm, "MOST_SERIES_BYTES", 8 * glm.N_VOLUMES * 10)
    assert "nilearn" not in glm.Peers(11, np.eye(12)[0]).calls()


def test_glm_rows_say_what_is_asked_and_what_it_costs(report):
    rows = [row for row in report["tables"]["glm"] if row["grid"] == "20x20x14"]
    assert [(row["caches"], row["contrasts"], row["bytes_per_voxel"]) for row in rows] == [
        ("hot", "1 t", 116),
        ("hot", "3 t + 1 F", 128),
        ("cold", "1 t", 116),
        ("cold", "3 t + 1 F", 128),
    ]
    assert rows[1]["times_faster"] == {}
    for row in report["tables"]["glm_cost"]:
        assert row["times_ols"] == pytest.approx(row["ar1"]["push_ms"] / row["ols"]["push_ms"])
        assert row["n_classes"] > 5
        for noise in ("ols", "ar1"):
            assert 1e-3 * row[noise]["design_us"] < row[noise]["push_ms"]
            assert row[noise]["told_us"] > 0

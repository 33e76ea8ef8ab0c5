"""The whole path with motion correction, mask and quality: heads that move, volumes that fail."""

import functools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

import memory
import recordings
from cuda_on_cpu import open_cuda_on_cpu
from epi import a_grid, deviation_mm, epi, rigid
from memory import TR_S, MemoryReader
from reference import U
from rtfmri.backends import Backend, open_backend
from rtfmri.config import (
    Config,
    Interpolation,
    MaskSettings,
    MotionSettings,
    QualitySettings,
    SliceTimingSettings,
    SmoothingSettings,
)
from rtfmri.errors import ConfigError, VolumeError
from rtfmri.export import export_bids
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import MAX_START_UP, ConditionMaps, Pipeline, Result
from rtfmri.recording import MOTION, open_recording, recover
from rtfmri.report import write_report
from rtfmri.session import Session
from rtfmri.simulator.scanner import Scanner
from rtfmri.volume import Grid, Volume

Image = NDArray[Any]

GRID = a_grid((28, 34, 22), (5.6, 5.6, 5.8))
SMALL = a_grid((16, 20, 12), (9.5, 9.5, 10.0))
CONFIG = Config(device="cpu")
REGISTER_ONLY = Config(device="cpu", motion=MotionSettings(mode="register_only"))
CONFIGS = {"correct": CONFIG, "register_only": REGISTER_ONLY}
N = 16
MIDDLE = 14, 17, 11
SLICE = slice(None), slice(None), 11
AIR = epi(GRID, noise_sd=0).reshape(GRID.shape, order="F") < 50
BRAIN = ~AIR


@functools.cache
def cpu() -> Backend:
    return open_backend("cpu")


def pose(index: int) -> NDArray[np.float64]:
    """A head that drifts, by less than 0.1 mm from volume to volume."""
    a, b = 0.2 * math.sin(index / 5), 0.2 * math.cos(index / 7)
    return rigid(GRID, [a, b, -a], [b, -a, a])


@functools.cache
def _image(index: int, dtype: str) -> Image:
    return epi(GRID, pose(index), noise_sd=5, seed=index, dtype=dtype)


def image(index: int, dtype: str = "int16") -> Image:
    """Volume *index* of a good run, a copy that may be spoilt."""
    return _image(index, dtype).reshape(GRID.shape, order="F").copy(order="F")


def volume(index: int, data: Image | None = None, grid: Grid = GRID, **header: Any) -> Volume:
    data = image(index) if data is None else data
    return Volume(data.reshape(grid.shape, order="F"), grid, index, TR_S, **header)


def good_run(n: int = N, dtype: str = "int16") -> list[Volume]:
    return [volume(i, image(i, dtype)) for i in range(n)]


def moved(translation_mm: Sequence[float], *, index: int = 0, dtype: Any = np.int16) -> Image:
    at = rigid(GRID, translation_mm, [0, 0, 0]) @ pose(index)
    return epi(GRID, at, noise_sd=5, seed=500 + index, dtype=dtype).reshape(GRID.shape, order="F")


def pipeline(config: Config = CONFIG, grid: Grid = GRID, **settings: Any) -> Pipeline:
    return Pipeline(grid, config, **{"backend": cpu(), **settings})


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether all maps have the same bits."""
    return ours.keys() == theirs.keys() and all(
        np.array_equal(a, b)
        for name in ours
        for a, b in zip(np.atleast_1d(ours[name]), np.atleast_1d(theirs[name]), strict=True)
    )


def same_maps(ours: Mapping[str, ConditionMaps], theirs: Mapping[str, ConditionMaps]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(a, b)
        for name in ours
        for a, b in zip(ours[name], theirs[name], strict=True)
    )


# --- faults


def zeros(good: Image) -> Image:
    return np.zeros_like(good)


def one_nan(good: Image) -> Image:
    good[MIDDLE] = np.nan
    return good


def all_nan(good: Image) -> Image:
    return np.full_like(good, np.nan)


def saturated(good: Image) -> Image:
    return np.minimum(good, np.percentile(good, 97).astype(good.dtype))


def noise(good: Image) -> Image:
    """Of two thirds of the mean, so that it is dimmer."""
    top = 4 / 3 * good.mean()
    drawn = np.random.default_rng(3).uniform(0, top, good.shape[::-1]).T
    return drawn.astype(good.dtype, order="F")


def half_outside(good: Image) -> Image:
    return moved([0, 95, 0], dtype=good.dtype)


def bright_slice(good: Image) -> Image:
    good[SLICE] = (1.3 * good[SLICE]).astype(good.dtype)
    return good


def dark_slice(good: Image) -> Image:
    good[SLICE] = (0.7 * good[SLICE]).astype(good.dtype)
    return good


@dataclass(frozen=True)
class Fault:
    """What spoils a volume, the problem it is to be called, and whether the head is still seen."""

    spoil: Callable[[Image], Image]
    problem: str
    is_found: bool


FAULTS = [
    Fault(zeros, "no signal", False),
    Fault(one_nan, "not finite", True),
    Fault(all_nan, "not finite", False),
    Fault(saturated, "saturated", True),
    Fault(noise, "not registered", False),
    Fault(half_outside, "out of view", False),
    Fault(bright_slice, "slice", True),
    Fault(dark_slice, "drop-out", True),
]
CASES = [
    pytest.param(fault, dtype, id=f"{fault.spoil.__name__}-{dtype}")
    for fault in FAULTS
    for dtype in ("int16", "uint16", "float32")
    if "nan" not in fault.spoil.__name__ or dtype == "float32"
]
REGION = {"region": np.zeros(GRID.shape)}
REGION["region"][12:16, 14:20, 10:13] = 1


def push_all(run: Pipeline, volumes: Iterable[Volume]) -> list[Result]:
    return [run.push(v) for v in volumes]


@functools.cache
def without(at: int, mode: str, dtype: str) -> tuple[Pipeline, list[Result]]:
    """A run in which volume *at* never came."""
    run = pipeline(CONFIGS[mode], rois=REGION, mask=BRAIN, dtype=dtype)
    return run, push_all(run, [v for v in good_run(dtype=dtype) if v.index != at])


# Early, where the run might begin anew, and late.
@pytest.mark.parametrize(("at", "mode"), [(4, "correct"), (12, "register_only")])
@pytest.mark.parametrize(("fault", "dtype"), CASES)
def test_a_bad_volume_is_flagged_and_leaves_no_trace(
    fault: Fault, dtype: str, at: int, mode: str
) -> None:
    volumes = good_run(dtype=dtype)
    volumes[at] = volume(at, fault.spoil(image(at, dtype)))
    run = pipeline(CONFIGS[mode], rois=REGION, mask=BRAIN, dtype=dtype)
    results = push_all(run, volumes)
    bad = results.pop(at)
    assert fault.problem in bad.quality.problems
    assert not bad.quality.usable
    assert bad.conditions == ()
    assert bad.motion is not None
    assert bad.motion.converged or not fault.is_found
    clean, expected = without(at, mode, dtype)
    for one, other in zip(results, expected, strict=True):
        assert one.quality.usable
        assert other.quality.usable
        assert one.quality.n_usable == other.quality.n_usable
        assert one.begins == other.begins == (one.index == 0)
        assert one.conditions == ("baseline",)
        assert one.motion is not None
        assert one.motion.converged
        assert deviation_mm(one.motion.affine @ pose(0), pose(one.index), GRID) < 0.05
    ours, theirs = run.maps()["baseline"], clean.maps()["baseline"]
    tsnr, their_tsnr = run.quality_maps()["tsnr"], clean.quality_maps()["tsnr"]
    psc, their_psc = ([r.roi["region"].psc for r in rs] for rs in (results, expected))
    assert ours.n_volumes == theirs.n_volumes == N - 1
    if fault.is_found and mode == "correct":
        # The next search begins elsewhere, and so ends elsewhere, by less than a tenth of the
        # last step: 0.001 mm. The steepest edge is 1000 over a voxel of 5.6 mm.
        np.testing.assert_allclose(ours.mean, theirs.mean, atol=0.001 * 1000 / 5.6)
        np.testing.assert_allclose(psc, their_psc, atol=0.02)
        inside = theirs.mean > 500
        np.testing.assert_allclose(tsnr[inside], their_tsnr[inside], rtol=0.05)
    else:
        assert np.array_equal(ours.mean, theirs.mean)
        assert np.array_equal(tsnr, their_tsnr)
        assert np.array_equal(psc, their_psc, equal_nan=True)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("spoil", [noise, half_outside, bright_slice, dark_slice])
def test_a_bad_volume_at_the_very_start_does_not_cost_the_run(
    spoil: Callable[[Image], Image], at: int
) -> None:
    volumes = good_run()
    volumes[at] = volume(at, spoil(image(at)))
    run = pipeline(mask=BRAIN)
    results = push_all(run, volumes)
    assert all(result.quality.usable for result in results[at + 2 :])
    # Nobody can know that the first is bad, but the second: then the run begins anew.
    first = max(result.index for result in results if result.begins)
    assert first == at + 1
    clean = pipeline(mask=BRAIN)
    push_all(clean, good_run()[first:])
    assert same_maps(run.maps(), clean.maps())
    assert same(run.quality_maps(), clean.quality_maps())


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_head_that_jumps_is_left_out_once_and_used_where_it_stays(dtype: str) -> None:
    volumes = good_run(dtype=dtype)
    for i in range(8, N):
        volumes[i] = volume(i, moved([0, 1.5, 0], index=i, dtype=dtype))
    run = pipeline(dtype=dtype)
    results = push_all(run, volumes)
    assert [r.index for r in results if not r.quality.usable] == [8]
    assert "motion" in results[8].quality.problems
    assert results[8].conditions == ()
    jumped = results[8].motion
    assert jumped is not None
    assert jumped.fd_mm > 0.5
    assert jumped.translation_mm[1] == pytest.approx(1.5, abs=0.15)
    assert run.maps()["baseline"].n_volumes == N - 1


@pytest.mark.parametrize(("limit_mm", "n_bad"), [(0.5, 2), (50.0, 0)])
def test_the_limit_of_motion_is_the_settings(limit_mm: float, n_bad: int) -> None:
    volumes = good_run()
    volumes[8] = volume(8, moved([0, 1.5, 0], index=8))
    config = Config(device="cpu", quality=QualitySettings(fd_limit_mm=limit_mm))
    results = push_all(pipeline(config), volumes)
    # There, and back again.
    assert sum("motion" in r.quality.problems for r in results) == n_bad


@pytest.mark.parametrize(("spoil", "dtype"), [(zeros, "int16"), (all_nan, "float32")])
def test_a_run_begins_with_the_first_volume_that_has_a_signal(
    spoil: Callable[[Image], Image], dtype: str
) -> None:
    volumes = good_run(8, dtype)
    volumes[0] = volume(0, spoil(image(0, dtype)))
    run, late = pipeline(dtype=dtype), pipeline(dtype=dtype)
    with pytest.raises(VolumeError, match="all voxels are equal"):
        run.push(volumes[0])
    assert run.maps() == run.quality_maps() == run.subtraction() == run.roi_t() == {}
    results, expected = push_all(run, volumes[1:]), push_all(late, volumes[1:])
    assert [r.begins for r in results] == [True] + [False] * 6
    assert run.n_start_up == 0
    assert [r.quality for r in results[1:]] == [r.quality for r in expected[1:]]
    assert same_maps(run.maps(), late.maps())
    assert same(run.quality_maps(), late.quality_maps())
    with Session(MemoryReader(volumes), config=CONFIG) as session:
        assert [r.index for r in session] == list(range(1, 8))
    assert session.counters.skipped == {"all voxels are equal, so no run can begin with it": 1}
    assert session.counters.processed == 7
    assert session.counters.unusable == session.counters.start_up == 0
    assert same_maps(session.maps(), late.maps())


def test_a_session_counts_and_tells_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    volumes = good_run()
    volumes[9] = volume(9, zeros(image(9)))
    volumes[12] = volume(12, saturated(image(12)))
    with Session(MemoryReader(volumes), config=CONFIG) as session:
        results = list(session)
    counters = session.counters
    assert len(results) == counters.processed == N
    assert counters.unusable == 2
    problems = [*results[9].quality.problems, *results[12].quality.problems]
    assert counters.problems == Counter(problems)
    assert {"no signal", "saturated"} <= set(problems)
    assert "volume 9: no signal" in caplog.text
    assert "volume 10" not in caplog.text
    quality = session.summary()["quality"]
    assert quality["usable"] == N - 2
    assert quality["problems"] == dict(counters.problems)


# --- voxels without a number


@pytest.mark.parametrize("interpolation", ["trilinear", "catmull-rom", "bspline"])
def test_air_without_numbers_is_no_problem(interpolation: Interpolation) -> None:
    volumes = good_run(dtype="float32")
    for v in volumes:
        v.data[AIR] = np.nan
    config = Config(device="cpu", motion=MotionSettings(interpolation=interpolation))
    run = pipeline(config, dtype=np.float32)
    results = push_all(run, volumes)
    assert all(r.quality.usable for r in results)
    maps, quality = run.maps()["baseline"], run.quality_maps()
    assert maps.n_volumes == N
    assert all(np.isfinite(part).all() for part in (maps.mean, *quality.values()))
    brain = quality["mask"] > 0
    assert 0.2 < brain.mean() < 0.6
    assert np.median(quality["tsnr"][brain]) > 50
    for result in results:
        assert result.motion is not None
        assert deviation_mm(result.motion.affine @ pose(0), pose(result.index), GRID) < 0.1


def test_where_the_first_volume_has_no_number_nothing_is_made_up() -> None:
    volumes = good_run(dtype="float32")
    one_nan(volumes[0].data)
    run = pipeline(dtype=np.float32)
    push_all(run, volumes)
    truth = np.mean([v.data[MIDDLE] for v in volumes[1:]])
    mean = run.maps()["baseline"].mean[MIDDLE]
    # No map there, or the mean of what there was: never one with a zero in it.
    assert mean == 0 or mean == pytest.approx(truth, rel=0.02)


def test_holes_elsewhere_than_in_the_first_volume_are_seen() -> None:
    volumes = good_run(dtype="float32")
    for v in volumes:
        v.data[AIR] = np.nan
    volumes[12].data[AIR] = 0
    one_nan(volumes[12].data)
    results = push_all(pipeline(dtype=np.float32), volumes)
    assert "not finite" in results[12].quality.problems
    assert [r.index for r in results if not r.quality.usable] == [12]


# --- the start of a run

START_UP = (1.8, 1.2, 1.05)


def starting(n: int = N, factors: Sequence[float] = START_UP) -> list[Volume]:
    volumes = good_run(n)
    for i, factor in enumerate(factors):
        volumes[i] = volume(i, (factor * image(i)).astype(np.int16))
    return volumes


def test_volumes_before_the_steady_state_count_for_nothing(tmp_path: Path) -> None:
    volumes, n = starting(), len(START_UP)
    steady = pipeline(rois=REGION)
    push_all(steady, volumes[n:])
    out = tmp_path / "run.h5"
    with Session(MemoryReader(volumes), config=CONFIG, rois=REGION, out=out) as session:
        results = list(session)
    assert [r.index for r in results if r.begins] == [*range(n + 1)]
    assert session.pipeline is not None
    assert session.pipeline.n_start_up == session.counters.start_up == n
    assert session.counters.unusable == 0
    assert session.summary()["quality"]["usable"] == N - n
    assert results[-1].quality.n_usable == N - n
    assert same_maps(session.maps(), steady.maps())
    assert same(session.pipeline.quality_maps(), steady.quality_maps())
    with open_recording(out) as recording:
        assert recording.n_start_up == n
        assert recording.members()[:, 0].tolist() == [False] * n + [True] * (N - n)
        assert same_maps(recording.maps(), steady.maps())


def test_start_up_is_left_out_of_a_recovered_run_too(tmp_path: Path) -> None:
    settings = {"motion": MotionSettings(), "mask": MaskSettings()}
    run = recordings.record(tmp_path / "b.h5", starting(), events=(), broken=True, **settings)
    assert run.n_start_up == len(START_UP)
    assert recover(tmp_path / "b.h5", tmp_path / "mended.h5") == N
    for name in ("b.h5", "mended.h5"):
        with open_recording(tmp_path / name) as recording:
            assert recording.n_start_up == len(START_UP)
            assert same_maps(recording.maps(), run.maps())
            assert same(recording.quality_maps(), run.quality_maps())


def test_a_late_drop_is_no_start_up() -> None:
    n = MAX_START_UP + 2
    run = pipeline()
    results = push_all(run, starting(n + 4, [1.2] * n))
    assert [r.index for r in results if r.begins] == [0]
    assert run.n_start_up == 0
    assert not results[n].quality.usable


def test_the_signal_may_rise() -> None:
    run = pipeline()
    results = push_all(run, starting(N, [1 - 0.005 * i for i in range(6, 0, -1)]))
    assert [r.index for r in results if r.begins] == [0]
    assert all(r.quality.usable for r in results)


# --- monitoring


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, list[Result], Path]:
    path = tmp_path_factory.mktemp("monitored") / "run.h5"
    volumes = good_run()
    volumes[9] = volume(9, dark_slice(image(9)))
    config = Config(device="cpu", quality=QualitySettings(target_min=1.0))
    with Session(MemoryReader(volumes), config=config, out=path) as session:
        results = list(session)
    return session, results, path


def test_monitoring_needs_no_task(monitored: tuple[Session, list[Result], Path]) -> None:
    session, results, _ = monitored
    assert set(session.maps()) == {"baseline"}
    for result in results:
        quality = result.quality
        assert math.isnan(quality.dvars) == (result.index == 0)
        assert quality.global_signal > 500
        assert result.conditions == (() if result.index == 9 else ("baseline",))
    summary = json.loads(json.dumps(session.summary(), allow_nan=False))
    assert summary["contrasts"] == {}
    quality = summary["quality"]
    assert quality["usable"] == N - 1
    assert quality["usable_min"] == pytest.approx((N - 1) * TR_S / 60)
    assert quality["forecast_min"] == pytest.approx((1 - quality["usable_min"]) * N / (N - 1))
    motions = [r.motion.fd_mm for r in results if r.motion]
    assert quality["fd_mm"] == pytest.approx({"mean": np.mean(motions), "max": max(motions)})
    assert 20 < quality["tsnr_median"] < 250


def test_a_recording_holds_motion_and_quality(
    monitored: tuple[Session, list[Result], Path],
) -> None:
    session, results, path = monitored
    with open_recording(path) as recording:
        rows, problems = recording.results, recording.problems()
        assert same(recording.quality_maps(), session.pipeline.quality_maps())  # type: ignore[union-attr]
    for row, words, result in zip(rows, problems, results, strict=True):
        motion, quality = result.motion, result.quality
        assert motion is not None
        assert tuple(row[name] for name in MOTION) == motion.parameters
        for name in ("fd_mm", "fd_jenkinson_mm"):
            assert row[name] == getattr(motion, name)
        for name in ("dvars", "dvars_std", "global_signal", "usable_min", "usable"):
            assert np.array_equal(row[name], getattr(quality, name), equal_nan=True)
        assert row["n_slice_outliers"] == quality.n_slice_outliers
        assert row["begins"] == result.begins
        assert words == quality.problems
    assert problems[9]


def test_report_and_export_of_a_monitored_run(
    monitored: tuple[Session, list[Result], Path], tmp_path: Path
) -> None:
    _, results, path = monitored
    page = write_report(path, tmp_path / "report")
    assert {"quality.png", "tsnr.png"} <= {file.name for file in page.parent.iterdir()}
    assert "drop-out" in page.read_text(encoding="utf-8")
    files = {file.name: file for file in export_bids(path, tmp_path / "bids")}
    table = files["sub-01_task-rest_desc-confounds_timeseries.tsv"]
    header, *rows = (line.split("\t") for line in table.read_text().splitlines())
    axes = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    names = [*axes, "framewise_displacement", "rmsd", "dvars", "std_dvars", "global_signal"]
    assert set(names) <= set(header)
    assert rows[0][header.index("dvars")] == "n/a"
    for row, result in zip(rows, results, strict=True):
        motion = result.motion
        assert motion is not None
        wanted = [*motion.translation_mm, *np.radians(motion.rotation_deg), motion.fd_mm]
        got = [float(row[header.index(name)]) for name in names[:7]]
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


# --- motion is put right

FINE = a_grid()
N_FINE = 12


def fine_pose(index: int) -> NDArray[np.float64]:
    turn = 2 * math.pi * index / N_FINE
    a, b = math.sin(turn), math.sin(2 * turn)
    return rigid(FINE, [0.7 * a, b, -a], [a, -0.7 * b, b])


@functools.cache
def fine_run() -> tuple[Volume, ...]:
    return tuple(
        volume(i, epi(FINE, fine_pose(i), noise_sd=2, seed=i), FINE) for i in range(N_FINE)
    )


@functools.cache
def run_fine(
    mode: str = "correct", interpolation: Interpolation = "catmull-rom"
) -> tuple[Pipeline, list[Result]]:
    config = Config(
        device="cpu",
        motion=MotionSettings(mode=mode, interpolation=interpolation),
        quality=QualitySettings(fd_limit_mm=50),
    )
    run = pipeline(config, FINE)
    return run, push_all(run, fine_run())


def median_sd(run: Pipeline) -> float:
    """Temporal standard deviation, the median over the brain."""
    maps = run.quality_maps()
    brain = maps["mask"] > 0
    assert maps["tsnr"][brain].all()
    return float(np.median(run.maps()["baseline"].mean[brain] / maps["tsnr"][brain]))


@pytest.mark.parametrize("interpolation", ["trilinear", "catmull-rom", "bspline"])
def test_a_corrected_head_stands_still(interpolation: Interpolation) -> None:
    run, results = run_fine(interpolation=interpolation)
    still, _ = run_fine(mode="off")
    assert all(r.quality.usable for r in results)
    for result in results:
        assert result.motion is not None
        found = result.motion.affine @ fine_pose(0)
        assert deviation_mm(found, fine_pose(result.index), FINE) < 0.02
    assert median_sd(run) < median_sd(still) / 3
    maps = run.maps()["baseline"]
    assert np.isfinite(maps.mean).all()
    assert maps.n_volumes == N_FINE


def test_interpolations_differ() -> None:
    means = [
        run_fine(interpolation=name)[0].maps()["baseline"].mean
        for name in ("trilinear", "catmull-rom", "bspline")
    ]
    assert not any(np.array_equal(means[i], means[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_register_only_looks_and_touches_nothing() -> None:
    _, corrected = run_fine()
    run, results = run_fine(mode="register_only")
    off, without = run_fine(mode="off")
    for one, other, none in zip(results, corrected, without, strict=True):
        assert none.motion is None
        for name in (field.name for field in fields(one.motion)):  # type: ignore[arg-type]
            assert np.array_equal(getattr(one.motion, name), getattr(other.motion, name)), name
    assert [r.quality for r in results[1:]] == [r.quality for r in without[1:]]
    assert same_maps(run.maps(), off.maps())
    assert same(run.quality_maps(), off.quality_maps())


def test_a_simulated_run_whose_head_moves() -> None:
    scanner = Scanner(n_volumes=24, shape=(32, 32, 18), motion=True, spikes=True, seed=13)
    paradigm, truth = Paradigm(scanner.events), scanner.truth
    run = pipeline(grid=scanner.grid, paradigm=paradigm)
    results = [
        run.push(volume(i, scanner.volume(i), scanner.grid)) for i in range(scanner.n_volumes)
    ]
    places = [rigid(scanner.grid, row[:3], row[3:]) for row in truth.motion]
    at_first = places[0]
    spiked = (truth.spikes & truth.brain.any((0, 1))).any(1)
    assert spiked.sum() == 2
    for result, place, is_spiked in zip(results, places, spiked, strict=True):
        assert result.motion is not None
        at_first = place if result.begins else at_first
        if is_spiked:
            assert "slice" in result.quality.problems
            assert result.conditions == ()
        else:
            # Voxels are 6.5 mm, and the simulator's own interpolation counts too.
            assert deviation_mm(result.motion.affine @ at_first, place, scanner.grid) < 0.2


# --- what is given


def test_poses_are_relative_to_the_reference_that_is_given() -> None:
    rest = epi(GRID, noise_sd=0, scale=2.0).reshape(GRID.shape, order="F").astype(np.float32)
    run = pipeline(reference=rest)
    shift = rigid(GRID, [1.0, -1.5, 0.5], [1.0, 0.5, -0.5])
    for i in range(4):
        at = pose(i) @ shift
        result = run.push(volume(i, epi(GRID, at, noise_sd=5, seed=i)))
        assert result.motion is not None
        assert deviation_mm(result.motion.affine, at, GRID) < 0.05
        assert result.motion.scale == pytest.approx(0.5, rel=0.01)
        assert result.quality.usable
    # The map is where the head is in the reference, not in the first volume.
    mean, brain = run.maps()["baseline"].mean, run.quality_maps()["mask"] > 0
    here = np.corrcoef(mean[brain], rest[brain])[0, 1]
    there = np.corrcoef(epi(GRID, shift).reshape(GRID.shape, order="F")[brain], rest[brain])[0, 1]
    assert here > 0.98 > there


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        ({"mask": {"source": "brain.nii"}}, {}, "mask must be given as an array"),
        ({"motion": {"reference": "sb.nii"}}, {}, "reference must be given as an array"),
        ({}, {"mask": np.ones((3, 3, 3), bool)}, r"mask must have the run's shape \(28, 34, 22\)"),
        ({}, {"reference": np.ones((3, 3, 3))}, r"reference must have the run's shape"),
        ({}, {"mask": np.zeros(GRID.shape, bool)}, "mask must have at least one voxel"),
    ],
)
def test_images_that_do_not_fit_start_no_run(
    config: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline(Config(device="cpu", **config), **given)


@pytest.mark.parametrize(("dtype", "order"), [(np.float64, "C"), (np.int32, "F")])
def test_a_reference_may_be_of_any_type(dtype: Any, order: Any) -> None:
    backend = open_cuda_on_cpu("forward")  # whose kernels know three types of voxels
    rest = epi(SMALL, noise_sd=0).reshape(SMALL.shape, order="F")
    results = []
    for reference in (rest, rest.astype(dtype, order=order)):
        run = pipeline(grid=SMALL, reference=reference, mask=rest > 500, backend=backend)
        results.append(run.push(volume(0, epi(SMALL, noise_sd=5), SMALL)))
    assert repr(results[0].motion) == repr(results[1].motion)


@pytest.mark.parametrize("spoil", [zeros, all_nan])
def test_a_reference_without_contrast_is_refused(spoil: Callable[[Image], Image]) -> None:
    reference = spoil(image(0, "float32"))
    with pytest.raises((ConfigError, VolumeError), match="reference"):
        pipeline(reference=reference).push(volume(0))


def save(path: Path, data: Image, affine: NDArray[np.float64]) -> Path:
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


def ball(grid: Grid) -> NDArray[np.bool_]:
    """Voxels less than 50 mm from the middle of GRID."""
    middle = GRID.affine[:3] @ np.append((np.array(GRID.shape) - 1) / 2, 1)
    places = np.einsum("ab,bxyz->axyz", grid.affine[:3, :3], np.indices(grid.shape))
    distance = places + (grid.affine[:3, 3] - middle)[:, None, None, None]
    return np.asarray((distance**2).sum(0) < 50**2)


def flipped(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, 0] * (grid.shape[0] - 1)
    affine[:3, 0] *= -1
    return Grid(grid.shape, affine)


OTHERS = {"same": GRID, "flipped": flipped(GRID), "finer": a_grid((52, 60, 40), (3.1, 3.2, 3.3))}


@pytest.mark.parametrize("where", OTHERS)
def test_a_mask_file_on_whatever_grid(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = OTHERS[where]
    path = save(tmp_path / "brain.nii.gz", ball(grid).astype(np.uint8), grid.affine)
    config = Config(device="cpu", mask=MaskSettings(source=path))
    out = tmp_path / "run.h5"
    with Session(MemoryReader(good_run(4)), config=config, out=out) as session:
        list(session)
    path.unlink()
    with open_recording(out) as recording:
        mask = recording.quality_maps()["mask"] > 0
        again = recording.pipeline()
        push_all(again, recording.volumes())
    # Nearest neighbours put the edge within half a voxel of where it is.
    assert np.count_nonzero(mask ^ ball(GRID)) <= (0.1 if where == "finer" else 0) * mask.sum()
    assert ("resampled" in caplog.text) == (where == "finer")
    assert same_maps(session.maps(), again.maps())


@pytest.mark.parametrize("where", OTHERS)
def test_a_reference_file_on_whatever_grid(tmp_path: Path, where: str) -> None:
    grid = OTHERS[where]
    data = epi(grid, noise_sd=0, dtype=np.float32).reshape(grid.shape, order="F")
    path = save(tmp_path / "sbref.nii", data, grid.affine)
    config = Config(device="cpu", motion=MotionSettings(reference=path))
    out = tmp_path / "run.h5"
    with Session(MemoryReader(good_run(4)), config=config, out=out) as session:
        results = list(session)
    for result in results:
        assert result.motion is not None
        # Linear interpolation of the reference blurs it, but moves it nowhere.
        limit_mm = 0.15 if where == "finer" else 0.05
        assert deviation_mm(result.motion.affine, pose(result.index), GRID) < limit_mm
    path.unlink()
    with open_recording(out) as recording:
        again = recording.pipeline()
        replayed = push_all(again, recording.volumes())
    assert [r.motion.parameters for r in replayed if r.motion] == [
        r.motion.parameters for r in results if r.motion
    ]


@pytest.mark.parametrize("setting", ["mask", "motion"])
def test_a_file_that_is_not_there_starts_no_run(tmp_path: Path, setting: str) -> None:
    name = "source" if setting == "mask" else "reference"
    config = Config(device="cpu", **{setting: {name: tmp_path / "none.nii"}})
    out = tmp_path / "run.h5"
    with pytest.raises(ConfigError, match=rf"{setting}\.{name} must be a file.*none\.nii"):
        Session(MemoryReader(good_run(1)), config=config, out=out)
    assert not out.exists()


def test_a_region_outside_the_mask_is_brain_too() -> None:
    corner = np.zeros(GRID.shape)
    corner[:2, :2, 0] = [[1, 2], [3, 4]]
    run = pipeline(REGISTER_ONLY, rois={"corner": corner, **REGION})
    volumes = good_run(6)
    results = push_all(run, volumes)
    mask = run.quality_maps()["mask"]
    without = pipeline(REGISTER_ONLY)
    push_all(without, volumes)
    expected = without.quality_maps()["mask"]
    assert not expected[corner > 0].any()
    assert np.array_equal(mask, np.maximum(expected, corner > 0))
    for weights, name in ((corner, "corner"), (REGION["region"], "region")):
        for v, result in zip(volumes, results, strict=True):
            signal = (v.data * weights).sum() / weights.sum()
            # Weights are float32, added up in float64.
            assert result.roi[name].signal == pytest.approx(signal, rel=2 * U)


# --- smoothing


def still(**settings: Any) -> Config:
    return memory.plain(**settings)


MASK = ball(GRID)
FWHM_MM = 12.0


def test_smoothing_within_the_mask_lets_nothing_in() -> None:
    rng = np.random.default_rng(0)
    data = rng.uniform(0, 5000, GRID.shape[::-1]).T.astype(np.float32)
    data[MASK] = 1000
    smoothing = SmoothingSettings(fwhm_mm=FWHM_MM, within_mask=True)
    run = pipeline(still(smoothing=smoothing), mask=MASK, dtype=np.float32)
    push_all(run, [volume(i, data) for i in range(2)])
    mean = run.maps()["baseline"].mean
    # Three filters of n taps each, rounded at every step: (n + 1) U each, for the volume and for
    # the scale.
    n_taps = 2 * math.ceil(4 * FWHM_MM / math.sqrt(8 * math.log(2)) / 5.6) + 1
    np.testing.assert_allclose(mean[MASK], 1000, rtol=2 * 3 * (n_taps + 1) * U)
    assert not mean[~MASK].any()
    plain = pipeline(still(smoothing=SmoothingSettings(fwhm_mm=FWHM_MM)), mask=MASK, dtype="f4")
    push_all(plain, [volume(i, data) for i in range(2)])
    assert abs(plain.maps()["baseline"].mean[MASK] - 1000).max() > 200


@pytest.mark.parametrize("config", [{}, {"motion": MotionSettings()}], ids=["off", "correct"])
def test_smoothing_in_a_box_is_smoothing_of_all(config: dict[str, Any]) -> None:
    smoothing = SmoothingSettings(fwhm_mm=FWHM_MM)
    whole = pipeline(still(smoothing=smoothing, **config))
    boxed = pipeline(still(smoothing=smoothing, **config), mask=MASK)
    volumes = good_run(5)
    push_all(whole, volumes)
    push_all(boxed, volumes)
    mean = boxed.maps()["baseline"].mean
    assert np.array_equal(mean[MASK], whole.maps()["baseline"].mean[MASK])
    assert not mean[~MASK].any()
    if not config:
        sigma = FWHM_MM / math.sqrt(8 * math.log(2)) / np.array(GRID.voxel_size_mm)
        smoothed = np.mean([gaussian_filter(v.data.astype(float), sigma) for v in volumes], 0)
        np.testing.assert_allclose(mean[MASK], smoothed[MASK], rtol=1e-5)


# --- slice timing

TIMES_S = tuple(TR_S * ((7 * z) % 22) / 22 for z in range(22))
LINEAR = SliceTimingSettings(method="linear")


def timed_run(n: int, dtype: str = "int16") -> list[Volume]:
    return [volume(i, image(i, dtype), slice_times_s=TIMES_S) for i in range(n)]


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_slices_are_brought_to_the_start_of_their_volume(dtype: str) -> None:
    volumes = timed_run(6, dtype)
    run = pipeline(still(slice_timing=LINEAR), dtype=dtype)
    off = pipeline(still(), dtype=dtype)
    push_all(run, volumes)
    push_all(off, volumes)
    series = np.stack([v.data for v in volumes]).astype(np.float64)
    back = np.array(TIMES_S) / TR_S
    retimed = np.concatenate([series[:1], series[1:] * (1 - back) + series[:-1] * back])
    # The newest volume against the baseline before it says what it was, and what they were.
    difference = run.subtraction()["difference"]
    np.testing.assert_allclose(difference, retimed[-1] - retimed[:-1].mean(0), atol=20 * 2000 * U)
    assert abs(off.subtraction()["difference"] - difference).max() > 1
    np.testing.assert_allclose(run.maps()["baseline"].mean, retimed.mean(0), rtol=1e-6, atol=1e-4)


def test_slice_timing_without_slice_times_starts_no_run() -> None:
    config = Config(device="cpu", slice_timing=LINEAR)
    with pytest.raises(ConfigError, match="slices' acquisition times"):
        pipeline(config).push(volume(0))
    with (
        pytest.raises(ConfigError, match="slices' acquisition times"),
        Session(MemoryReader(good_run(2)), config=config) as session,
    ):
        list(session)


@pytest.mark.parametrize("method", ["linear", "cubic"])
@pytest.mark.parametrize("spoil", [zeros, one_nan, all_nan, saturated, noise, dark_slice])
def test_slice_timing_brings_nothing_bad_into_the_next_volume(
    spoil: Callable[[Image], Image], method: Any
) -> None:
    config = Config(device="cpu", slice_timing=SliceTimingSettings(method=method))
    volumes = timed_run(N, "float32")
    clean = pipeline(config, mask=BRAIN, dtype=np.float32)
    push_all(clean, volumes)
    volumes[12] = volume(12, spoil(image(12, "float32")), slice_times_s=TIMES_S)
    run = pipeline(config, mask=BRAIN, dtype=np.float32)
    results = push_all(run, volumes)
    assert not results[12].quality.usable
    assert results[-1].quality.usable
    ours, theirs = run.maps()["baseline"].mean, clean.maps()["baseline"].mean
    assert np.isfinite(ours).all()
    brain = theirs > 500
    # One volume less of noise 5 changes a mean of 16 by less than 5; a bad one by 30 and more.
    assert abs(ours - theirs)[brain].max() < 5


# --- replay, other machines, small grids


def test_a_replay_gives_the_same_bits(tmp_path: Path) -> None:
    events, out = [Event(6, 10, "tap")], tmp_path / "run.h5"
    volumes = starting()
    volumes[13] = volume(13, noise(image(13)))
    arguments: dict[str, Any] = {"events": events, "rois": REGION, "config": CONFIG}
    with Session(MemoryReader(volumes), out=out, **arguments) as session:
        results = list(session)
    assert session.maps()["tap"].n_volumes >= 2
    with open_recording(out) as recording:
        again = recording.pipeline()
        replayed = push_all(again, recording.volumes())
        rows = recording.results
    assert same_maps(session.maps(), again.maps())
    assert session.pipeline is not None
    assert same(session.pipeline.quality_maps(), again.quality_maps())
    for row, one, other in zip(rows, results, replayed, strict=True):
        assert one.motion is not None
        assert other.motion is not None
        assert other.motion.parameters == one.motion.parameters
        assert other.motion.parameters == tuple(row[name] for name in MOTION)
        assert repr(other.quality) == repr(one.quality)  # nan is as good as nan
        assert repr(other.roi) == repr(one.roi)
        assert (other.begins, other.conditions) == (one.begins, one.conditions)
    with Session(str(out), **arguments) as session_again:
        list(session_again)
    assert same_maps(session_again.maps(), session.maps())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "motion": MotionSettings(interpolation="bspline"),
            "slice_timing": SliceTimingSettings(method="cubic"),
            "smoothing": SmoothingSettings(fwhm_mm=10.0, within_mask=True),
        },
    ],
    ids=["default", "everything"],
)
def test_cuda_gives_the_bits_of_the_cpu(settings: dict[str, Any]) -> None:
    times_s = tuple(TR_S * z / 12 for z in range(12))
    poses = [rigid(SMALL, [0.1 * i, -0.1 * i, 0.1], [0.1 * i, 0, 0.1]) for i in range(4)]
    images = [epi(SMALL, p, noise_sd=5, seed=i, dtype="f4") for i, p in enumerate(poses)]
    images[2] = one_nan_in(images[2])
    weights = np.zeros(SMALL.shape)
    weights[6:10, 8:12, 4:7] = 1
    made = []
    for backend in (cpu(), open_cuda_on_cpu("shuffled")):
        run = Pipeline(
            SMALL,
            Config(**settings),
            paradigm=Paradigm([Event(0, 3, "tap")]),
            rois={"region": weights},
            dtype=np.float32,
            backend=backend,
        )
        results = [
            run.push(volume(i, data, SMALL, slice_times_s=times_s))
            for i, data in enumerate(images)
        ]
        made.append((run, results))
    (ours, results), (theirs, others) = made
    assert (ours.device, theirs.device) == ("cpu", "cuda")
    assert same_maps(ours.maps(), theirs.maps())
    assert same(ours.quality_maps(), theirs.quality_maps())
    assert same(ours.subtraction(), theirs.subtraction())
    assert [r.index for r in results if not r.quality.usable] == [2]
    for one, other in zip(results, others, strict=True):
        assert repr(one.motion) == repr(other.motion)
        assert repr(one.quality) == repr(other.quality)
        a, b = one.roi["region"], other.roi["region"]
        assert a.signal == pytest.approx(b.signal, rel=1e-11, nan_ok=True)


def one_nan_in(flat: Image) -> Image:
    flat = flat.copy()
    flat[np.ravel_multi_index((8, 10, 6), SMALL.shape, order="F")] = np.nan
    return flat


def test_a_grid_too_small_for_motion_works_without(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(device="cpu", mask=MaskSettings(source="none"))
    run = pipeline(config, memory.GRID)
    assert "motion is not looked at: 9x8x7 voxels" in caplog.text
    volumes = memory.volumes(6)
    results = push_all(run, volumes)
    assert all(r.motion is None and r.quality.usable for r in results)
    mean = np.mean([v.data for v in volumes], 0)
    np.testing.assert_allclose(run.maps()["baseline"].mean, mean, rtol=1e-6)


def test_a_grid_that_is_large_enough_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline()
    assert not caplog.records

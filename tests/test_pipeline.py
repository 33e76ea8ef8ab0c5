"""The per-TR path against float64, for every kind of baseline."""

import gc
import importlib
import math
import os
import pkgutil
import subprocess
import sys
import weakref
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import rtfmri.backends.cpu as cpu
from memory import ACTIVE, EVENTS, GRID, TR_S, plain, volumes
from rtfmri.config import BaselineKind, BaselineSettings, Config, MaskSettings, SmoothingSettings
from rtfmri.errors import ConfigError, DeviceError, VolumeError
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline
from rtfmri.volume import Grid, Volume

N = 60
WINDOW = 6
PARADIGM = Paradigm(EVENTS)
MEMBERS = [PARADIGM.members(i * TR_S, TR_S) for i in range(N)]


def reference_moments(
    rows: np.ndarray, kind: BaselineKind
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, sample variance and effective number of volumes, straight from the weights."""
    n = len(rows)
    if kind == "sliding":
        weights = np.r_[np.zeros(max(0, n - WINDOW)), np.ones(min(n, WINDOW))]
    elif kind == "fixed":
        weights = np.r_[np.ones(min(n, WINDOW)), np.zeros(max(0, n - WINDOW))]
    elif kind == "exponential":
        # Each new volume takes the share max(1/n, 2/(window+1)); the older ones keep the rest.
        weights = np.zeros(0)
        for i in range(1, n + 1):
            share = max(1 / i, 2 / (WINDOW + 1))
            weights = np.r_[weights * (1 - share), share]
    else:
        weights = np.ones(n)
    weights /= weights.sum()
    mean = np.tensordot(weights, rows, 1)
    n_effective = 1 / (weights**2).sum()
    variance = np.tensordot(weights, (rows - mean) ** 2, 1) * n_effective / (n_effective - 1)
    return mean, variance, n_effective


def run(kind: BaselineKind, dtype: type = np.int16) -> tuple[Pipeline, np.ndarray]:
    made = volumes(N, dtype=dtype)
    settings = BaselineSettings(kind=kind, window_volumes=WINDOW)
    pipeline = Pipeline(GRID, plain(baseline=settings), paradigm=PARADIGM, dtype=dtype)
    for volume in made:
        pipeline.push(volume)
    return pipeline, np.stack([v.data for v in made]).astype(np.float64)


# float32 means near 1000 carry an error of some ulps (6e-5 each); divided by a standard error of
# about 1 that is below 1e-3 in t, and by an sd of 5 below 1e-3 in z.
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
@pytest.mark.parametrize("kind", ["cumulative", "exponential", "sliding", "fixed"])
def test_maps_equal_the_two_pass_formulas(kind: BaselineKind, dtype: type) -> None:
    pipeline, series = run(kind, dtype)
    rows = [i for i, m in enumerate(MEMBERS) if m == (0,)]
    assert len(rows) > 2 * WINDOW
    mean, variance, n = reference_moments(series[rows], kind)
    active = series[[i for i, m in enumerate(MEMBERS) if m == (1,)]]
    effect = active.mean(0) - mean
    t = effect / np.sqrt(active.var(0, ddof=1) / len(active) + variance / n)
    maps = pipeline.maps()
    assert maps["tap"].n_volumes == len(active)
    assert maps["baseline"].n_volumes == len(rows) if kind != "fixed" else WINDOW
    np.testing.assert_allclose(maps["baseline"].mean, mean, rtol=1e-6)
    np.testing.assert_allclose(maps["tap"].effect, effect, atol=1e-3)
    np.testing.assert_allclose(maps["tap"].psc, 100 * effect / mean, atol=1e-4)
    np.testing.assert_allclose(maps["tap"].t, t, atol=1e-3)
    assert not maps["baseline"].t.any()


@pytest.mark.parametrize("kind", ["cumulative", "exponential", "sliding", "fixed"])
def test_each_volume_is_compared_with_the_baseline_before_it(kind: BaselineKind) -> None:
    pipeline, series = run(kind)
    rows = [i for i, m in enumerate(MEMBERS[:-1]) if m == (0,)]
    mean, variance, _ = reference_moments(series[rows], kind)
    got = pipeline.subtraction()
    difference = series[-1] - mean
    np.testing.assert_allclose(got["difference"], difference, atol=1e-3)
    np.testing.assert_allclose(got["psc"], 100 * difference / mean, atol=1e-4)
    np.testing.assert_allclose(got["z"], difference / np.sqrt(variance), atol=1e-3)


def test_smoothing_comes_before_everything_else() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    config = plain(smoothing=SmoothingSettings(fwhm_mm=6.0))
    weights = np.zeros(GRID.shape)
    weights[4, 4, 3] = 1
    pipeline = Pipeline(GRID, config, paradigm=PARADIGM, rois={"voxel": weights})
    sigma = 6.0 / np.sqrt(8 * np.log(2)) / np.array(GRID.voxel_size_mm)
    series = []
    for volume in volumes(N):
        series.append(ndimage.gaussian_filter(volume.data.astype(np.float64), sigma))
        result = pipeline.push(volume)
        assert result.roi["voxel"].signal == pytest.approx(series[-1][4, 4, 3], rel=1e-5)
        assert result.stage_ms["smooth"] > 0
    active, rest = (
        np.stack([s for s, m in zip(series, MEMBERS, strict=True) if m == (c,)]) for c in (1, 0)
    )
    error = np.sqrt(active.var(0, ddof=1) / len(active) + rest.var(0, ddof=1) / len(rest))
    t = (active.mean(0) - rest.mean(0)) / error
    # Errors of 3e-4 in each volume average out in the means; the standard error is about 0.3.
    np.testing.assert_allclose(pipeline.maps()["tap"].t, t, rtol=2e-3, atol=2e-3)


def test_the_active_region_is_found_and_nothing_else() -> None:
    t = run("cumulative")[0].maps()["tap"].t
    elsewhere = np.ones(GRID.shape, bool)
    elsewhere[ACTIVE] = False
    # 3 % of 1000 at sd 5 is t > 15; 500 null voxels stay below 6 (p = 1e-6 at 20 degrees).
    assert t[ACTIVE].min() > 12
    assert abs(t[elsewhere]).max() < 6


def test_roi_values_are_those_of_the_mean_signal() -> None:
    weights = np.zeros(GRID.shape)
    weights[ACTIVE] = np.random.default_rng(1).random(weights[ACTIVE].shape) + 0.5
    made = volumes(N)
    signal = np.array([(v.data * weights).sum() / weights.sum() for v in made])
    pipeline = Pipeline(GRID, plain(), paradigm=PARADIGM, rois={"motor": weights})
    for i, volume in enumerate(made):
        value = pipeline.push(volume).roi["motor"]
        before = signal[[j for j in range(i) if MEMBERS[j] == (0,)]]
        assert value.signal == pytest.approx(signal[i], rel=1e-6)
        if len(before) < 2:
            assert math.isnan(value.psc)
            assert math.isnan(value.z)
            continue
        assert value.psc == pytest.approx(100 * (signal[i] / before.mean() - 1), abs=1e-4)
        assert value.z == pytest.approx((signal[i] - before.mean()) / before.std(ddof=1), rel=1e-2)
    active = signal[[i for i, m in enumerate(MEMBERS) if m == (1,)]]
    rest = signal[[i for i, m in enumerate(MEMBERS) if m == (0,)]]
    error = np.sqrt(active.var(ddof=1) / len(active) + rest.var(ddof=1) / len(rest))
    t = (active.mean() - rest.mean()) / error
    assert pipeline.roi_t()["tap"]["motor"] == pytest.approx(t, rel=1e-3)


def test_overlapping_conditions_both_count() -> None:
    paradigm = Paradigm([Event(20, 40, "see"), Event(40, 40, "hear")])
    pipeline = Pipeline(GRID, plain(), paradigm=paradigm)
    results = [pipeline.push(v) for v in volumes(60)]
    assert any(r.conditions == ("hear", "see") for r in results)
    for name in ("see", "hear", "baseline"):
        rows = [v.data for v, r in zip(volumes(60), results, strict=True) if name in r.conditions]
        maps = pipeline.maps()[name]
        assert maps.n_volumes == len(rows)
        np.testing.assert_allclose(maps.mean, np.mean(rows, 0), rtol=1e-6)


def test_results_say_what_happened() -> None:
    pipeline = Pipeline(GRID, plain(deadline_s=1e-9), paradigm=PARADIGM)
    results = []
    for volume in volumes(15):
        results.append(pipeline.push(volume))
        shown = [image.any() for image in pipeline.subtraction().values()]
        assert shown == [results[-1].baseline_ready] * 3
    assert [r.index for r in results] == list(range(15))
    assert [r.baseline_ready for r in results[:4]] == [False, False, True, True]
    assert results[14].conditions == ("tap",)
    assert results[12].conditions == ()
    assert all(r.deadline_missed for r in results)
    assert all(ms >= 0 for r in results for ms in r.stage_ms.values())
    assert sum(results[0].stage_ms.values()) == pytest.approx(results[0].latency_ms)


def test_a_volume_of_another_kind_is_refused_and_leaves_no_trace() -> None:
    pipeline = Pipeline(GRID, plain(), paradigm=PARADIGM)
    good = volumes(5)
    for volume in good[:4]:
        pipeline.push(volume)
    before = pipeline.maps()["baseline"].mean.copy()
    smaller = Grid((9, 8, 6), GRID.affine)
    with pytest.raises(VolumeError, match="another shape or position"):
        pipeline.push(volumes(1, grid=smaller)[0])
    with pytest.raises(VolumeError, match="another voxel type"):
        pipeline.push(volumes(1, dtype=np.float32)[0])
    assert np.array_equal(pipeline.maps()["baseline"].mean, before)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.zeros(GRID.shape), "at least one voxel"),
        (np.full(GRID.shape, -1.0), "0 or more"),
        (np.full(GRID.shape, np.nan), "finite"),
        (np.ones((3, 3, 3)), r"\(9, 8, 7\), got \(3, 3, 3\)"),
    ],
)
def test_a_bad_region_starts_no_run(weights: np.ndarray, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Pipeline(GRID, plain(), rois={"bad": weights})


def test_cuda_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtfmri.backends.gpu_problem", lambda: "there is no GPU here")
    with pytest.raises(DeviceError, match="there is no GPU here"):
        Pipeline(GRID, Config(device="cuda"))
    assert Pipeline(GRID, Config(device="auto")).device == "cpu"


def test_more_threads_than_there_are_is_refused() -> None:
    with pytest.raises(DeviceError, match="threads must be at most"):
        Pipeline(GRID, plain(threads=1 + numba.config.NUMBA_NUM_THREADS))


def test_a_volume_made_by_hand_needs_no_clocks() -> None:
    volume = Volume(volumes(1)[0].data, GRID, 0, 2.0)
    assert Pipeline(GRID, plain()).push(volume).latency_ms < 60_000


def test_no_two_kernels_share_a_place_in_numbas_cache() -> None:
    # It is keyed on the name alone: a serial twin of a parallel kernel would be loaded for it.
    found: dict[str, Dispatcher] = {}
    for module in pkgutil.iter_modules(cpu.__path__):
        for kernel in vars(importlib.import_module(f"{cpu.__name__}.{module.name}")).values():
            if isinstance(kernel, Dispatcher):
                name = f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}"
                assert found.setdefault(name, kernel) is kernel, name
    assert len(found) > 20


FRESH = """
import importlib, pkgutil
import numpy as np
from numba.core.dispatcher import Dispatcher
import rtfmri.backends.cpu as cpu
from epi import a_grid, epi
from rtfmri.config import Config
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline
from rtfmri.volume import Volume

def compiled():
    names = [f"{cpu.__name__}.{m.name}" for m in pkgutil.iter_modules(cpu.__path__)]
    modules = [importlib.import_module(name) for name in names]
    kernels = {k for m in modules for k in vars(m).values() if isinstance(k, Dispatcher)}
    return {(k.py_func.__qualname__, s) for k in kernels for s in k.signatures}

grid, dtype = a_grid((24, 24, 16)), np.dtype("DTYPE")
config = Config(device="cpu", CONFIG)
given = dict(rois={"all": np.ones(grid.shape)}, paradigm=Paradigm([Event(2, 4, "tap")]))
pipeline = Pipeline(grid, config, n_volumes=30, dtype=dtype, **given)
before = compiled()
data = epi(grid).astype(dtype).reshape(grid.shape, order="F")
for i in range(30 if config.glm.noise == "ar1" else 3):
    pipeline.push(Volume(data, grid, i, 2.0, slice_times_s=(0.5,) * 16))
print(compiled() - before)
"""


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("int16", ""),
        (
            "uint16",
            (
                "smoothing={'fwhm_mm': 6.0, 'within_mask': True}, baseline={'kind': 'sliding'}, "
                "detrend={'method': 'exponential'}, roi={'filter': 'kalman'}"
            ),
        ),
        (
            "float32",
            (
                "motion={'interpolation': 'trilinear'}, slice_timing={'method': 'cubic'}, "
                "glm={'noise': 'ar1', 'ar1_warm_up_volumes': 24}, detrend={'method': 'cosine'}"
            ),
        ),
    ],
)
def test_no_volume_waits_for_a_compiler(dtype: str, config: str) -> None:
    pytest.importorskip("nilearn")
    script = FRESH.replace("DTYPE", dtype).replace("CONFIG", config)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "set()", done.stderr


def test_a_pipeline_that_nobody_holds_is_gone_at_once():
    grid = Grid((12, 12, 8), np.diag([4.0, 4.0, 4.0, 1.0]))
    pipeline = Pipeline(grid, Config(device="cpu", mask=MaskSettings(source="none")))
    rng = np.random.default_rng(0)
    for i in range(3):
        data = np.asfortranarray(rng.integers(500, 1500, grid.shape, np.int16))
        pipeline.push(Volume(data, grid, i, 1.0))
    gone = weakref.ref(pipeline)
    gc.disable()
    try:
        del pipeline
        assert gone() is None
    finally:
        gc.enable()

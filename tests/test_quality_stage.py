"""Quality of volumes and of a run: which volumes are found bad, and that good ones are not."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from dicom_files import real_data
from rtfmri.backends import POSE_FIELDS, Backend, open_backend
from rtfmri.config import QualitySettings
from rtfmri.readers import open_reader
from rtfmri.simulator.scanner import Scanner
from rtfmri.stages.quality import PROBLEMS, QualityStage, QualityValue, report_parts
from rtfmri.volume import Volume

SHAPE = (16, 16, 6)
TR_S = 2.0
GOOD_POSE = {"quaternion_w": 1.0, "scale": 1.0, "inside": 1.0, "residual": 0.1, "converged": 1.0}
few_backends = pytest.mark.parametrize(
    "backend", ["cpu", CUDA_BACKENDS[0], CUDA_BACKENDS[-1]], indirect=True
)


class Monitor:
    """A pipeline of nothing but the quality stage: the brain is where the mask is."""

    def __init__(
        self,
        backend: Backend,
        mask: NDArray[np.bool_],
        *,
        has_motion: bool = True,
        settings: QualitySettings | None = None,
    ) -> None:
        parts = report_parts(mask.shape[2], has_motion)
        self.backend, self.mask, self.has_motion, self.parts = backend, mask, has_motion, parts
        self.report = backend.zeros(parts.slices.stop + 3, np.float64)  # others' numbers behind
        self.stage = QualityStage(
            backend,
            mask.shape,
            int(mask.sum()),
            settings or QualitySettings(),
            TR_S,
            report=self.report,
            has_motion=has_motion,
        )

    def push(self, volume: NDArray[Any], **pose: float) -> QualityValue:
        limits = self.backend.copy(self.stage.limits)
        if self.has_motion:
            fields = [(GOOD_POSE | pose).get(name, 0.0) for name in POSE_FIELDS]
            self.report[self.parts.pose] = self.backend.copy(np.array(fields))
        self.stage.inspect(self.backend.upload(volume.reshape(-1, order="F")))
        self.stage.push(self.backend.copy(volume[self.mask].astype(np.float32)), limits)
        value = self.stage.result(self.backend.download(self.report))
        # The backend judged for itself, before the host had seen anything.
        assert self.backend.download(self.stage.usable).tolist() == [value.usable]
        assert value.usable == (value.problems == ())
        return value


def a_head(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float64]:
    """An ellipsoid with structure, 0 outside."""
    places = np.indices(shape, np.float64) + 0.5
    radii = [2 * np.abs(p / n - 0.5) for p, n in zip(places, shape, strict=True)]
    inside = sum(r**2 for r in radii) < 0.9
    return np.where(inside, 1000 + 200 * np.sin(places.sum(0)), 0)


HEAD = a_head()
MASK = HEAD > 0


def noisy(image: NDArray[Any], seed: int, sd: float = 10, dtype: str = "int16") -> NDArray[Any]:
    noise = np.random.default_rng(seed).normal(0, sd, image.shape)
    return np.rint(np.abs(image + noise)).astype(dtype, order="F")


def a_run(n_volumes: int, dtype: str = "int16") -> list[NDArray[Any]]:
    return [noisy(HEAD, seed, dtype=dtype) for seed in range(n_volumes)]


def push_all(monitor: Monitor, volumes: Iterable[NDArray[Any]]) -> list[QualityValue]:
    return [monitor.push(volume) for volume in volumes]


@pytest.fixture
def cpu() -> Backend:
    return open_backend("cpu")


# --- each problem by its name


def with_nan(volume: NDArray[Any]) -> NDArray[Any]:
    volume[5:9, 5:9, 3] = np.nan
    return volume


def saturated(volume: NDArray[Any]) -> NDArray[Any]:
    # 2 % of the voxels are at the converter's end; nothing else about them is odd.
    return np.minimum(volume, np.quantile(volume, 0.98).astype(volume.dtype))


def brighter(volume: NDArray[Any], factor: float) -> NDArray[Any]:
    volume[:, :, 3] = volume[:, :, 3] * factor
    return volume


DEFECTS: list[tuple[str, Callable[[NDArray[Any]], NDArray[Any]], dict[str, float]]] = [
    ("not finite", with_nan, {}),
    ("no signal", np.zeros_like, {}),
    ("no signal", lambda v: np.full_like(v, 900), {}),
    ("no signal", lambda v: np.full_like(v, np.nan), {}),
    ("saturated", saturated, {}),
    ("not registered", lambda v: v, {"converged": 0.0}),
    ("not registered", lambda v: v, {"x_mm": math.nan}),
    ("out of view", lambda v: v, {"inside": 0.79}),
    ("motion", lambda v: v, {"fd_power_mm": 0.51}),
    ("spike", lambda v: noisy(v, 99, sd=60, dtype="float32"), {}),
    ("slice", lambda v: brighter(v, 1.3), {}),
    ("drop-out", lambda v: brighter(v, 0.5), {}),
]


@few_backends
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d[0].replace(" ", "-"))
def test_a_bad_volume_is_named_and_left_out(backend: Backend, defect: Any) -> None:
    word, spoil, pose = defect
    volumes = a_run(13, "float32")
    monitor = Monitor(backend, MASK)
    assert not any(value.problems for value in push_all(monitor, volumes[:7]))
    bad = monitor.push(spoil(volumes[7].copy(order="F")), **pose)
    assert word in bad.problems
    assert list(bad.problems) == [name for name in PROBLEMS if name in bad.problems]
    assert bad.n_usable == 7
    # Nothing is held against the volumes that follow.
    after = push_all(monitor, volumes[8:])
    assert not any(value.problems for value in after)
    assert after[-1].n_usable == 12
    check_maps(monitor, volumes, [i != 7 for i in range(13)])


def check_maps(monitor: Monitor, volumes: list[NDArray[Any]], usable: list[bool]) -> None:
    """Compare with two-pass float64, of usable volumes, and of pairs of them that follow."""
    brains = np.stack([volume[MASK] for volume in volumes]).astype(np.float64)
    good, pairs = brains[usable], [a and b for a, b in pairwise(usable)]
    successive = (np.diff(brains, axis=0)[pairs] ** 2).mean(0)
    maps = monitor.stage.maps()
    # Float32 recursions of at most 40 steps: about 10 roundings of 2**-24 a step.
    np.testing.assert_allclose(maps["tsnr"], good.mean(0) / good.std(0, ddof=1), rtol=3e-5)
    np.testing.assert_allclose(maps["snr"], good.mean(0) / np.sqrt(successive / 2), rtol=3e-5)
    assert maps["tsnr"].dtype == maps["snr"].dtype == np.float32


def test_limits_are_limits(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    at_the_limit = {"fd_power_mm": 0.5, "inside": 0.8}
    assert monitor.push(noisy(HEAD, 0), **at_the_limit).problems == ()
    both = monitor.push(noisy(HEAD, 1), fd_power_mm=0.501, inside=0.799)
    assert both.problems == ("out of view", "motion")


def test_slices_are_counted(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    push_all(monitor, a_run(8))
    volume = noisy(HEAD, 9)
    volume[:, :, 2] = volume[:, :, 2] * 1.3
    volume[:, :, 3:5] = volume[:, :, 3:5] * 0.5
    value = monitor.push(volume)
    assert value.n_slice_outliers == 3
    assert {"slice", "drop-out"} < set(value.problems)


def test_an_outlier_does_not_hide_the_next(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    push_all(monitor, a_run(8))
    assert "slice" in monitor.push(brighter(noisy(HEAD, 9), 10)).problems
    assert monitor.push(noisy(HEAD, 10)).usable
    assert "drop-out" in monitor.push(brighter(noisy(HEAD, 11), 0.5)).problems


def test_an_empty_volume_early_on_does_not_hide_what_follows(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    push_all(monitor, [noisy(HEAD, 0), np.zeros(SHAPE, np.int16, order="F"), *a_run(4)[1:]])
    assert "drop-out" in monitor.push(brighter(noisy(HEAD, 9), 0.5)).problems


def test_a_faint_slice_may_vary(cpu: Backend) -> None:
    monitor, faint = Monitor(cpu, MASK), HEAD.copy()
    faint[:, :, 0] = 0  # nothing but noise there, whose sum varies by 30 %
    for seed, factor in enumerate([1.0] * 5 + [1.3, 1.0, 0.7, 1.0]):
        volume = noisy(faint, seed)
        volume[:, :, 0] = volume[:, :, 0] * factor
        assert monitor.push(volume).problems == ()


@pytest.mark.parametrize("bad", [np.zeros_like(HEAD), np.full_like(HEAD, np.nan)])
def test_the_first_volume_may_be_bad(cpu: Backend, bad: NDArray[Any]) -> None:
    monitor = Monitor(cpu, MASK)
    first = monitor.push(bad.astype(np.float32, order="F"))
    assert "no signal" in first.problems
    assert not any(value.problems for value in push_all(monitor, a_run(15, "float32")))


def test_voxels_that_never_are_finite_or_always_the_largest_are_no_problem(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    for volume in a_run(12, "float32"):
        volume[~MASK] = np.nan
        volume[3:6, 3:9, 3] = 4095  # 18 of 1536 voxels
        assert monitor.push(volume).problems == ()


# --- no lock-out


def shifted(image: NDArray[Any]) -> NDArray[Any]:
    return np.roll(image, 1, axis=2)


@pytest.mark.parametrize(
    "change",
    [
        lambda seed: noisy(1.3 * HEAD, seed),
        lambda seed: noisy(0.6 * HEAD, seed),
        lambda seed: noisy(shifted(HEAD), seed),
        lambda seed: noisy(HEAD, seed, sd=40),
    ],
    ids=["gain-up", "gain-down", "head-stays-elsewhere", "noise-up"],
)
def test_after_a_lasting_change_volumes_are_usable_again(
    cpu: Backend, change: Callable[[int], NDArray[Any]]
) -> None:
    monitor = Monitor(cpu, MASK)
    push_all(monitor, a_run(20))
    values = [monitor.push(change(seed)) for seed in range(20, 60)]
    assert not values[0].usable
    assert all(value.usable for value in values[12:])


# --- numbers


def test_dvars_and_global_signal(cpu: Backend) -> None:
    volumes = a_run(12)
    monitor = Monitor(cpu, MASK)
    values = push_all(monitor, volumes)
    brains = np.stack([volume[MASK] for volume in volumes]).astype(np.float64)
    signal = brains.mean(1)
    dvars = np.sqrt((np.diff(brains, axis=0) ** 2).mean(1))
    assert math.isnan(values[0].dvars)
    assert math.isnan(values[1].dvars_std)
    for i, value in enumerate(values):
        assert value.global_signal == pytest.approx(signal[i], rel=1e-12)
        if i:
            wanted = 100 * dvars[i - 1] / signal[:i].mean()
            assert value.dvars == pytest.approx(wanted, rel=1e-12)
        if i > 1:
            wanted = dvars[i - 1] / np.sqrt((dvars[: i - 1] ** 2).mean())
            assert value.dvars_std == pytest.approx(wanted, rel=1e-12)


def test_standardised_dvars_is_that_of_the_batch_formula(cpu: Backend) -> None:
    # Stationary AR(1) noise: the variance of differences is 2 (1 - ar1) var (Nichols 2013).
    n_volumes, phi, shape = 300, 0.4, (20, 10, 8)
    rng = np.random.default_rng(0)
    sd = rng.uniform(5, 20, shape)
    series, noise = [], rng.normal(0, sd)
    for _ in range(n_volumes):
        noise = phi * noise + np.sqrt(1 - phi**2) * rng.normal(0, sd)
        series.append((1000 + noise).astype(np.float32, order="F"))
    values = push_all(Monitor(cpu, np.ones(shape, bool), has_motion=False), series)
    assert all(value.usable for value in values)
    x = np.stack(series).reshape(n_volumes, -1).astype(np.float64)
    d = x - x.mean(0)
    ar1 = (d[1:] * d[:-1]).sum(0) / (d**2).sum(0)
    expected = np.sqrt((2 * (1 - ar1) * x.var(0)).mean())
    dvars = np.sqrt((np.diff(x, axis=0) ** 2).mean(1))
    # Both sum the same products but for the first and the last deviation of each voxel, which is
    # 1 / ((1 - phi) n) of the variance of differences; half of it after the root.
    tolerance = 1.5 * 0.5 / ((1 - phi) * n_volumes)
    assert values[-1].dvars_std == pytest.approx(dvars[-1] / expected, rel=tolerance)


def test_maps_of_usable_volumes(cpu: Backend) -> None:
    monitor, volumes = Monitor(cpu, MASK), a_run(40)
    volumes[7][:, :, 2] //= 2
    usable = [value.usable for value in push_all(monitor, volumes)]
    assert usable == [i != 7 for i in range(40)]
    check_maps(monitor, volumes, usable)


def test_maps_are_0_where_there_is_no_noise(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    assert not any(image.any() for image in monitor.stage.maps().values())
    volumes = a_run(5)
    for volume in volumes:
        volume[8, 8, 3] = 1000
    push_all(monitor, volumes[:1])
    assert not any(image.any() for image in monitor.stage.maps().values())
    push_all(monitor, volumes[1:])
    still = np.zeros(SHAPE, bool)
    still[8, 8, 3] = True
    for image in monitor.stage.maps().values():
        assert np.array_equal(image == 0, still[MASK])


def test_drift_lowers_tsnr_and_not_snr(cpu: Backend) -> None:
    monitor = Monitor(cpu, MASK)
    values = push_all(monitor, (noisy(HEAD * (1 + 0.001 * i), i) for i in range(100)))
    assert all(value.usable for value in values)
    maps, thermal = monitor.stage.maps(), 1050 / 10
    assert np.median(maps["snr"]) == pytest.approx(thermal, rel=0.05)
    assert np.median(maps["tsnr"]) < 0.4 * thermal


def test_forecast(cpu: Backend) -> None:
    settings = QualitySettings(target_min=0.4)  # 12 volumes of 2 s
    monitor = Monitor(cpu, MASK, settings=settings)
    volumes = a_run(20)
    assert monitor.push(volumes[0], converged=0.0).forecast_min == math.inf
    assert monitor.push(volumes[1]).forecast_min == pytest.approx((0.4 - 1 / 30) * 2)
    values = push_all(monitor, volumes[2:])
    for n, value in enumerate(values, start=2):
        assert value.n_usable == n
        assert value.usable_min == pytest.approx(n / 30)
        assert value.forecast_min == pytest.approx(max(0.4 - n / 30, 0) * (n + 1) / n)
    assert values[-1].forecast_min == 0
    assert Monitor(cpu, MASK).push(volumes[0]).forecast_min is None


@few_backends
def test_it_works_without_motion_and_leaves_others_numbers_alone(backend: Backend) -> None:
    monitor = Monitor(backend, MASK, has_motion=False)
    monitor.report[monitor.parts.slices.stop :] = math.nan
    assert all(value.usable for value in push_all(monitor, a_run(6)))
    assert np.isnan(backend.download(monitor.report)[-3:]).all()


# --- whole runs


def flagged(values: list[QualityValue]) -> NDArray[np.bool_]:
    return np.array([not {"spike", "slice", "drop-out"}.isdisjoint(v.problems) for v in values])


@pytest.mark.parametrize("motion", [False, True])
def test_good_volumes_of_a_simulated_run_are_good(cpu: Backend, motion: bool) -> None:
    scanner = Scanner(n_volumes=150, shape=(32, 32, 18), motion=motion)
    monitor = Monitor(cpu, scanner.truth.brain)
    values = push_all(monitor, (scanner.volume(i) for i in range(150)))
    assert flagged(values).mean() < 0.02


def test_spikes_of_a_simulated_run_are_found(cpu: Backend) -> None:
    n_spiked = n_found = n_false = 0
    for seed in range(4):
        scanner = Scanner(n_volumes=150, shape=(32, 32, 18), spikes=True, seed=seed)
        monitor = Monitor(cpu, scanner.truth.brain)
        found = flagged(push_all(monitor, (scanner.volume(i) for i in range(150))))
        spiked = (scanner.truth.spikes & scanner.truth.brain.any((0, 1))).any(1)
        n_spiked += spiked.sum()
        n_found += (found & spiked).sum()
        n_false += (found & ~spiked).sum()
    assert n_spiked >= 10
    assert n_found >= 0.95 * n_spiked
    assert n_false < 0.02 * 4 * 150


def test_a_dropped_slice_of_a_simulated_run_is_found(cpu: Backend) -> None:
    scanner = Scanner(n_volumes=12, shape=(32, 32, 18))
    for z in np.flatnonzero(scanner.truth.brain.any((0, 1))):
        monitor = Monitor(cpu, scanner.truth.brain)
        push_all(monitor, (scanner.volume(i) for i in range(6)))
        volume = scanner.volume(6)
        volume[:, :, z] //= 2
        assert "drop-out" in monitor.push(volume).problems


@pytest.mark.parametrize("folder", ["siemens_mosaic_psc", "siemens_mosaic_mb"])
def test_good_volumes_of_a_real_run_are_good(cpu: Backend, folder: str) -> None:
    series = [v.data for v in open_reader(str(real_data(folder))) if isinstance(v, Volume)]
    monitor = Monitor(cpu, series[0] > series[0].mean())
    values = push_all(monitor, series)
    assert flagged(values).mean() < 0.02
    assert not any({"no signal", "saturated"} & set(value.problems) for value in values)
    usable = [value.usable for value in values]
    assert all(a or b for a, b in pairwise(usable))

"""The baseline step against NumPy."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfmri.backends import Backend, Moments, Subtraction, open_backend

from ..measure import (
    Call,
    Clock,
    Plan,
    Tables,
    gb_per_s,
    grid_name,
    peers_clock,
    statistics_ms,
    take_turns,
)
from ..tables import Layout, number, text

NEEDED_BYTES = 26
"""A voxel's bytes that any such step must move: int16 in (2), float32 mean and variance read and
written (16), psc and z written (8). Ours also writes the difference, 4 more."""
N_BEFORE = 1000
"""Volumes seen before the one that is timed, as the formulas want a number."""

_NUMPY = ("numpy_guarded", "numpy_plain", "numpy_in_place")
_F32 = NDArray[np.float32]


class InPlace:
    """Welford, PSC and z by NumPy float32 as one writes it for speed: no array is made.

    It gives the answers of `rtfmri.backends.Subtraction`, also where the mean is not positive or
    the variance 0. Those voxels are mended afterwards, since a division with ``where=`` is slower.

    Parameters
    ----------
    mean, variance : (n_voxels,) float32
        Running moments, updated by each call.
    """

    def __init__(self, mean: _F32, variance: _F32) -> None:
        self.mean, self.variance = mean, variance
        self.difference, self.psc, self.z, self._step = (np.empty_like(mean) for _ in range(4))
        self._undefined = np.empty(mean.shape, np.bool_)

    def __call__(self, volume: NDArray[np.int16], n_before: int) -> None:
        """Compare *volume* with the *n_before* volumes before it, then fold it in."""
        gain, bessel = np.float32(1 / (n_before + 1)), np.float32(n_before / (n_before - 1))
        np.subtract(volume, self.mean, out=self.difference)
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(self.difference, self.mean, out=self.psc)
            np.multiply(self.psc, np.float32(100), out=self.psc)
            np.multiply(self.variance, bessel, out=self.z)
            np.sqrt(self.z, out=self.z)
            np.divide(self.difference, self.z, out=self.z)
        self.psc[np.less_equal(self.mean, 0, out=self._undefined)] = 0
        self.z[np.less_equal(self.variance, 0, out=self._undefined)] = 0
        np.multiply(self.difference, gain, out=self._step)
        np.add(self.mean, self._step, out=self.mean)
        np.multiply(self._step, self.difference, out=self._step)
        np.add(self.variance, self._step, out=self.variance)
        np.multiply(self.variance, np.float32(1) - gain, out=self.variance)


class Plain:
    """The same as one writes it down from the textbook: the sum of squares is the state."""

    def __init__(self, mean: _F32, variance: _F32, n_before: int) -> None:
        self.mean: NDArray[Any] = mean
        self.m2: NDArray[Any] = variance * np.float32(n_before)

    def __call__(self, volume: NDArray[np.int16], n_before: int) -> None:
        """Compare *volume* with the *n_before* volumes before it, then fold it in."""
        self.difference = volume - self.mean
        self.psc = 100 * self.difference / self.mean
        self.z = self.difference / np.sqrt(self.m2 / (n_before - 1))
        self.mean = self.mean + self.difference / (n_before + 1)
        self.m2 = self.m2 + self.difference * (volume - self.mean)


class Guarded(Plain):
    """The textbook's, with NumPy's own way around a division by zero: it gives our answers."""

    def __call__(self, volume: NDArray[np.int16], n_before: int) -> None:
        """Compare *volume* with the *n_before* volumes before it, then fold it in."""
        self.difference = volume - self.mean
        self.psc = _divide(100 * self.difference, self.mean)
        self.z = _divide(self.difference, np.sqrt(self.m2 / (n_before - 1)))
        self.mean = self.mean + self.difference / (n_before + 1)
        self.m2 = self.m2 + self.difference * (volume - self.mean)


def _divide(numerator: _F32, denominator: _F32) -> _F32:
    zeros = np.zeros_like(numerator)
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


class Fused:
    """The same by one `Backend.subtract`."""

    def __init__(self, backend: Backend, mean: _F32, variance: _F32) -> None:
        self._backend = backend
        self.moments = Moments(backend.copy(mean), backend.copy(variance))
        self.out = Subtraction(*(backend.zeros(mean.size) for _ in range(3)))

    def __call__(self, volume: Any, n_before: int) -> None:
        """Compare *volume* with the *n_before* volumes before it, then fold it in."""
        self._backend.subtract(
            volume,
            self.moments,
            self.out,
            bessel=n_before / (n_before - 1),
            into=self.moments,
            gain=1 / (n_before + 1),
        )


LAYOUTS = {
    "baseline": Layout(
        "Baseline + PSC + z of a volume: one fused pass against NumPy float32",
        (
            ("grid", text("grid")),
            ("caches", text("caches")),
            ("fused ms", number(4, "median_ms")),
            ("one thread", number(4, "fused_one_thread_ms")),
            ("NumPy guarded ms", number(3, "numpy_guarded_ms")),
            ("times", number(1, "times_faster", "numpy_guarded")),
            ("plain ms", number(3, "numpy_plain_ms")),
            ("times", number(1, "times_faster", "numpy_plain")),
            ("in place ms", number(3, "numpy_in_place_ms")),
            ("times", number(1, "times_faster", "numpy_in_place")),
            ("largest error of z", number(7, "z_error", "fused")),
            ("guarded", number(7, "z_error", "numpy_guarded")),
            ("plain", number(7, "z_error", "numpy_plain")),
            ("in place", number(7, "z_error", "numpy_in_place")),
            ("stream GB/s", number(1, "stream_gb_s")),
            ("26 B/voxel allow ms", number(4, "allowed_ms")),
            ("fused / allowed", number(2, "of_allowed")),
        ),
    ),
}


def run(plan: Plan) -> Tables:
    """Return the rows of the table ``baseline``."""
    speed = []
    for shape in plan.grids:
        plan.progress(f"baseline against NumPy, {grid_name(shape)}")
        speed += [
            _against_numpy(plan.backend, plan.clock, shape, plan.rounds, cold)
            for cold in (False, True)
        ]
    return {"baseline": speed}


def _against_numpy(
    backend: Backend, clock: Clock, shape: Sequence[int], rounds: int, cold: bool
) -> dict[str, Any]:
    n = int(np.prod(shape))
    rng = np.random.default_rng(0)
    volume = rng.integers(500, 1500, n).astype(np.int16)
    mean = rng.normal(1000, 50, n).astype(np.float32)
    variance = rng.uniform(200, 600, n).astype(np.float32)
    fused = Fused(backend, mean, variance)
    peers: dict[str, Call] = {}
    in_place = InPlace(mean.copy(), variance.copy())
    plain, guarded = (form(mean, variance, N_BEFORE) for form in (Plain, Guarded))
    peers["numpy_in_place"] = lambda: in_place(volume, N_BEFORE)
    peers["numpy_plain"] = lambda: plain(volume, N_BEFORE)
    peers["numpy_guarded"] = lambda: guarded(volume, N_BEFORE)
    if backend.name == "cpu":
        single = Fused(_one_thread(), mean, variance)
        peers["fused_one_thread"] = lambda: single(volume, N_BEFORE)

    on_device = backend.copy(volume)
    fused(on_device, N_BEFORE)
    z = {"fused": backend.download(fused.out.z)}
    for name, peer in (
        ("numpy_in_place", in_place),
        ("numpy_plain", plain),
        ("numpy_guarded", guarded),
    ):
        peer(volume, N_BEFORE)
        z[name] = np.array(peer.z)
    exact = (volume - mean.astype(np.float64)) / np.sqrt(
        variance.astype(np.float64) * N_BEFORE / (N_BEFORE - 1)
    )
    z_error = {name: float(np.abs(values - exact).max()) for name, values in z.items()}
    held_bytes = volume.nbytes + 5 * mean.nbytes
    stream = clock.largest if cold else clock.stream(held_bytes)
    host = peers_clock(clock)
    seconds = take_turns(
        {
            "fused": clock.timer(lambda: fused(on_device, N_BEFORE), cold=cold),
            "stream": clock.timer(stream, cold=cold),
            **{name: host.timer(call, cold=cold) for name, call in peers.items()},
        },
        rounds,
        cold=cold,
    )
    median_ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    stream_gb_s = gb_per_s(stream.n_bytes, seconds["stream"])
    allowed_ms = 1e3 * NEEDED_BYTES * n / (1e9 * stream_gb_s)
    return {
        "grid": grid_name(shape),
        "caches": "cold" if cold else "hot",
        **statistics_ms(seconds["fused"]),
        **{f"{name}_ms": median_ms[name] for name in peers},
        "times_faster": {name: median_ms[name] / median_ms["fused"] for name in _NUMPY},
        "z_error": z_error,
        "stream_gb_s": stream_gb_s,
        "allowed_ms": allowed_ms,
        "of_allowed": median_ms["fused"] / allowed_ms,
    }


def _one_thread() -> Backend:
    # Opening a backend sets numba's threads for the process; one thread then is the backend's
    # own choice of how to share out the voxels.
    single = open_backend("cpu", 1)
    open_backend("cpu")
    return single

"""EPI of a head whose motion is known: a function of place, sampled where the head moved it.

No volume is made by interpolation, so that what a motion correction gets wrong is its own.
"""

# mypy: disable-error-code="untyped-decorator"

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from rtfmri.volume import Grid, unflatten

WALK_MM, WALK_DEG = 1.0, 1.0
DRIFT = 0.6
JUMP_MM, JUMP_DEG = 6.0, 6.0
ACTIVATION = 0.04
"""Signal change in the middle of the active region, as a part of the signal there."""
SPHERE_MM = 50.0
"""Radius of the sphere over which the error of a motion estimate is averaged."""

_SIGNAL = 1000.0
_HEAD_MM = (68.0, 85.0, 55.0)
_FIT = 0.45
"""A head as tall as the field of view would be cut off by any motion; this is at most the
half-axis of an ellipsoid as a part of the field of view."""
_EDGE_MM = 1.5
_RIM_DEPTH_MM, _RIM_WIDTH_MM, _RIM_SIGNAL = 9.0, 3.0, -350.0
"""A dark layer below the surface, as the skull and what lies between it and the brain."""
_VENTRICLE_SIGNAL = 600.0
_VENTRICLES = np.array([[s * 12.0, 5.0, 8.0, 7.0, 18.0, 9.0] for s in (-1, 1)])
"""Place and size along x, y, z in mm: two Gaussian blobs."""
_ACTIVE = np.array([34.0, -12.0, 18.0, 13.0, 13.0, 13.0])
"""The active region likewise: one side only, so that it pulls."""
_N_WAVES = 64
_SHORTEST_MM, _LONGEST_MM = 12.0, 60.0
_WAVE_SIGNAL = 60.0


class Scan(NamedTuple):
    """Voxel size in mm and standard deviation of the noise, of a signal of 1000."""

    voxel_mm: tuple[float, float, float]
    noise_sd: float


SCANS = {
    (64, 64, 36): Scan((3.0, 3.0, 3.5), 15.0),
    (104, 104, 72): Scan((2.0, 2.0, 2.0), 25.0),
    (192, 192, 84): Scan((1.1, 1.1, 1.1), 40.0),
}
"""By shape. Other shapes get the field of view of the first."""


class Phantom:
    """A textured ellipsoid with a dark rim and bright ventricles, in the middle of the grid.

    ``signal = head * (1000 + waves + ventricles + rim) * (1 + activation)``, with noise in both
    channels of a complex image of which the magnitude is kept (Rician: Gudbjartsson & Patz 1995,
    MRM 34:910). The texture is plane waves of 12 to 60 mm, longer ones larger.

    Parameters
    ----------
    shape : (int, int, int)
        Voxels along x, y, z.
    seed : int
        Of texture and noise.
    """

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        first, (voxel_mm, noise_sd) = next(iter(SCANS.items()))
        same_view = tuple(
            n * mm / size for n, mm, size in zip(first, voxel_mm, shape, strict=True)
        )
        scan = SCANS.get(shape, Scan((same_view[0], same_view[1], same_view[2]), noise_sd))
        affine = np.diag([*scan.voxel_mm, 1.0])
        affine[:3, 3] = -np.array(scan.voxel_mm) * (np.array(shape) - 1) / 2
        self.grid = Grid(shape, affine)
        self._seed, self._noise_sd = seed, np.float32(scan.noise_sd)
        view_mm = np.array(scan.voxel_mm) * shape
        self._half_axes_mm = np.minimum(_HEAD_MM, _FIT * view_mm)
        rng = np.random.default_rng(seed)
        lengths_mm = np.exp(rng.uniform(math.log(_SHORTEST_MM), math.log(_LONGEST_MM), _N_WAVES))
        directions = rng.normal(size=(_N_WAVES, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        # Wave number along x, y, z, phase and amplitude of each.
        self._waves = np.column_stack(
            [
                2 * np.pi / lengths_mm[:, None] * directions,
                rng.uniform(0, 2 * np.pi, _N_WAVES),
                _WAVE_SIGNAL * np.sqrt(lengths_mm / _LONGEST_MM),
            ]
        )

    def signal(self, motion: NDArray[np.float64], *, active: float = 0.0) -> NDArray[np.float32]:
        """Return the head without noise, (x, y, z) float32, x fastest.

        Parameters
        ----------
        motion : (6,) float64
            As for `rigid`.
        active : float
            How far the active region is on, from 0 to 1.
        """
        signal = np.empty(self.grid.shape, np.float32, order="F")
        to_rest = np.linalg.inv(rigid(motion)) @ self.grid.affine
        _render(signal, to_rest, self._half_axes_mm, self._waves, ACTIVATION * active)
        return signal

    def mask(self) -> NDArray[np.bool_] | None:
        """Return the mask that a pipeline needs here: none where nilearn is there to find it."""
        if find_spec("nilearn"):
            return None
        signal = self.signal(np.zeros(6))
        head: NDArray[np.bool_] = signal > signal.max() / 4
        return head

    def volume(
        self, index: int, motion: NDArray[np.float64], *, active: float = 0.0
    ) -> NDArray[np.int16]:
        """Return what the scanner sends, (x, y, z) int16, x fastest; the noise is *index*'s."""
        signal = self.signal(motion, active=active).reshape(-1, order="F")
        rng = np.random.default_rng([self._seed, index])
        real, imaginary = self._noise_sd * rng.standard_normal((2, signal.size), np.float32)
        magnitude = np.rint(np.hypot(signal + real, imaginary)).astype(np.int16)
        return unflatten(magnitude, self.grid.shape)


def drifting(phantom: Phantom, n_images: int = 12) -> list[NDArray[np.int16]]:
    """Return volumes of a head that drifts away from rest and comes back, to be used in turn.

    It moves by `DRIFT` mm and degrees about all axes, so slowly that no volume is bad for it.
    """
    away = [phantom.volume(i, np.full(6, DRIFT * i / (n_images - 1))) for i in range(n_images)]
    return [*away, *away[-2:0:-1]]


def walk(n_volumes: int, seed: int = 0) -> NDArray[np.float64]:
    """Return the motion of each volume, (n_volumes, 6): a random walk within +-1 mm, +-1 degree.

    The head is at rest in volume 0; the largest excursion of each of the six is 1.
    """
    rng = np.random.default_rng([seed, 1])
    places = np.cumsum(rng.normal(size=(n_volumes, 6)), axis=0)
    places -= places[0]
    limits = np.array([WALK_MM] * 3 + [WALK_DEG] * 3)
    return np.asarray(limits * places / np.maximum(np.abs(places).max(axis=0), 1e-9))


def jumps() -> NDArray[np.float64]:
    """Return what a head at rest jumps to, (6, 6): 6 mm along an axis and 6 degrees about one.

    Each axis is gone along both ways; the rotation is about the next axis.
    """
    motions = np.zeros((6, 6))
    for i, sign in enumerate([1, -1] * 3):
        motions[i, i // 2] = sign * JUMP_MM
        motions[i, 3 + (i // 2 + 1) % 3] = sign * JUMP_DEG
    return motions


def rigid(motion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 4x4 transform from the head at rest to the head in the volume, RAS+ mm.

    Parameters
    ----------
    motion : (6,) float64
        Translations along x, y, z in mm, rotations about x, y, z in degrees: a point p goes to
        ``Rz Ry Rx p + t``, about the centre of the grid, which is the origin here. It is the
        convention of `rtfmri.simulator.scanner.Truth`.
    """
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(motion[3:])), np.sin(np.radians(motion[3:]))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    transform = np.eye(4)
    transform[:3, :3] = about_z @ about_y @ about_x
    transform[:3, 3] = motion[:3]
    return transform


def deviation_mm(estimated: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Return by how much two transforms differ: root mean square over a sphere of 50 mm.

    With ``D = estimated true^-1 - 1 = [A t]`` it is ``sqrt(R^2 tr(A'A) / 5 + t't)``, the sphere's
    centre being the origin, here the grid's centre (Jenkinson 1999, FMRIB technical report
    TR99MJ1).
    """
    difference = estimated @ np.linalg.inv(true) - np.eye(4)
    turned, shifted_mm = difference[:3, :3], difference[:3, 3]
    return math.sqrt(SPHERE_MM**2 * np.sum(turned**2) / 5 + shifted_mm @ shifted_mm)


# Not cached: the cache remembers a name of this package, which has another in a checkout.
@njit(parallel=True, error_model="numpy")
def _render(out: Any, to_rest: Any, half_axes: Any, waves: Any, activation: Any) -> None:
    n_x, n_y, n_z = out.shape
    for line in prange(n_y * n_z):
        j, k = line % n_y, line // n_y
        start = to_rest[:3, 1] * j + to_rest[:3, 2] * k + to_rest[:3, 3]
        texture = np.zeros(n_x)
        for wave in range(waves.shape[0]):
            _add_wave(texture, waves[wave], start, to_rest[:3, 0])
        for i in range(n_x):
            x = start[0] + to_rest[0, 0] * i
            y = start[1] + to_rest[1, 0] * i
            z = start[2] + to_rest[2, 0] * i
            square = (x / half_axes[0]) ** 2 + (y / half_axes[1]) ** 2 + (z / half_axes[2]) ** 2
            depth = (1 - math.sqrt(square)) * half_axes[2]
            if depth < -20 * _EDGE_MM:
                out[i, j, k] = 0.0  # less than 1e-8 of the signal is left
                continue
            rim = (depth - _RIM_DEPTH_MM) / _RIM_WIDTH_MM
            signal = _SIGNAL + texture[i] + _RIM_SIGNAL * math.exp(-(rim**2))
            for side in range(2):
                signal += _VENTRICLE_SIGNAL * _blob(_VENTRICLES[side], x, y, z)
            signal *= 1 + activation * _blob(_ACTIVE, x, y, z)
            out[i, j, k] = signal / (1 + math.exp(-depth / _EDGE_MM))


@njit(error_model="numpy")
def _add_wave(line: Any, wave: Any, start: Any, step: Any) -> None:
    # Turned on from voxel to voxel by a fixed angle: 20 times as fast as a cosine for each, and
    # no further from it than 1e-13.
    phase, turn = wave[3], 0.0
    for axis in range(3):
        phase += wave[axis] * start[axis]
        turn += wave[axis] * step[axis]
    real, imaginary = wave[4] * math.cos(phase), wave[4] * math.sin(phase)
    cosine, sine = math.cos(turn), math.sin(turn)
    for i in range(line.size):
        line[i] += real
        real, imaginary = real * cosine - imaginary * sine, imaginary * cosine + real * sine


@njit(error_model="numpy")
def _blob(blob: Any, x: Any, y: Any, z: Any) -> Any:
    square = ((x - blob[0]) / blob[3]) ** 2 + ((y - blob[1]) / blob[4]) ** 2
    return math.exp(-square - ((z - blob[2]) / blob[5]) ** 2)

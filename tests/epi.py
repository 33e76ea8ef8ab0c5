"""Echo-planar images of a head that moves: an analytic function, so nothing is interpolated."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfmri.volume import Grid

Floats = NDArray[np.float64]

RADII_MM = np.array([68.0, 85.0, 52.0])
BLOB_MM = np.array([35.0, -20.0, 20.0])
N_WAVES = 32


def a_grid(
    shape: tuple[int, int, int] = (44, 52, 34), size_mm: ArrayLike = (4.0, 4.2, 4.5)
) -> Grid:
    """An oblique grid whose x runs to the left, around a point that is not the origin."""
    x, z = np.radians([15.0, -8.0])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(np.asarray(size_mm) * [-1, 1, 1])
    affine[:3, 3] = np.array([4.0, -20.0, 9.0]) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def centre(grid: Grid) -> Floats:
    return grid.affine[:3] @ np.append((np.array(grid.shape) - 1) / 2, 1)


def rigid(grid: Grid, translation_mm: ArrayLike, rotation_deg: ArrayLike) -> Floats:
    """Return T as `rtfmri.stages.motion` defines it, written out anew."""
    (cx, cy, cz), (sx, sy, sz) = (f(np.radians(rotation_deg)) for f in (np.cos, np.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    moved, c = np.eye(4), centre(grid)
    moved[:3, :3] = about_z @ about_y @ about_x
    moved[:3, 3] = c - moved[:3, :3] @ c + translation_mm
    return moved


def epi(
    grid: Grid,
    motion: Floats | None = None,
    *,
    noise_sd: float = 15.0,
    blob_percent: float = 0.0,
    scale: float = 1.0,
    dtype: Any = np.int16,
    seed: int = 0,
) -> NDArray[Any]:
    """Return a volume, (n_voxels,): an ellipsoid of about 1000 with bright and dark parts.

    A point p of the head is at *motion* p. The noise is Rician in effect: Gaussian of *noise_sd*,
    folded at 0.
    """
    voxels = np.indices(grid.shape).reshape(3, -1, order="F")
    places = grid.affine[:3, :3] @ voxels + grid.affine[:3, 3:]
    if motion is not None:
        back = np.linalg.inv(motion)
        places = back[:3, :3] @ places + back[:3, 3:]
    x, y, z = p = places - centre(grid)[:, None]
    radius = np.sqrt(((p / RADII_MM[:, None]) ** 2).sum(0))
    depth_mm = (1 - radius) * RADII_MM[2]
    head = 1 / (1 + np.exp(np.clip(-depth_mm / 1.5, -50, 50)))
    rng = np.random.default_rng(1)
    signal = np.full(radius.shape, 1000.0)
    for _ in range(N_WAVES):
        wave = rng.normal(size=3)
        length_mm = np.exp(rng.uniform(np.log(12), np.log(60)))
        wave *= 2 * np.pi / length_mm / np.linalg.norm(wave)
        signal += 40 * np.sqrt(length_mm / 30) * np.cos(wave @ p + rng.uniform(0, 2 * np.pi))
    for side in (-12, 12):
        ventricle = ((x - side) / 7) ** 2 + ((y - 5) / 18) ** 2 + ((z - 8) / 9) ** 2
        signal += 600 * np.exp(-ventricle)
    signal -= 350 * np.exp(-(((depth_mm - 9) / 3) ** 2))
    blob = ((p - BLOB_MM[:, None]) ** 2).sum(0) / (2 * 10.0**2)
    signal *= scale * head * (1 + blob_percent / 100 * np.exp(-blob))
    signal += np.random.default_rng([2, seed]).normal(0, noise_sd, signal.shape)
    return np.rint(np.abs(signal)).astype(dtype)


def deviation_mm(found: Floats, true: Floats, grid: Grid, radius_mm: float = 50.0) -> float:
    """Root mean square distance between two poses over a sphere around the grid's centre."""
    # Six points have a ball's second moments when they are at sqrt(3/5) of its radius.
    axes = np.vstack([np.eye(3), -np.eye(3)]) * radius_mm * np.sqrt(3 / 5)
    points = np.column_stack([axes + centre(grid), np.ones(6)])
    return float(np.sqrt((((found - true) @ points.T) ** 2).sum(0).mean()))

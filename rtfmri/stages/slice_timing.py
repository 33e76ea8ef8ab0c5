"""Slice timing: each slice interpolated in time to the start of its volume."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from rtfmri.backends import Array, Backend, Shape
from rtfmri.errors import ConfigError

N_POINTS = {"linear": 2, "cubic": 4}
"""Volumes through which each method interpolates, the newest included."""


class SliceTimingStage:
    """Makes volumes whose slices are all of one moment: the start of the newest volume.

    A slice that was taken t after that moment is interpolated between its newest value and the one
    a TR before; no result waits for the next volume. What leaves is the head's state at the
    volume's start: one TR, at most, before its last slice was there.

    Parameters
    ----------
    backend : Backend
        What executes it.
    shape : (int, int, int)
        Voxels along x, y, z; slices are along z.
    tr_s : float
        Time between volumes in seconds.
    slice_times_s : sequence of float, or None
        Acquisition start of each slice in seconds after its volume's, as in
        `rtfmri.volume.Volume`.
    method : {"linear", "cubic"}
        Polynomial through the newest two or four volumes.
    dtype : dtype
        Of the volumes, of which the stage keeps one or three.

    Raises
    ------
    ConfigError
        If slice times are missing, are not one for each slice, or are not from 0 to *tr_s*.

    Notes
    -----
    The first volume of a run, or after one that is missing, leaves as it is; the next ones are
    interpolated through as many volumes as there are in a row.
    """

    def __init__(
        self,
        backend: Backend,
        shape: Shape,
        tr_s: float,
        slice_times_s: Sequence[float] | None,
        method: Literal["linear", "cubic"],
        dtype: DTypeLike,
    ) -> None:
        times_s = _checked(slice_times_s, shape[2], tr_s)
        n_points, n_voxels = N_POINTS[method], int(np.prod(shape))
        self._weights = [
            backend.copy(time_weights(times_s / tr_s, n)) for n in range(1, n_points + 1)
        ]
        self._ring = backend.zeros((n_points - 1, n_voxels), dtype)
        self._out = backend.zeros(n_voxels)
        self._backend = backend
        self._shape = shape
        self._slot = 0
        self._n_in_a_row = 0
        self._next_index = 0

    def push(self, volume: Array, index: int) -> Array:
        """Return *volume* as of its start, (n_voxels,) float32, valid until the next push.

        Parameters
        ----------
        volume : (n_voxels,) int16, uint16 or float32
            On the backend.
        index : int
            Its position in the run.
        """
        self._n_in_a_row = self._n_in_a_row + 1 if index == self._next_index else 1
        self._next_index = index + 1
        weights = self._weights[min(self._n_in_a_row, len(self._weights)) - 1]
        self._backend.retime(volume, self._ring, self._slot, self._shape, weights, self._out)
        self._slot = (self._slot + 1) % len(self._ring)
        return self._out

    def forget(self) -> None:
        """Let the next volume leave as it is: the one before it is not fit to be mixed in."""
        self._n_in_a_row = 0


def time_weights(fractions: ArrayLike, n_points: int) -> NDArray[np.float32]:
    """Return the weights of the newest volumes for the value some time before the newest one.

    They are those of the polynomial through *n_points* values at equal distances (Lagrange's
    form: Berrut & Trefethen 2004, SIAM Review 46:501), evaluated between the newest two.

    Parameters
    ----------
    fractions : (n_slices,) array
        How long before the newest value, in parts of the distance between values, from 0 to 1.
    n_points : int
        Values that are used; 1 means the newest as it is.

    Returns
    -------
    weights : (n_points, n_slices) float32
        Of the newest volume first; they add up to 1 for each slice.
    """
    back = np.asarray(fractions, np.float64)
    weights = np.ones((n_points, back.size))
    for point in range(n_points):
        for other in range(n_points):
            if other != point:
                weights[point] *= (back - other) / (point - other)
    return weights.astype(np.float32)


def _checked(
    slice_times_s: Sequence[float] | None, n_slices: int, tr_s: float
) -> NDArray[np.float64]:
    if slice_times_s is None:
        raise ConfigError(
            "slice_timing needs the slices' acquisition times and the volumes' headers have none; "
            "set its method to off, or give NIfTI files a BIDS sidecar with SliceTiming"
        )
    times_s = np.asarray(slice_times_s, np.float64)
    if times_s.shape != (n_slices,):
        raise ConfigError(
            f"slice_times_s must have one time for each of {n_slices} slices, got {times_s.size}"
        )
    # A not-a-number fails both comparisons.
    if not (times_s.min() >= 0 and times_s.max() <= tr_s):
        raise ConfigError(
            f"slice_times_s must be from 0 to the TR of {tr_s:g} s, got {times_s.min():g} to "
            f"{times_s.max():g} s; correct the TR, or set the method of slice_timing to off"
        )
    return times_s

"""The per-TR path, in order: one volume in, one result out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfmri.backends import Array, Backend, open_backend
from rtfmri.config import Config
from rtfmri.errors import ConfigError, VolumeError
from rtfmri.paradigm import Paradigm
from rtfmri.stages.baseline import BaselineStage
from rtfmri.stages.roi import RoiStage, RoiValue
from rtfmri.stages.smoothing import SmoothingStage
from rtfmri.volume import Grid, Volume, unflatten


@dataclass(frozen=True, slots=True)
class Result:
    """What one volume gave.

    Attributes
    ----------
    index : int
        The volume's position in the run, from 0.
    time_s : float
        Start of its acquisition, in seconds after the start of volume 0.
    conditions : tuple of str
        The conditions it counted for; empty in a transition.
    roi : dict of str to RoiValue
        One value a region.
    baseline_ready : bool
        Whether there was a baseline to subtract; else PSC and z are nan.
    stage_ms : dict of str to float
        Time in each step, in the order of the path, in ms.
    latency_ms : float
        From the arrival of the volume's last byte to this result, in ms.
    deadline_missed : bool
        Whether that is more than `Config.deadline_s`.
    """

    index: int
    time_s: float
    conditions: tuple[str, ...]
    roi: dict[str, RoiValue]
    baseline_ready: bool
    stage_ms: dict[str, float]
    latency_ms: float
    deadline_missed: bool


class ConditionMaps(NamedTuple):
    """One condition over the run, (x, y, z) float32 maps.

    ``mean`` is its mean image; ``effect`` (scanner units), ``psc`` (percent) and ``t`` (Welch)
    compare it with the baseline, and are 0 for the baseline and while either has fewer than two
    volumes.
    """

    n_volumes: int
    mean: NDArray[np.float32]
    effect: NDArray[np.float32]
    psc: NDArray[np.float32]
    t: NDArray[np.float32]


class Pipeline:
    """The path of a volume, without any input or output.

    Parameters
    ----------
    grid : Grid
        Shape and position of every volume.
    config : Config, optional
        Settings.
    paradigm : Paradigm, optional
        Conditions by time; by default every volume is baseline.
    rois : mapping of str to (x, y, z) array, optional
        Weights of each region on *grid*; 0 is outside.
    dtype : dtype
        Of the volumes: int16, uint16 or float32. Kernels for it are compiled here, not later.
    backend : Backend, optional
        One that is open already, instead of the one that *config* names.

    Raises
    ------
    ConfigError
        If a region does not fit the grid or is empty.
    DeviceError
        If the device cannot be had.
    """

    def __init__(
        self,
        grid: Grid,
        config: Config | None = None,
        *,
        paradigm: Paradigm | None = None,
        rois: Mapping[str, NDArray[Any]] | None = None,
        dtype: DTypeLike = np.int16,
        backend: Backend | None = None,
    ) -> None:
        config = config or Config()
        rois = rois or {}
        for name, weights in rois.items():
            if weights.shape != grid.shape:
                raise ConfigError(
                    f"ROI {name!r} must have the run's shape {grid.shape}, got {weights.shape}"
                )
        self.grid = grid
        self.dtype = np.dtype(dtype)
        self.paradigm = paradigm or Paradigm((), config.paradigm, config.baseline)
        self._deadline_s = config.deadline_s
        self._backend = backend or open_backend(config.device, config.threads)
        self._backend.warm(self.dtype)
        self._smoothing: SmoothingStage | None = None
        if config.smoothing.fwhm_mm:
            self._backend.warm(np.float32)
            self._smoothing = SmoothingStage(self._backend, grid, config.smoothing.fwhm_mm)
        compared = np.dtype(np.float32) if self._smoothing else self.dtype
        n_conditions = len(self.paradigm.conditions)
        self._baseline = BaselineStage(
            self._backend, grid.n_voxels, n_conditions, config.baseline, compared
        )
        self._roi = RoiStage(self._backend, rois, n_conditions, config.baseline)

    @property
    def device(self) -> str:
        """The backend that executes this pipeline: cpu or cuda."""
        return self._backend.name

    def push(self, volume: Volume) -> Result:
        """Take one volume through all steps.

        Raises
        ------
        VolumeError
            If shape, position or dtype differ from the run's; the state is as it was before.
        """
        started_s = time.perf_counter()
        self._check(volume)
        members = self.paradigm.members(volume.time_s, volume.tr_s)
        voxels = self._backend.upload(volume.flat)
        uploaded_s = time.perf_counter()
        if self._smoothing:
            voxels = self._smoothing.push(voxels)
        smoothed_s = time.perf_counter()
        self._baseline.push(voxels, members)
        subtracted_s = time.perf_counter()
        roi = self._roi.push(voxels, members)
        self._backend.synchronize()
        done_s = time.perf_counter()
        return Result(
            index=volume.index,
            time_s=volume.time_s,
            conditions=tuple(self.paradigm.conditions[c] for c in members),
            roi=roi,
            baseline_ready=self._baseline.ready,
            stage_ms={
                "decode": 1e3 * (volume.decoded_s - volume.arrived_s),
                "wait": 1e3 * (started_s - volume.decoded_s),
                "upload": 1e3 * (uploaded_s - started_s),
                "smooth": 1e3 * (smoothed_s - uploaded_s),
                "baseline": 1e3 * (subtracted_s - smoothed_s),
                "roi": 1e3 * (done_s - subtracted_s),
            },
            latency_ms=1e3 * (done_s - volume.arrived_s),
            deadline_missed=done_s - volume.arrived_s > (self._deadline_s or volume.tr_s),
        )

    def subtraction(self) -> dict[str, NDArray[np.float32]]:
        """Return the newest volume against the baseline before it.

        Returns
        -------
        dict of str to (x, y, z) float32
            ``difference`` in scanner units, ``psc`` in percent, ``z`` in baseline standard
            deviations; all 0 while there is no baseline (`Result.baseline_ready`).
        """
        maps = {name: self._image(m) for name, m in self._baseline.subtraction._asdict().items()}
        if not self._baseline.ready:
            for image in maps.values():
                image.fill(0)
        return maps

    def maps(self) -> dict[str, ConditionMaps]:
        """Return what the volumes so far say of each condition, the baseline first."""
        maps = {}
        for i, name in enumerate(self.paradigm.conditions):
            state = self._baseline.conditions[i]
            contrast = self._baseline.contrast(i) if i else None
            flats = contrast or (self._backend.zeros(self.grid.n_voxels),) * 3
            effect, psc, t = (self._image(flat) for flat in flats)
            mean = self._image(state.moments.mean)
            maps[name] = ConditionMaps(state.n_volumes, mean, effect, psc, t)
        return maps

    def roi_t(self) -> dict[str, dict[str, float]]:
        """Return Welch's t of the ROI signals, each condition against the baseline."""
        return {name: self._roi.t(i) for i, name in enumerate(self.paradigm.conditions) if i}

    def _image(self, flat: Array) -> NDArray[np.float32]:
        return unflatten(self._backend.download(flat), self.grid.shape)

    def _check(self, volume: Volume) -> None:
        if not volume.grid.matches(self.grid):
            raise VolumeError("another shape or position than the run's first volume")
        if volume.data.dtype != self.dtype:
            raise VolumeError("another voxel type than the run's first volume")

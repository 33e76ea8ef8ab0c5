"""The general linear model: what each voxel does for the task, known after every volume.

Recursive least squares in its stable form. The design's triangular factor R and each voxel's
coordinates z = Q'y are brought up to date by one Givens rotation a column (Golub 1965, Numer.
Math. 7:206; Gentleman 1973, JIMA 12:329). That is exact from the first volume on and needs no
start values; a column that says nothing yet (a condition that has not come, motion that has not
happened) is left out until it does. A contrast c is estimated by ``c'b = w'z`` with ``R'w = c``,
and its t is the unit vector of w times z, over the residuals' standard deviation: nothing is
inverted, so float32 is enough for voxels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfmri.anytime import MixtureTest
from rtfmri.backends import POSE_FIELDS, Array, Backend, Contrasts, new_design, new_fit
from rtfmri.config import GlmSettings
from rtfmri.design import Design
from rtfmri.errors import ConfigError
from rtfmri.stages.region import copied_to, region_of

Floats = NDArray[np.float64]

MIN_RESIDUAL_DOF = 12
"""Residual degrees of freedom that the warm-up of ar1 must leave."""
MEMORY_FWHM_MM = 15.0
"""How far a voxel's noise is told from its neighbours', as Worsley 2002 does (NeuroImage 15:1)."""
MEMORY_STEP, MOST_MEMORY = 0.02, 0.9
"""Voxels whose lag-1 autocorrelations are within one such step share a noise class."""
_MEMORIES = np.linspace(0, MOST_MEMORY, 10)
"""Where the bias is tabulated; between them it is all but a line."""
_NODES, _AT_A_TIME = 64, 16_384
_AS_IT_IS = np.array([1.0, 0.0])


@dataclass(frozen=True, eq=False, slots=True)
class ContrastMaps:
    """One contrast after the volumes so far, per voxel: (n_voxels,), or (x, y, z) of a pipeline.

    Parameters
    ----------
    kind : {"t", "F"}
    dof : int
        Residual degrees of freedom; 0 while nothing can be said, or the contrast asks for what the
        rest of the design explains as well.
    n_rows : int
        Degrees of freedom of the contrast: 1 for t.
    statistic : float32
        t or F; 0 where it cannot be said.
    effect : float32 or None
        The contrast of the coefficients, in scanner units; None for F.
    variance : float32 or None
        Of the effect.
    log_e : float32 or None
        Natural logarithm of the anytime-valid e-value (`rtfmri.anytime`); None for F.
    """

    kind: Literal["t", "F"]
    dof: int
    n_rows: int
    statistic: NDArray[np.float32]
    effect: NDArray[np.float32] | None = None
    variance: NDArray[np.float32] | None = None
    log_e: NDArray[np.float32] | None = None

    def each(self, change: Callable[[NDArray[Any]], Any]) -> "ContrastMaps":
        """Return the same with *change* made to every map."""
        maps = {name: getattr(self, name) for name in ("statistic", "effect", "variance", "log_e")}
        return replace(self, **{name: change(m) for name, m in maps.items() if m is not None})


class GlmStage:
    """Fits the design to each voxel, volume by volume.

    With ``noise = "ar1"`` a voxel's noise is taken for first-order autoregressive. The first
    `GlmSettings.ar1_warm_up_volumes` usable volumes are kept, and fitted as independent. Then each
    voxel's lag-1 autocorrelation is estimated from their residuals (smoothed by *smooth*, without
    the bias that a fit brings), and rounded to classes; the kept volumes are fitted again,
    whitened, and so is each one after them. The fit then equals generalised least squares with
    that noise, also across volumes that are missing or were not usable.

    Parameters
    ----------
    backend : Backend
        What executes it.
    n_voxels : int
        Voxels of a volume.
    design : Design
    settings : GlmSettings
    smooth : callable, optional
        Smooths a map, (n_voxels,) float32 on the host, in space; by default not at all.

    Raises
    ------
    ConfigError
        If the warm-up of ar1 is too short for the design.

    Attributes
    ----------
    statistics : (n_contrasts, n_voxels) float32
        On the backend: t or F of each contrast after the volume pushed last.
    whitened : bool
        Whether the noise's memory is known, and not 0, and taken out.
    """

    def __init__(
        self,
        backend: Backend,
        n_voxels: int,
        design: Design,
        settings: GlmSettings,
        smooth: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> None:
        self.design, self._backend, self._settings = design, backend, settings
        self._n_voxels, self._smooth = n_voxels, smooth
        weights = np.concatenate(
            [np.zeros((0, len(design.columns))), *(c.weights for c in design.contrasts)]
        )
        self._contrasts = Contrasts(
            backend.copy(weights),
            backend.copy(
                np.cumsum([0, *(len(c.weights) for c in design.contrasts)], dtype=np.int32)
            ),
            backend.copy(np.array([c.kind == "F" for c in design.contrasts], np.int32)),
        )
        asked = np.flatnonzero(weights.any(axis=0))
        self._first_column = int(asked[0]) if asked.size else 0
        self.statistics = backend.zeros((len(design.contrasts), n_voxels))
        self.whitened = False
        self._memory: Floats = np.zeros(1)
        self._labels = np.zeros(n_voxels, np.int32)
        self._no_pose = backend.zeros(len(POSE_FIELDS), np.float64)
        self._rows: list[Floats] = []
        self._indices: list[int] = []
        self._last_index, self._index = -1, -1
        self._ring: Array | None = None
        if settings.noise == "ar1":
            n = settings.ar1_warm_up_volumes
            if n < len(design.columns) + MIN_RESIDUAL_DOF:
                raise ConfigError(
                    f"glm.ar1_warm_up_volumes must be at least {MIN_RESIDUAL_DOF} more than the "
                    f"{len(design.columns)} columns of the design, got {n}"
                )
            self._ring = backend.zeros((n, n_voxels))
            self._everything = copied_to(backend, region_of(np.ones((n_voxels, 1, 1), np.bool_)))
        self._start(n_classes=1)

    @property
    def warming_up(self) -> bool:
        """Whether the noise's memory is still to be estimated."""
        return self._ring is not None

    def told(self, index: int, row: Floats | None = None) -> Floats:
        """Return what is known of volume *index* before it comes, (n,), for `push`.

        Its *row* of the design is taken from there, where it is not known better.
        """
        self.catch_up()
        self._index = index
        row = self.design.row(index) if row is None else row
        return np.concatenate([row, self._whitening(index)])

    def push(
        self,
        volume: Array,
        told: Array,
        row: Array,
        pose: Array | None = None,
        usable: Array | None = None,
    ) -> None:
        """Take a volume into the fit.

        Parameters
        ----------
        volume : (n_voxels,) float32
            On the backend.
        told : (n,) float64
            On the backend: what `told` returned for it.
        row : (n_columns,) float64
            On the backend, overwritten with the volume's row of the design.
        pose : (n,) float64, optional
            On the backend, as `POSE_FIELDS`: motion, where *told* does not have it yet.
        usable : (1,) float32, optional
            On the backend; 0 leaves the fit as it is, None says 1. `settle` is to be called with
            the same.
        """
        self._fit(volume, told, row, pose, usable)
        if self._ring is not None:
            self._backend.gather(volume, self._everything, None, self._ring[len(self._rows)])

    def settle(self, row: Floats, usable: bool = True) -> None:
        """Count the volume that was pushed last, if it was usable.

        Parameters
        ----------
        row : (n_columns,) float64
            Its row of the design, on the host.
        usable : bool
        """
        if not usable:
            return
        self._last_index = self._index
        if self._ring is not None:
            self._rows.append(np.array(row))
            self._indices.append(self._index)

    def catch_up(self) -> None:
        """Do what may wait until a result is out: the end of ar1's warm-up, where it is due.

        It costs as much as all volumes so far together. Whatever needs it does it.
        """
        if self._ring is not None and len(self._rows) == len(self._ring):
            self._whiten()

    def maps(self) -> dict[str, ContrastMaps]:
        """Return what the volumes so far say of each contrast, on the host."""
        self.catch_up()
        download = self._backend.download
        statistics, counts = download(self.statistics), download(self._state.counts)
        scales = download(self._step.scales)[self._labels]
        dof = np.maximum(counts[:, 0] - counts[:, 1], 0)[self._labels]
        squares = np.empty(self._n_voxels)
        squares[download(self._voxels.order)] = download(self._voxels.squares)
        noise = np.sqrt(squares / np.maximum(dof, 1))
        found, at = {}, 0
        for contrast, statistic in zip(self.design.contrasts, statistics, strict=True):
            scale, n_rows = scales[:, at], len(contrast.weights)
            at += n_rows
            least_dof = int(dof.min()) if scale.any() else 0
            maps = ContrastMaps(contrast.kind, least_dof, n_rows, statistic)
            if contrast.kind == "t":
                error = noise * scale
                maps = replace(
                    maps,
                    effect=(statistic * error).astype(np.float32),
                    variance=(error**2).astype(np.float32),
                    log_e=self._log_e_values(statistic, scale, dof),
                )
            found[contrast.name] = maps
        return found

    def test(self, contrast: str, voxel: int) -> MixtureTest:
        """Return the anytime-valid test of a t contrast at one voxel, after the volumes so far.

        As long as the noise's memory is to be estimated, it says nothing.
        """
        self.catch_up()
        names = [c.name for c in self.design.contrasts for _ in c.weights]
        label = self._labels[voxel]
        scale = self._backend.download(self._step.scales)[label, names.index(contrast)]
        n, rank = self._backend.download(self._state.counts)[label]
        return self._mixture(scale, n - rank)

    def adjusted(self, volume: NDArray[np.float64], row: Floats) -> Floats:
        """Return a volume without its drift, motion and confounds, in percent of its level.

        What is taken out is what the fit to all volumes so far, this one included, says of them;
        the level is the constant's. So the task stays, and so does noise.

        Parameters
        ----------
        volume : (n_voxels,) float64
            On the host, as `push` got it.
        row : (n_columns,) float64
            Its row of the design.

        Returns
        -------
        (n_voxels,) float64
            nan while there are no more volumes than the design has columns that vary, and where
            the level is not above 0.
        """
        download = self._backend.download
        factors, counts = download(self._state.factor), download(self._state.counts)
        order = download(self._voxels.order)
        coordinates = download(self._voxels.coordinates).astype(np.float64)
        nuisance = row.copy()
        nuisance[self.design.conditions] = 0
        adjusted = np.full(self._n_voxels, np.nan)
        for label, (factor, (n, rank)) in enumerate(zip(factors, counts, strict=True)):
            members = np.flatnonzero(self._labels[order] == label)
            if n <= rank or not members.size:
                continue
            known = np.diag(factor) > 0
            fitted = coordinates[np.ix_(known, members)]
            weights = np.linalg.solve(factor[np.ix_(known, known)], fitted)
            start, voxels = download(self._voxels.origin)[members], order[members]
            level = start + weights[0]
            rest = volume[voxels] - start - nuisance[known] @ weights
            np.divide(100 * rest, level, out=rest, where=level > 0)
            adjusted[voxels] = np.where(level > 0, rest, np.nan)
        return adjusted

    def memory(self) -> NDArray[np.float32]:
        """Return the lag-1 autocorrelation that is taken out of each voxel, (n_voxels,)."""
        self.catch_up()
        return self._memory[self._labels].astype(np.float32)

    def _mixture(self, scale: float, dof: float) -> MixtureTest:
        information = 1 / scale**2 if scale > 0 and not self.warming_up else 0.0
        return MixtureTest(float(dof), float(information), self._settings.prior_sd)

    def _log_e_values(
        self, t: NDArray[np.float32], scale: Floats, dof: Floats
    ) -> NDArray[np.float32]:
        values = np.zeros(t.shape, np.float32)
        for label in range(len(self._memory)):
            inside = np.flatnonzero(self._labels == label)
            if inside.size:
                test = self._mixture(scale[inside[0]], dof[inside[0]])
                values[inside] = test.log_e_value(t[inside])
        return values

    def _start(self, n_classes: int) -> None:
        """Forget all volumes; voxels are in the noise classes that they have labels of."""
        n_rows, p = self._contrasts.weights.shape
        self._state, self._step = new_design(self._backend, n_classes, n_rows, p)
        self._voxels = new_fit(self._backend, p, self._labels, whitened=self.whitened)

    def _fit(
        self, volume: Array, told: Array, row: Array, pose: Array | None, usable: Array | None
    ) -> None:
        p = len(self.design.columns)
        self._backend.update_design(
            told[:p],
            self._no_pose if pose is None else pose,
            told[p:],
            self._contrasts,
            self._state,
            self._step,
            row,
            motion_at=-1 if pose is None else self.design.motion_at,
            usable=usable,
        )
        self._backend.update_glm(
            volume,
            self._voxels,
            self._contrasts,
            self._step,
            self.statistics,
            whitened=self.whitened,
            first_column=self._first_column,
            usable=usable,
        )

    def _whitening(self, index: int) -> Floats:
        """Return the weights of a volume and of the usable one before it, (2 * n_classes,).

        Given that one, g volumes earlier, the noise is ``memory**g`` of its, plus what is new; all
        are scaled so that what is new has the variance that it has from one volume to the next.
        """
        if not self.whitened:
            return _AS_IT_IS
        memory, gap = self._memory, index - self._last_index
        carried = memory**gap if self._last_index >= 0 else np.zeros_like(memory)
        gain = np.sqrt((1 - memory**2) / (1 - carried**2))
        return np.column_stack([gain, gain * carried]).ravel()

    def _whiten(self) -> None:
        """Estimate the noise's memory from the volumes kept, and fit them again without it."""
        backend = self._backend
        rows, indices = np.array(self._rows), np.array(self._indices)
        ratios = _lag_one_ratios(backend.download(self._ring), rows)
        if self._smooth:
            ratios = self._smooth(ratios)
        memory = _memory_of(ratios, rows, indices)
        steps = np.rint(memory / MEMORY_STEP).astype(np.int32)
        classes, labels = np.unique(steps, return_inverse=True)
        self._memory = np.asarray(classes * MEMORY_STEP, np.float64)
        self.whitened = bool(self._memory.any())
        self._labels = labels.astype(np.int32)
        ring: Any = self._ring
        self._ring = None
        self._rows, self._indices = [], []
        if not self.whitened:
            return
        self._start(len(classes))
        self._last_index = -1
        scratch = backend.zeros(rows.shape[1], np.float64)
        for volume, row, index in zip(ring, rows, indices.tolist(), strict=True):
            told = np.concatenate([row, self._whitening(index)])
            self._fit(volume, backend.upload(told), scratch, None, None)
            self._last_index = index


def _residual_maker(rows: Floats) -> Floats:
    """Return M, which takes from any series what the design explains, (n, n)."""
    q, r = np.linalg.qr(rows / np.maximum(np.linalg.norm(rows, axis=0), 1e-300))
    q = q[:, np.abs(np.diag(r)) > 1e-7]
    return np.asarray(np.eye(len(rows)) - q @ q.T)


def _lag_one_ratios(volumes: NDArray[np.float32], rows: Floats) -> NDArray[np.float32]:
    """Return sum r(k) r(k + 1) / sum r(k)^2 of each voxel's residuals, (n_voxels,); 0 without any.

    Parameters
    ----------
    volumes : (n, n_voxels) float32
    rows : (n, n_columns) float64
        Of the design.
    """
    project = _residual_maker(rows).astype(np.float32)
    ratios = np.zeros(volumes.shape[1], np.float32)
    for start in range(0, ratios.size, _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        residuals = project @ (volumes[:, part] - volumes[0, part])
        squares = np.einsum("kv,kv->v", residuals, residuals)
        products = np.einsum("kv,kv->v", residuals[1:], residuals[:-1])
        np.divide(products, squares, out=ratios[part], where=squares > 0)
    return ratios


def _memory_of(
    ratios: NDArray[np.float32], rows: Floats, indices: NDArray[np.int_]
) -> NDArray[np.float64]:
    """Return the autocorrelation whose residuals have these lag-one ratios on average.

    Residuals understate it, the more so the fewer volumes and the more columns there are: so what
    they show on average is tabulated for noise of each memory, and read backwards. (Worsley 2002,
    NeuroImage 15:1, appendix A, corrects numerator and denominator; this is their ratio.)

    Parameters
    ----------
    ratios : (n_voxels,) float32
    rows : (n, n_columns) float64
        Of the design.
    indices : (n,) int
        Positions in the run, which tell the distances between the volumes.
    """
    table = _mean_lag_one_ratios(rows.tobytes(), tuple(indices.tolist()))
    return np.interp(ratios, table, _MEMORIES)


@lru_cache(maxsize=1)  # voxels and regions have the same rows
def _mean_lag_one_ratios(rows: bytes, indices: tuple[int, ...]) -> list[float]:
    """Return what `_lag_one_ratios` has on average for noise of each of `_MEMORIES`."""
    project = _residual_maker(np.frombuffer(rows).reshape(len(indices), -1))
    distance = np.abs(np.subtract.outer(indices, indices))
    return [_mean_lag_one_ratio(project, memory**distance) for memory in _MEMORIES]


def _mean_lag_one_ratio(project: Floats, covariance: Floats) -> float:
    """Return what `_lag_one_ratios` has on average, for Gaussian noise of *covariance*, (n, n).

    It is a ratio of quadratic forms, e'Ae / e'Be. With the eigenvalues b of B and the diagonal a
    of A in its eigenvectors, both seen from white noise, the mean is the integral over s > 0 of
    ``sum(a / (1 + 2 b s)) / sqrt(prod(1 + 2 b s))`` (Sawa 1978, Econometrica 46:155; Magnus 1986,
    Ann. Econ. Stat. 4:95); here by Gauss-Legendre, s = x / (1 - x) over the mean of b.
    """
    residuals = project @ np.linalg.cholesky(covariance)
    products = residuals[1:].T @ residuals[:-1]
    b, vectors = np.linalg.eigh(residuals.T @ residuals)
    a = np.einsum("ik,ij,jk->k", vectors, (products + products.T) / 2, vectors)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    x = (1 + nodes) / 2
    s = x / (1 - x) / b.sum()
    grown = 1 + 2 * np.outer(s, np.maximum(b, 0))
    integrand = (a / grown).sum(axis=1) / np.sqrt(grown.prod(axis=1))
    return float((weights / 2 * integrand / (1 - x) ** 2).sum() / b.sum())

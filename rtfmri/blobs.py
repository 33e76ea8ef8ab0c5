"""From a map of t or F to blobs: what is above a threshold, and where it lies.

A threshold is a matter of how often one may be wrong: per voxel (t, z, p), in any voxel of the
map (bonferroni), or in a share of those that are shown (fdr). These hold for a map that is looked
at once. ``anytime`` and ``e-bh`` are the last two for a map that is looked at after every volume,
see `rtfmri.anytime`.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from rtfmri.anytime import MixtureTest, e_bh
from rtfmri.atlas import Atlas
from rtfmri.errors import ConfigError, GridError
from rtfmri.stages.glm import ContrastMaps
from rtfmri.volume import Grid

Floats = NDArray[np.float64]
Map = NDArray[np.float32]
Mask = NDArray[np.bool_]
Point = tuple[float, float, float]

Method = Literal["t", "z", "p", "bonferroni", "fdr", "anytime", "e-bh"]
METHODS: tuple[Method, ...] = get_args(Method)
"""The ways to set a threshold, see `threshold`."""

_MAX_Z, _MIN_CHANCE = 20.0, 1e-80
"""Levels beyond these are refused: far from there, the tails can no longer be told in float64."""
_RANKS = {6: 1, 18: 2, 26: 3}
"""Neighbours of a voxel, by how many axes they may differ in: a face, an edge, a corner shared."""


@dataclass(frozen=True, eq=False, slots=True)
class StatMap:
    """A map of t or F and what it is distributed as where nothing happens.

    Parameters
    ----------
    values : (x, y, z) float32
        The statistic; 0 where nothing is known, which values that are not finite become.
    kind : {"t", "F"}
        Which of them.
    dof : float
        Residual degrees of freedom, finite. Below 1 nothing is known.
    dof_between : int
        Of F's numerator, 1 or more.
    test : MixtureTest, optional
        The e-values of a t map whose voxels all have the same design.
    log_e : (x, y, z) float32, optional
        Natural logarithms of the e-values of a t map, instead of *test*; not finite is as 0.

    Raises
    ------
    GridError
        If *values* is not 3-D or *log_e* has another shape.
    ConfigError
        If kind, degrees of freedom or e-values break the rules above.
    """

    values: Map
    kind: Literal["t", "F"]
    dof: float
    dof_between: int = 1
    test: MixtureTest | None = None
    log_e: Map | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("t", "F"):
            raise ConfigError(f"kind must be t or F, got {self.kind!r}")
        if self.dof == math.inf:
            raise ConfigError(f"dof must be finite, got {self.dof}")
        if not self.dof_between >= 1:
            raise ConfigError(f"dof_between must be 1 or more, got {self.dof_between}")
        if self.kind == "F" and not (self.test is None and self.log_e is None):
            raise ConfigError("test and log_e must be left out of an F map, they are of t maps")
        values = _finite(self.values)
        if values.ndim != 3:
            raise GridError(f"values must be (x, y, z), got shape {values.shape}")
        object.__setattr__(self, "values", values)
        if self.log_e is not None:
            _check_shape("log_e", self.log_e, values.shape)
            object.__setattr__(self, "log_e", _finite(self.log_e))

    @classmethod
    def of(cls, maps: ContrastMaps) -> Self:
        """Return the map of a contrast of the general linear model, as (x, y, z)."""
        return cls(maps.statistic, maps.kind, maps.dof, maps.n_rows, log_e=maps.log_e)

    def log_e_values(self) -> Floats:
        """Return the natural logarithm of each voxel's e-value, (x, y, z) float64.

        Raises
        ------
        ConfigError
            If the map has neither *log_e* nor *test*.
        """
        if self.log_e is not None:
            return self.log_e.astype(np.float64)
        if self.test is not None:
            return self.test.log_e_value(self.values)
        raise ConfigError(f"e-values need test or log_e of a t map, got a {self.kind} map without")


@dataclass(frozen=True, eq=False, slots=True)
class Threshold:
    """What of a map is above a threshold.

    Parameters
    ----------
    above : (x, y, z) bool
        The voxels.
    statistic : float
        The critical F, t, or t without its sign if two-sided. Where the data set it (fdr, e-bh) or
        it differs between voxels (*log_e*), the smallest one above. inf if no value reaches it.
    text : str
        The threshold in words, such as ``|t| >= 4.9 (Bonferroni, 5 %)``.
    """

    above: Mask
    statistic: float
    text: str


@dataclass(frozen=True, slots=True)
class Blob:
    """One cluster of neighbours that are above the threshold with the same sign.

    Parameters
    ----------
    label : int
        Its number in the volume that `label_blobs` returns, from 1.
    n_voxels : int
        How many.
    volume_mm3 : float
        And what they fill.
    peak : float
        The statistic that is largest without its sign, with its sign.
    peak_mm : (float, float, float)
        Its place in scanner mm, RAS+.
    centre_mm : (float, float, float)
        Centre of mass, the voxels weighted by their statistics without signs, in scanner mm.
    peak_mni_mm : (float, float, float), optional
        The peak's place in MNI mm, where the way there is known.
    region : str, optional
        The atlas' name of that place, where it has one.
    """

    label: int
    n_voxels: int
    volume_mm3: float
    peak: float
    peak_mm: Point
    centre_mm: Point
    peak_mni_mm: Point | None = None
    region: str | None = None


def threshold(
    stat: StatMap, mask: Mask, method: Method, level: float, two_sided: bool = True
) -> Threshold:
    """Find what of a map is above a threshold.

    Parameters
    ----------
    stat : StatMap
        The map. What is 0 is never above.
    mask : (x, y, z) bool
        The voxels that are looked at, and counted where their number matters.
    method : str
        - ``t``: the statistic itself, also of an F map, is *level* or more.
        - ``z``: as rare as a normal variate of *level*, at most 20.
        - ``p``: the chance of so large a value in this voxel is at most *level*.
        - ``bonferroni``: the chance that any voxel is wrong is at most *level*: p at most
          ``level / m`` (m voxels).
        - ``fdr``: of the voxels above, the share that is wrong is at most *level* on average
          (Benjamini & Hochberg 1995, JRSS B 57:289).
        - ``anytime``: as bonferroni, however often one looks: e-values of ``m / level`` or more,
          by Ville's inequality in each voxel.
        - ``e-bh``: as fdr, however often one looks and however the voxels depend on each other
          (`rtfmri.anytime.e_bh`).
    level : float
        Above 0; where it is a chance, 1e-80 or more and below 1.
    two_sided : bool
        Whether negative t count as well; the chance is that of both sides. Otherwise only positive
        values can be above (with e-values of both sides, which errs on the safe side). F has only
        one side.

    Returns
    -------
    threshold : Threshold
        None above, and that is no error, if nothing reaches it, *mask* is empty, or the degrees of
        freedom are below 1.

    Raises
    ------
    ConfigError
        If method or level break the rules above, or the method needs e-values of a map without.
    GridError
        If *mask* has another shape than the map.
    """
    _check_level(method, level)
    _check_shape("mask", mask, stat.values.shape)
    tails = 2 if two_sided and stat.kind == "t" else 1
    sizes = (np.abs(stat.values) if tails == 2 else stat.values).astype(np.float64)
    log_e = stat.log_e_values() if method in ("anytime", "e-bh") else None
    if not (stat.dof >= 1 and mask.any()):
        return Threshold(np.zeros(mask.shape, bool), math.inf, "nothing is known yet")
    symbol = "|t|" if tails == 2 else stat.kind
    if log_e is None:
        statistic = _critical(stat, sizes[mask], method, level, tails)
        above = mask & (sizes > 0) & (sizes >= statistic)
        return Threshold(above, statistic, _text(symbol, statistic, method, level))
    log_e = np.where(sizes > 0, log_e, -np.inf)
    m = int(mask.sum())
    least = math.log(m / level) if method == "anytime" else e_bh(log_e[mask], level)
    above = mask & (log_e >= least)
    if stat.log_e is None and stat.test is not None:
        statistic = float(stat.test.critical_t(least))
        return Threshold(above, statistic, _text(symbol, statistic, method, level))
    text = _text("log10(e)", least / math.log(10), method, level)
    return Threshold(above, float(sizes[above].min(initial=np.inf)), text)


def label_blobs(values: NDArray[Any], above: Mask, connectivity: int = 26) -> NDArray[np.int32]:
    """Give a number to each cluster of a map, those of positive and negative values apart.

    Parameters
    ----------
    values : (x, y, z) float
        The map, finite.
    above : (x, y, z) bool
        Its voxels above the threshold; those of value 0 belong to no cluster.
    connectivity : {26, 18, 6}
        Neighbours of a voxel: all that touch it, not those at its corners, only those that share a
        face.

    Returns
    -------
    labels : (x, y, z) int32
        0 outside, then 1, 2, ... in no order of importance.

    Raises
    ------
    ConfigError
        If *connectivity* is none of the three.
    """
    from scipy.ndimage import generate_binary_structure, label

    if connectivity not in _RANKS:
        raise ConfigError(f"connectivity must be 6, 18 or 26, got {connectivity}")
    neighbours = generate_binary_structure(3, _RANKS[connectivity])
    labels = np.zeros(above.shape, np.int32)
    for side in (values > 0, values < 0):
        numbers, _ = label(above & side, neighbours)
        labels += np.where(numbers > 0, numbers + labels.max(), 0).astype(np.int32)
    return labels


def find_blobs(
    stat: StatMap,
    above: Mask,
    grid: Grid,
    connectivity: int = 26,
    min_voxels: int = 1,
    to_mni: Floats | None = None,
    atlas: Atlas | None = None,
) -> tuple[Blob, ...]:
    """Find the blobs of a map, those with the largest peaks first.

    Parameters
    ----------
    stat : StatMap
        The map.
    above : (x, y, z) bool
        Its voxels above the threshold.
    grid : Grid
        Of the map.
    connectivity : {26, 18, 6}
        As for `label_blobs`.
    min_voxels : int
        Smaller blobs are left out; 1 or more.
    to_mni : (4, 4) float64, optional
        Scanner mm to MNI mm.
    atlas : Atlas, optional
        That names the peaks; needs *to_mni*.

    Returns
    -------
    blobs : tuple of Blob
        Empty if nothing is above. Of equal voxels, the peak is the first in the order of x, then
        y, then z.

    Raises
    ------
    ConfigError
        If a setting breaks the rules above.
    GridError
        If map, *above* and *grid* differ in shape, or *to_mni* is not 4x4 and finite.
    """
    _check_shape("above", above, stat.values.shape)
    _check_shape("values", stat.values, grid.shape)
    if min_voxels < 1:
        raise ConfigError(f"min_voxels must be 1 or more, got {min_voxels}")
    if to_mni is not None and not (np.shape(to_mni) == (4, 4) and np.isfinite(to_mni).all()):
        raise GridError(f"to_mni must be 4x4 and finite, got {np.asarray(to_mni).tolist()}")
    if atlas is not None and to_mni is None:
        raise ConfigError("to_mni must be given where an atlas is, it brings the peaks there")
    labels = label_blobs(stat.values, above, connectivity)
    voxels, numbers = np.argwhere(labels), labels[labels > 0]
    values = stat.values[labels > 0].astype(np.float64)
    # Blob by blob, each from its largest value down; voxels of equal value keep their order.
    order = np.lexsort((-np.abs(values), numbers))
    starts = np.flatnonzero(np.diff(numbers[order], prepend=0))
    members = [part for part in np.split(order, starts[1:]) if len(part) >= min_voxels]
    members.sort(key=lambda part: -abs(values[part[0]]))
    return tuple(
        _blob(int(numbers[part[0]]), voxels[part], values[part], grid, to_mni, atlas)
        for part in members
    )


def table(blobs: Sequence[Blob]) -> list[dict[str, Any]]:
    """Return a row for each blob, in the columns of `nilearn.reporting.get_clusters_table`.

    Further columns have the number of voxels and the centre of mass; MNI place and region follow
    where any blob has one, with an empty text for a blob without.
    """
    columns = _columns(blobs)
    return [dict(zip(columns, _cells(i, blob), strict=False)) for i, blob in enumerate(blobs, 1)]


def write_table(blobs: Sequence[Blob], path: str | Path) -> None:
    """Write `table` as tab-separated values with a header, six digits to a number.

    What is unknown is ``n/a``, as in BIDS. No blobs are a header alone.
    """
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(_columns(blobs))
        for row in table(blobs):
            cells = (f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row.values())
            writer.writerow("n/a" if cell == "" else cell for cell in cells)


def _blob(
    label: int,
    voxels: NDArray[np.int64],
    values: Floats,
    grid: Grid,
    to_mni: Floats | None,
    atlas: Atlas | None,
) -> Blob:
    """Describe the blob of *voxels* (n, 3) with *values* (n,), its peak first."""
    peak_mm = _moved(grid.affine, voxels[0])
    mni_mm = None if to_mni is None else _moved(to_mni, peak_mm)
    return Blob(
        label=label,
        n_voxels=len(voxels),
        volume_mm3=len(voxels) * abs(float(np.linalg.det(grid.affine[:3, :3]))),
        peak=float(values[0]),
        peak_mm=peak_mm,
        centre_mm=_moved(grid.affine, np.average(voxels, axis=0, weights=np.abs(values))),
        peak_mni_mm=mni_mm,
        region=None if atlas is None or mni_mm is None else atlas.region_at(mni_mm),
    )


def _columns(blobs: Sequence[Blob]) -> list[str]:
    """Return the columns that the blobs fill, always from the left."""
    columns = ["Cluster ID", "X", "Y", "Z", "Peak Stat", "Cluster Size (mm3)", "Voxels"]
    columns += ["Centre X", "Centre Y", "Centre Z"]
    if any(blob.peak_mni_mm is not None for blob in blobs):
        columns += ["MNI X", "MNI Y", "MNI Z"]
        if any(blob.region is not None for blob in blobs):
            columns.append("Region")
    return columns


def _cells(number: int, blob: Blob) -> list[Any]:
    cells = [number, *blob.peak_mm, blob.peak, blob.volume_mm3, blob.n_voxels, *blob.centre_mm]
    return [*cells, *(blob.peak_mni_mm or ("", "", "")), blob.region or ""]


def _critical(stat: StatMap, sizes: Floats, method: Method, level: float, tails: int) -> float:
    """Return the critical value of the statistic, whose *sizes* (voxels,) have so many *tails*."""
    from scipy import stats

    if method == "t":
        return level
    if method == "fdr":
        null = stats.t(stat.dof) if stat.kind == "t" else stats.f(stat.dof_between, stat.dof)
        p = np.minimum(tails * null.sf(sizes), 1)
        rejected = stats.false_discovery_control(p) <= level
        return float(sizes[rejected].min(initial=np.inf))
    p_of_one_tail = {
        "z": float(stats.norm.sf(level)),
        "p": level / tails,
        "bonferroni": level / tails / sizes.size,
    }[method]
    if stat.kind == "F":
        return _critical_f(p_of_one_tail, stat.dof_between, stat.dof)
    # t^2 is F with 1 and dof degrees of freedom.
    return math.sqrt(_critical_f(min(2 * p_of_one_tail, 1), 1, stat.dof))


def _critical_f(p: float, dof_between: int, dof: float) -> float:
    """Return the F above which the tail is *p*: Abramowitz & Stegun 1964, 26.6.2, solved for F.

    `scipy.stats.f.isf` loses digits from p = 1e-10 down and is soon inf.
    """
    from scipy.special import betaincinv

    x = float(betaincinv(dof / 2, dof_between / 2, p))
    return dof * (1 - x) / (dof_between * x)


def _text(symbol: str, least: float, method: Method, level: float) -> str:
    reasons = {
        "t": "",
        "z": f" (z of {level:g})",
        "p": f" (p of {level:g}, uncorrected)",
        "bonferroni": f" (Bonferroni, {100 * level:g} %)",
        "fdr": f" (FDR, {100 * level:g} %)",
        "anytime": f" (anytime Bonferroni, {100 * level:g} %)",
        "e-bh": f" (anytime FDR, {100 * level:g} %)",
    }
    reached = f"{symbol} >= {least:.3g}" if least < math.inf else "nothing"
    return reached + reasons[method]


def _check_level(method: Method, level: float) -> None:
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "t":
        rule, kept = "above 0 and finite", 0 < level < math.inf
    elif method == "z":
        rule, kept = f"above 0 and at most {_MAX_Z:g}", 0 < level <= _MAX_Z
    else:
        rule, kept = f"{_MIN_CHANCE:g} or more and below 1", _MIN_CHANCE <= level < 1
    if not kept:
        raise ConfigError(f"level must be {rule} for method {method}, got {level}")


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        raise GridError(f"{name} must be of shape {shape}, got {np.shape(array)}")


def _finite(array: NDArray[Any]) -> Map:
    return np.nan_to_num(np.asarray(array, np.float32), nan=0, posinf=0, neginf=0)


def _moved(affine: Floats, point: Any) -> Point:
    x, y, z = (affine @ [*point, 1])[:3]
    return float(x), float(y), float(z)

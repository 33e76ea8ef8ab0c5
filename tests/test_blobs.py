"""Thresholds against their definitions and their promised error rates; blobs that were planted."""

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rtfmri.anytime import MixtureTest, e_bh
from rtfmri.atlas import Atlas
from rtfmri.blobs import (
    METHODS,
    Blob,
    Method,
    StatMap,
    find_blobs,
    label_blobs,
    table,
    threshold,
    write_table,
)
from rtfmri.errors import ConfigError, GridError
from rtfmri.export import to_nifti
from rtfmri.volume import Grid

SHAPE = (12, 11, 10)
SIGMAS = 4
"""Error rates may be off by this many standard deviations of their estimate."""


def rotation(degrees: float, axis: int) -> NDArray[np.float64]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.eye(3)
    first, second = (i for i in range(3) if i != axis)
    turn[first, first], turn[first, second] = c, -s
    turn[second, first], turn[second, second] = s, c
    return turn


def oblique(shape: tuple[int, int, int] = SHAPE) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = rotation(20, 0) @ rotation(-12, 2) @ np.diag([-2.0, 2.5, 3.0])
    affine[:3, 3] = [11.0, -23.0, 5.0]
    return Grid(shape, affine)


def a_t_map(seed: int = 0, dof: float = 40, shape: tuple[int, int, int] = SHAPE) -> StatMap:
    """Noise with an effect in a tenth of the voxels, of either sign."""
    rng = np.random.default_rng(seed)
    t = rng.standard_t(dof, shape)
    t += np.where(rng.random(shape) < 0.1, rng.choice([-5, 5], shape), 0)
    test = MixtureTest(dof, information=20.0)
    return StatMap(t.astype(np.float32), "t", dof, test=test)


def an_f_map(dof_between: int = 3, dof: float = 40) -> StatMap:
    f = np.random.default_rng(1).f(dof_between, dof, SHAPE)
    f[:2] *= 8
    return StatMap(f.astype(np.float32), "F", dof, dof_between)


def everywhere(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.bool_]:
    return np.ones(shape, bool)


def a_level(method: str) -> float:
    return {"t": 3.0, "z": 2.5}.get(method, 0.05)


def p_values(stat: StatMap, two_sided: bool) -> NDArray[np.float64]:
    values = stat.values.astype(np.float64)
    if stat.kind == "F":
        return np.asarray(stats.f.sf(values, stat.dof_between, stat.dof))
    if two_sided:
        return np.asarray(2 * stats.t.sf(np.abs(values), stat.dof))
    return np.asarray(stats.t.sf(values, stat.dof))


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("stat", [a_t_map(), an_f_map()], ids=["t", "F"])
def test_thresholds_of_one_look_are_those_of_the_p_values(stat: StatMap, two_sided: bool) -> None:
    mask = np.random.default_rng(2).random(SHAPE) < 0.7
    p = np.where(mask, p_values(stat, two_sided), 1)
    one_tail = p / 2 if stat.kind == "t" and two_sided else p
    adjusted = np.ones(SHAPE)
    adjusted[mask] = stats.false_discovery_control(p[mask])
    wanted: dict[Method, NDArray[np.bool_]] = {
        "p": p <= 0.05,
        "z": one_tail <= stats.norm.sf(2.5),
        "bonferroni": p <= 0.05 / mask.sum(),
        "fdr": adjusted <= 0.05,
    }
    for method, above in wanted.items():
        found = threshold(stat, mask, method, a_level(method), two_sided)
        assert found.above.any(), method
        assert np.array_equal(found.above, above & mask), method
        sizes = np.abs(stat.values) if two_sided else stat.values
        assert sizes[found.above].min() >= found.statistic
        assert not (found.statistic <= sizes[mask & ~found.above]).any()


def test_the_statistic_itself_is_a_threshold() -> None:
    stat = a_t_map()
    above = threshold(stat, everywhere(), "t", 3.0).above
    assert np.array_equal(above, np.abs(stat.values) >= 3)
    above = threshold(stat, everywhere(), "t", 3.0, two_sided=False).above
    assert np.array_equal(above, stat.values >= 3)
    f = an_f_map()
    assert np.array_equal(threshold(f, everywhere(), "t", 3.0).above, f.values >= 3)


def test_benjamini_hochberg_by_its_definition() -> None:
    stat = a_t_map()
    p = np.sort(p_values(stat, True).ravel())
    k = np.flatnonzero(p <= 0.05 * np.arange(1, p.size + 1) / p.size)[-1] + 1
    assert threshold(stat, everywhere(), "fdr", 0.05).above.sum() == k > 0


@pytest.mark.parametrize("dof", [1.0, 1.5, 5.0, 100.0, 1e6])
@pytest.mark.parametrize("p", [0.5, 1e-3, 1e-12, 1e-80])
def test_critical_values_have_the_tail_that_was_asked_for(dof: float, p: float) -> None:
    """To 1e-9: incomplete beta functions of 1e6 degrees of freedom keep 5 digits less than 1e-16.

    Two-sided p of t; that of F is 1 - (1 + 2 F / dof)^(-dof / 2) for 2 degrees of freedom.
    """
    zeros = np.zeros((2, 2, 2), np.float32)
    t = threshold(StatMap(zeros, "t", dof), everywhere((2, 2, 2)), "p", p).statistic
    assert 2 * stats.t.sf(t, dof) == pytest.approx(p, rel=1e-9)
    f = threshold(StatMap(zeros, "F", dof, 2), everywhere((2, 2, 2)), "p", p).statistic
    assert f == pytest.approx(dof / 2 * math.expm1(-2 / dof * math.log(p)), rel=1e-9)


def test_the_largest_values_do_no_harm() -> None:
    values = np.zeros(SHAPE, np.float32)
    values[1, 1, 1], values[3, 3, 3] = 1e30, -1e30
    largest = values != 0
    test = MixtureTest(200.0, information=1e4)
    for method in METHODS:
        level = 20.0 if method == "z" else a_level(method)
        found = threshold(StatMap(values, "t", 200.0, test=test), everywhere(), method, level)
        assert np.array_equal(found.above, largest), method
        if method not in ("anytime", "e-bh"):
            found = threshold(StatMap(np.abs(values), "F", 200.0, 3), everywhere(), method, level)
            assert np.array_equal(found.above, largest), method


@pytest.mark.parametrize("by_test", [True, False])
@pytest.mark.parametrize("two_sided", [True, False])
def test_e_values(by_test: bool, two_sided: bool) -> None:
    stat, mask = a_t_map(), np.random.default_rng(3).random(SHAPE) < 0.7
    assert stat.test is not None
    log_e = stat.test.log_e_value(stat.values)
    if not by_test:
        # Voxels that differ in what is known of them.
        log_e += np.random.default_rng(4).normal(0, 1, SHAPE)
        stat = StatMap(stat.values, "t", stat.dof, test=stat.test, log_e=log_e.astype(np.float32))
        log_e = np.asarray(stat.log_e, np.float64)
    if not two_sided:
        log_e = np.where(stat.values > 0, log_e, -np.inf)
    m = mask.sum()

    found = threshold(stat, mask, "anytime", 0.05, two_sided)
    assert found.above.any()
    assert np.array_equal(found.above, mask & (np.exp(log_e) >= m / 0.05))

    found = threshold(stat, mask, "e-bh", 0.05, two_sided)
    e = np.sort(np.exp(log_e[mask]))[::-1]
    k = np.flatnonzero(e >= m / (0.05 * np.arange(1, m + 1)))[-1] + 1
    assert found.above.sum() == k > 0
    assert np.array_equal(found.above, mask & (log_e >= e_bh(log_e[mask], 0.05)))
    assert found.statistic == pytest.approx(np.abs(stat.values[found.above]).min())


def test_e_values_of_one_test_have_a_critical_t() -> None:
    stat = a_t_map()
    assert stat.test is not None
    found = threshold(stat, everywhere(), "anytime", 0.05)
    log_e = stat.test.log_e_value(found.statistic)
    assert log_e == pytest.approx(math.log(np.prod(SHAPE) / 0.05))
    assert np.array_equal(found.above, np.abs(stat.values) >= found.statistic)


def test_a_threshold_says_what_it_is() -> None:
    stat, mask = StatMap(np.full((10, 10, 10), 9, np.float32), "t", 50), everywhere((10, 10, 10))
    text = {method: threshold(stat, mask, method, a_level(method)).text for method in METHODS[:5]}
    assert text == {
        "t": "|t| >= 3",
        "z": f"|t| >= {stats.t.isf(stats.norm.sf(2.5), 50):.3g} (z of 2.5)",
        "p": f"|t| >= {stats.t.isf(0.025, 50):.3g} (p of 0.05, uncorrected)",
        "bonferroni": f"|t| >= {stats.t.isf(0.025 / 1000, 50):.3g} (Bonferroni, 5 %)",
        "fdr": "|t| >= 9 (FDR, 5 %)",
    }
    assert threshold(stat, mask, "t", 3, two_sided=False).text == "t >= 3"
    assert threshold(StatMap(stat.values, "F", 50, 2), mask, "t", 3).text == "F >= 3"
    known = StatMap(stat.values, "t", 50, log_e=np.full((10, 10, 10), 20, np.float32))
    text_of_e = f"log10(e) >= {math.log10(1000 / 0.05):.3g} (anytime Bonferroni, 5 %)"
    assert threshold(known, mask, "anytime", 0.05).text == text_of_e
    dark = StatMap(np.zeros((10, 10, 10), np.float32), "t", 50)
    assert threshold(dark, mask, "fdr", 0.05).text == "nothing (FDR, 5 %)"


def maps_of_many_runs(n_runs: int, n_voxels: int, n_signal: int, dof: int) -> NDArray[np.float32]:
    """Student's t of independent voxels, (runs, voxels); the effects are in the first ones."""
    t = np.random.default_rng(5).standard_t(dof, (n_runs, n_voxels))
    t[:, :n_signal] += 4
    return t.astype(np.float32)


def false_shares(method: Method, level: float, n_signal: int) -> NDArray[np.float64]:
    """Return the share of what is above that is wrong, for each of many runs."""
    dof, n_voxels, shares = 20, 300, []
    mask, test = everywhere((n_voxels, 1, 1)), MixtureTest(dof, information=16.0)
    for t in maps_of_many_runs(1500, n_voxels, n_signal, dof):
        above = threshold(
            StatMap(t.reshape(mask.shape), "t", dof, test=test), mask, method, level
        ).above
        shares.append(above[n_signal:].sum() / max(above.sum(), 1))
    return np.array(shares)


@pytest.mark.parametrize("n_signal", [0, 60])
def test_the_false_discovery_rate_is_what_was_asked_for(n_signal: int) -> None:
    """Of independent voxels it is exactly level * m0 / m (Finner & Roters 2001, Biom. J. 43:985).

    A share lies in [0, 1], so its variance is at most that of a coin with the same mean.
    """
    shares, wanted = false_shares("fdr", 0.1, n_signal), 0.1 * (300 - n_signal) / 300
    margin = SIGMAS * math.sqrt(wanted * (1 - wanted) / shares.size)
    assert abs(shares.mean() - wanted) < margin
    assert false_shares("e-bh", 0.1, n_signal).mean() < 0.1 + margin


def test_bonferroni_is_wrong_as_often_as_was_asked_for() -> None:
    wrong = false_shares("bonferroni", 0.1, 0) > 0
    wanted = 1 - (1 - 0.1 / 300) ** 300
    margin = SIGMAS * math.sqrt(wanted * (1 - wanted) / wrong.size)
    assert abs(wrong.mean() - wanted) < margin


def test_who_looks_at_every_volume_needs_anytime() -> None:
    """The mean of noise, tested after every volume: Bonferroni is wrong too often."""
    n_runs, n_voxels, n_volumes, level = 150, 20, 80, 0.1
    noise = np.random.default_rng(6).normal(size=(n_volumes, n_runs, n_voxels))
    n = np.arange(1, n_volumes + 1)[:, None, None]
    mean = np.cumsum(noise, 0) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (np.cumsum(noise**2, 0) - n * mean**2) / (n - 1)
        t = (mean / np.sqrt(variance / n)).astype(np.float32)
    mask, wrong = everywhere((n_voxels, 1, 1)), {}
    methods: tuple[Method, ...] = ("bonferroni", "anytime")
    for method in methods:
        ever = np.zeros(n_runs, bool)
        for i in range(1, n_volumes):
            test = MixtureTest(i, information=i + 1.0, prior_sd=0.5)
            for run in np.flatnonzero(~ever):
                stat = StatMap(t[i, run].reshape(mask.shape), "t", i, test=test)
                ever[run] = threshold(stat, mask, method, level).above.any()
        wrong[method] = ever.mean()
    margin = SIGMAS * math.sqrt(level * (1 - level) / n_runs)
    assert wrong["anytime"] < level + margin < wrong["bonferroni"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("two_sided", [True, False])
def test_a_null_map_stays_dark(method: Method, two_sided: bool) -> None:
    nothing = np.zeros(SHAPE, np.float32)
    unknown = np.full(SHAPE, np.nan, np.float32)
    unknown[0], unknown[1] = np.inf, -np.inf
    some = np.full(SHAPE, 99, np.float32)
    mask, test = everywhere(), MixtureTest(40.0, 20.0)
    for stat, where in (
        (StatMap(nothing, "t", 40, test=test), mask),
        (StatMap(unknown, "t", 40, test=test), mask),
        (StatMap(unknown, "t", 40, log_e=unknown), mask),
        (StatMap(some, "t", 0.5, test=test), mask),
        (StatMap(some, "t", math.nan, test=test), mask),
        (StatMap(some, "t", 40, test=test), ~mask),
    ):
        found = threshold(stat, where, method, a_level(method), two_sided)
        assert found.above.shape == SHAPE
        assert not found.above.any()
        assert find_blobs(stat, found.above, oblique()) == ()


@pytest.mark.parametrize("method", ["p", "fdr", "anytime", "e-bh"])
def test_a_lenient_level_leaves_what_is_unknown_dark(method: Method) -> None:
    stat = a_t_map()
    values = stat.values.copy()
    values[:6] = np.nan
    log_e = np.where(np.isnan(values), np.nan, 9).astype(np.float32)
    for two_sided in (True, False):
        stat = StatMap(values, "t", 40, log_e=log_e)
        above = threshold(stat, everywhere(), method, 0.99, two_sided).above
        assert above.any()
        assert not above[:6].any()
        assert two_sided or (values[above] > 0).all()


def test_neighbours() -> None:
    """A chain of voxels that share a face, then an edge, then a corner; and one of other sign."""
    values = np.zeros((6, 6, 6), np.float32)
    for voxel in ((1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 3, 2)):
        values[voxel] = 4
    values[0, 1, 1] = -4
    for connectivity, sizes in ((6, [1, 1, 1, 2]), (18, [1, 1, 3]), (26, [1, 4])):
        labels = label_blobs(values, values != 0, connectivity)
        assert labels.dtype == np.int32
        assert sorted(np.bincount(labels.ravel())[1:]) == sizes
        assert np.array_equal(labels > 0, values != 0)
        assert labels[0, 1, 1] not in labels[1:]
        assert labels[1, 1, 1] == labels[2, 1, 1]


def planted() -> tuple[StatMap, NDArray[np.bool_]]:
    """Noise below 2 and, far from each other, a positive, a negative and a small blob."""
    values = np.random.default_rng(7).uniform(-1.9, 1.9, SHAPE).astype(np.float32)
    values[1:4, 1:4, 1:4] = 4 + np.arange(27).reshape(3, 3, 3) / 10
    values[2, 1, 3] = 9
    values[7:9, 6:9, 5:7] = -5
    values[8, 7, 6] = -8
    values[10, 1, 8] = 6
    return StatMap(values, "t", 40), np.abs(values) >= 2


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_planted_blobs_are_found(connectivity: int) -> None:
    stat, above = planted()
    grid = oblique()
    blobs = find_blobs(stat, above, grid, connectivity)
    voxels = [np.argwhere(above & (stat.values > 0) & (np.arange(12) < 6)[:, None, None])]
    voxels += [np.argwhere(stat.values <= -5), np.array([[10, 1, 8]])]
    peaks = [((2, 1, 3), 9), ((8, 7, 6), -8), ((10, 1, 8), 6)]
    assert [blob.n_voxels for blob in blobs] == [27, 12, 1]
    labels = label_blobs(stat.values, above, connectivity)
    for blob, (peak, value), members in zip(blobs, peaks, voxels, strict=True):
        assert blob.peak == value
        assert blob.volume_mm3 == pytest.approx(len(members) * 15)
        assert blob.peak_mm == pytest.approx((grid.affine @ [*peak, 1])[:3])
        weights = np.abs(stat.values[tuple(members.T)]).astype(np.float64)
        centre = (weights[:, None] * members).sum(0) / weights.sum()
        assert blob.centre_mm == pytest.approx((grid.affine @ [*centre, 1])[:3])
        assert np.array_equal(np.argwhere(labels == blob.label), members)
        assert blob.peak_mni_mm is None
        assert blob.region is None
    assert find_blobs(stat, above, grid, connectivity, min_voxels=12) == blobs[:2]
    assert find_blobs(stat, above, grid, connectivity, min_voxels=28) == ()


def test_equal_voxels_have_the_first_as_their_peak() -> None:
    values = np.zeros(SHAPE, np.float32)
    values[3:6, 2:5, 4:7] = 5
    grid = Grid(SHAPE, np.eye(4))
    (blob,) = find_blobs(StatMap(values, "t", 40), values > 0, grid)
    assert blob.peak_mm == pytest.approx((3, 2, 4))
    assert blob.centre_mm == pytest.approx((4, 3, 5))


@pytest.mark.parametrize("seed", range(3))
def test_the_table_is_nilearns(seed: int) -> None:
    from nilearn.reporting import get_clusters_table
    from scipy.ndimage import gaussian_filter

    shape, grid = (24, 22, 20), oblique((24, 22, 20))
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = gaussian_filter(noise, 1.5)
    stat = StatMap((smooth / smooth.std()).astype(np.float32), "t", 40)
    above = np.abs(stat.values) > 1.5
    rows = table(find_blobs(stat, above, grid, connectivity=6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = get_clusters_table(to_nifti(stat.values, grid), 1.5, two_sided=True)
    wanted = frame[frame["Cluster Size (mm3)"] != ""].to_dict("records")
    wanted.sort(key=lambda row: -abs(row["Peak Stat"]))
    assert len(rows) == len(wanted) > 20
    assert {row["Peak Stat"] > 0 for row in rows} == {True, False}
    assert list(rows[0])[:6] == list(frame.columns)
    for row, peer in zip(rows, wanted, strict=True):
        for column in ("X", "Y", "Z", "Peak Stat"):
            # NIfTI headers are float32: 1e-7 of some 50 mm, and a little for the sum.
            assert row[column] == pytest.approx(peer[column], abs=1e-4)
        # nilearn cuts the size to an integer.
        assert peer["Cluster Size (mm3)"] <= row["Cluster Size (mm3)"] + 1e-3
        assert peer["Cluster Size (mm3)"] > row["Cluster Size (mm3)"] - 1 - 1e-3


def to_mni() -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = 1.1 * rotation(5, 1), [1, 2, 3]
    return matrix


def an_atlas(stat: StatMap) -> Atlas:
    """The run's own grid in MNI space, with a name for the positive half of it."""
    labels = np.where(np.arange(12)[:, None, None] < 6, 7, np.zeros(SHAPE, int))
    return Atlas(labels, Grid(SHAPE, to_mni() @ oblique().affine), {7: "Precentral gyrus"})


def test_peaks_in_mni_space_and_their_regions(tmp_path: Path) -> None:
    stat, above = planted()
    without = find_blobs(stat, above, oblique(), to_mni=to_mni())
    blobs = find_blobs(stat, above, oblique(), to_mni=to_mni(), atlas=an_atlas(stat))
    assert [blob.region for blob in without] == [None, None, None]
    assert [blob.region for blob in blobs] == ["Precentral gyrus", None, None]
    for blob in blobs:
        assert blob.peak_mni_mm == pytest.approx((to_mni() @ [*blob.peak_mm, 1])[:3])

    first = [*table(find_blobs(stat, above, oblique()))[0]]
    assert first[6:] == ["Voxels", "Centre X", "Centre Y", "Centre Z"]
    assert [*table(without)[0]] == [*first, "MNI X", "MNI Y", "MNI Z"]
    rows = table(blobs)
    assert [*rows[2]] == [*first, "MNI X", "MNI Y", "MNI Z", "Region"]
    assert [row["Cluster ID"] for row in rows] == [1, 2, 3]
    assert [row["Region"] for row in rows] == ["Precentral gyrus", "", ""]

    write_table(blobs, tmp_path / "blobs.tsv")
    with (tmp_path / "blobs.tsv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file, delimiter="\t"))
    assert [row["Region"] for row in read] == ["Precentral gyrus", "n/a", "n/a"]
    for row, text in zip(rows, read, strict=True):
        assert list(row) == list(text)
        for column in list(row)[:-1]:
            assert float(text[column]) == pytest.approx(row[column], rel=1e-5)


def test_no_blobs_are_a_header(tmp_path: Path) -> None:
    assert table(()) == []
    write_table((), tmp_path / "blobs.tsv")
    (line,) = (tmp_path / "blobs.tsv").read_text(encoding="utf-8").splitlines()
    stat, above = planted()
    assert line.split("\t") == list(table(find_blobs(stat, above, oblique()))[0])


@pytest.mark.parametrize("method", METHODS)
def test_nan_never_appears(method: Method) -> None:
    """A map with holes and a few infinite voxels, from threshold to table."""
    rng, stat = np.random.default_rng(8), a_t_map()
    values = stat.values.copy()
    values[rng.random(SHAPE) < 0.2] = np.nan
    values[rng.random(SHAPE) < 0.02] = np.inf
    stat = StatMap(values, "t", 40, test=stat.test)
    found = threshold(stat, everywhere(), method, a_level(method))
    assert found.above.any()
    assert not (found.above & ~np.isfinite(values)).any()
    blobs = find_blobs(stat, found.above, oblique(), to_mni=to_mni())
    assert sum(blob.n_voxels for blob in blobs) == found.above.sum()
    numbers = [number for row in table(blobs) for number in row.values()]
    assert np.isfinite(numbers).all()


BAD_LEVELS = [("t", 0.0), ("t", math.inf), ("t", math.nan), ("z", 0.0), ("z", 20.5)]
BAD_LEVELS += [(m, level) for m in METHODS[2:] for level in (0.0, 1.0, -0.1, math.nan, 1e-81)]


@pytest.mark.parametrize(("method", "level"), BAD_LEVELS)
def test_bad_levels(method: Method, level: float) -> None:
    with pytest.raises(ConfigError, match=f"level must be .* for method {method}, got {level}"):
        threshold(a_t_map(), everywhere(), method, level)


def test_bad_methods() -> None:
    with pytest.raises(ConfigError, match=r"method must be one of t, z, .*, got 'q'"):
        threshold(a_t_map(), everywhere(), "q", 0.05)  # type: ignore[arg-type]
    methods: tuple[Method, ...] = ("anytime", "e-bh")
    for stat in (an_f_map(), StatMap(a_t_map().values, "t", 40)):
        for method in methods:
            with pytest.raises(ConfigError, match=f"test or log_e .* got a {stat.kind} map"):
                threshold(stat, everywhere(), method, 0.05)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kind": "z"}, "kind must be t or F, got 'z'"),
        ({"dof": math.inf}, "dof must be finite, got inf"),
        ({"kind": "F", "dof_between": 0}, "dof_between must be 1 or more, got 0"),
        ({"kind": "F", "log_e": np.zeros(SHAPE)}, "left out of an F map"),
        ({"kind": "F", "test": MixtureTest(9, 1)}, "left out of an F map"),
        ({"values": np.zeros(9)}, r"values must be \(x, y, z\), got shape \(9,\)"),
        ({"log_e": np.zeros((2, 2, 2))}, r"log_e must be of shape .* got \(2, 2, 2\)"),
    ],
)
def test_bad_maps(wrong: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {
        "values": np.zeros(SHAPE, np.float32),
        "kind": "t",
        "dof": 9.0,
    } | wrong
    with pytest.raises((ConfigError, GridError), match=match):
        StatMap(**arguments)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"connectivity": 8}, "connectivity must be 6, 18 or 26, got 8"),
        ({"min_voxels": 0}, "min_voxels must be 1 or more, got 0"),
        ({"above": np.ones((2, 2, 2), bool)}, r"above must be .* got \(2, 2, 2\)"),
        ({"grid": oblique((2, 2, 2))}, r"values must be of shape \(2, 2, 2\)"),
        ({"to_mni": np.eye(3)}, "to_mni must be 4x4 and finite"),
        ({"to_mni": np.full((4, 4), np.nan)}, "to_mni must be 4x4 and finite"),
        ({"atlas": an_atlas(planted()[0])}, "to_mni must be given"),
    ],
)
def test_bad_searches(wrong: dict[str, Any], match: str) -> None:
    stat, above = planted()
    arguments: dict[str, Any] = {"stat": stat, "above": above, "grid": oblique()}
    with pytest.raises((ConfigError, GridError), match=match):
        find_blobs(**(arguments | wrong))


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(GridError, match=r"mask must be of shape .* got \(2, 2, 2\)"):
        threshold(a_t_map(), everywhere((2, 2, 2)), "p", 0.05)


def test_blobs_can_be_compared_and_kept() -> None:
    blob = Blob(1, 2, 3.0, 4.0, (1, 2, 3), (1, 2, 3))
    assert blob == Blob(1, 2, 3.0, 4.0, (1, 2, 3), (1, 2, 3))
    assert len({blob, blob}) == 1

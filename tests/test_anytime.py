"""The e-value against marginal likelihoods; what looking at every volume costs, by simulation."""

import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rtfmri.anytime import MixtureTest, e_bh
from sequential import (
    N_VOLUMES,
    Floats,
    Looks,
    block_design,
    false_discovery_rate,
    first_rejections,
    looks,
    share_ever,
    simulate,
    stopping_volumes,
)

N_RUNS = 2000
EFFECT = 1.6
"""A signal of 2 % at a tSNR of 80, in standard deviations of the noise."""
N_MAPS, N_VOXELS = 300, 40
IS_NULL = np.arange(N_VOXELS) >= N_VOXELS // 5


def at_most(alpha: float, n: int) -> float:
    """The 99th percentile, nearly, of a share of *n* that is *alpha* in the long run."""
    return alpha + stats.norm.ppf(0.99) * math.sqrt(alpha * (1 - alpha) / n)


@cache
def runs(effect: float) -> Looks:
    design = block_design()
    return looks(design, simulate(design, N_RUNS, seed=1, effect=effect))


# --- one e-value


def log_marginal_likelihood(y: Floats, x: Floats, covariance: Floats) -> float:
    """Of ``y ~ N(x b, s^2 covariance)``, b flat and s right Haar, but for a constant."""
    precision = np.linalg.inv(covariance)
    within = x.T @ precision @ x
    projector = precision - precision @ x @ np.linalg.inv(within) @ x.T @ precision
    determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(within)[1]
    n, p = x.shape
    return float(-0.5 * determinants - 0.5 * (n - p) * np.log(y @ projector @ y))


def log_bayes_factor(y: Floats, x: Floats, contrast: Floats, prior_sd: float) -> float:
    """With ``contrast @ b`` from N(0, (s prior_sd)^2) against 0, all else of b flat."""
    nuisance = x @ np.linalg.svd(contrast[None])[2][1:].T
    direction = x @ contrast / (contrast @ contrast)
    noise = np.eye(len(y))
    effect = prior_sd**2 * np.outer(direction, direction)
    return log_marginal_likelihood(y, nuisance, noise + effect) - log_marginal_likelihood(
        y, nuisance, noise
    )


def t_test(y: Floats, x: Floats, contrast: Floats, prior_sd: float) -> tuple[float, MixtureTest]:
    n, p = x.shape
    inverse = np.linalg.inv(x.T @ x)
    b = inverse @ x.T @ y
    variance = contrast @ inverse @ contrast
    t = contrast @ b / np.sqrt(((y - x @ b) ** 2).sum() / (n - p) * variance)
    return float(t), MixtureTest(n - p, float(1 / variance), prior_sd)


@pytest.mark.parametrize("prior_sd", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("n", "p"), [(3, 2), (6, 5), (12, 1), (30, 4), (150, 9)])
def test_it_is_the_ratio_of_marginal_likelihoods(n: int, p: int, prior_sd: float) -> None:
    rng = np.random.default_rng(n)
    x, weights = rng.normal(size=(n, p)), rng.normal(size=p)
    for contrast in (np.eye(p)[-1], weights):
        for effect in (0.0, 1.0):
            y = 40 * (rng.normal(size=n) + effect * x @ contrast)
            t, test = t_test(y, x, contrast, prior_sd)
            wanted = log_bayes_factor(y, x, contrast, prior_sd)
            assert test.log_e_value(t) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
            assert test.log_e_value(-t) == test.log_e_value(t)


TESTS = [
    MixtureTest(dof, information, 0.7) for dof in (1, 8, 195) for information in (0.01, 3, 90)
]


@pytest.mark.parametrize("test", TESTS, ids=str)
def test_critical_t_inverts_it(test: MixtureTest) -> None:
    least, most = float(test.log_e_value(0)), float(test.log_e_value(np.inf))
    # Near the limit, t is all but undetermined: 0.9 of the way is far enough.
    log_e = least + (most - least) * np.linspace(0, 0.9, 10)
    t = test.critical_t(log_e)
    assert t[0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(t) > 0).all()
    np.testing.assert_allclose(test.log_e_value(t), log_e, atol=1e-9)
    assert test.critical_t([least - 1, most + 1e-6, most + 1000, np.inf]).tolist() == [
        0,
        np.inf,
        np.inf,
        np.inf,
    ]


def test_an_infinite_t_has_the_limit_of_a_large_one() -> None:
    test = MixtureTest(10, 5)
    near, limit, beyond = test.log_e_value([1e9, np.inf, 1e200])
    assert near == pytest.approx(limit, rel=1e-9)
    assert limit == beyond
    assert limit == pytest.approx(10 / 2 * np.log(1 + 5), rel=1e-12)
    assert np.isnan(test.log_e_value(np.nan))


@pytest.mark.parametrize(("dof", "information"), [(0.5, 3), (0, 3), (-4, 3), (10, 0)])
def test_where_nothing_is_known_e_is_1(dof: float, information: float) -> None:
    test = MixtureTest(dof, information)
    assert test.log_e_value([[0, 5, np.inf, np.nan]]).tolist() == [[0, 0, 0, 0]]
    assert test.critical_t([0, 3]).tolist() == [np.inf, np.inf]


# --- looked at after every volume


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_without_an_effect_e_seldom_ever_gets_large(alpha: float) -> None:
    assert 0 < share_ever(runs(0).log_e() >= -np.log(alpha)) <= at_most(alpha, N_RUNS)


def test_without_an_effect_t_often_gets_large() -> None:
    t, promised = runs(0).t, 2 * float(stats.norm.sf(3.1))
    assert share_ever(np.abs(t) > 3.1) > 20 * promised  # 0.107 for a promised 0.0019
    dof = np.array([[max(test.dof, 1)] for test in runs(0).tests])
    p_value = np.asarray(2 * stats.t.sf(np.abs(t), dof))
    assert share_ever(p_value < promised) > 10 * promised  # 0.041
    assert (p_value[-1] < 0.05).mean() <= at_most(0.05, N_RUNS)  # once, at the end, it is right


@pytest.mark.parametrize("effect", [0, EFFECT])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_confidence_sequence_seldom_ever_misses(alpha: float, effect: float) -> None:
    looked = runs(effect)
    critical = np.array([[test.critical_t(-np.log(alpha))] for test in looked.tests])
    missed = np.abs(looked.effect - effect) > critical * looked.standard_error
    assert 0 < share_ever(missed) <= at_most(alpha, N_RUNS)
    width = np.nanmedian(critical[-1] * looked.standard_error[-1])
    assert width < 0.65  # 200 volumes say something


def test_an_effect_is_found_soon() -> None:
    # Median of the volumes needed at alpha = 0.001: 104, 54, 39 for these effects.
    medians = []
    for effect in (1.0, EFFECT, 3.2):
        stopped = stopping_volumes(runs(effect).log_e(), 0.001)
        medians.append(float(np.median(stopped)))
        assert np.isfinite(stopped).mean() >= (0.99 if effect >= EFFECT else 0.9)
    print("median stopping volume for effects of 1, 1.6, 3.2:", medians)
    assert medians == sorted(medians, reverse=True)
    assert medians[1] < N_VOLUMES / 2


# --- many voxels


def e_bh_by_definition(e: Floats, alpha: float) -> NDArray[np.bool_]:
    for k in range(len(e), 0, -1):
        threshold = len(e) / (k * alpha)
        if (e >= threshold).sum() >= k:
            return e >= threshold
    return np.zeros(len(e), bool)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_e_bh_is_its_definition(alpha: float) -> None:
    rng, n_some = np.random.default_rng(0), 0
    for n in (1, 2, 7, 40, 300):
        for _ in range(20):
            log_e = rng.normal(rng.uniform(-2, 6), 2, n)
            rejected = log_e >= e_bh(log_e, alpha)
            assert np.array_equal(rejected, e_bh_by_definition(np.exp(log_e), alpha))
            n_some += bool(rejected.any())
    assert 10 < n_some < 100


def test_e_bh_of_what_is_no_number_or_not_there() -> None:
    log_e = np.log([25.0, 25.0, 1.0, 1.0])
    assert e_bh(log_e, 0.1) == log_e[0]
    assert e_bh(log_e.reshape(2, 2), 0.1) == log_e[0]
    assert e_bh(np.where(log_e > 0, log_e, np.nan), 0.1) == log_e[0]
    assert e_bh([np.nan, np.nan, np.log(15)], 0.1) == np.inf  # 30 would be needed
    assert e_bh([np.inf, 0, -np.inf], 0.1) == np.inf  # which the first one reaches
    assert e_bh([0.0, 0.0], 0.1) == np.inf
    assert e_bh([], 0.1) == np.inf


@pytest.mark.parametrize("shared", [0.0, 0.5], ids=["independent", "correlated"])
def test_a_map_kept_when_it_first_shows_something_has_few_false_voxels(shared: float) -> None:
    # False discovery rate at 0.05: e-BH 0.01, BH on p-values 0.47 (independent).
    alpha, design = 0.05, block_design()
    effect = np.where(IS_NULL, 0, 0.5)
    maps = [simulate(design, N_VOXELS, i, effect=effect, shared=shared) for i in range(N_MAPS)]
    looked = looks(design, np.concatenate(maps, axis=1))
    by_e = first_rejections(looked.log_e().reshape(N_VOLUMES, N_MAPS, N_VOXELS), alpha)
    dof = np.array([[max(test.dof, 1)] for test in looked.tests])
    log_p = np.nan_to_num(np.log(2 * stats.t.sf(np.abs(looked.t), dof)))
    by_p = first_rejections(-log_p.reshape(N_VOLUMES, N_MAPS, N_VOXELS), alpha)
    assert by_e.any(1).mean() > 0.5
    assert false_discovery_rate(by_e, IS_NULL) <= at_most(alpha, N_MAPS)
    assert false_discovery_rate(by_p, IS_NULL) > 3 * alpha

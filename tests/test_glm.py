"""The incremental GLM, on every backend, against one batch fit in float64."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import CUDA_BACKENDS
from reference import U, least_squares
from rtfmri.backends import Backend, open_backend
from rtfmri.config import GlmSettings
from rtfmri.design import MOTION_COLUMNS, Confounds, Design
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event, Paradigm
from rtfmri.stages.glm import MIN_RESIDUAL_DOF, ContrastMaps, GlmStage

pytest.importorskip("nilearn")

TR_S, N, N_VOXELS, NOISE_SD = 2.0, 90, 1500, 10.0
EVENTS = tuple(Event(20 + 24 * i, 12, "tap" if i % 2 else "see") for i in range(7))
ASKED: dict[str, Any] = {
    "contrasts": {"tap": "tap", "difference": "tap - see", "turn": "rot_z"},
    "f_contrasts": {"any": ("tap", "see")},
}
STARTED = 36
"""Volumes after which every column of the design has happened."""

two_backends = pytest.mark.parametrize("backend", ["cpu", CUDA_BACKENDS[2]], indirect=True)


def a_design(settings: GlmSettings | None = None, **more: Any) -> Design:
    return Design(Paradigm(EVENTS), settings or GlmSettings(**ASKED), TR_S, n_volumes=N, **more)


def poses(n: int = N, seed: int = 1) -> NDArray[np.float64]:
    """Fields of `POSE_FIELDS` of a head that wanders, (n, 14)."""
    rng = np.random.default_rng(seed)
    fields = np.zeros((n, 14))
    quarter = np.cumsum(rng.normal(0, 5e-4, (n, 3)), axis=0)
    fields[:, 1:4], fields[:, 0] = quarter, np.sqrt(1 - (quarter**2).sum(1))
    fields[:, 4:7] = np.cumsum(rng.normal(0, 0.03, (n, 3)), axis=0)
    return fields


def motion_columns(fields: NDArray[np.float64]) -> NDArray[np.float64]:
    """mm, and the angles of Rz Ry Rx in radians, by the textbook."""
    w, x, y, z = fields[:, :4].T
    about_x = np.arctan2(2 * (y * z + w * x), 1 - 2 * (x * x + y * y))
    about_y = np.arcsin(2 * (w * y - x * z))
    about_z = np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
    return np.column_stack([fields[:, 4:7], about_x, about_y, about_z])


def full_rows(design: Design, fields: NDArray[np.float64], n: int = N) -> NDArray[np.float64]:
    rows = design.rows(n)
    rows[:, design.motion_at : design.motion_at + 6] = motion_columns(fields)
    return rows


def series(
    rows: NDArray[np.float64], n_voxels: int = N_VOXELS, seed: int = 0
) -> NDArray[np.float32]:
    """Voxels of 300 to 3000 that do a bit of everything, and noise; the first keeps still."""
    rng = np.random.default_rng(seed)
    size = np.abs(rows).max(0)
    coefficients = rng.normal(0, NOISE_SD / 3, (rows.shape[1], n_voxels)) / size[:, None]
    y = rng.uniform(300, 3000, n_voxels) + rows @ coefficients
    y += rng.normal(0, NOISE_SD, y.shape)
    y[:, 0] = 700
    return y.astype(np.float32)


def fit(
    backend: Backend,
    stage: GlmStage,
    y: NDArray[np.float32],
    fields: NDArray[np.float64],
    usable: NDArray[np.bool_] | None = None,
    start: int = 0,
) -> None:
    """Push volumes as the pipeline does, from *start* on."""
    row = backend.zeros(len(stage.design.columns), np.float64)
    for index in range(start, len(y)):
        good = usable is None or bool(usable[index])
        stage.push(
            backend.copy(y[index]),
            backend.upload(stage.told(index)),
            row,
            backend.copy(fields[index]),
            backend.copy(np.array([good], np.float32)),
        )
        stage.settle(backend.download(row), good)


def fitted(
    backend: Backend, y: NDArray[np.float32], fields: NDArray[np.float64], **settings: Any
) -> GlmStage:
    given = GlmSettings(**{**ASKED, **settings})
    stage = GlmStage(backend, y.shape[1], a_design(given), given)
    fit(backend, stage, y, fields)
    return stage


def assert_as_batch(
    maps: dict[str, ContrastMaps],
    design: Design,
    rows: NDArray[np.float64],
    y: NDArray[np.float32],
    bound: float = 2e-3,
) -> None:
    """Compare with one fit in float64.

    A rotation rounds two numbers, of sizes that the norm of y bounds; roundings that are
    independent add up as squares (Higham & Mary 2019, SIAM J. Sci. Comput. 41:A2815): coordinates
    are off by some 2 U sqrt(n p) |y|, and t by that over the noise, times 6 for the worst of many
    voxels. This is below the 2e-3 that is promised.
    """
    spread = np.linalg.norm(y.astype(np.float64) - y[0], axis=0)
    moving = spread > 0
    for contrast in design.contrasts:
        found = maps[contrast.name]
        effect, statistic, dof = least_squares(rows, y[:, moving], contrast.weights)
        assert found.dof == dof
        error = 12 * U * math.sqrt(rows.size) * spread[moving].max() / (0.5 * NOISE_SD)
        assert error < bound
        got = found.statistic[moving]
        size = np.abs(statistic)
        if contrast.kind == "t":
            assert np.abs(got - statistic).max() < error * (1 + size.max() / math.sqrt(dof))
            assert found.effect is not None
            assert found.variance is not None
            np.testing.assert_allclose(
                found.effect[moving], effect[0], atol=3 * error * np.sqrt(found.variance.max())
            )
            np.testing.assert_allclose(
                found.variance[moving], (effect[0] / statistic) ** 2, rtol=1e-3
            )
        else:  # of F, as of a squared t
            assert np.abs(np.sqrt(got) - np.sqrt(size)).max() < 2 * error * (1 + size.max() / dof)
        assert not found.statistic[~moving].any()


@pytest.mark.parametrize("n_voxels", [1, 255, 257, 1025])
def test_equals_a_batch_fit(backend: Backend, n_voxels: int) -> None:
    fields, design = poses(), a_design()
    rows = full_rows(design, fields)
    y = series(rows, n_voxels + 1)
    stage = fitted(backend, y, fields)
    assert_as_batch(stage.maps(), design, rows, y)


@pytest.mark.parametrize("n", [STARTED, 37, 50, 70, N])
def test_equals_a_batch_fit_to_the_volumes_so_far(n: int) -> None:
    backend, fields, design = open_backend("cpu"), poses(), a_design()
    rows = full_rows(design, fields)
    y = series(rows)
    stage = fitted(backend, y[:n], fields)
    assert_as_batch(stage.maps(), design, rows[:n], y[:n])


@pytest.mark.parametrize("n", [14, 17, 20])
def test_what_has_not_happened_yet_is_left_out(n: int) -> None:
    backend, fields, design = open_backend("cpu"), poses(), a_design()
    rows = full_rows(design, fields)
    y = series(rows)
    maps = fitted(backend, y[:n], fields).maps()
    # "tap" comes after "see": until then nothing can be said of it.
    assert not rows[:n, -1].any()
    for name in ("tap", "difference", "any"):
        assert not maps[name].statistic.any()
    _, t, dof = least_squares(rows[:n], y[:n, 1:], design.contrasts[2].weights)
    assert maps["turn"].dof == dof == n - np.linalg.matrix_rank(rows[:n])
    # Few volumes of a long plan: cosines differ little yet, and 1e-7 of them makes 1e-3 of t.
    np.testing.assert_allclose(maps["turn"].statistic[1:], t, rtol=1e-2, atol=1e-2)


def test_every_implementation_gives_the_same_bits(backend: Backend) -> None:
    fields = poses()
    y = series(full_rows(a_design(), fields), 600)
    ours, cpu = (fitted(b, y, fields).maps() for b in (backend, open_backend("cpu")))
    for name, maps in cpu.items():
        assert np.array_equal(ours[name].statistic, maps.statistic)
        assert maps.statistic[1:].any()


def test_motion_is_taken_from_the_pose(backend: Backend) -> None:
    fields, design = poses(), a_design()
    stage = GlmStage(backend, 2, design, GlmSettings(**ASKED))
    row = backend.zeros(len(design.columns), np.float64)
    told = backend.upload(stage.told(40))
    stage.push(backend.zeros(2), told, row, backend.copy(fields[40]))
    np.testing.assert_allclose(
        backend.download(row), full_rows(design, fields)[40], rtol=1e-12, atol=1e-14
    )


@two_backends
def test_a_volume_that_is_not_usable_leaves_no_trace(backend: Backend) -> None:
    fields = poses()
    rows = full_rows(a_design(), fields)
    y = series(rows, 600)
    usable = np.random.default_rng(4).random(N) > 0.2
    spoilt = y.copy()
    spoilt[~usable] = np.nan
    design, settings = a_design(), GlmSettings(**ASKED)
    stage = GlmStage(backend, 600, design, settings)
    fit(backend, stage, spoilt, fields, usable)
    assert_as_batch(stage.maps(), design, rows[usable], y[usable])


def test_missing_volumes_keep_their_rows() -> None:
    backend, fields, design = open_backend("cpu"), poses(), a_design()
    rows = full_rows(design, fields)
    y = series(rows)
    stage = GlmStage(backend, N_VOXELS, design, GlmSettings(**ASKED))
    there = np.flatnonzero(np.arange(N) % 9 != 4)
    row = np.zeros(len(design.columns))
    for index in there.tolist():
        stage.push(y[index], stage.told(index), row, fields[index])
        stage.settle(row)
    assert_as_batch(stage.maps(), design, rows[there], y[there])


def test_a_rank_deficient_design() -> None:
    # The second confound is the first; the third is the sum of both conditions.
    backend, fields = open_backend("cpu"), poses()
    noise = np.random.default_rng(3).normal(size=N)
    both = a_design().rows(N)[:, -2:].sum(1)
    confounds = Confounds(np.column_stack([noise, 3 * noise, both]), ("one", "same", "sum"))
    design = a_design(confounds=confounds)
    rows = full_rows(design, fields)
    y = series(rows)
    stage = GlmStage(backend, N_VOXELS, design, GlmSettings(**ASKED))
    fit(backend, stage, y, fields)
    maps = stage.maps()
    assert maps["difference"].dof == N - len(design.columns) + 2
    # Neither condition can be told from the other and their sum, but their difference can.
    for name in ("tap", "any"):
        assert not maps[name].statistic.any()
        assert maps[name].effect is None or not maps[name].effect.any()
    _, t, _ = least_squares(rows, y[:, 1:], design.contrasts[1].weights)
    np.testing.assert_allclose(maps["difference"].statistic[1:], t, atol=2e-3)


def test_more_columns_than_volumes_say_nothing() -> None:
    backend, fields = open_backend("cpu"), poses()
    many = np.random.default_rng(2).normal(size=(N, 100))
    design = a_design(confounds=Confounds(many, tuple(f"c{i}" for i in range(100))))
    stage = GlmStage(backend, 20, design, GlmSettings(**ASKED))
    y = series(full_rows(design, fields), 20)
    for start in range(N):
        fit(backend, stage, y[: start + 1], fields, start=start)
        if start % 20 == 0 or start == N - 1:
            for maps in stage.maps().values():
                assert maps.dof == 0
                for image in (maps.statistic, maps.effect, maps.variance, maps.log_e):
                    assert image is None or not image.any()


@two_backends
def test_extreme_voxels_never_make_what_is_no_number(backend: Backend) -> None:
    fields, design = poses(), a_design()
    rows = full_rows(design, fields)
    y = np.zeros((N, 6), np.float32)
    y[:, 1] = 65535
    y[:, 2] = rows[:, -1]  # nothing but the task
    y[40, 3] = 32767  # one spike
    y[:, 4] = np.where(np.arange(N) % 2, -32768, 32767)
    y[:, 5] = 1e-30
    maps = fitted(backend, y, fields).maps()
    for found in maps.values():
        for image in (found.statistic, found.effect, found.variance, found.log_e):
            assert image is None or np.isfinite(image).all()
    assert maps["tap"].statistic[[0, 1, 5]].tolist() == [0, 0, 0]
    assert maps["tap"].statistic[2] > 1e4
    assert maps["tap"].effect is not None
    assert maps["tap"].effect[2] == pytest.approx(1, rel=1e-5)


def test_no_contrasts_are_fine() -> None:
    backend, fields = open_backend("cpu"), poses()
    settings = GlmSettings(contrasts={})
    design = Design(Paradigm(()), settings, TR_S, n_volumes=N)
    stage = GlmStage(backend, 5, design, settings)
    fit(backend, stage, np.ones((5, 5), np.float32), fields)
    assert stage.maps() == {}


def test_a_long_run_does_not_drift_off() -> None:
    n = 5000
    backend = open_backend("cpu")
    settings = GlmSettings(contrasts={"tap": "tap"}, motion=False, drift="linear")
    events = tuple(Event(20.0 + 40 * i, 20, "tap") for i in range(n // 20))
    design = Design(Paradigm(events), settings, TR_S, n_volumes=n)
    rows = design.rows(n)
    rng = np.random.default_rng(8)
    y = (1000 + rng.normal(0, NOISE_SD, (n, 40)) + 2 * rows[:, -1:]).astype(np.float32)
    stage = GlmStage(backend, 40, design, settings)
    row = np.zeros(rows.shape[1])
    for index in range(n):
        stage.push(y[index], stage.told(index), row)
        stage.settle(row)
    _, t, _ = least_squares(rows, y, design.contrasts[0].weights)
    assert np.abs(t).min() > 4
    np.testing.assert_allclose(stage.maps()["tap"].statistic, t, atol=2e-3)


# --- noise that remembers

WARM_UP = 50


def autoregressive(n: int, memory: NDArray[np.float64], seed: int = 5) -> NDArray[np.float64]:
    """Noise of sd 1, (n, n_voxels), whose lag-1 autocorrelation is *memory*."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n, memory.size))
    for k in range(1, n):
        noise[k] = memory * noise[k - 1] + np.sqrt(1 - memory**2) * noise[k]
    return noise


def tissue_means(memory: NDArray[np.float64]) -> Any:
    """Stands for smoothing in space: every voxel gets the mean of its like."""
    kinds = [memory == value for value in np.unique(memory)]

    def smooth(values: NDArray[np.float32]) -> NDArray[np.float32]:
        smoothed = np.empty_like(values)
        for kind in kinds:
            smoothed[kind] = values[kind].mean()
        return smoothed

    return smooth


def whitened_fit(
    backend: Backend,
    memory: NDArray[np.float64],
    y: NDArray[np.float32],
    fields: NDArray[np.float64],
    usable: NDArray[np.bool_] | None = None,
) -> GlmStage:
    settings = GlmSettings(**ASKED, noise="ar1", ar1_warm_up_volumes=WARM_UP)
    stage = GlmStage(backend, memory.size, a_design(settings), settings, tissue_means(memory))
    fit(backend, stage, y, fields, usable)
    return stage


@two_backends
def test_whitened_it_equals_generalised_least_squares(backend: Backend) -> None:
    memory = np.repeat([0.0, 0.25, 0.55], 400)
    fields, design = poses(), a_design()
    rows = full_rows(design, fields)
    usable = np.ones(N, bool)
    usable[[7, 20, 21, 60, 75]] = False  # gaps before and after the memory is known
    y = (1000 + NOISE_SD * autoregressive(N, memory)).astype(np.float32)
    stage = whitened_fit(backend, memory, y, fields, usable)
    assert stage.whitened
    maps, known = stage.maps(), stage.memory()
    assert np.abs(known - memory).max() < 0.08
    x, indices = rows[usable], np.flatnonzero(usable)
    for value in np.unique(known):
        like = known == value
        distance = np.abs(indices[:, None] - indices)
        root = np.linalg.inv(np.linalg.cholesky(float(value) ** distance))
        for contrast in design.contrasts:
            _, wanted, dof = least_squares(root @ x, root @ y[usable][:, like], contrast.weights)
            assert maps[contrast.name].dof == dof
            got = maps[contrast.name].statistic[like]
            np.testing.assert_allclose(got, wanted, atol=2e-3 * (1 + wanted.max()))


def test_whitened_bits_are_the_same_on_every_backend(backend: Backend) -> None:
    memory = np.repeat([0.1, 0.4], 300)
    fields = poses()
    y = (1000 + NOISE_SD * autoregressive(N, memory)).astype(np.float32)
    ours, cpu = (whitened_fit(b, memory, y, fields) for b in (backend, open_backend("cpu")))
    assert np.array_equal(ours.memory(), cpu.memory())
    for name, maps in cpu.maps().items():
        assert np.array_equal(ours.maps()[name].statistic, maps.statistic)


@pytest.mark.parametrize("true", [0.0, 0.2, 0.4, 0.7])
def test_the_memory_is_found_without_bias(true: float) -> None:
    n_voxels = 4000
    memory, fields = np.full(n_voxels, true), poses()
    y = (1000 + NOISE_SD * autoregressive(WARM_UP, memory)).astype(np.float32)
    found = whitened_fit(open_backend("cpu"), memory, y, fields[:WARM_UP]).memory()
    # A voxel's own estimate has a standard error of 1 / sqrt(dof) at most; then steps of 0.02.
    error = 1 / math.sqrt((WARM_UP - len(a_design().columns)) * n_voxels)
    assert abs(float(found[0]) - true) < 0.01 + 4 * error + (0.02 if true == 0 else 0)


def test_false_positives_are_what_they_are_said_to_be() -> None:
    stats = pytest.importorskip("scipy.stats")
    memory = np.repeat([0.15, 0.3, 0.45], 10_000)
    fields, design = poses(), a_design()
    y = (1000 + NOISE_SD * autoregressive(N, memory, seed=11)).astype(np.float32)
    backend, p = open_backend("cpu"), 1e-3
    whitened = whitened_fit(backend, memory, y, fields)
    plain = GlmStage(backend, memory.size, design, GlmSettings(**ASKED))
    fit(backend, plain, y, fields)
    shares = {}
    for name, stage in (("ar1", whitened), ("ols", plain)):
        maps = stage.maps()["tap"]
        found = np.abs(maps.statistic) > stats.t.isf(p / 2, maps.dof)
        shares[name] = found.sum()
    low, high = stats.binom.interval(0.99, memory.size, p)
    assert low <= shares["ar1"] <= high, shares
    assert shares["ols"] > 3 * high, shares


def test_there_is_no_evidence_before_the_memory_is_known() -> None:
    memory, fields = np.full(300, 0.3), poses()
    y = (1000 + NOISE_SD * autoregressive(N, memory)).astype(np.float32)
    y += 100 * full_rows(a_design(), fields)[:, -2:-1].astype(np.float32)
    see = GlmSettings(contrasts={"see": "see"}, noise="ar1", ar1_warm_up_volumes=WARM_UP)
    stage = GlmStage(open_backend("cpu"), 300, a_design(see), see)
    fit(open_backend("cpu"), stage, y[: WARM_UP - 1], fields)
    maps = stage.maps()["see"]
    assert stage.warming_up
    assert maps.statistic.min() > 10
    assert maps.log_e is not None
    assert not maps.log_e.any()
    fit(open_backend("cpu"), stage, y[:WARM_UP], fields, start=WARM_UP - 1)
    found = stage.maps()["see"].log_e
    assert found is not None
    assert found.min() > 5


def test_looking_at_every_volume_of_noise_that_remembers() -> None:
    n, alpha, memory = 160, 0.05, np.full(2000, 0.3)
    events = tuple(Event(20.0 + 40 * i, 20, "tap") for i in range(8))
    y = (1000 + NOISE_SD * autoregressive(n, memory, seed=3)).astype(np.float32)
    backend, ever = open_backend("cpu"), {}
    for noise in ("ar1", "ols"):
        settings = GlmSettings(contrasts={"tap": "tap"}, noise=noise, motion=False)
        design = Design(Paradigm(events), settings, TR_S, n_volumes=n)
        stage = GlmStage(backend, memory.size, design, settings, tissue_means(memory))
        row, largest = np.zeros(len(design.columns)), np.zeros(memory.size)
        for index in range(n):
            stage.push(y[index], stage.told(index), row)
            stage.settle(row)
            log_e = stage.maps()["tap"].log_e
            assert log_e is not None
            largest = np.maximum(largest, log_e)
        ever[noise] = np.mean(largest >= -math.log(alpha))
    # Prewhitened, e-values keep their promise; taken for independent, they do not.
    assert ever["ar1"] <= alpha
    assert ever["ols"] > 2 * alpha


def test_the_end_of_the_warm_up_can_wait_until_the_result_is_out() -> None:
    memory, fields = np.full(300, 0.3), poses()
    y = (1000 + NOISE_SD * autoregressive(N, memory)).astype(np.float32)
    backend = open_backend("cpu")
    waiting = whitened_fit(backend, memory, y[:WARM_UP], fields)
    assert waiting.warming_up
    waiting.catch_up()
    assert not waiting.warming_up
    at_once = whitened_fit(backend, memory, y[:WARM_UP], fields)
    for stage in (waiting, at_once):
        fit(backend, stage, y, fields, start=WARM_UP)
    for name, maps in waiting.maps().items():
        assert np.array_equal(at_once.maps()[name].statistic, maps.statistic)


def test_a_warm_up_that_is_too_short_starts_no_run() -> None:
    settings = GlmSettings(**ASKED, noise="ar1", ar1_warm_up_volumes=20)
    least = MIN_RESIDUAL_DOF + len(a_design().columns)
    assert least > 20
    with pytest.raises(ConfigError, match=f"at least {MIN_RESIDUAL_DOF} more than .* got 20"):
        GlmStage(open_backend("cpu"), 5, a_design(settings), settings)


# --- against nilearn itself


def test_t_and_effects_are_nilearns() -> None:
    first_level = pytest.importorskip("nilearn.glm.first_level")
    contrasts = pytest.importorskip("nilearn.glm.contrasts")
    fields, design = poses(), a_design()
    rows = full_rows(design, fields)
    y = series(rows)
    for n in (STARTED, 60, N):
        maps = fitted(open_backend("cpu"), y[:n], fields).maps()
        labels, results = first_level.run_glm(
            y[:n, 1:].astype(np.float64), rows[:n], noise_model="ols"
        )
        for contrast in design.contrasts:
            weights = contrast.weights if contrast.kind == "F" else contrast.weights[0]
            theirs = contrasts.compute_contrast(labels, results, weights, stat_type=contrast.kind)
            found = maps[contrast.name]
            bound = 2e-3 if contrast.kind == "t" else 2e-3 * np.sqrt(theirs.stat().max())
            assert np.abs(found.statistic[1:] - theirs.stat()).max() < bound
            if contrast.kind == "t":
                assert found.effect is not None
                scale = np.sqrt(found.variance.max())  # type: ignore[union-attr]
                assert np.abs(found.effect[1:] - theirs.effect_size().ravel()).max() < 2e-3 * scale


def test_the_motion_columns_have_fmripreps_names() -> None:
    assert a_design().columns[-8:-2] == MOTION_COLUMNS

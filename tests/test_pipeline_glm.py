"""The GLM in the per-TR path, against nilearn: simulated and real runs, from a source to maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_on_cpu import open_cuda_on_cpu
from dicom_files import real_data
from epi import a_grid, epi, rigid
from memory import ACTIVE, EVENTS, GRID, TR_S, MemoryReader, plain, volumes
from reference import least_squares
from rtfmri.backends import Backend, open_backend
from rtfmri.config import (
    Config,
    DetrendSettings,
    GlmSettings,
    MaskSettings,
    MotionSettings,
    RoiSettings,
    SliceTimingSettings,
)
from rtfmri.design import Confounds
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline, Result
from rtfmri.readers import open_reader
from rtfmri.recording import open_recording, recover
from rtfmri.session import Session
from rtfmri.stages.glm import ContrastMaps
from rtfmri.volume import Volume

first_level = pytest.importorskip("nilearn.glm.first_level")
nilearn_contrasts = pytest.importorskip("nilearn.glm.contrasts")

BOUND = 2e-3
"""Of t, against a batch fit in float64: what float32 voxels are allowed to cost."""


def as_they_come(**glm: Any) -> Config:
    """Motion is a regressor, but voxels stay as the scanner sent them, all of them."""
    return Config(
        device="cpu",
        motion=MotionSettings(mode="register_only"),
        mask=MaskSettings(source="none"),
        glm=GlmSettings(**glm),
    )


@dataclass
class Watched:
    """A run whose maps were kept at some volumes."""

    results: list[Result]
    maps: dict[int, Mapping[str, ContrastMaps]]
    contrasts: Mapping[str, tuple[str, NDArray[np.float64]]]
    series: NDArray[np.float32]
    """(n_volumes, n_voxels) as they were pushed."""


def watch(source: str, events: Any, config: Config, at: Sequence[int]) -> Watched:
    results, maps = [], {}
    with Session(source, events=events, config=config) as session:
        for result in session:
            results.append(result)
            if len(results) in at:
                assert session.pipeline
                maps[len(results)] = session.pipeline.glm_maps()
        assert session.pipeline
        assert session.pipeline.design
        contrasts = {c.name: (c.kind, c.weights) for c in session.pipeline.design.contrasts}
    read = [v.data for v in open_reader(source, tr_s=config.tr_s) if isinstance(v, Volume)]
    series = np.stack([data.reshape(-1, order="F") for data in read]).astype(np.float32)
    return Watched(results, maps, contrasts, series)


def assert_nilearns(run: Watched) -> dict[str, float]:
    """Compare with nilearn's OLS on the same design, at every volume that was kept."""
    largest = {}
    usable = np.array([result.quality.usable for result in run.results])
    design = np.array([result.design for result in run.results])
    for n, maps in run.maps.items():
        used = usable[:n]
        rows, y = design[:n][used], run.series[:n][used].astype(np.float64)
        noisy = y.std(axis=0) > 1e-3
        # What has not happened yet is left out: nilearn would count it as a degree of freedom.
        there = rows.any(axis=0)
        labels, results = first_level.run_glm(y[:, noisy], rows[:, there], noise_model="ols")
        for name, (kind, weights) in run.contrasts.items():
            if (weights[:, ~there] != 0).any():
                continue
            asked = weights[:, there] if kind == "F" else weights[0, there]
            theirs = nilearn_contrasts.compute_contrast(labels, results, asked, stat_type=kind)
            got = maps[name].statistic.reshape(-1, order="F")[noisy]
            difference = np.abs(got - theirs.stat())
            if kind == "t":
                effect = maps[name].effect
                assert effect is not None
                error = np.sqrt(theirs.effect_variance())
                effects = effect.reshape(-1, order="F")[noisy] - theirs.effect_size().ravel()
                assert np.abs(effects / np.maximum(error, 1e-6)).max() < BOUND
            else:  # as of a t squared
                difference = difference / np.maximum(2 * np.sqrt(theirs.stat()), 1)
            assert difference.max() < BOUND, (n, name)
            largest[f"{name} at {n}"] = float(difference.max())
            assert np.isfinite(maps[name].statistic).all()
    assert largest
    return largest


def test_a_simulated_run() -> None:
    source = "simulator:finger-tapping?volumes=70&shape=24x24x16&motion=1"
    config = as_they_come(f_contrasts={"moves": ("trans_x", "trans_y", "trans_z")})
    run = watch(source, simulated_events(70), config, (25, 40, 70))
    assert len(run.maps) == 3
    assert_nilearns(run)


def simulated_events(n: int) -> tuple[Event, ...]:
    from rtfmri.simulator import Scanner

    return Scanner(n_volumes=n, shape=(24, 24, 16)).events


def test_a_real_neurofeedback_run() -> None:
    folder = real_data("siemens_mosaic_psc")
    run = watch(str(folder), folder / "events.tsv", as_they_come(), (40, 90, 155))
    assert_nilearns(run)
    assert run.maps[155]["NFBREG"].statistic.max() > 10


def test_a_real_run_of_seeing_and_hearing() -> None:
    folder = real_data("nifti_fsl_feeds")
    config = as_they_come(
        contrasts={"visual": "visual", "auditory": "auditory", "side": "visual - auditory"},
        f_contrasts={"any": ("visual", "auditory")},
    ).with_changes(tr_s=3.0)
    run = watch(str(folder / "bold.nii.gz"), folder / "events.tsv", config, (30, 64))
    assert_nilearns(run)


def test_visual_and_auditory_areas_separate() -> None:
    folder = real_data("nifti_fsl_feeds")
    # The file is of a head that was realigned before; what motion is left goes with the task.
    config = Config(device="cpu", tr_s=3.0, glm=GlmSettings(motion=False))
    with Session(
        str(folder / "bold.nii.gz"), events=folder / "events.tsv", config=config
    ) as session:
        assert len(list(session)) == 64
        assert session.pipeline
        maps, grid = session.pipeline.glm_maps(), session.pipeline.grid
    seen, heard = maps["visual"].statistic, maps["auditory"].statistic
    places = {}
    for name, t, other in (("visual", seen, heard), ("auditory", heard, seen)):
        voxel = np.unravel_index(t.argmax(), t.shape)
        assert t[voxel] > 11
        assert abs(other[voxel]) < 0.4 * t[voxel]
        places[name] = (grid.affine @ [*voxel, 1])[:3]
    assert places["visual"][1] < -15  # occipital: at the back
    assert abs(places["auditory"][0]) > 10  # temporal: at the sides
    assert ((seen > 6) & (heard > 6)).sum() < 0.2 * min((seen > 6).sum(), (heard > 6).sum())


def test_a_real_run_of_many_volumes_and_conditions(tmp_path: Path) -> None:
    folder = real_data("nifti_haxby")
    lines = (folder / "attributes_literal.txt").read_text().splitlines()
    words = [line.split()[0] for line in lines if line.strip()]
    edges = [i for i in range(len(words)) if i == 0 or words[i] != words[i - 1]] + [len(words)]
    events = tuple(
        Event(2.5 * a, 2.5 * (b - a), words[a]) for a, b in pairwise(edges) if words[a] != "rest"
    )
    assert len({event.trial_type for event in events}) == 8
    config = as_they_come(
        drift="linear", contrasts={"faces": "face - house", "cats": "cat"},
        f_contrasts={"objects": tuple(sorted({e.trial_type for e in events}))},
    ).with_changes(tr_s=2.5)  # fmt: skip
    run = watch(str(folder / "bold.nii.gz"), events, config, (200, 700, 1452))
    assert_nilearns(run)


SHORT = (Event(4.0, 10.0, "tap"), Event(26.0, 10.0, "tap"))


def moving_run(n: int = 22) -> list[Volume]:
    """A head that wanders, with a blob that comes and goes with the task."""
    grid, rng = a_grid((20, 24, 16), (8.5, 8.5, 9.0)), np.random.default_rng(3)
    steps = np.cumsum(rng.normal(0, [0.06] * 3 + [0.04] * 3, (n, 6)), axis=0)
    made = []
    for i in range(n):
        on = any(e.onset_s + 5 <= (i + 0.5) * TR_S < e.onset_s + e.duration_s + 5 for e in SHORT)
        pose = rigid(grid, steps[i, :3], steps[i, 3:]) if i else None
        data = epi(grid, pose, noise_sd=8.0, blob_percent=9.0 * on, seed=i)
        made.append(Volume(data.reshape(grid.shape, order="F"), grid, i, TR_S))
    return made


def pushed(run: Sequence[Volume], config: Config, **more: Any) -> tuple[Pipeline, list[Result]]:
    given = {
        "paradigm": Paradigm(EVENTS, config.paradigm, config.baseline),
        "n_volumes": 1 + run[-1].index,
        "dtype": run[0].data.dtype,
        **more,
    }
    pipeline = Pipeline(run[0].grid, config, **given)
    return pipeline, [pipeline.push(volume) for volume in run]


def test_the_blob_of_a_moving_head_is_found_by_both_backends() -> None:
    run = moving_run()
    mask = epi(run[0].grid, noise_sd=0).reshape(run[0].grid.shape, order="F") > 300
    found = []
    for backend in (open_backend("cpu"), open_cuda_on_cpu("shuffled")):
        rois = {"blob": near_the_blob(run[0])}
        given = {"paradigm": Paradigm(SHORT), "mask": mask, "rois": rois, "backend": backend}
        pipeline, results = pushed(run, Config(device="cpu"), **given)
        found.append((pipeline.glm_maps()["tap"], results))
        assert pipeline.roi_contrasts()["tap"]["blob"].statistic > 4
    (ours, results), (theirs, their_results) = found
    assert np.array_equal(ours.statistic, theirs.statistic)
    for a, b in zip(results, their_results, strict=True):
        assert np.array_equal(a.design, b.design)  # type: ignore[arg-type]
        assert a.motion
        assert a.design is not None
        moved = np.concatenate([a.motion.translation_mm, np.radians(a.motion.rotation_deg)])
        np.testing.assert_allclose(a.design[-7:-1], moved, atol=1e-12)
    assert ours.statistic[near_the_blob(run[0])].max() > 4


def near_the_blob(volume: Volume) -> NDArray[np.bool_]:
    with_blob, without = (
        epi(volume.grid, noise_sd=0, blob_percent=percent).reshape(volume.grid.shape, order="F")
        for percent in (10.0, 0.0)
    )
    return (with_blob - without) > 60


@pytest.mark.parametrize("noise", ["ols", "ar1"])
def test_an_unusable_volume_leaves_no_trace(noise: str) -> None:
    made = volumes(60, dtype=np.float32)
    glm = GlmSettings(noise=noise, ar1_warm_up_volumes=25, drift="linear")
    bad = (30, 31, 44)
    clean, spoilt = [v for v in made if v.index not in bad], list(made)
    for i in bad:
        data = made[i].data.copy(order="F")
        data[0, 0, 0] = np.nan
        spoilt[i] = Volume(data, GRID, i, TR_S)
    (one, results), (other, _) = (pushed(run, plain(glm=glm)) for run in (spoilt, clean))
    assert [r.index for r in results if not r.quality.usable] == [30, 31, 44]
    ours, theirs = one.glm_maps()["tap"], other.glm_maps()["tap"]
    assert np.array_equal(ours.statistic, theirs.statistic)
    assert ours.statistic[ACTIVE].min() > 5


def test_a_run_that_begins_anew_forgets_what_was_before() -> None:
    made = volumes(40)
    bright = Volume(np.asfortranarray(made[0].data * 2), GRID, 0, TR_S)
    late, _ = pushed([bright, *made[1:]], plain())
    alone, _ = pushed(made[1:], plain())
    assert late.n_start_up == 1
    assert np.array_equal(late.glm_maps()["tap"].statistic, alone.glm_maps()["tap"].statistic)


def test_results_hold_each_regions_t() -> None:
    weights = np.zeros(GRID.shape)
    weights[ACTIVE] = 1
    made = volumes(60)
    settings = GlmSettings(contrasts={"tap": "tap"}, f_contrasts={"any": ("tap", "drift_1")})
    pipeline, results = pushed(made, plain(glm=settings), rois={"motor": weights})
    signal = np.array([v.data[ACTIVE].mean() for v in made])
    design = np.array([r.design for r in results])
    assert pipeline.design
    for n in (30, 45, 60):
        for contrast in pipeline.design.contrasts:
            _, wanted, _ = least_squares(design[:n], signal[:n, None], contrast.weights)
            got = results[n - 1].roi["motor"].t[contrast.name]
            assert got == pytest.approx(wanted[0], rel=1e-3)
    value = pipeline.roi_contrasts()["tap"]["motor"]
    assert value.effect == pytest.approx(30, abs=4)
    assert value.interval is not None
    assert value.log_e is not None
    low, high = value.interval
    assert low < 30 < high
    # Wider than an interval for who looks once.
    assert high - low > 2 * 1.96 * (value.standard_error or 0)
    assert value.log_e > 10
    assert pipeline.roi_contrasts()["any"]["motor"].interval is None


def test_there_is_no_glm_without_events_or_if_it_is_off() -> None:
    for config, events in ((plain(), ()), (plain(glm=GlmSettings(noise="off")), EVENTS)):
        pipeline = Pipeline(GRID, config, paradigm=Paradigm(events))
        result = [pipeline.push(volume) for volume in volumes(5)][-1]
        assert result.design is None
        assert pipeline.design is None
        assert pipeline.glm_maps() == pipeline.roi_contrasts() == {}
        assert result.stage_ms["glm"] == 0


def test_confounds_take_out_what_they_explain() -> None:
    made = volumes(60)
    breath = np.random.default_rng(6).normal(size=60)
    waves = [
        Volume(np.asfortranarray(v.data + np.int16(round(40 * b))), GRID, v.index, TR_S)
        for v, b in zip(made, breath, strict=True)
    ]
    table = Confounds(breath[:, None], ("breath",))
    without, _ = pushed(waves, plain())
    within, _ = pushed(waves, plain(), confounds=table)
    a, b = (p.glm_maps()["tap"].statistic[ACTIVE].mean() for p in (without, within))
    assert b > 3 * a


def test_a_condition_that_never_comes_has_a_dark_map() -> None:
    events = (*EVENTS, Event(10_000, 20, "never"))
    pipeline = Pipeline(GRID, plain(), paradigm=Paradigm(events), n_volumes=40)
    for volume in volumes(40):
        pipeline.push(volume)
    maps = pipeline.glm_maps()
    assert maps["never"].dof == 0
    for image in (maps["never"].statistic, maps["never"].effect, maps["never"].log_e):
        assert image is not None
        assert not image.any()
    assert maps["tap"].statistic[ACTIVE].min() > 5


@pytest.mark.parametrize(
    ("glm", "words"),
    [
        ({"contrasts": {"x": "tap - rest"}}, "contrast 'x' .* the columns are"),
        ({"confounds": "c.tsv"}, "confounds must be given"),
        ({"noise": "ar1", "ar1_warm_up_volumes": 20}, None),
    ],
)
def test_a_bad_design_starts_no_run(glm: dict[str, Any], words: str | None) -> None:
    config = plain(glm=GlmSettings(**glm))
    if words:
        with pytest.raises(ConfigError, match=words):
            Pipeline(GRID, config, paradigm=Paradigm(EVENTS))
    else:  # known once the length of the run is, which decides how many cosines there are
        pipeline = Pipeline(GRID, config, paradigm=Paradigm(EVENTS), n_volumes=2000)
        with pytest.raises(ConfigError, match=r"ar1_warm_up_volumes must be at least 12 more"):
            pipeline.push(volumes(1)[0])


def test_a_session_reads_the_confounds_and_refuses_too_few(tmp_path: Path) -> None:
    path = tmp_path / "confounds.tsv"
    path.write_text("pulse\n" + "\n".join(str(0.1 * i) for i in range(30)) + "\n")
    config = plain(glm=GlmSettings(confounds=path))
    with Session(
        MemoryReader(volumes(30)), events=EVENTS, config=config, out=tmp_path / "run.h5"
    ) as session:
        assert len(list(session)) == 30
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.confounds
        assert recording.confounds.names == ("pulse",)
        assert "pulse" in recording.columns
        replayed = recording.pipeline()
        for volume in recording.volumes():
            replayed.push(volume)
        ours, theirs = recording.contrast_maps()["tap"], replayed.glm_maps()["tap"]
        assert np.array_equal(ours.statistic, theirs.statistic)
    with pytest.raises(ConfigError, match="a line for each of the run's 31 volumes, got 30"):
        Session(MemoryReader(volumes(31)), events=EVENTS, config=config)
    with pytest.raises(ConfigError, match="the columns are"):
        Session(
            MemoryReader(volumes(31)),
            events=EVENTS,
            config=plain(glm=GlmSettings(contrasts={"x": "tip"})),
        )


@pytest.mark.parametrize("noise", ["ols", "ar1"])
def test_a_recording_holds_it_all_and_recovers_it(tmp_path: Path, noise: str) -> None:
    glm = GlmSettings(
        noise=noise,
        ar1_warm_up_volumes=25,
        drift="linear",
        contrasts={"tap": "tap"},
        f_contrasts={"any": ("tap", "drift_1")},
    )
    weights = np.zeros(GRID.shape)
    weights[ACTIVE] = 1
    path = tmp_path / "run.h5"
    with Session(
        MemoryReader(volumes(60)),
        events=EVENTS,
        rois={"motor": weights},
        config=plain(glm=glm),
        out=path,
    ) as session:
        results = list(session)
        assert session.pipeline
        maps, memory = session.pipeline.glm_maps(), session.pipeline.quality_maps()["memory"]
    recover(path, tmp_path / "again.h5")
    for name in ("run.h5", "again.h5"):
        with open_recording(tmp_path / name) as recording:
            assert recording.contrast_names == ("tap", "any")
            assert np.array_equal(recording.design, [r.design for r in results])
            ts = [[r.roi["motor"].t["tap"], r.roi["motor"].t["any"]] for r in results]
            assert np.array_equal(recording.roi_t[:, 0], ts)
            assert np.array_equal(recording.quality_maps()["memory"], memory)
            for contrast, found in recording.contrast_maps().items():
                wanted = maps[contrast]
                assert (found.kind, found.dof, found.n_rows) == (
                    wanted.kind,
                    wanted.dof,
                    wanted.n_rows,
                )
                for field in ("statistic", "effect", "variance", "log_e"):
                    ours, theirs = getattr(found, field), getattr(wanted, field)
                    assert (ours is None) == (theirs is None)
                    assert ours is None or np.array_equal(ours, theirs)
    assert maps["any"].n_rows == 2


# --- what else is done to a signal


def drifting_volumes(n: int = 120) -> list[Volume]:
    """The active region's task, and a drift of all voxels that is as large."""
    return [
        Volume(np.asfortranarray(v.data + np.int16(round(0.25 * v.index))), GRID, v.index, TR_S)
        for v in volumes(n)
    ]


@pytest.mark.parametrize("backend", [open_backend("cpu"), open_cuda_on_cpu("backward")])
def test_detrending_keeps_the_task_and_takes_the_drift(backend: Backend) -> None:
    weights = np.zeros(GRID.shape)
    weights[ACTIVE] = 1
    last_psc, effects = {}, {}
    for method in ("off", "linear"):
        config = plain(detrend=DetrendSettings(method=method))
        pipeline, results = pushed(
            drifting_volumes(), config, rois={"motor": weights}, backend=backend
        )
        rest = [r.roi["motor"] for r in results if r.conditions == ("baseline",)]
        last_psc[method] = np.mean([value.psc for value in rest[-10:]])
        effects[method] = pipeline.maps()["tap"].psc[ACTIVE].mean()
        # The raw signal is told as it is.
        assert results[-1].roi["motor"].signal == pytest.approx(1000 + 0.25 * 119, abs=4)
        assert results[-1].roi["motor"].filtered == pytest.approx(
            1000 + (0.25 * 119 if method == "off" else 0), abs=8
        )
    assert last_psc["off"] > 1
    assert abs(last_psc["linear"]) < 0.4
    assert effects["linear"] == pytest.approx(3.0, abs=0.2)
    assert abs(effects["off"] - 3.0) > 0.5


def test_the_kalman_filter_takes_a_spike_out_of_feedback() -> None:
    weights = np.zeros(GRID.shape)
    weights[ACTIVE] = 1
    made = volumes(60)
    data = made[50].data.copy(order="F")
    data[ACTIVE] += 200  # not enough of the brain for the quality stage to see
    made[50] = Volume(data, GRID, 50, TR_S)
    psc = {}
    for method in ("off", "kalman"):
        config = plain(roi=RoiSettings(filter=method))
        _, results = pushed(made, config, rois={"motor": weights})
        assert results[50].roi["motor"].signal > 1150
        psc[method] = results[50].roi["motor"].psc
    assert psc["off"] > 15
    assert abs(psc["kalman"]) < 2


def test_slice_timing_moves_the_designs_moment() -> None:
    run = [
        Volume(v.data, v.grid, v.index, v.tr_s, slice_times_s=tuple(0.25 * k for k in range(7)))
        for v in volumes(40)
    ]
    designs = []
    for method in ("off", "linear"):
        _, results = pushed(run, plain(slice_timing=SliceTimingSettings(method=method)))
        designs.append(np.array([r.design for r in results])[:, -1])
    at_start = np.interp(np.arange(40) * TR_S, (np.arange(40) + 0.5) * TR_S, designs[0])
    np.testing.assert_allclose(designs[1][1:], at_start[1:], atol=0.08)
    assert np.abs(designs[0] - designs[1]).max() > 0.1

"""A real neurofeedback run: 155 Siemens mosaics with documented onsets, from files to maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dicom_files import real_data
from memory import plain
from offline import Offline
from rtfmri.config import Config, FeedbackSettings
from rtfmri.pipeline import Result
from rtfmri.readers import open_reader
from rtfmri.recording import open_recording
from rtfmri.session import Session
from rtfmri.volume import Volume


@dataclass
class Run:
    session: Session
    results: Sequence[Result]
    folder: Path
    out: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With the default settings."""
    return made(tmp_path_factory.mktemp("real") / "run.h5", Config(device="cpu"))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without motion correction and mask: what a few lines of NumPy can repeat."""
    config = plain(feedback=FeedbackSettings(signals=SIGNALS))
    return made(tmp_path_factory.mktemp("plain") / "run.h5", config)


SIGNALS = {
    "psc": {"kind": "activity", "roi": "left"},
    "z": {"kind": "activity", "roi": "left", "measure": "z"},
    "median": {"kind": "activity", "roi": "left", "summary": "median"},
    "eigenvariate": {"kind": "activity", "roi": "right", "summary": "eigenvariate"},
    "difference": {"kind": "differential", "plus": "left", "minus": "right"},
    "link": {"kind": "connectivity", "rois": ["left", "right"], "window_volumes": 30},
}


def made(out: Path, config: Config) -> Run:
    folder = real_data("siemens_mosaic_psc")
    with Session(
        str(folder),
        events=folder / "events.tsv",
        rois={"left": folder / "lROI_1.nii", "right": folder / "rROI_2.nii"},
        config=config,
        out=out,
    ) as session:
        results = list(session)
    return Run(session, results, folder, out)


def test_all_volumes_are_used_and_the_strangers_counted(run: Run) -> None:
    assert [result.index for result in run.results] == list(range(155))
    assert run.session.counters.missing == 0
    assert run.session.counters.skipped == {"is not DICOM": 6}
    assert run.session.n_recorded == 155
    maps = run.session.maps()
    in_transition = sum(not result.conditions for result in run.results)
    assert maps["NFBREG"].n_volumes + maps["baseline"].n_volumes + in_transition == 155


def test_both_regions_rise_in_the_blocks(run: Run, plain_run: Run) -> None:
    assert run.session.pipeline
    assert plain_run.session.pipeline
    t, t_plain = (r.session.pipeline.roi_t()["NFBREG"] for r in (run, plain_run))
    assert t_plain["left"] > 3
    assert t_plain["right"] > 2
    # The head turned by 0.4 degrees over the run: that put right, both regions stand out more.
    assert t["left"] > 1.3 * t_plain["left"]
    assert t["right"] > 1.2 * t_plain["right"]


def test_the_run_is_as_good_as_it_looks(run: Run) -> None:
    assert all(result.quality.usable for result in run.results)
    assert all(result.motion and result.motion.converged for result in run.results)
    assert [result.begins for result in run.results] == [True] + [False] * 154
    last = run.results[-1]
    assert last.quality.usable_min == pytest.approx(155 * 1.97 / 60)
    assert last.motion
    # The drift that python-rtspm finds in this run, too.
    assert last.motion.rotation_deg[2] == pytest.approx(0.38, abs=0.05)


def test_motion_correction_makes_the_signal_steadier(run: Run, plain_run: Run) -> None:
    assert run.session.pipeline
    assert plain_run.session.pipeline
    maps = run.session.pipeline.quality_maps()
    before = plain_run.session.pipeline.quality_maps()["tsnr"]
    brain = maps["mask"] > 0
    assert np.median(maps["tsnr"][brain]) > 1.05 * np.median(before[brain])


def test_the_map_is_that_of_a_two_pass_computation(plain_run: Run) -> None:
    run = plain_run
    volumes = [item for item in open_reader(str(run.folder)) if isinstance(item, Volume)]
    series = np.stack([volume.data for volume in volumes]).astype(np.float64)
    active, rest = (
        series[[name in result.conditions for result in run.results]]
        for name in ("NFBREG", "baseline")
    )
    error = np.sqrt(active.var(0, ddof=1) / len(active) + rest.var(0, ddof=1) / len(rest))
    effect = active.mean(0) - rest.mean(0)
    t = np.divide(effect, error, out=np.zeros_like(effect), where=error > 0)
    got = run.session.maps()["NFBREG"].t
    assert np.abs(got - t).max() < 1e-3
    assert np.unravel_index(got.argmax(), got.shape) == np.unravel_index(t.argmax(), t.shape)
    assert t.max() > 10


def test_the_recording_replays_to_the_same_bits(run: Run) -> None:
    with open_recording(run.out) as recording:
        pipeline = recording.pipeline()
        for volume in recording.volumes():
            pipeline.push(volume)
        assert np.array_equal(pipeline.maps()["NFBREG"].t, recording.maps()["NFBREG"].t)


def test_every_signal_is_what_float64_makes_of_the_recorded_volumes(plain_run: Run) -> None:
    with open_recording(plain_run.out) as recording:
        rois = recording.roi_weights
        conditions = [result.conditions for result in plain_run.results]
        offline = Offline.of(recording.volumes(), rois, conditions)
        got = dict(zip(recording.signal_names, recording.signals.T, strict=True))
    left, right = (offline.activity(name, "psc") for name in ("left", "right"))
    n = len(conditions)
    psc_error = 100 * n * 2.0**-24  # a mean of float32 is off by at most one rounding a volume
    # z is PSC over the sd in percent of the mean; early on that of two or three volumes is small.
    sd_percent = np.abs(left / offline.activity("left", "z"))
    wanted = {
        "psc": (left, psc_error),
        "z": (offline.activity("left", "z"), 2 * psc_error / np.nanmin(sd_percent)),
        "median": (offline.median("left", "psc"), psc_error),
        "eigenvariate": (offline.eigenvariate("right", "psc"), 20 * psc_error),
        "difference": (left - right, 2 * psc_error),
        "link": (offline.connectivity("left", "right", 30), 1e-6),
    }
    assert list(got) == list(wanted)
    for name, (values, error) in wanted.items():
        np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(values), err_msg=name)
        known = ~np.isnan(values)
        assert np.abs(got[name] - values)[known].max() <= error, name
        assert np.ptp(values[known]) > 0.5, name

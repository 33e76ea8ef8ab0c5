"""A real neurofeedback run: 155 Siemens mosaics with documented onsets, from files to maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dicom_files import real_data
from rtfmri.config import Config
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
    folder = real_data("siemens_mosaic_psc")
    out = tmp_path_factory.mktemp("real") / "run.h5"
    with Session(
        str(folder),
        events=folder / "events.tsv",
        rois={"left": folder / "lROI_1.nii", "right": folder / "rROI_2.nii"},
        config=Config(device="cpu"),
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


def test_both_regions_rise_in_the_blocks(run: Run) -> None:
    assert run.session.pipeline
    t = run.session.pipeline.roi_t()["NFBREG"]
    assert t["left"] > 3
    assert t["right"] > 2


def test_the_map_is_that_of_a_two_pass_computation(run: Run) -> None:
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

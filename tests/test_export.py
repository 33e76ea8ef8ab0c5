import csv
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

import recordings
from recordings import ACTIVE, EVENTS, GRID, TR_S
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.export import bids_labels, export_bids
from rtfmri.paradigm import Event, read_events
from rtfmri.recording import open_recording

N = 50
ROI_VALUES = ("signal", "filtered", "psc", "z", "adjusted")
# BIDS: entities as key-label with labels of letters and digits, then suffix and extension.
BIDS_NAME = re.compile(
    r"sub-[A-Za-z0-9]+_task-[A-Za-z0-9]+(_(contrast|stat|label|desc)-[A-Za-z0-9]+)*"
    r"_(boldref|statmap|mask|probseg|events|timeseries|design)\.(nii\.gz|json|tsv)"
)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.h5"
    graded = recordings.roi() * 0.5
    graded[3, 8, 5] = 1
    rois = {"motor area": recordings.roi(), "graded": graded}
    # Volume 7 never comes.
    run = [v for v in recordings.volumes(N) if v.index != 7]
    recordings.record(path, run, rois=rois, skipped=["cut short"])
    return path


@pytest.fixture(scope="module")
def func(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bids")
    export_bids(recording, out)
    return out / "sub-01" / "func"


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_a_dataset_says_what_made_it(func: Path) -> None:
    description = json.loads((func.parents[1] / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["Name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", description["BIDSVersion"])
    assert description["GeneratedBy"][0]["Name"] == "rtfmri"


def test_names_are_bids_and_every_file_has_its_sidecar(func: Path) -> None:
    names = sorted(path.name for path in func.iterdir())
    # Images: quality, subtraction, GLM, regions; then events, three tables, the design.
    assert len(names) == 2 * (4 + 3 + 6 + 2) + 1 + 3 * 2 + 2
    for name in names:
        assert BIDS_NAME.fullmatch(name), name
        stem = name.removesuffix(".nii.gz").removesuffix(".tsv")
        if not name.endswith(("events.tsv", ".json")):
            assert f"{stem}.json" in names


def test_maps_come_back_with_values_affine_and_units(recording: Path, func: Path) -> None:
    with open_recording(recording) as run:
        maps = run.maps()
        contrast = run.contrast_maps()["left hand"]
    effect = "sub-01_task-leftHand_contrast-leftHand_desc-subtraction_stat-{}_statmap"
    expected = {effect.format(s): getattr(maps["left hand"], s) for s in ("effect", "psc", "t")}
    glm = "sub-01_task-leftHand_contrast-leftHand_stat-{}_statmap"
    expected |= {glm.format(s): getattr(contrast, s) for s in ("effect", "variance")}
    expected[glm.format("t")] = contrast.statistic
    expected["sub-01_task-leftHand_desc-baseline_boldref"] = maps["baseline"].mean
    for name, values in expected.items():
        image = nibabel.load(func / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), values)
        assert image.get_data_dtype() == np.float32
        # NIfTI stores the affine in float32: 2**-24 of the largest entry, 27 mm.
        np.testing.assert_allclose(image.affine, GRID.affine, atol=27 * 2**-24)
        assert image.header["sform_code"] == image.header["qform_code"] == 1
        assert image.header.get_xyzt_units()[0] == "mm"
    assert maps["left hand"].t[ACTIVE].min() > 10
    t_image = nibabel.load(func / f"{effect.format('t')}.nii.gz")
    assert t_image.get_fdata()[ACTIVE].min() > 10


def test_sidecars_tell_units_formula_and_counts(recording: Path, func: Path) -> None:
    with open_recording(recording) as run:
        counts = {name: values.n_volumes for name, values in run.maps().items()}
    name = "sub-01_task-leftHand_contrast-leftHand_desc-subtraction_stat-psc_statmap.json"
    sidecar = json.loads((func / name).read_text())
    assert sidecar["Units"] == "percent"
    assert "mean(baseline)" in sidecar["Formula"]
    assert sidecar["RepetitionTime"] == TR_S
    assert sidecar["BaselineCondition"] == "baseline"
    assert sidecar["Condition"] == "left hand"
    assert sidecar["NumberOfVolumes"] == counts
    assert sidecar["Software"].startswith("rtfmri ")


def test_z_and_p_have_the_tail_of_t(recording: Path, func: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    with open_recording(recording) as run:
        maps = run.contrast_maps()["left hand"]
    name = "sub-01_task-leftHand_contrast-leftHand_stat-{}_statmap.nii.gz"
    p, z, log10e = (nibabel.load(func / name.format(s)).get_fdata() for s in ("p", "z", "log10e"))
    known = maps.statistic != 0
    np.testing.assert_allclose(p[known], stats.t.sf(maps.statistic[known], maps.dof), rtol=1e-5)
    np.testing.assert_allclose(stats.norm.sf(z[known]), p[known], rtol=1e-3, atol=1e-30)
    assert z[ACTIVE].min() > 7
    assert np.isfinite(z).all()
    assert not p[~known].any()
    assert not z[~known].any()
    assert log10e[ACTIVE].min() > 5
    sidecar = json.loads((func / name.format("z").replace(".nii.gz", ".json")).read_text())
    assert sidecar["DegreesOfFreedom"] == maps.dof


def test_the_design_comes_back(recording: Path, func: Path) -> None:
    table = read_tsv(func / "sub-01_task-leftHand_design.tsv")
    with open_recording(recording) as run:
        design, columns = run.design, run.columns
    assert list(table[0]) == list(columns)
    back = [[float(row[column]) for column in columns] for row in table]
    np.testing.assert_array_equal(back, design)
    sidecar = json.loads((func / "sub-01_task-leftHand_design.json").read_text())
    assert sidecar["Contrasts"]["left hand"]["Test"] == "t"
    assert np.array(sidecar["Contrasts"]["left hand"]["Weights"]).argmax() == len(columns) - 1
    assert len(sidecar["Used"]) == len(design)


def test_regions_are_masks_or_weights(func: Path) -> None:
    mask = nibabel.load(func / "sub-01_task-leftHand_label-motorArea_mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask.dataobj), recordings.roi())
    weights = nibabel.load(func / "sub-01_task-leftHand_label-graded_probseg.nii.gz")
    assert sorted(np.unique(np.asarray(weights.dataobj))) == [0, 0.5, 1]


def test_feedback_comes_back_row_by_row(recording: Path, func: Path) -> None:
    table = read_tsv(func / "sub-01_task-leftHand_desc-feedback_timeseries.tsv")
    with open_recording(recording) as run:
        roi, members, ts = run.roi, run.members(), run.roi_t
    assert [int(row["volume"]) for row in table] == [i for i in range(N) if i != 7]
    assert table[0]["motorArea_psc"] == table[1]["motorArea_z"] == "n/a"
    for i, row in enumerate(table):
        assert float(row["time_s"]) == int(row["volume"]) * TR_S
        names = [n for n, on in zip(("baseline", "left hand"), members[i], strict=True) if on]
        assert row["conditions"] == (",".join(names) or "n/a")
        cells = [row[f"motorArea_{value}"] for value in ROI_VALUES]
        back = [float(cell.replace("n/a", "nan")) for cell in cells]
        np.testing.assert_array_equal(back, roi[i, 0])
        assert float(row["motorArea_t_leftHand"]) == ts[i, 0, 0]
    assert ts[-1, 0, 0] > 10
    assert {row["shown"] for row in table} == {"n/a"}  # no signals in this run
    columns = json.loads((func / "sub-01_task-leftHand_desc-feedback_timeseries.json").read_text())
    assert list(columns) == list(table[0])
    assert columns["motorArea_psc"]["Units"] == "percent"


def test_timing_has_every_stage_and_the_deadline(recording: Path, func: Path) -> None:
    table = read_tsv(func / "sub-01_task-leftHand_desc-timing_timeseries.tsv")
    with open_recording(recording) as run:
        rows = run.results
    for field in ("arrived_s", "decode_ms", "wait_ms", "upload_ms", "baseline_ms", "roi_ms"):
        np.testing.assert_array_equal([float(row[field]) for row in table], rows[field])
    assert {row["deadline_missed"] for row in table} == {"false"}
    assert {row["acquired_s"] for row in table} == {"n/a"}


def test_events_come_back(func: Path) -> None:
    assert read_events(func / "sub-01_task-leftHand_events.tsv") == EVENTS


def test_a_broken_recording_gives_the_same_maps(tmp_path: Path) -> None:
    run = recordings.volumes(40)
    pipeline = recordings.record(tmp_path / "b.h5", run, rois={"r": recordings.roi()}, broken=True)
    export_bids(tmp_path / "b.h5", tmp_path / "out", subject="07", task="tap")
    name = "sub-07/func/sub-07_task-tap_contrast-leftHand_{}stat-t_statmap.nii.gz"
    welch, t = (
        np.asarray(nibabel.load(tmp_path / "out" / name.format(part)).dataobj)
        for part in ("desc-subtraction_", "")
    )
    np.testing.assert_array_equal(welch, pipeline.maps()["left hand"].t)
    np.testing.assert_array_equal(t, pipeline.glm_maps()["left hand"].statistic)


def test_nothing_is_overwritten_and_nothing_half_written(recording: Path, tmp_path: Path) -> None:
    written = export_bids(recording, tmp_path)
    assert all(path.is_file() for path in written)
    written[3].write_text("mine")
    written[5].unlink()
    with pytest.raises(RecordingError, match="exists already"):
        export_bids(recording, tmp_path)
    assert written[3].read_text() == "mine"
    assert not written[5].exists()


def test_a_second_subject_joins_our_dataset_but_no_other(recording: Path, tmp_path: Path) -> None:
    export_bids(recording, tmp_path / "ours")
    files = export_bids(recording, tmp_path / "ours", subject="02")
    assert all("sub-02" in path.name for path in files)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "dataset_description.json").write_text('{"Name": "another"}')
    with pytest.raises(RecordingError, match=r"dataset_description\.json exists already"):
        export_bids(recording, tmp_path / "theirs")


def test_a_condition_without_volumes_has_no_map(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events = (*EVENTS, Event(500, 20, "never"))
    run = recordings.volumes(40)
    recordings.record(tmp_path / "r.h5", run, events=events, rois={"r": recordings.roi()})
    names = [path.name for path in export_bids(tmp_path / "r.h5", tmp_path / "out")]
    assert not [name for name in names if "contrast-never" in name]
    assert any("contrast-leftHand" in name and "task-task" in name for name in names)
    assert "never" in caplog.text


def test_monitoring_is_called_rest(tmp_path: Path) -> None:
    recordings.record(tmp_path / "r.h5", recordings.volumes(5), events=())
    names = {path.name for path in export_bids(tmp_path / "r.h5", tmp_path / "out")}
    assert "sub-01_task-rest_desc-baseline_boldref.nii.gz" in names
    assert not [name for name in names if "contrast" in name or "events" in name]


@pytest.mark.parametrize("values", [{"subject": "sub-01"}, {"task": "finger tapping"}])
def test_labels_of_others_are_not_mended(
    recording: Path, tmp_path: Path, values: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="letters and digits only"):
        export_bids(recording, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_no_recording_no_export(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot read"):
        export_bids(tmp_path / "none.h5", tmp_path / "out")


def test_a_folder_that_cannot_be_made(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="cannot write"):
        export_bids(recording, tmp_path / "file")


def test_labels() -> None:
    names = ["left hand", "left_hand", "Left-Hand", "NFBREG", "2-back", "手", "?"]
    labels = ["leftHand", "leftHand2", "LeftHand3", "NFBREG", "2Back", "unnamed", "unnamed2"]
    assert list(bids_labels(names).values()) == labels

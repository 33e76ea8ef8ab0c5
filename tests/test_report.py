import os
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot
import nibabel
import numpy as np
import pytest

import recordings
from recordings import ACTIVE, EVENTS, GRID
from rtfmri.config import Config
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.paradigm import Event
from rtfmri.pipeline import ConditionMaps
from rtfmri.report import peak, write_report
from rtfmri.report.regions import active_region, inactive_region
from rtfmri.session import Session
from rtfmri.stages.mask import brain_mask
from rtfmri.volume import Grid, Volume

N = 40


class Page(HTMLParser):
    """What a page says, what it loads, and the documents in its frames."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.text = ""
        self.loads: list[str] = []
        self.frames: list[str] = []
        self.feed(document)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [values[name] or "" for name in ("src", "href") if name in values]
        self.frames += [values["srcdoc"] or ""] if "srcdoc" in values else []


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    # Volume 7 never comes.
    run = [v for v in recordings.volumes(N) if v.index != 7]
    rois = {"<motor> & co": recordings.roi()}
    recordings.record(folder / "r.h5", run, rois=rois, skipped=["cut short", "cut short"])
    return write_report(folder / "r.h5", folder / "new" / "report")


def test_the_page_tells_what_the_run_was(index: Path) -> None:
    text = read(index).text
    assert "16x18x12 voxels" in text
    assert "left hand" in text
    assert "2 x cut short" in text
    assert "1 volumes" in text
    assert "<motor> & co" in text


def test_the_page_loads_nothing_and_forbids_it(index: Path) -> None:
    page = read(index)
    assert "default-src 'none'" in index.read_text(encoding="utf-8")
    assert len(page.frames) == 1
    inner = Page(page.frames[0])
    loads = page.loads + inner.loads
    assert len(loads) >= 4
    assert {address.partition(",")[0] for address in loads} == {"data:image/png;base64"}
    assert "http://" not in page.frames[0]
    assert "https://" not in page.frames[0]


def test_each_picture_is_a_readable_png(index: Path) -> None:
    names = {path.name for path in index.parent.glob("*.png")}
    assert names == {
        "subtraction.png",
        "blobs-leftHand.png",
        "evidence-leftHand.png",
        "design.png",
        "time-courses.png",
        "quality.png",
        "tsnr.png",
        "latency.png",
    }
    for name in names:
        pixels = matplotlib.image.imread(index.parent / name)
        assert pixels.shape[1] == 1500  # 10 inches at 150 dpi
        assert np.ptp(pixels[..., :3]) > 0.5


def test_blobs_are_warm_where_the_signal_rose(index: Path) -> None:
    pixels = matplotlib.image.imread(index.parent / "blobs-leftHand.png")
    red, blue = pixels[..., 0], pixels[..., 2]
    above_the_bar = slice(0, int(0.85 * len(red)))
    assert (red - blue)[above_the_bar].max() > 0.3
    assert (blue - red)[above_the_bar].max() < 0.1


def test_the_peak_is_in_the_active_block(tmp_path: Path) -> None:
    pipeline = recordings.record(tmp_path / "r.h5", recordings.volumes(N))
    maps = pipeline.maps()["left hand"]
    t, place_mm = peak(maps.t, GRID, recordings.head())
    i, j, k = np.rint(np.linalg.inv(GRID.affine) @ [*place_mm, 1])[:3].astype(int)
    assert recordings.roi()[i, j, k] == 1
    assert t == maps.t[recordings.head()].max() == maps.t[i, j, k]


@pytest.mark.skipif("RTFMRI_TEST_DATA" not in os.environ, reason="RTFMRI_TEST_DATA is not set")
def test_the_peaks_of_a_real_run_are_where_hearing_and_seeing_are(tmp_path: Path) -> None:
    # Its header says 1 mm for voxels of about 4 mm. Hearing: temporal lobes, at the sides of the
    # head; seeing: occipital lobe, at the back.
    data = Path(os.environ["RTFMRI_TEST_DATA"]) / "nifti_fsl_feeds"
    config = Config(tr_s=3.0, device="cpu")
    with Session(str(data / "bold.nii.gz"), events=data / "events.tsv", config=config) as session:
        assert len(list(session)) == 64
        assert session.pipeline
        maps, grid = session.maps(), session.pipeline.grid
        brain = session.pipeline.quality_maps()["mask"] > 0
    hearing, (x, _, _) = peak(maps["auditory"].t, grid, brain)
    seeing, (_, y, _) = peak(maps["visual"].t, grid, brain)
    assert min(hearing, seeing) > 10
    assert abs(x) > 10
    assert y < -15


def test_the_peak_is_not_in_the_air() -> None:
    mean = np.where(recordings.head(), 1000, 20).astype(np.float32)
    t = np.zeros(GRID.shape, np.float32)
    t[0, 0, 0], t[1, 1, 1], t[ACTIVE] = 99, np.nan, 5
    maps = ConditionMaps(9, mean, np.zeros_like(mean), np.zeros_like(mean), t)
    assert peak(maps.t, GRID, recordings.head())[0] == 5


def test_the_brain_is_found_without_the_air() -> None:
    found = brain_mask(np.where(recordings.head(), 1000, 20).astype(np.float32), GRID)
    assert found[ACTIVE].all()
    assert not found[~recordings.head()].any()


@pytest.mark.parametrize("value", [0, 1, np.nan])
def test_there_is_always_a_brain_to_draw(value: float) -> None:
    assert brain_mask(np.full((4, 4, 1), value), Grid((4, 4, 1), np.eye(4))).any()


def test_active_and_inactive_regions() -> None:
    brain = np.ones((20, 20, 20), bool)
    t = np.random.default_rng(0).normal(0, 1, brain.shape).clip(-3, 3)
    t[5:8, 5:8, 5:8] = 6
    t[5, 5, 5], t[15, 15, 15] = 9, 8
    active = active_region(t, brain)
    assert active[5:8, 5:8, 5:8].all()
    assert active.sum() == 27  # the other peak is another cluster
    inactive = inactive_region([t, t[::-1]], brain)
    assert inactive.sum() == 50
    assert not inactive[3:10, 5:8, 5:8].any()  # nowhere near
    assert np.abs(t[inactive]).max() < 0.5


def test_a_large_cluster_is_cut_to_its_best_voxels() -> None:
    t = np.full((10, 10, 10), 4.0)
    t[:, :, 5] = 7.0
    active = active_region(t, np.ones(t.shape, bool))
    assert active.sum() == 50
    assert active[:, :, 5].sum() == 50


def test_a_broken_recording_is_shown_and_said_to_be_one(tmp_path: Path) -> None:
    rois = {"r": recordings.roi()}
    recordings.record(tmp_path / "b.h5", recordings.volumes(N), rois=rois, broken=True)
    text = read(write_report(tmp_path / "b.h5", tmp_path)).text
    assert "was cut off" in text
    assert "Blobs: left hand" in text


def test_monitoring_has_a_page_without_maps(tmp_path: Path) -> None:
    recordings.record(tmp_path / "m.h5", recordings.volumes(12), events=())
    page = read(write_report(tmp_path / "m.h5", tmp_path))
    assert "Mean image" in page.text
    assert "Blobs" not in page.text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "mean.png",
        "time-courses.png",
        "quality.png",
        "tsnr.png",
        "latency.png",
    }


def test_conditions_get_their_own_blobs_or_a_reason(tmp_path: Path) -> None:
    events = (*EVENTS, Event(500, 20, "never"), Event(21, 18, "left_hand"))
    recordings.record(tmp_path / "r.h5", recordings.volumes(N), events=events)
    text = read(write_report(tmp_path / "r.h5", tmp_path)).text
    assert "Blobs: left_hand" in text
    assert "no map of never" in text
    assert (tmp_path / "blobs-leftHand.png").is_file()
    assert (tmp_path / "blobs-leftHand2.png").is_file()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((16, 12, 1), np.int16), ((1, 12, 9), np.float32), ((3, 3, 3), np.float32)],
)
def test_thin_and_tiny_volumes(tmp_path: Path, shape: tuple[int, int, int], dtype: type) -> None:
    grid = Grid(shape, np.diag([-3.0, 3, 4, 1]))
    rng = np.random.default_rng(1)
    run = []
    for i in range(30):
        data = np.asfortranarray(rng.normal(900, 5, shape), dtype)
        data[0, 0, 0] = np.nan if dtype is np.float32 else 0
        run.append(Volume(data, grid, i, recordings.TR_S))
    recordings.record(tmp_path / "r.h5", run)
    assert "too few slices" in read(write_report(tmp_path / "r.h5", tmp_path)).text


def test_the_shortest_run(tmp_path: Path) -> None:
    recordings.record(tmp_path / "r.h5", recordings.volumes(1))
    assert "no map of left hand" in read(write_report(tmp_path / "r.h5", tmp_path)).text


def test_an_empty_image(tmp_path: Path) -> None:
    grid = Grid((6, 6, 2), np.eye(4))
    dark = [Volume(np.zeros(grid.shape, np.int16, "F"), grid, i, 2.0) for i in range(30)]
    for volume in dark:
        volume.data[0, 0, 0] = 1  # a volume without any contrast begins no run
    recordings.record(tmp_path / "r.h5", dark)
    assert "No cluster" in read(write_report(tmp_path / "r.h5", tmp_path)).text


def test_the_anatomy_replaces_the_baseline_image(tmp_path: Path) -> None:
    recordings.record(tmp_path / "r.h5", recordings.volumes(N))
    fine = GRID.affine @ np.diag([0.5, 0.5, 0.5, 1])
    anatomy = np.zeros((32, 36, 24), np.float32)
    anatomy[8:24, 8:28, 6:18] = 500
    nibabel.save(nibabel.Nifti1Image(anatomy, fine), tmp_path / "t1.nii.gz")
    index = write_report(tmp_path / "r.h5", tmp_path / "out", anatomy=tmp_path / "t1.nii.gz")
    assert "over the anatomy" in read(index).text


@pytest.mark.parametrize("content", [None, b"no image"])
def test_an_anatomy_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    recordings.record(tmp_path / "r.h5", recordings.volumes(20))
    if content:
        (tmp_path / "t1.nii").write_bytes(content)
    with pytest.raises(ConfigError, match="anatomy must be a 3-D NIfTI image"):
        write_report(tmp_path / "r.h5", tmp_path, anatomy=tmp_path / "t1.nii")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    recordings.record(tmp_path / "r.h5", recordings.volumes(5))
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="cannot write the report"):
        write_report(tmp_path / "r.h5", tmp_path / "file")


def test_no_figure_is_left_in_pyplot(index: Path) -> None:
    assert index.is_file()
    assert matplotlib.pyplot.get_fignums() == []

from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest

from dicom_files import oblique_grid, voxels
from rtfmri.errors import ConfigError, RecordingError
from rtfmri.simulator import play, player
from rtfmri.volume import Volume

TR_S = 2.0


def _run(n_volumes: int = 3, dtype: type = np.int16) -> list[Volume]:
    grid = oblique_grid()
    data = [voxels(grid, seed, np.int16).astype(dtype) for seed in range(n_volumes)]
    return [Volume(d, grid, i, TR_S) for i, d in enumerate(data)]


class _Clock:
    """Stands in for the time module: sleeping moves it on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


@pytest.mark.parametrize("query", ["", "?format=dicom"])
def test_dicom_is_the_default(tmp_path, query):
    run = _run()
    assert play(run, f"folder:{tmp_path / 'export'}{query}", speed=None) == 3
    files = sorted((tmp_path / "export").iterdir())
    assert [f.name for f in files] == [f"001_000001_00000{i}.dcm" for i in (1, 2, 3)]
    headers = [pydicom.dcmread(f) for f in files]
    assert [h.InstanceNumber for h in headers] == [1, 2, 3]
    assert len({h.SeriesInstanceUID for h in headers}) == 1
    np.testing.assert_array_equal(headers[1].pixel_array[:10, :12], run[1].data[:, :, 0].T)


def test_nifti_keeps_voxels_affine_and_tr(tmp_path):
    run = _run(dtype=np.float32)
    play(run, f"folder:{tmp_path}?format=nifti", speed=None)
    files = sorted(tmp_path.iterdir())
    assert [f.suffix for f in files] == [".nii"] * 3
    image = nibabel.load(files[2])
    np.testing.assert_array_equal(np.asarray(image.dataobj), run[2].data)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, run[2].grid.affine, atol=1e-5)
    assert image.header["pixdim"][4] == TR_S


def test_the_same_run_is_the_same_series_and_another_is_not(tmp_path):
    uids = []
    for name, run in (("a", _run()), ("b", _run()), ("c", _run()[1:])):
        play(run, f"folder:{tmp_path / name}", speed=None)
        first = sorted((tmp_path / name).iterdir())[0]
        uids.append(pydicom.dcmread(first).SeriesInstanceUID)
    assert uids[0] == uids[1] != uids[2]


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_a_volume_appears_when_its_acquisition_has_ended(tmp_path, monkeypatch, speed):
    clock = _Clock()
    monkeypatch.setattr(player, "time", clock)
    seen = []
    run = [_run(4)[i] for i in (0, 1, 3)]
    play(
        run,
        f"folder:{tmp_path}",
        speed=speed,
        on_volume=lambda i: seen.append((i, clock.now_s - 100)),
    )
    # Volume 2 is missing, and its time passes all the same.
    assert seen == [(i, pytest.approx((i + 1) * TR_S / speed)) for i in (0, 1, 3)]


def test_without_a_speed_nothing_waits(tmp_path, monkeypatch):
    def refuse(_: float) -> None:
        raise AssertionError("slept")

    monkeypatch.setattr(player, "time", SimpleNamespace(sleep=refuse, perf_counter=lambda: 0.0))
    assert play(_run(), f"folder:{tmp_path}", speed=None) == 3


def test_no_part_of_a_file_is_ever_seen(tmp_path, monkeypatch):
    """While a file is being written, it has a name with a dot; then it is there whole."""
    visible = []

    def write(path, *_, **__):
        visible.append(sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")))
        path.write_bytes(b"whole")
        assert path.name.startswith(".")

    monkeypatch.setattr(player, "write_mosaic", write)
    play(_run(2), f"folder:{tmp_path}", speed=None)
    assert visible == [[], ["001_000001_000001.dcm"]]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_volume_is_ignored(tmp_path):
    assert play(["a gap", *_run(1), None], f"folder:{tmp_path}", speed=None) == 1


def test_float_voxels_need_nifti(tmp_path):
    with pytest.raises(
        ConfigError, match=r"these volumes are float32; use folder:DIR\?format=nif"
    ):
        play(_run(dtype=np.float32), f"folder:{tmp_path}", speed=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target",
    ["", "export", "folder:", "folder:?format=nifti", "dicom:x", "folder:x?format=png",
     "folder:x?speed=2", "folder:x?format=nifti&a=b"],
)  # fmt: skip
def test_target_must_be_in_the_grammar(target):
    with pytest.raises(ConfigError, match=r"target must be folder:DIR, .* got"):
        play(_run(1), target, speed=None)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_speed_must_be_above_zero(tmp_path, speed):
    with pytest.raises(ConfigError, match="speed must be above 0"):
        play(_run(1), f"folder:{tmp_path}", speed=speed)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(RecordingError, match="cannot make the folder"):
        play(_run(1), f"folder:{tmp_path / 'file' / 'export'}", speed=None)


def test_file_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(player, "write_mosaic", fail)
    with pytest.raises(RecordingError, match=r"cannot write .*001_000001_000001\.dcm: .*No space"):
        play(_run(1), f"folder:{tmp_path}", speed=None)


def test_another_run_is_not_overwritten(tmp_path):
    play(_run(2), f"folder:{tmp_path}", speed=None)
    with pytest.raises(RecordingError, match="exists already; play into an empty folder"):
        play(_run(1), f"folder:{tmp_path}", speed=None)

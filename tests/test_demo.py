"""The demo finds what the simulator put there, and nothing where it put nothing."""

from pathlib import Path

import pytest

from rtfmri.demo import Demo, run_demo
from rtfmri.errors import ConfigError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", device="cpu")


def test_the_active_regions_are_found(demo: Demo) -> None:
    # least_dice is what the true effects allow at the noisiest the simulator promises to be;
    # a ROC area of .99 leaves one active voxel in a hundred below a quiet one.
    assert demo.score.dice > demo.score.least_dice > 0.8
    assert demo.score.roc_area > 0.99
    assert min(demo.score.peak_t.values()) > demo.score.threshold_t


def test_the_inactive_region_stays_in_the_nulls_band(demo: Demo) -> None:
    assert abs(demo.score.inactive_t) < demo.score.inactive_limit_t
    assert demo.score.inactive_limit_t < 3.5


def test_everything_is_left_behind(demo: Demo) -> None:
    assert (demo.out / "run.h5").stat().st_size > 0
    assert (demo.out / "report" / "index.html").exists()
    assert len(list((demo.out / "report").glob("*.png"))) >= 4
    assert list((demo.out / "bids").rglob("*_statmap.nii.gz"))
    assert (demo.out / "truth" / "truth.json").exists()
    assert demo.run["volumes"] == demo.run["recorded"] == 150
    assert demo.run["missing"] == 0
    assert not demo.run["skipped"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="must be a new folder"):
        run_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]

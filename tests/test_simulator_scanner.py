import json
import socket

import nibabel
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, map_coordinates
from scipy.spatial.transform import Rotation

from rtfmri.errors import ConfigError, RecordingError
from rtfmri.paradigm import Event, read_events
from rtfmri.simulator import Scanner
from rtfmri.simulator.brain import ACTIVE, INACTIVE, build_brain
from rtfmri.simulator.scanner import DRIFT_PERIODS_S, GREY, SPIKE_GAIN, THERMAL_SNR

SMALL = (32, 32, 18)


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner()


@pytest.fixture(scope="module")
def run(scanner: Scanner) -> np.ndarray:
    """All volumes of the default run, (n_volumes, x, y, z) float32."""
    return np.stack([scanner.volume(i) for i in range(scanner.n_volumes)]).astype(np.float32)


def _slope(course: np.ndarray, response: np.ndarray) -> tuple[float, float]:
    """Return the least-squares slope on *response* beside the drifts, and its standard error."""
    time_s = (np.arange(len(response)) + 0.5) * 2.0
    turns = 2 * np.pi * time_s / np.array(DRIFT_PERIODS_S)[:, None]
    design = np.vstack([response, np.ones_like(response), np.sin(turns), np.cos(turns)]).T
    beta, residue, *_ = np.linalg.lstsq(design, course)
    degrees = len(course) - design.shape[1]
    variance = residue[0] / degrees * np.linalg.inv(design.T @ design)
    return float(beta[0]), float(np.sqrt(variance[0, 0]))


def test_volume_is_what_a_scanner_gives(scanner):
    volume = scanner.volume(0)
    assert volume.shape == scanner.grid.shape == (64, 64, 36)
    assert volume.dtype == np.int16
    assert volume.flags.f_contiguous
    assert volume.min() >= 0
    assert 1000 < volume.max() < 2500
    assert scanner.grid.voxel_size_mm == pytest.approx((3.25, 3.25, 4.0))


def test_volumes_depend_on_seed_and_index_alone():
    first, second = (Scanner(n_volumes=n, shape=SMALL, seed=3) for n in (20, 150))
    for index in (0, 1, 2):
        first.volume(index)
    np.testing.assert_array_equal(first.volume(9), second.volume(9))
    assert (first.volume(9) != second.volume(10)).mean() > 0.5
    assert (first.volume(9) != Scanner(shape=SMALL, seed=4).volume(9)).mean() > 0.5


def test_nothing_is_fetched(monkeypatch):
    def refuse(*_):
        raise AssertionError("the simulator went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert Scanner(shape=(17, 16, 8)).volume(0).any()


def test_tissue_contrast_is_that_of_an_epi(scanner):
    brain = build_brain(scanner.grid.shape)
    # Away from where the signal drops out.
    upper = np.arange(36) * 4.0 + scanner.grid.affine[2, 3] > 0
    white = (brain.mask & (brain.grey < 0.05) & (brain.csf < 0.05))[..., upper]
    means = [
        brain.anatomy[..., upper][tissue].mean()
        for tissue in (brain.csf[..., upper] > 0.9, brain.grey[..., upper] > 0.9, white)
    ]
    assert means == pytest.approx([1190, 1000, 870], rel=0.03)
    assert 0 < brain.anatomy[~brain.mask].max() < brain.anatomy[brain.mask].mean()


def test_signal_to_noise_over_time_is_that_of_3_tesla(scanner, run):
    grey = build_brain(scanner.grid.shape).grey > 0.8
    quiet = grey & (scanner.truth.effect_percent == 0)
    tsnr = (run.mean(0) / run.std(0, ddof=1))[quiet]
    assert 60 < np.median(tsnr) < 100


def test_noise_is_rician(scanner, run):
    """Where there is no signal it is Rayleigh: mean sd sqrt(pi/2), variance sd^2 (2 - pi/2)."""
    air = run[:, :5, :5].ravel()
    sd = GREY / THERMAL_SNR
    spread = sd * np.sqrt(2 - np.pi / 2)
    assert air.mean() == pytest.approx(sd * np.sqrt(np.pi / 2), abs=5 * spread / np.sqrt(air.size))
    # Rounding to integers adds 1/12; the standard error of an sd is below sd / sqrt(n).
    expected = np.sqrt(spread**2 + 1 / 12)
    assert air.std() == pytest.approx(expected, abs=5 * spread / np.sqrt(air.size))


@pytest.mark.parametrize("region", [*ACTIVE, INACTIVE], ids=lambda region: region.name)
@pytest.mark.parametrize("shape", [(64, 64, 36), (16, 16, 8)])
def test_regions_lie_where_they_should(region, shape):
    truth = Scanner(n_volumes=1, shape=shape).truth
    mask = {**truth.regions, INACTIVE.name: truth.inactive}[region.name]
    grid = build_brain(shape).grid
    centre = grid.affine @ [*np.argwhere(mask).mean(0), 1]
    # Grey matter is not symmetric in its ball, but its centre stays in the ball or in the voxel.
    limit_mm = max(region.radius_mm, float(np.linalg.norm(grid.voxel_size_mm)) / 2)
    assert np.linalg.norm(centre[:3] - region.centre_mm) < limit_mm
    assert truth.brain[mask].all()


def test_effect_is_in_the_regions_and_nowhere_else(scanner):
    truth = scanner.truth
    active = np.logical_or.reduce(list(truth.regions.values()))
    np.testing.assert_array_equal(truth.effect_percent > 0, active)
    assert not (truth.inactive & active).any()
    hands = truth.regions["left_hand"] | truth.regions["right_hand"]
    assert 1.5 < truth.effect_percent[hands].mean() < 3
    assert 2 < truth.effect_percent.max() < 3.5
    assert truth.response.max() == pytest.approx(1, abs=0.02)
    assert truth.response.min() < -0.1


@pytest.mark.parametrize("name", [region.name for region in ACTIVE])
def test_active_region_follows_the_response_by_its_effect(scanner, run, name):
    truth = scanner.truth
    region = truth.regions[name]
    rest = build_brain(scanner.grid.shape).anatomy[region]
    expected = (rest * truth.effect_percent[region]).sum() / rest.sum()
    # The inactive region has the same breathing and pulse; what it lacks is the response.
    course = 100 * (run[:, region].mean(1) / rest.mean())
    still = run[:, truth.inactive].mean(1)
    slope, error = _slope(course - 100 * still / still.mean(), truth.response)
    assert slope == pytest.approx(expected, abs=5 * error)
    assert slope > 10 * error


def test_inactive_region_does_not(scanner, run):
    still = run[:, scanner.truth.inactive].mean(1)
    slope, error = _slope(still, scanner.truth.response)
    assert abs(slope) < 3 * error


def test_run_begins_with_rest_and_ends_where_it_ends():
    scanner = Scanner(n_volumes=35, shape=SMALL)
    assert scanner.events == (Event(20.0, 20.0, "tapping"), Event(60.0, 10.0, "tapping"))
    # Nothing answers before the first block: neither the volumes before it nor its first moment.
    assert not scanner.truth.response[:10].any()
    longer = Scanner(n_volumes=70, shape=SMALL).truth.response
    np.testing.assert_allclose(scanner.truth.response, longer[:35], atol=1e-12)


def test_run_without_a_block_is_rest():
    scanner = Scanner(n_volumes=5, shape=SMALL)
    assert scanner.events == ()
    assert not scanner.truth.response.any()


def test_response_does_not_depend_on_how_it_is_sampled():
    slow, fast = (Scanner(n_volumes=n, tr_s=tr_s, shape=SMALL) for n, tr_s in ((40, 3), (120, 1)))
    # The middle of a volume of 3 s is that of the second of three volumes of 1 s.
    np.testing.assert_allclose(slow.truth.response, fast.truth.response[1::3], atol=1e-12)


def test_head_moves_as_the_truth_says():
    still = Scanner(n_volumes=40)
    moving = Scanner(n_volumes=40, motion=True)
    motion = moving.truth.motion
    assert not motion[0].any()
    assert 0.2 < np.abs(motion[:, :3]).max() <= 1
    assert 0.2 < np.abs(motion[:, 3:]).max() <= 1
    assert not still.truth.motion.any()

    # Where the head is found, what is left is the noise of two images and interpolation.
    noise = np.sqrt(2) * GREY / THERMAL_SNR
    for index in (10, 25, 39):
        there, nowhere, opposite = (
            _mismatch(still, moving, index, position)
            for position in (motion[index], np.zeros(6), -motion[index])
        )
        assert there < 1.3 * noise
        assert 1.5 * there < nowhere < opposite


def _mismatch(still: Scanner, moving: Scanner, index: int, position: np.ndarray) -> float:
    """Return the root mean square difference of the brain when looked for at *position*."""
    affine = still.grid.affine
    centre_mm = (affine @ [*(np.array(still.grid.shape) - 1) / 2, 1])[:3]
    inner = np.argwhere(binary_erosion(still.truth.brain, iterations=3))
    points_mm = inner @ affine[:3, :3].T + affine[:3, 3]
    turn = Rotation.from_euler("xyz", position[3:], degrees=True)
    found_mm = turn.apply(points_mm - centre_mm) + centre_mm + position[:3]
    found = np.linalg.solve(affine[:3, :3], (found_mm - affine[:3, 3]).T)
    after = map_coordinates(moving.volume(index).astype(np.float64), found, order=3)
    difference = after - still.volume(index)[tuple(inner.T)]
    return float(np.sqrt((difference**2).mean()))


def test_spikes_are_where_the_truth_says():
    quiet = Scanner(shape=SMALL)
    spiky = Scanner(shape=SMALL, spikes=True)
    spikes = spiky.truth.spikes
    assert 0 < spikes.any(1).sum() < 15
    assert not quiet.truth.spikes.any()
    volume = int(np.flatnonzero(spikes.any(1))[0])
    ratio = spiky.volume(volume).mean((0, 1)) / quiet.volume(volume).mean((0, 1))
    # Noise does not spike, so slices with little head in them gain less than the rest.
    assert (ratio[spikes[volume]] > 1 + SPIKE_GAIN / 2).all()
    np.testing.assert_array_equal(ratio[~spikes[volume]], 1)


def test_truth_is_written_beside(scanner, tmp_path):
    scanner.write_truth(tmp_path / "truth")
    for name, expected in {
        "effect_percent": scanner.truth.effect_percent,
        "inactive_mask": scanner.truth.inactive,
        "brain_mask": scanner.truth.brain,
        **{f"{name}_mask": mask for name, mask in scanner.truth.regions.items()},
    }.items():
        image = nibabel.load(tmp_path / "truth" / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
        np.testing.assert_allclose(image.affine, scanner.grid.affine)
    assert read_events(tmp_path / "truth" / "events.tsv") == scanner.events
    courses = np.genfromtxt(tmp_path / "truth" / "timecourses.tsv", names=True)
    np.testing.assert_allclose(courses["response"], scanner.truth.response, atol=1e-6)
    said = json.loads((tmp_path / "truth" / "truth.json").read_text(encoding="utf-8"))
    assert (said["seed"], said["tr_s"], said["shape"]) == (0, 2.0, [64, 64, 36])
    assert said["regions"]["left_hand"]["centre_mm"] == [-38, -26, 56]
    assert said["regions"]["inactive"]["n_voxels"] == scanner.truth.inactive.sum()


def test_truth_needs_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(RecordingError, match="cannot write the truth"):
        Scanner(n_volumes=1, shape=SMALL).write_truth(tmp_path / "file" / "truth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paradigm": "juggling"}, "paradigm must be 'finger-tapping', got 'juggling'"),
        ({"n_volumes": 0}, "n_volumes must be 1 or more, got 0"),
        ({"tr_s": 0.0}, "tr_s must be above 0 and at most 60, got 0.0"),
        ({"tr_s": float("nan")}, "tr_s must be above 0 and at most 60, got nan"),
        ({"shape": (64, 64)}, r"shape must be at least \(16, 16, 8\), got \(64, 64\)"),
        ({"shape": (64, 64, 0)}, "shape must be at least"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Scanner(**arguments)


@pytest.mark.parametrize("index", [-1, 150])
def test_volume_must_be_in_the_run(scanner, index):
    with pytest.raises(IndexError, match=f"volume must be from 0 to 149, got {index}"):
        scanner.volume(index)

"""Files of every vendor, in any order, to the volumes of a run, and one run to the next."""

import gzip
import random
from collections.abc import Iterable

import numpy as np
import pytest
from pydicom import Dataset

from dicom_files import (
    PATIENT,
    PHILIPS_SCALES,
    SERIES_UID,
    echo_mosaic,
    ge_slices,
    mosaic,
    oblique_grid,
    philips_enhanced,
    philips_slices,
    slice_file,
    to_bytes,
    voxels,
    xa_frames,
    xa_slices,
)
from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers import RunEnd, Skipped
from rtfmri.readers.dicom import DERIVED, OTHER_SERIES, Assembly
from rtfmri.volume import Volume

OTHER_UID = SERIES_UID + ".77"
TR_S = 1.5


class Sender:
    """Gives files to an assembly, with a clock of its own."""

    def __init__(self, **options: object) -> None:
        self.assembly = Assembly(**options)
        self.now_s = 100.0
        self.n_files = 0

    def send(self, datasets: Iterable[Dataset], after_s: float = 0.0) -> list:
        items = []
        for dataset in datasets:
            self.now_s += after_s
            self.n_files += 1
            items += self.assembly.add(to_bytes(dataset), f"file {self.n_files}", self.now_s)
        return items


def volumes(items: list) -> list[Volume]:
    return [item for item in items if isinstance(item, Volume)]


def precise(data: np.ndarray) -> np.ndarray:
    slope, intercept, scale = (np.float64(np.float32(value)) for value in PHILIPS_SCALES)
    return (data * slope + intercept) / (slope * scale)


def weighted(echoes: list[np.ndarray], t2star_ms: float) -> np.ndarray:
    times_ms = 12.0 * np.arange(1, len(echoes) + 1)
    weights = times_ms * np.exp(-times_ms / t2star_ms)
    return np.tensordot(weights / weights.sum(), np.array(echoes, np.float64), 1)


def assert_close(volume: Volume, expected: np.ndarray, n_steps: int) -> None:
    """Compare with float64; each of *n_steps* float32 steps may be off by half an ulp."""
    assert volume.data.dtype == np.float32
    limit = n_steps * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(volume.data, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("make", [ge_slices, xa_slices, xa_frames, philips_slices])
@pytest.mark.parametrize("order", ["as sent", "backwards", "shuffled", "volumes interleaved"])
def test_slices_of_every_vendor_in_any_order(make, order):
    files = [dataset for index in range(3) for dataset in make(index)]
    if order == "backwards":
        files.reverse()
    elif order == "shuffled":
        random.Random(5).shuffle(files)
    elif order == "volumes interleaved":
        files = [files[i] for z in range(7) for i in range(z, len(files), 7)]
    sender = Sender()
    items = sender.send(files, 0.01)
    items.sort(key=lambda item: item.index)
    assert [item.index for item in items] == [0, 1, 2]
    assert sender.assembly.end() == []
    grid = oblique_grid()
    for item in items:
        assert item.tr_s == TR_S
        assert item.grid.matches(grid)
        if make is philips_slices:
            assert_close(item, precise(voxels(grid, item.index * 10 + 1)), 3)
        else:
            dtype = np.int16 if make is ge_slices else np.uint16
            assert item.data.dtype == dtype
            np.testing.assert_array_equal(item.data, voxels(grid, item.index, dtype))


def test_a_volume_arrives_with_its_last_slice():
    sender = Sender()
    files = ge_slices()
    assert sender.send(files[:-1], 0.1) == []
    (volume,) = sender.send(files[-1:], 0.1)
    assert volume.arrived_s == pytest.approx(100.7)
    assert volume.arrived_s == sender.now_s
    assert volume.acquired_s is None


def test_slice_times_of_ge_are_in_its_protocol():
    (volume,) = Sender().send(ge_slices())
    taken = np.argsort(volume.slice_times_s)
    assert taken.tolist() == [0, 2, 4, 6, 1, 3, 5]
    np.testing.assert_allclose(np.sort(volume.slice_times_s), np.arange(7) * TR_S / 7, atol=1e-6)
    for damage in (lambda b: b[:9], lambda b: b[:4] + b[5:], lambda b: b[:4] + gzip.compress(b"")):
        files = ge_slices()
        for dataset in files:
            dataset[0x0025, 0x101B].value = damage(dataset[0x0025, 0x101B].value)
        (volume,) = Sender().send(files)
        assert volume.slice_times_s is None


def test_slice_times_are_the_slices_own_and_pass_midnight():
    (volume,) = volumes(Sender().send(xa_slices()))
    # The first slice was taken at midnight, the others within the second before it.
    assert volume.acquired_s == pytest.approx(86399.1)
    np.testing.assert_allclose(volume.slice_times_s, [0.9, 0, 0.1, 0.2, 0.3, 0.4, 0.5], atol=1e-6)
    (volume,) = volumes(Sender().send(xa_frames()))
    np.testing.assert_allclose(volume.slice_times_s, np.arange(7) / 10, atol=1e-6)
    assert volume.acquired_s == pytest.approx(3 * 3600 + 4 * 60 + 5)


@pytest.mark.parametrize("lost", [0, 3, 6])
def test_a_lost_slice_costs_its_volume_alone(lost):
    files = [ge_slices(index) for index in range(6)]
    del files[1][lost]
    sender = Sender()
    items = sender.send(dataset for volume in files for dataset in volume)
    assert [item.index for item in volumes(items)] == [0, 2, 3, 4, 5]
    assert [item for item in items if isinstance(item, Skipped)] == [
        Skipped("volume 1 (6 of 7 slices)", "lacks slices")
    ]
    assert sender.send(ge_slices(1)[lost : lost + 1]) == [
        Skipped(f"file {sender.n_files}", "came after its volume was given up")
    ]


def test_what_lacks_slices_at_the_end_is_told():
    sender = Sender()
    sender.send([*ge_slices(0), *ge_slices(1)[:4]])
    assert sender.assembly.end() == [Skipped("volume 1 (4 of 7 slices)", "lacks slices")]
    assert sender.assembly.end() == []


@pytest.mark.parametrize("make", [ge_slices, xa_frames, philips_slices, lambda i: [mosaic(i)]])
def test_what_comes_twice_is_skipped(make):
    files = [dataset for index in range(2) for dataset in make(index)]
    sender = Sender()
    items = sender.send(dataset for dataset in files for _ in range(2))
    assert [item.index for item in volumes(items)] == [0, 1]
    assert {item.reason for item in items if isinstance(item, Skipped)} == {"came twice"}
    assert len(items) == 2 + len(files)


def test_slices_are_counted_by_the_user_or_by_the_first_volume():
    files = [ge_slices(index, says=False) for index in range(4)]
    told = Sender(slices=7)
    items = told.send(dataset for volume in files for dataset in volume)
    assert [item.index for item in items] == [0, 1, 2, 3]
    learning = Sender()
    assert learning.send(files[0]) == []
    (first,) = learning.send(files[1][:1])
    assert first.index == 0
    assert first.data.shape == (12, 10, 7)
    rest = learning.send([*files[1][1:], *files[2], *files[3]])
    assert [item.index for item in rest] == [1, 2, 3]
    for volume in [first, *rest]:
        np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), volume.index, np.int16))


def test_slices_in_the_order_of_places_are_refused_where_nothing_counts_volumes():
    files = [ge_slices(index, says=False) for index in range(3)]
    by_place = [files[index][z] for z in range(7) for index in range(3)]
    for instance, dataset in enumerate(by_place, 1):
        dataset.InstanceNumber = instance
    for order in ([3, 4, 5], [0, 3, 6, 1]):
        items = Sender().send(by_place[i] for i in order)
        assert {item.reason for item in items} == {"is of a volume of unknown size; give slices=N"}


def test_philips_slices_without_their_number_are_learned():
    files = [philips_slices(index) for index in range(3)]
    for dataset in (dataset for volume in files for dataset in volume):
        del dataset[0x2001, 0x1018]
    sender = Sender()
    assert sender.send(files[0]) == []
    assert [v.index for v in sender.send(files[1])] == [0, 1]
    assert [v.index for v in sender.send(files[2])] == [2]


def test_another_vendors_private_tags_are_not_taken_for_philips():
    # GE's BrainWave has a block of its own in Philips' group.
    files = ge_slices()
    for dataset in files:
        dataset.private_block(0x2001, "1.2.840.113819.3", create=True).add_new(0x18, "SL", 3)
    assert [v.index for v in Sender().send(files)] == [0]


@pytest.mark.parametrize("says", [True, False])
def test_echoes_of_mosaics_are_summed_or_chosen(says):
    grid = oblique_grid()
    files = [echo_mosaic(index, echo, says=says) for index in range(3) for echo in (2, 1, 3)]
    echoes = [[voxels(grid, index * 10 + echo) for echo in (1, 2, 3)] for index in range(3)]
    combined = Sender(t2star_ms=40.0).send(files)
    # Without a word of their number, the last volume waits for one more.
    assert [item.index for item in combined] == [0, 1, 2]
    for volume in combined:
        assert_close(volume, weighted(echoes[volume.index], 40.0), 6)
    for echo in (1, 2, 3):
        for volume in Sender(echo=echo).send(files):
            np.testing.assert_array_equal(volume.data, echoes[volume.index][echo - 1])


def test_echoes_that_nothing_counts_may_be_given():
    files = [echo_mosaic(0, echo, says=False) for echo in (1, 2, 3)]
    assert Sender().send(files) == []
    assert len(Sender(echoes=3).send(files)) == 1


def test_an_echo_that_is_not_there_is_an_error():
    with pytest.raises(SourceError, match="echo must be at most 3, as many are there; got 4"):
        Sender(echo=4).send([echo_mosaic(0, 1), echo_mosaic(1, 1)])
    files = [echo_mosaic(0, echo, says=False) for echo in (1, 2, 3)]
    files.append(echo_mosaic(1, 1, says=False))
    (item,) = Sender(echo=4).send(files)
    assert item == Skipped("volume 0", "has no echo of that number")


def test_echoes_without_times_cannot_be_summed():
    files = [echo_mosaic(0, echo) for echo in (1, 2, 3)]
    del files[0].EchoTime
    (item,) = Sender().send(files)
    assert item == Skipped("volume 0", "has echoes without their times; choose one with echo=N")


def test_philips_slices_of_echoes_with_phases():
    files = [
        dataset
        for index in range(2)
        for echo in (1, 2)
        for kind in "MP"
        for dataset in philips_slices(index, echo=echo, n_echoes=2, kind=kind)
    ]
    items = Sender().send(files)
    assert [item.index for item in volumes(items)] == [0, 1]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert {item.reason for item in skipped} == {"is no magnitude image"}
    assert len(skipped) == 2 * 2 * 7
    for volume in volumes(items):
        echoes = [precise(voxels(oblique_grid(), volume.index * 10 + echo)) for echo in (1, 2)]
        assert_close(volume, weighted(echoes, 47.0), 8)


@pytest.mark.parametrize("says_time", [True, False])
@pytest.mark.parametrize("phase", [True, False])
def test_a_whole_run_in_one_file(says_time, phase):
    dataset = philips_enhanced(phase=phase, says_time=says_time)
    items = Sender(echo=2).send([dataset])
    assert [item.index for item in items] == [0, 1, 2]
    for volume in items:
        assert volume.grid.matches(oblique_grid())
        assert_close(volume, precise(voxels(oblique_grid(), volume.index * 10 + 2)), 3)
    combined = Sender().send([dataset])
    assert [item.index for item in combined] == [0, 1, 2]
    echoes = [precise(voxels(oblique_grid(), 20 + echo)) for echo in (1, 2)]
    assert_close(combined[2], weighted(echoes, 47.0), 8)


def test_the_last_volume_of_a_file_may_be_cut_off():
    dataset = philips_enhanced(phase=False, n_echoes=1)
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:18]
    dataset.NumberOfFrames = 18
    dataset.PixelData = dataset.PixelData[: 18 * 12 * 10 * 2]
    sender = Sender()
    assert [item.index for item in sender.send([dataset])] == [0, 1]
    assert sender.assembly.end() == [Skipped("volume 2 (4 of 7 slices)", "lacks slices")]


def test_phase_is_known_by_any_vendors_word():
    philips, ge, siemens, enhanced = (
        philips_slices()[0],
        ge_slices()[0],
        mosaic(),
        philips_enhanced(1, 1, phase=True),
    )
    philips[0x2005, 0x1011].value = "P"
    ge[0x0043, 0x102F].value = 1
    siemens.ImageType = ["ORIGINAL", "PRIMARY", "P", "ND", "MOSAIC"]
    enhanced.ComplexImageComponent = "PHASE"
    for dataset in (philips, ge, siemens, enhanced):
        assert Sender().send([dataset]) == [Skipped("file 1", "is no magnitude image")]


def test_a_single_band_reference_is_no_run():
    reference = mosaic(0, series_uid=OTHER_UID)
    reference.ImageComments = "Single-band reference SENSE1"
    items = Sender().send([reference, mosaic(0), mosaic(1)], TR_S)
    assert items[0] == Skipped("file 1", "is a single-band reference")
    assert [item.index for item in volumes(items)] == [0, 1]


def localiser() -> list[Dataset]:
    """Return three slices at right angles, a protocol that says so, and a short TR."""
    grid = oblique_grid((12, 12, 3))
    files = []
    for z, cosines in enumerate(["1 0 0 0 1 0", "0 1 0 0 0 1", "1 0 0 0 0 1"]):
        d = slice_file(voxels(grid), grid, z, instance=z, uid=OTHER_UID)
        d.ImageOrientationPatient = cosines.split()
        d.Manufacturer, d.RepetitionTime = "Siemens Healthineers", "8.6"
        files.append(d)
    return files


def test_a_localiser_does_not_block_the_run_after_it():
    sender = Sender()
    items = sender.send([*localiser(), *ge_slices(0), *ge_slices(1)])
    assert [item.index for item in volumes(items)] == [0, 1]
    assert len(items) == 5  # each file of the localiser is accounted for


def test_a_series_of_one_volume_makes_room_for_a_run_of_another_shape():
    other = oblique_grid((12, 10, 9))
    sender = Sender()
    (anatomy,) = sender.send([mosaic(0, grid=other, series_uid=OTHER_UID)])
    assert anatomy.data.shape == other.shape
    assert sender.send([mosaic(0)], 60.0) == []
    assert sender.send([mosaic(1)], TR_S) == [RunEnd("the next run began")]
    assert [item.index for item in sender.assembly.next_run()] == [0, 1]
    assert [item.index for item in sender.send([mosaic(2)], TR_S)] == [2]


def test_a_short_repetition_time_is_asked_for_once_it_is_a_run():
    files = [mosaic(index) for index in range(2)]
    for dataset in files:
        dataset.RepetitionTime = "22"
    sender = Sender()
    (skipped,) = sender.send(files[:1])
    assert "0.05 to 60 s, got 0.022 s" in skipped.reason
    with pytest.raises(SourceError, match="--tr"):
        sender.send(files[1:])
    assert [item.index for item in Sender(tr_s=2.0).send(files)] == [0, 1]


def test_the_series_may_be_chosen():
    files = [mosaic(0), mosaic(1), mosaic(0, series_uid=OTHER_UID)]
    files[2].SeriesNumber = 9
    files[2].ImageType = ["DERIVED", "PRIMARY", "M", "MOSAIC"]
    sender = Sender(series=9)
    items = sender.send([files[0], files[2], files[1]])
    assert items[0] == Skipped("file 1", OTHER_SERIES)
    assert items[1].index == 0
    assert items[2] == Skipped("file 3", OTHER_SERIES)
    # Chosen by number, no other series is ever the next run.
    assert sender.send([mosaic(0, series_uid=SERIES_UID + ".5")], 600) == [
        Skipped("file 4", OTHER_SERIES)
    ]


def test_a_derived_series_is_read_on_request_alone():
    derived = mosaic(0)
    derived.ImageType = ["DERIVED", "PRIMARY", "M", "MOSAIC"]
    assert Sender().send([derived]) == [Skipped("file 1", DERIVED)]


def run_of(uid: str, indices: Iterable[int]) -> list[Dataset]:
    return [mosaic(index, series_uid=uid) for index in indices]


def test_the_next_run_begins_after_a_silence():
    sender = Sender()
    assert len(sender.send(run_of(SERIES_UID, range(4)), TR_S)) == 4
    assert sender.send(run_of(OTHER_UID, [0]), 30.0) == [RunEnd("the next run began")]
    # What comes before the next run is asked for is kept, and the last one may have stragglers.
    assert sender.send(run_of(OTHER_UID, [1]), TR_S) == []
    assert [item.index for item in sender.send(run_of(SERIES_UID, [5]), 0.1)] == [5]
    assert [item.index for item in sender.assembly.next_run()] == [0, 1]
    assert [item.index for item in sender.send(run_of(OTHER_UID, [2]), TR_S)] == [2]
    assert sender.send(run_of(SERIES_UID, [6]), 60.0) == [Skipped("file 9", OTHER_SERIES)]
    third = sender.send(run_of(SERIES_UID + ".3", [0]), 60.0)
    assert third == [RunEnd("the next run began")]
    assert [item.index for item in sender.assembly.next_run()] == [0]


def test_the_next_run_of_slices_begins_with_its_first_slice():
    sender = Sender()
    sender.send([d for index in range(3) for d in ge_slices(index)], TR_S / 7)
    files = ge_slices(0, uid=OTHER_UID)
    assert sender.send(files[:1], 20.0) == [RunEnd("the next run began")]
    assert sender.send(files[1:3]) == []
    assert sender.assembly.next_run() == []
    assert [item.index for item in sender.send(files[3:])] == [0]


def test_a_twin_that_comes_along_is_not_the_next_run():
    sender = Sender()
    items = []
    for index in range(5):
        items += sender.send(run_of(SERIES_UID, [index]), TR_S)
        items += sender.send(run_of(OTHER_UID, [index]), 0.3)
    # It lags behind when the scanner is done, and a late one of it comes after a long silence.
    items += sender.send(run_of(OTHER_UID, [5, 6]), 40.0)
    items += sender.send(run_of(OTHER_UID, [0]), 40.0)
    assert [item.index for item in volumes(items)] == [0, 1, 2, 3, 4]
    assert {item.reason for item in items if isinstance(item, Skipped)} == {OTHER_SERIES}
    assert len(items) == 13
    # The run after it is one.
    assert sender.send(run_of(SERIES_UID + ".3", [0]), 1.0) == [RunEnd("the next run began")]


def test_maps_and_stray_volumes_in_the_middle_are_not_the_next_run():
    sender = Sender()
    items = sender.send(run_of(SERIES_UID, range(3)), TR_S)
    derived = mosaic(0, series_uid=OTHER_UID)
    derived.ImageType = ["DERIVED", "PRIMARY", "T", "MOSAIC"]
    items += sender.send([derived], 30.0)
    items += sender.send([mosaic(0, grid=oblique_grid((12, 10, 9)), series_uid=OTHER_UID)], 1.0)
    items += sender.send(run_of(SERIES_UID + ".3", [4]), 1.0)
    items += sender.send(run_of(SERIES_UID, range(3, 5)), TR_S)
    assert [item.index for item in volumes(items)] == [0, 1, 2, 3, 4]
    assert [item.reason for item in items if isinstance(item, Skipped)] == [OTHER_SERIES] * 3


def test_a_run_that_was_ended_from_outside_is_not_read_on():
    sender = Sender()
    sender.send([*ge_slices(0), *ge_slices(1)[:2]], 0.1)
    assert sender.assembly.next_run() == [Skipped("volume 1 (2 of 7 slices)", "lacks slices")]
    assert sender.send(ge_slices(1)[2:3]) == [Skipped("file 10", OTHER_SERIES)]
    items = sender.send(ge_slices(0, uid=OTHER_UID))
    assert [item.index for item in items] == [0]


def test_a_file_that_is_not_whole_may_come_again():
    sender = Sender()
    sender.send(ge_slices(0))
    *files, last = (to_bytes(dataset) for dataset in ge_slices(1))
    for data in files:
        assert sender.assembly.add(data, "x", 1.0) == []
    for n_bytes in (len(last) - 1, len(last) - 50, 800, 200, 100, 0):
        with pytest.raises(VolumeError):
            sender.assembly.add(last[:n_bytes], "x", 1.0)
    (volume,) = sender.assembly.add(last, "x", 1.0)
    np.testing.assert_array_equal(volume.data, voxels(oblique_grid(), 1, np.int16))


def test_unevenly_spaced_slices_are_no_volume():
    files = ge_slices()
    files[3].ImagePositionPatient = (
        (
            np.array(files[3].ImagePositionPatient, float)
            + 0.4
            * (np.array(files[4].ImagePositionPatient, float) - files[3].ImagePositionPatient)
        )
        .round(6)
        .tolist()
    )
    assert Sender().send(files) == [Skipped("volume 0", "has slices at uneven distances")]


def test_a_slice_in_another_plane_is_skipped():
    files = ge_slices()
    files[3].PixelSpacing = ["2", "2"]
    sender = Sender()
    assert sender.send(files) == [Skipped("file 4", "lies in another plane than the first slice")]
    assert len(sender.assembly.end()) == 1


def test_any_number_of_series_before_the_run_is_accounted_for():
    sender = Sender()
    items = []
    for number in range(40):
        items += sender.send(ge_slices(0, uid=f"{SERIES_UID}.4.{number}")[:1])
    assert len(items) == 32  # what is kept is limited
    items += sender.send([*ge_slices(0), *ge_slices(1)])
    assert [item.index for item in volumes(items)] == [0, 1]
    assert len([item for item in items if isinstance(item, Skipped)]) == 40


def test_runs_do_not_know_each_others_digests():
    data = to_bytes(mosaic())
    digests = {Assembly()._decoder.read(data)[0].series for _ in range(3)}
    assert len(digests) == 3
    assert not any(PATIENT in digest or SERIES_UID in digest for digest in digests)

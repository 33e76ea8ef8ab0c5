"""Damaged DICOM files: a file is read or refused, and never takes memory, time or names with it.

Each part gives some thousand seeded mutants of small files to an assembly, 50,000 in all. Where
``RTFMRI_MUTANTS`` is set, so many, to look further.
"""

import os
import random
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import JPEGLSLossless

from dicom_files import (
    Frame,
    echo_mosaic,
    ge_slices,
    mosaic,
    multiframe,
    oblique_grid,
    philips_slices,
    real_data,
    to_bytes,
    voxels,
)
from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers import RunEnd, Skipped
from rtfmri.readers.dicom import Assembly
from rtfmri.readers.mosaic import Mosaics
from rtfmri.readers.pieces import Decoder
from rtfmri.volume import Volume

N_MUTANTS = int(os.environ.get("RTFMRI_MUTANTS", "50000"))
N_PARTS = 10
LONGEST_S = 10.0
MOST_GROWTH_BYTES = 200 * 2**20
SMALL = oblique_grid((4, 4, 4))


PATIENT = "XAVERIUS^QUINTILIAN"


def with_patient(dataset: Dataset) -> bytes:
    dataset.PatientName = dataset.SeriesDescription = PATIENT
    return to_bytes(dataset)


def small_mosaic(index: int) -> bytes:
    return with_patient(mosaic(index, grid=SMALL))


def small_frames(index: int) -> bytes:
    data = voxels(SMALL, index).T
    frames = [Frame(z, data[z], 30.0) for z in range(4)]
    return with_patient(multiframe(frames, index, grid=SMALL))


def slices_of(make: Callable[..., list[Dataset]]) -> Callable[[int], bytes]:
    return lambda index: with_patient(make(index // 7)[index % 7])


KINDS = {
    "mosaic": small_mosaic,
    "mosaic like another": small_mosaic,
    "frames": small_frames,
    "ge": slices_of(ge_slices),
    "philips": slices_of(philips_slices),
    "echoes": lambda index: with_patient(echo_mosaic(index // 3, index % 3 + 1)),
}


def mutant(data: bytes, chance: random.Random) -> bytes:
    """Return *data* with one to four changes: flips, cuts, insertions, and lengths that lie."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(128, max(129, len(damaged)))
        kind = chance.randrange(6)
        if kind == 0:
            damaged[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            damaged[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            del damaged[at : at + chance.randrange(1, 9)]
        elif kind == 4:
            size = chance.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
            damaged[at : at + 4] = struct.pack("<I", size)
        else:
            # A length after a value representation, which a parser is sure to believe.
            names = [b"UI", b"OW", b"SQ", b"OB", b"DS", b"IS", b"US", b"PN"]
            place = damaged.find(chance.choice(names), at)
            if place > 0:
                damaged[place + 2 : place + 4] = struct.pack("<H", chance.randrange(65536))
    return bytes(damaged)


@pytest.mark.parametrize("part", range(N_PARTS))
def test_damaged_files_are_read_or_refused(part, caplog, capfd):
    chance = random.Random(part)
    names = list(KINDS)
    originals = {name: [make(index) for index in range(8)] for name, make in KINDS.items()}
    assembly = Assembly()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, taken = 0, 0
    for number in range(N_MUTANTS // N_PARTS):
        kind = names[number % len(names)]
        if number % 200 == 0:
            assembly = Assembly()
        if kind == "mosaic like another" and number % 200 < len(names):
            assembly.add(originals[kind][0], "x", 0.0)  # so that others take the fast way
        data = mutant(chance.choice(originals[kind]), chance)
        began_s = time.perf_counter()
        try:
            items = assembly.add(data, "x", float(number))
        except (VolumeError, SourceError) as error:
            refused += 1
            assert_anonymous(str(error))
        else:
            taken += 1
            assert all(isinstance(item, Volume | Skipped | RunEnd) for item in items)
            assert_anonymous(str([item for item in items if not isinstance(item, Volume)]))
            if RunEnd("the next run began") in items:
                assembly.next_run()
        assert time.perf_counter() - began_s < LONGEST_S
    assert refused > N_MUTANTS // N_PARTS // 10
    assert taken > N_MUTANTS // N_PARTS // 10
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib * 1024 < MOST_GROWTH_BYTES
    assert_anonymous(caplog.text)
    assert_anonymous("".join(capfd.readouterr()))


def assert_anonymous(text: str) -> None:
    assert not any(part in text.upper() for part in PATIENT.split("^"))


def test_the_fast_way_gives_what_the_thorough_way_gives():
    chance = random.Random(1)
    originals = [small_mosaic(index) for index in range(4)]
    fast = Mosaics()
    fast.learn(originals[0], Decoder().read(originals[0])[0])
    n_fast = 0
    for _ in range(3000):
        data = mutant(chance.choice(originals), chance)
        quick = fast.read(data)
        if quick is None:
            continue
        try:
            (thorough,) = Decoder().read(data)
            expected = thorough.load()
        except VolumeError:
            continue  # the thorough way looks at more, such as all of the CSA header
        n_fast += 1
        np.testing.assert_array_equal(quick.load(), expected)
        np.testing.assert_array_equal(quick.affine, thorough.affine)
        for name in (
            "shape",
            "index",
            "acquired_s",
            "times_s",
            "tr_s",
            "echo_time_ms",
            "n_echoes",
        ):
            assert getattr(quick, name) == getattr(thorough, name), name
    assert n_fast > 500


@pytest.mark.parametrize("field", [b"\x10\x00\x10\x00", b"\xe0\x7f\x10\x00"])
@pytest.mark.parametrize("make", [small_mosaic, small_frames])
def test_a_length_of_gigabytes_takes_no_memory(field, make):
    data = bytearray(make(0))
    at = data.find(field)
    data[at + 4 : at + 12] = b"OW\0\0" + struct.pack("<I", 0xF0000000)
    tracemalloc.start()
    with suppress(VolumeError):
        Assembly().add(bytes(data), "x", 0.0)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_damaged_jpeg_takes_nothing_down():
    """A decoder that crashes does so in a process of its own, and the next file is read."""
    pytest.importorskip("jpeg_ls", reason="no encoder of JPEG-LS is installed")
    dataset = mosaic(0)
    dataset.compress(JPEGLSLossless)
    whole = to_bytes(dataset)
    check_damaged(whole, n_mutants=300)


def test_damaged_real_jpeg_takes_nothing_down():
    """Bytes of these made gdcm end its process with an exception that nobody caught."""
    files = sorted(real_data("siemens_transfer_syntaxes").glob("*.dcm"))
    for file in files[4:]:
        whole = file.read_bytes()
        check_damaged(whole, n_mutants=100)


def check_damaged(whole: bytes, n_mutants: int) -> None:
    """Feed a file with some bytes of its voxels changed, and after them the *whole* file."""
    rng = np.random.default_rng(0)
    begin = len(whole) // 2
    for _ in range(n_mutants):
        mutant = bytearray(whole)
        for at in rng.integers(begin, len(whole), rng.choice([1, 8, 64])):
            mutant[at] = rng.integers(256)
        with suppress(VolumeError):
            Assembly(2.0).add(bytes(mutant), "mutant", 0.0)
    (volume,) = Assembly(2.0).add(whole, "whole", 0.0)
    assert isinstance(volume, Volume)

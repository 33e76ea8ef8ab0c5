"""Philips PAR/REC pairs: voxels, geometry, and pairs that are not whole, or not what is read."""

import random
import subprocess
from pathlib import Path

import dcm2niix
import nibabel
import numpy as np
import pytest

from dicom_files import PATIENT, real_data
from par_files import pair_grid, precise, scales_of, write_pair
from rtfmri.errors import SourceError, VolumeError
from rtfmri.readers import Skipped, open_reader
from rtfmri.readers.dicom import Assembly
from rtfmri.readers.parrec import read_par
from rtfmri.volume import Volume

SHAPE = (12, 10, 7)


def stored(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, SHAPE, np.uint16)


def assemble(*pars: Path, **options: object) -> list:
    assembly = Assembly(**options)
    items = [item for par in pars for item in assembly.take(read_par(par), par.name, 1.0)]
    return items + assembly.end()


def assert_values(volume: Volume, expected: np.ndarray) -> None:
    """Compare with float64; there are three roundings of float32."""
    assert volume.data.dtype == np.float32
    limit = 3 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(volume.data, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["run.par", "run.PAR"])
def test_a_whole_run_in_a_pair(name, tmp_path):
    par = tmp_path / name
    images = [(stored(t), t + 1, 1, kind) for t in range(3) for kind in (0, 3)]
    write_pair(par, images, **{"Max. number of dynamics": "3"})
    items = assemble(par)
    assert [item.index for item in items] == [0, 1, 2]
    for volume in items:
        assert volume.tr_s == 1.5
        assert volume.grid.matches(pair_grid(SHAPE))
        assert_values(volume, precise(stored(volume.index)))


def test_dumps_of_a_volume_are_numbered_as_they_come(tmp_path):
    pars = []
    for t in range(3):
        pars.append(tmp_path / f"Dump-{t}.par")
        # As research tools write them: phase first, and magnitude has another number.
        write_pair(pars[-1], [(stored(9), 1, 1, 3), (stored(t), 1, 1, 16)])
        text = pars[-1].read_text().replace(" 1 3 0 ", " 1 17 0 ")
        pars[-1].write_text(text)
    items = assemble(*pars)
    assert [item.index for item in items] == [0, 1, 2]
    for volume in items:
        assert_values(volume, precise(stored(volume.index)))


def test_echoes_of_a_pair(tmp_path):
    par = tmp_path / "run.par"
    write_pair(par, [(stored(echo), 1, echo, 0) for echo in (1, 2, 3)])
    (volume,) = assemble(par, echo=2)
    assert_values(volume, precise(stored(2)))
    (volume,) = assemble(par)
    times_ms = np.array([12.0, 24, 36])
    weights = times_ms * np.exp(-times_ms / 47)
    expected = sum(
        w * precise(stored(e)) for w, e in zip(weights / weights.sum(), (1, 2, 3), strict=True)
    )
    limit = 8 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(volume.data, expected, rtol=0, atol=limit)


def test_a_pair_that_is_not_whole_says_so(tmp_path):
    par, rec = tmp_path / "run.par", tmp_path / "run.rec"
    write_pair(par, [(stored(0), 1, 1, 0)])
    text, pixels = par.read_text(), rec.read_bytes()
    rec.write_bytes(pixels[:-1])
    with pytest.raises(VolumeError, match="cut short"):
        read_par(par)
    rec.unlink()
    with pytest.raises(VolumeError, match="cut short"):
        read_par(par)
    rec.write_bytes(pixels)
    for n in (0, 10, 200, 1200):
        par.write_text(text[:n])
        with pytest.raises(VolumeError) as caught:
            read_par(par)
        assert PATIENT not in str(caught.value)
    par.write_text(text[:-50])
    with pytest.raises(VolumeError):
        read_par(par)


def test_a_damaged_text_is_read_or_refused(tmp_path):
    par = tmp_path / "run.par"
    write_pair(par, [(stored(0), 1, 1, 0)])
    text, chance = par.read_bytes(), random.Random(0)
    n_read, reasons = 0, set()
    for _ in range(300):
        damaged = bytearray(text)
        for _ in range(chance.choice((1, 2, 5))):
            damaged[chance.randrange(len(damaged))] = chance.choice(b"0189.-e \nx")
        par.write_bytes(damaged)
        try:
            n_read += len(assemble(par, tr_s=1.5)) > 0
        except VolumeError as error:
            reasons.add(str(error))
    assert n_read > 10
    assert not any(PATIENT in reason for reason in reasons)


def test_a_pair_without_magnitude(tmp_path):
    write_pair(tmp_path / "run.par", [(stored(0), 1, 1, 3)])
    with pytest.raises(VolumeError, match="no magnitude"):
        read_par(tmp_path / "run.par")


def test_a_repetition_time_that_cannot_be_is_asked_for(tmp_path):
    for t in range(2):
        write_pair(tmp_path / f"{t}.par", [(stored(t), 1, 1, 0)], **{"Repetition time [ms]": "2"})
    with pytest.raises(SourceError, match=r"0.05 to 60 s, got 0.002 s; .*--tr"):
        open_reader(str(tmp_path))
    reader = open_reader(str(tmp_path), tr_s=2.0)
    assert [item.index for item in reader] == [0, 1]


def test_a_folder_of_pairs_is_replayed(tmp_path):
    for t in (10, 2, 0, 1):
        write_pair(tmp_path / f"vol{t}.par", [(stored(t), 1, 1, 0)])
    (tmp_path / "lonely.rec").write_bytes(b"nothing")
    (tmp_path / "vol2.rec").write_bytes(b"cut")
    reader = open_reader(str(tmp_path))
    items = list(reader)
    assert reader.n_volumes == 3
    assert [item.name for item in items if isinstance(item, Skipped)] == ["lonely.rec", "vol2.par"]
    volumes = [item for item in items if isinstance(item, Volume)]
    for index, (volume, t) in enumerate(zip(volumes, (0, 1, 10), strict=True)):
        assert volume.index == index
        assert_values(volume, precise(stored(t)))


def test_a_pair_agrees_with_dcm2niix(tmp_path):
    par = tmp_path / "run.par"
    # It reads places from the general part, which dumps leave empty.
    turned = {
        "Angulation midslice(ap,fh,rl)[degr]": "-4 3 6",
        "Off Centre midslice(ap,fh,rl) [mm]": "-20.5 14.25 3.75",
    }
    write_pair(par, [(stored(0), 1, 1, 0)], **turned)
    (volume,) = assemble(par)
    assert_same_as_dcm2niix(volume, par, [scales_of(z)[0] * scales_of(z)[2] for z in range(7)])


def assert_same_as_dcm2niix(
    volume: Volume, par: Path, factors: list[float], rounding_mm: float = 0.0
) -> None:
    """Compare with dcm2niix, which gives slices of different scales as they are displayed.

    These are our values times slope x scale of each slice; it keeps slopes in float32.
    """
    out = par.parent / "out"
    out.mkdir()
    command = [dcm2niix.bin, "-z", "n", "-f", "run", "-o", out, par.parent]
    subprocess.run(command, check=True, capture_output=True)
    theirs = nibabel.as_closest_canonical(nibabel.load(out / "run.nii"))
    displayed = volume.data.astype(np.float64) * factors
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(displayed, volume.grid.affine))
    limit = 5 * np.finfo(np.float32).eps * displayed.max()
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), rtol=0, atol=limit)
    corners = np.array(np.meshgrid(*((0, n - 1) for n in ours.shape))).reshape(3, -1)
    corners = np.vstack([corners, np.ones(8)])
    moved_mm = (ours.affine - theirs.affine) @ corners
    assert np.abs(moved_mm).max() < 1e-4 + rounding_mm


def magnitude_alone(par: Path, folder: Path) -> tuple[Path, list[float]]:
    """Write the magnitude of a dump so that dcm2niix takes it, which refuses the dump itself."""
    pixels, lines, general, factors = [], [], [], []
    rec = par.with_suffix(".rec").read_bytes()
    for line in par.read_text().splitlines():
        fields = line.split()
        if len(fields) < 40 or line.startswith(("#", ".")):
            general.append(line.replace("mixes               :   2", "mixes               :   1"))
        elif fields[4] == "16":
            at = int(fields[6]) * 12800
            # Phases of the heart count from 1, types of images from 0.
            fields[3], fields[4], fields[6] = "1", "0", str(len(pixels))
            factors.append(float(fields[12]) * float(fields[13]))
            angles, centre = fields[16:19], [float(fields[19]), 15.6, 1.21]
            lines.append(" ".join(fields))
            pixels.append(rec[at : at + 12800])
    text = "\n".join(general + lines) + "\n"
    for label, value in (
        ("Angulation midslice(ap,fh,rl)[degr]:", "  ".join(angles)),
        ("Off Centre midslice(ap,fh,rl) [mm] :", "  ".join(map(str, centre))),
        ("Repetition time [ms]               :", "2000"),
    ):
        text = text.replace(f"{label}   ", f"{label}   {value} # ", 1)
    (folder / "run.par").write_text(text)
    (folder / "run.rec").write_bytes(b"".join(pixels))
    return folder / "run.par", factors


def test_real_pairs(tmp_path):
    folder = real_data("philips_parrec")
    with pytest.raises(SourceError, match="--tr"):
        open_reader(str(folder))
    reader = open_reader(str(folder), tr_s=2.0)
    volumes = [item for item in reader if isinstance(item, Volume)]
    assert [volume.index for volume in volumes] == list(range(30))
    assert reader.n_volumes == 30
    assert all(volume.grid.shape == (80, 80, 30) for volume in volumes)
    assert all(volume.grid.matches(volumes[0].grid) for volume in volumes)
    # Scales differ from slice to slice and from volume to volume; the precise values do not.
    means = [float(volume.data.mean()) for volume in volumes]
    assert np.std(means) < 0.01 * np.mean(means)
    par, factors = magnitude_alone(folder / "Dump-0000.par", tmp_path)
    # Positions of slices are rounded to 0.1 mm, and dcm2niix derives the last one from the first:
    # half of that at either end.
    assert_same_as_dcm2niix(volumes[0], par, factors, rounding_mm=0.1)

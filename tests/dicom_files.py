"""Synthetic DICOM files for the tests of readers; the names and dates in them are made up."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian

from rtfmri.simulator.dicom import mosaic_dataset
from rtfmri.volume import Grid

SERIES_UID = "1.2.826.0.1.3680043.8.498.1"
PATIENT = "DOE^JANE"


def real_data(folder: str) -> Path:
    """Return a folder of the real data, or skip the test."""
    root = os.environ.get("RTFMRI_TEST_DATA")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"RTFMRI_TEST_DATA names no folder with {folder}")
    return Path(root) / folder


def oblique_grid(shape: tuple[int, int, int] = (12, 10, 7)) -> Grid:
    """Return a grid of 3 x 2.5 x 4 mm, turned about all axes, x to the left and y to the back."""
    a, b, c = np.deg2rad([8.0, -5.0, 12.0])
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_y = [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    about_z = [[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]
    affine = np.eye(4)
    rotation = np.array(about_z) @ about_y @ about_x
    affine[:3, :3] = rotation @ np.diag([-3.0, -2.5, 4.0])
    affine[:3, 3] = [17.5, 22.25, -9.125]
    return Grid(shape, affine)


def voxels(grid: Grid, seed: int = 0, dtype: type = np.uint16) -> np.ndarray:
    """Return random voxels that fill *dtype*'s range, (x, y, z), x fastest."""
    limits = np.iinfo(dtype)
    random = np.random.default_rng(seed)
    return np.asfortranarray(
        random.integers(limits.min, limits.max, grid.shape, dtype, endpoint=True)
    )


def to_bytes(dataset: Dataset) -> bytes:
    """Return the file that *dataset* makes."""
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def mosaic(index: int = 0, *, grid: Grid | None = None, series_uid: str = SERIES_UID) -> Dataset:
    """Return a Siemens mosaic of `voxels` with *index* as their seed."""
    grid = grid or oblique_grid()
    return mosaic_dataset(voxels(grid, index), grid, index=index, tr_s=1.5, series_uid=series_uid)


def enhanced(
    index: int = 0, *, order: list[int] | None = None, grid: Grid | None = None
) -> Dataset:
    """Return an enhanced multiframe image of `voxels`, its slices stored in *order*."""
    grid = grid or oblique_grid()
    order = order if order is not None else list(range(grid.shape[2]))
    to_patient = np.diag([-1.0, -1, 1, 1]) @ grid.affine
    directions = to_patient[:3, :3] / grid.voxel_size_mm

    def item(**values: object) -> Sequence:
        dataset = Dataset()
        for name, value in values.items():
            setattr(dataset, name, value)
        return Sequence([dataset])

    def numbers(values: np.ndarray) -> list[str]:
        return [f"{value:.10g}" for value in values]

    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = EnhancedMRImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = f"{SERIES_UID}.{index + 1}"
    d.SeriesInstanceUID = SERIES_UID
    d.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    d.Modality, d.Manufacturer = "MR", "Siemens Healthineers"
    d.PatientName, d.PatientID = PATIENT, "12345"
    d.AcquisitionNumber = d.InstanceNumber = index + 1
    d.AcquisitionDateTime = f"20200102030405.{250000 + index:06d}"
    d.Rows, d.Columns, d.NumberOfFrames = grid.shape[1], grid.shape[0], grid.shape[2]
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, 0
    size = grid.voxel_size_mm
    (shared,) = item(
        PixelMeasuresSequence=item(
            PixelSpacing=numbers(np.array([size[1], size[0]])), SliceThickness=f"{size[2]:g}"
        ),
        PlaneOrientationSequence=item(
            ImageOrientationPatient=numbers(directions[:, :2].T.ravel())
        ),
        MRTimingAndRelatedParametersSequence=item(RepetitionTime="1500"),
    )
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    d.DimensionIndexSequence = item(DimensionIndexPointer=0x00209057)
    d.PerFrameFunctionalGroupsSequence = Sequence(
        [
            item(
                PlanePositionSequence=item(
                    ImagePositionPatient=numbers((to_patient @ [0, 0, z, 1])[:3])
                ),
                FrameContentSequence=item(
                    InStackPositionNumber=z + 1, DimensionIndexValues=[z + 1]
                ),
            )[0]
            for z in order
        ]
    )
    d.PixelData = np.ascontiguousarray(voxels(grid, index).T[order]).tobytes()
    return d

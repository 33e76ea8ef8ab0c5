"""Synthetic Philips PAR/REC pairs for the tests of readers; the names in them are made up."""

from pathlib import Path

import numpy as np

from dicom_files import PATIENT
from rtfmri.volume import Grid

ANGLES_DEG = (-4.0, 3.0, 6.0)
"""About the axes to the back, the head and the right."""
CENTRE_MM = (-20.5, 14.25, 3.75)
SCALES = (1.5, -300.0, 0.02)
"""Rescale slope, intercept and scale slope; those of a slice differ by its number in percent."""
SIZE_MM = (3.0, 2.5, 4.0)

GENERAL = {
    "Patient name": PATIENT,
    "Examination name": "made up",
    "Protocol name": "made up",
    "Examination date/time": "2020.01.02 / 03:04:05",
    "Series Type": "Image   MRSERIES",
    "Acquisition nr": "1",
    "Reconstruction nr": "1",
    "Scan Duration [sec]": "60",
    "Max. number of cardiac phases": "1",
    "Max. number of echoes": "1",
    "Max. number of dynamics": "1",
    "Max. number of mixes": "1",
    "Patient position": "Head First Supine",
    "Preparation direction": "Anterior-Posterior",
    "Technique": "FEEPI",
    "Scan resolution  (x, y)": "0  0",
    "Scan mode": "MS",
    "Repetition time [ms]": "1500.0",
    "FOV (ap,fh,rl) [mm]": "0  0  0",
    "Water Fat shift [pixels]": "0",
    "Angulation midslice(ap,fh,rl)[degr]": "0  0  0",
    "Off Centre midslice(ap,fh,rl) [mm]": "0  0  0",
    "Flow compensation <0=no 1=yes> ?": "0",
    "Presaturation     <0=no 1=yes> ?": "0",
    "Phase encoding velocity [cm/sec]": "0  0  0",
    "MTC               <0=no 1=yes> ?": "0",
    "SPIR              <0=no 1=yes> ?": "0",
    "EPI factor        <0,1=no EPI>": "0",
    "Dynamic scan      <0=no 1=yes> ?": "0",
    "Diffusion         <0=no 1=yes> ?": "0",
    "Diffusion echo time [ms]": "0",
    "Max. number of diffusion values": "1",
    "Max. number of gradient orients": "1",
    "Number of label types   <0=no ASL>": "1",
}


def scales_of(z: int) -> tuple[float, float, float]:
    slope, intercept, scale = SCALES
    return slope * (1 + z / 100), intercept, scale * (1 + z / 100)


def precise(data: np.ndarray) -> np.ndarray:
    """Return what stored values (x, y, z) stand for, in float64."""
    values = data.astype(np.float64)
    for z in range(data.shape[2]):
        slope, intercept, scale = scales_of(z)
        values[..., z] = (values[..., z] * slope + max(intercept, 0)) / (slope * scale)
    return values


def write_pair(
    par: Path,
    images: list[tuple[np.ndarray, int, int, int]],
    **general: str,
) -> None:
    """Write (voxels, dynamic, echo, kind) one after another; kind 0 is magnitude, 3 is phase."""
    lines, pixels = [], []
    for data, dynamic, echo, kind in images:
        n_x, n_y, n_z = data.shape
        for z in range(n_z):
            slope, intercept, scale = scales_of(z)
            offset = [CENTRE_MM[0], CENTRE_MM[1] + (z - (n_z - 1) / 2) * SIZE_MM[2], CENTRE_MM[2]]
            fields = [
                *(z + 1, echo, dynamic, 1, kind, 0, len(pixels), 16, 100, n_x, n_y),
                *(intercept if kind == 3 else max(intercept, 0), slope, scale, 1070, 1860),
                *ANGLES_DEG,
                *offset,
                *(SIZE_MM[2] - 0.5, 0.5, 0, 1, 0, 2, SIZE_MM[0], SIZE_MM[1], 12.0 * echo),
                *(0, 0, 0, 1, 75, 0, 0, 0, 43, 0, 1, 1, 0, 0, 0, 0, 0, 1),
            ]
            lines.append(" ".join(str(field) for field in fields))
            pixels.append(data.T[z])
    general = {**GENERAL, "Max. number of slices/locations": str(images[0][0].shape[2]), **general}
    head = "\n".join(f".    {key:35}:   {value}" for key, value in general.items())
    par.write_text(
        f"# === DATA DESCRIPTION FILE {'=' * 54}\n#\n# Dataset name: run\n#\n"
        "# CLINICAL TRYOUT             Research image export tool     V4.2\n#\n"
        f"# === GENERAL INFORMATION {'=' * 56}\n#\n{head}\n#\n"
        f"# === IMAGE INFORMATION {'=' * 58}\n#  sl ec  dyn ph ty    idx pix scan% rec size\n\n"
        + "\n".join(lines)
        + "\n"
    )
    rec = par.with_suffix(".REC" if par.suffix == ".PAR" else ".rec")
    rec.write_bytes(np.array(pixels, "<u2").tobytes())


def pair_grid(shape: tuple[int, int, int]) -> Grid:
    """Return where `write_pair` puts its images, by Philips' own axes: back, head, right."""
    ap, fh, rl = np.deg2rad(ANGLES_DEG)
    about_ap = [[1, 0, 0], [0, np.cos(ap), -np.sin(ap)], [0, np.sin(ap), np.cos(ap)]]
    about_fh = [[np.cos(fh), 0, np.sin(fh)], [0, 1, 0], [-np.sin(fh), 0, np.cos(fh)]]
    about_rl = [[np.cos(rl), -np.sin(rl), 0], [np.sin(rl), np.cos(rl), 0], [0, 0, 1]]
    turned = np.array(about_rl) @ about_ap @ about_fh
    # Columns of a transverse image go to the left, rows to the back, slices to the head.
    axes = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]) @ np.diag(SIZE_MM)
    to_ras = np.array([[0, 0, -1], [-1, 0, 0], [0, 1, 0]])
    affine = np.eye(4)
    affine[:3, :3] = to_ras @ turned @ axes
    centre = to_ras @ np.array(CENTRE_MM)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)

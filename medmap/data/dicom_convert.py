"""A DICOM series as one NIfTI file, by dcm2niix, on exactly the grid that the headers tell."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmap.data.dicom import Series
from medmap.data.nifti import read_header
from medmap.errors import InputError

LONGEST_S = 600
"""Nothing is waited for longer than this."""
NEAR = 0.25
"""The file's grid and the headers' may differ by this part of a voxel: some scanners round positions to 0.1 mm, and
dcm2niix takes the distance of slices from the first two."""


def convert(series: Series, folder: Path) -> Path:
    """Write a series as ``series-LABEL.nii`` into a folder, and return the file.

    The files of this volume alone are shown to dcm2niix, in the order of the slices, in a folder that is removed. It
    lies in the given one: who removes that leaves nothing of a patient, also where this is not done to its end.

    Raises InputError where dcm2niix fails, writes more or less than one volume, or one on another grid.
    """
    out = folder / f"series-{series.label}.nii"
    with tempfile.TemporaryDirectory(prefix="medmap-series-", dir=folder) as name:
        given, made = Path(name) / "given", Path(name) / "made"
        given.mkdir()
        made.mkdir()
        for number, path in enumerate(dict.fromkeys(frame.path for frame in series.frames)):
            shutil.copyfile(path, given / f"{number:06d}.dcm")
        said = _run(series, given, made)
        files = sorted(made.glob("*.nii"))
        if len(files) != 1:
            raise InputError(
                f"{series.name}: dcm2niix made {len(files)} files of it, one volume is expected ({said}); name another "
                "series, or export it again"
            )
        voxel_map(series, read_header(files[0]).affine, read_header(files[0]).shape)
        shutil.move(files[0], out)
    return out


def voxel_map(series: Series, affine: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """How an array [X Y Z] on the grid of a file lies in DICOM's order [column row slice].

    affine: 4×4 of the file, voxel → mm in RAS+
    shape:  of the file

    Returns (axes, flips): DICOM's axis j is the file's axis axes[j], backwards where flips[j].
    Raises InputError where the two grids are not the same up to order and direction of the axes.
    """
    step = np.linalg.inv(affine) @ series.affine  # (column, row, slice) → voxel of the file
    axes = [int(axis) for axis in np.abs(step[:3, :3]).argmax(axis=0)]
    flips = [bool(step[axis, j] < 0) for j, axis in enumerate(axes)]
    ideal = np.eye(4)
    ideal[:3, :3] = 0
    for j, axis in enumerate(axes):
        ideal[axis, j] = -1 if flips[j] else 1
        ideal[axis, 3] = shape[axis] - 1 if flips[j] else 0
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*_last(series), 1]
    sizes = tuple(shape[axis] for axis in axes)
    if sorted(axes) != [0, 1, 2] or sizes != series.shape or np.abs((step - ideal) @ corners.T).max() > NEAR:
        raise InputError(
            f"{series.name}: converted to a grid of {'×'.join(map(str, shape))} voxels that is not the one its headers "
            f"tell, {'×'.join(map(str, series.shape))}; export it again, or convert it yourself and give NIfTI files"
        )
    return axes, flips


def dicom_order(series: Series, volume: NDArray[np.generic], affine: NDArray[np.float64]) -> NDArray[np.generic]:
    """A volume [X Y Z] on a file's grid as [slice row column] of a series. Raises InputError as `voxel_map` does."""
    axes, flips = voxel_map(series, affine, volume.shape)
    turned = volume.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return np.ascontiguousarray(turned.transpose(2, 1, 0))


def _last(series: Series) -> list[int]:
    return [size - 1 for size in series.shape]


def _run(series: Series, given: Path, made: Path) -> str:
    """What dcm2niix said last. Raises InputError where it fails."""
    import dcm2niix

    # -g i: no defaults of somebody's; -m y: these slices are one volume; -x i: neither cropped nor turned
    options = ["-g", "i", "-b", "n", "-z", "n", "-m", "y", "-x", "i", "-f", "volume", "-o", str(made), str(given)]
    try:
        done = subprocess.run(
            [str(dcm2niix.bin), *options],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LONGEST_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"{series.name}: dcm2niix cannot be run ({error}); install it again, pip install 'medmap[dicom]'"
        ) from error
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() or "warning" in line.lower()] or lines[-1:]
    said = "; ".join(told[:2]).replace(f"{made}", "").replace(f"{given}", "")
    if done.returncode != 0 and not any(made.glob("*.nii")):
        raise InputError(
            f"{series.name}: dcm2niix cannot convert it (exit code {done.returncode}; {said}); export it again, or "
            "name another series"
        )
    return said

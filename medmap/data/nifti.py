"""NIfTI files: headers, volumes, label maps in; masks and volumes out, never half-written."""

from __future__ import annotations

import gzip
import hashlib
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray

from medmap.core.case import Grid
from medmap.data.filenames import SUFFIXES
from medmap.data.filenames import stem as stem
from medmap.data.whole import whole
from medmap.errors import InputError

_SPACE_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
_UNITS = {1: "meter", 2: "mm", 3: "micron"}


@dataclass(frozen=True)
class Header:
    """What a file says about its volume, without its voxels.

    path:    the file
    shape:   voxels per axis, as stored (four axes where several volumes share the file)
    affine:  4×4 voxel → mm in RAS+, invertible
    dtype:   type on disk
    oriented: whether the file says where the volume lies (qform or sform code > 0); else the affine is a default
    unit:    of lengths, as the file names it: mm, meter, micron or unknown; the affine is not brought to mm
    forms_apart: how far qform and sform put the same voxel apart, where both are set, at the corner where it is most;
             in the unit of lengths. The affine is the sform then
    """

    path: Path
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    oriented: bool = True
    unit: str = "unknown"
    forms_apart: float = 0.0

    @property
    def channels(self) -> int:
        """Number of volumes in the file: 1 for a 3-D file, also where its shape ends with ones."""
        return prod(self.shape[3:])

    @property
    def grid(self) -> Grid:
        """The grid of one volume."""
        x, y, z = self.shape[:3]
        return Grid((x, y, z), self.affine)

    @property
    def orientation(self) -> str:
        """Where the storage axes point, e.g. ``RAS`` or ``LPS``."""
        return "".join(nib.aff2axcodes(self.affine))


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file (hidden files are not: some archives carry ``._name.nii.gz``)."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_header(path: Path) -> Header:
    """Shape, affine and type of a NIfTI file; the voxels are not read.

    Raises InputError for a file that is absent, unreadable, not NIfTI, not at least 3-D, or whose
    affine has no inverse.
    """
    image = _open(Path(path))
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or min(shape) < 1:
        raise InputError(f"{path}: found {len(shape)} dimensions {shape}; a 3-D volume is expected")
    affine = np.asarray(image.affine, dtype=np.float64)
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    # as a share of the edges: 1e-9 is also the volume of an upright voxel that is counted in metres
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-9 * np.prod(edges):
        raise InputError(f"{path}: the affine has no inverse, so nobody knows where its voxels lie; export it again")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are of type {dtype}; numbers are expected (is it a colour picture?)")
    codes = int(image.header["qform_code"]), int(image.header["sform_code"])
    apart = _forms_apart(image.header, shape) if all(code > 0 for code in codes) else 0.0
    return Header(Path(path), shape, affine, dtype, any(codes), _unit(image.header), apart)


def read_volume(path: Path, channel: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """One volume as Float32[X Y Z], with the file's scale and offset applied, and its affine (4×4 voxel → mm, RAS+).

    channel: which volume of a 4-D file; None where the file is 3-D

    Raises InputError as `read_header` does, for a damaged file (of a .gz, the checksum is held to), for a 4-D file
    where no channel is asked for, and for a channel that the file does not hold.
    """
    header = read_header(path)
    data = _voxels(header, channel)
    volume = np.ascontiguousarray(data, dtype=np.float32)
    return volume, header.affine


def read_labels(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A label map as integers [X Y Z] in the file's own codes (UInt8 where they fit, else Int32), and its affine.

    Raises InputError as `read_volume` does, and for values that are not whole numbers.
    """
    header = read_header(path)
    data = _voxels(header, None)
    if data.dtype.kind == "f":
        odd = int(np.count_nonzero(data != np.rint(data)))
        if odd:
            raise InputError(
                f"{path}: {odd} voxels are not whole numbers, so this is no label map; if it was resampled, "
                "do that again with nearest-neighbour interpolation"
            )
    small = data.size == 0 or (data.min() >= 0 and data.max() <= 255)
    return np.ascontiguousarray(data, dtype=np.uint8 if small else np.int32), header.affine


def write_mask(path: Path, labels: NDArray[Any], like: Path) -> None:
    """Write codes as UInt8 on exactly the grid of the file ``like``: its affine, qform and sform with their codes.

    labels: integers 0…255, [X Y Z] of the reference file

    The file appears under its name only when it is whole. Raises InputError where the reference cannot be read, the
    shape is another one, or the place cannot be written.
    """
    reference = _open(Path(like))
    if labels.shape != tuple(reference.shape[:3]):
        raise InputError(
            f"{path}: the mask has {labels.shape} voxels, {like} has {reference.shape[:3]}; same grid needed"
        )
    header = type(reference.header)()
    for name in _SPACE_FIELDS:
        header[name] = reference.header[name]
    header["pixdim"][:4] = reference.header["pixdim"][:4]
    header.set_data_dtype(np.uint8)
    mask = type(reference)(np.ascontiguousarray(labels, dtype=np.uint8), None, header)
    _save(mask, Path(path))


def write_volume(path: Path, array: NDArray[Any], affine: NDArray[Any], dtype: DTypeLike | None = None) -> None:
    """Write a volume with its affine (4×4 voxel → mm, RAS+) as qform and sform; never half-written.

    dtype: type on disk, the array's own where None; floats are rounded on the way to integers

    Raises InputError where the place cannot be written.
    """
    target = np.dtype(array.dtype if dtype is None else dtype)
    values = np.rint(array) if target.kind in "iu" and array.dtype.kind == "f" else array
    image = nib.Nifti1Image(np.ascontiguousarray(values, dtype=target), np.asarray(affine, np.float64), dtype=target)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    _save(image, Path(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises InputError for a file that cannot be read."""
    with _explained(Path(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def looks_cut_off(header: Header) -> bool:
    """Whether the file is too short for the volume that its header promises.

    Cheap: an uncompressed file has its size; a gzip file ends with the number of bytes it unpacks to (modulo 2³²).
    Only where that number disagrees (legal for a gzip file of several members) is the file unpacked to be sure.
    """
    needed = prod(header.shape) * header.dtype.itemsize + 352
    size = header.path.stat().st_size
    if not header.path.name.lower().endswith(".gz"):
        return size < needed
    with open(header.path, "rb") as file:
        file.seek(max(0, size - 4))
        promised = int.from_bytes(file.read(4), "little")
    if (promised - needed) % 2**32 < 2**20:  # header extensions make it a little longer
        return False
    try:
        with gzip.open(header.path, "rb") as stream:
            return sum(len(block) for block in iter(lambda: stream.read(1 << 20), b"")) < needed
    except (OSError, EOFError, zlib.error):
        return True


def _forms_apart(header: Any, shape: tuple[int, ...]) -> float:
    """Both are affine, so that they are farthest apart at a corner; 0 where the qform is none that can be read."""
    corners = np.array([(*at, 1) for at in product(*((0, n - 1) for n in shape[:3]))], np.float64)
    try:
        apart = corners @ (header.get_qform() - header.get_sform()).T
    except (HeaderDataError, ValueError):
        return 0.0
    return float(np.linalg.norm(apart[:, :3], axis=1).max())


def _unit(header: Any) -> str:
    """Of lengths: the three lowest bits; those above are the unit of time, which may be any number."""
    return _UNITS.get(int(header["xyzt_units"]) & 7, "unknown")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what nibabel, gzip and the system raise into one InputError that names the file and the cure."""
    again = "copy or download it again"
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if isinstance(error, gzip.BadGzipFile) and not _is_gzip(path):
            raise InputError(f"{path}: {_unlike_nifti(path)}, a NIfTI file is expected; {again}") from error
        raise InputError(f"{path}: damaged or cut off while it was written ({error}); {again}") from error
    except (ImageFileError, HeaderDataError) as error:
        raise InputError(f"{path}: {_unlike_nifti(path)}, a NIfTI file is expected; {again}") from error
    except (OSError, ValueError, TypeError, OverflowError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {again}") from error


def _unlike_nifti(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        return "empty"
    if path.name.lower().endswith(".gz") and not _is_gzip(path):
        return "named .gz but its bytes are not gzip"
    return "something else inside"


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextmanager
def _silent() -> Iterator[None]:
    """Nibabel logs what it mends in a header; what of that matters is a fault that is told once, with its file."""
    refuse = _Refuse()
    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


class _Refuse(logging.Filter):
    """One for every reading, as patients may be read side by side."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


def _open(path: Path) -> Any:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; a NIfTI file is expected")
    if path.exists() and not path.name.lower().endswith(SUFFIXES):  # nibabel would believe the name, and fail its way
        found = f"a name that ends in {path.suffix}" if path.suffix else "a name without an ending"
        raise InputError(
            f"{path}: found {found}; expected a NIfTI file (.nii or .nii.gz); convert it, or name the right file"
        )
    with _explained(path), _silent():
        image = nib.load(path)
    if not isinstance(image, nib.Nifti1Image):
        raise InputError(
            f"{path}: found {type(image).__name__}; expected a NIfTI file of one piece (.nii or .nii.gz); convert it"
        )
    return image


def _voxels(header: Header, channel: int | None) -> NDArray[Any]:
    many = header.channels
    if channel is None and many > 1:
        raise InputError(
            f"{header.path}: found a 4-D file of shape {header.shape}; a 3-D volume is expected; split it into its "
            "volumes (fslsplit, or img.slicer[..., i] of nibabel)"
        )
    if channel is not None and not 0 <= channel < many:
        raise InputError(f"{header.path}: volume {channel + 1} is asked for, the file holds {many}")
    with _explained(header.path), _silent():
        image: Any = nib.load(header.path, mmap=False)
        if not header.path.name.lower().endswith(".gz"):
            return _array(image.dataobj, header, channel)
        with gzip.open(header.path, "rb") as stream:
            voxels = _array(type(image).from_stream(stream).dataobj, header, channel)
            while stream.read(1 << 20):  # the checksum stands at the end, beyond the last voxel
                pass
            return voxels


def _array(data: Any, header: Header, channel: int | None) -> NDArray[Any]:
    volume = np.asanyarray(data[..., channel or 0] if len(header.shape) > 3 else data)
    return volume.reshape(header.shape[:3])


def _save(image: Any, path: Path) -> None:
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: masks and volumes are written as .nii.gz (or .nii); give it such a name")
    try:
        with whole(path) as (fresh,):
            nib.save(image, fresh)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); check that the folder exists, that it may be "
            "written to, and that the disk is not full"
        ) from error

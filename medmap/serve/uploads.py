"""What came in: known by its content, named without folders, no larger than it may be."""

from __future__ import annotations

import gzip
import re
import zlib
from importlib.util import find_spec
from math import prod
from pathlib import Path

from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from medmap.data.nifti import SUFFIXES, read_header, stem
from medmap.errors import InputError

MOST_VOXELS = 2**27
"""512 × 512 × 512: what a header promises is made room for before it is read."""
MOST_OFFSET_BYTES = 2**20
"""Voxels begin here at the latest: nibabel reads all that a header has before them."""
_HEADER_BYTES = 540
_SLACK_BYTES = 2**24
_DICOM = ("pydicom", "dcm2niix", "highdicom")
_LONGEST = 100
"""Bytes of a name: file systems count these, and take 255 with what is added to it."""


def safe_name(name: str) -> str:
    """A file's own name without folders or anything that means something to a system.

    >>> safe_name("../../etc/ann_t1.nii.gz"), safe_name("C:\\\\x\\\\.bob t2?.nii"), safe_name("..")
    ('ann_t1.nii.gz', 'bob t2_.nii', 'file')
    """
    last = re.split(r"[/\\]", name)[-1]
    plain = re.sub(r"[^\w.()+ -]", "_", last).encode()[-_LONGEST:].decode(errors="ignore")
    return plain.lstrip(". ") or "file"


def kind_of(file: Path) -> str:
    """``.nii.gz``, ``.nii`` or ``.zip`` by the first bytes of a file, whatever it is called; empty for anything else.

    A file of other bytes that is gzip is taken for a compressed NIfTI file until its header is read.
    """
    with open(file, "rb") as stream:
        start = stream.read(348)
    if start[:2] == b"\x1f\x8b":
        return ".nii.gz"
    if start[:4] == b"PK\x03\x04":
        return ".zip"
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    return ".nii" if sizes & {348, 540} else ""


def taken_in(file: Path, name: str, folder: Path) -> Path:
    """Move an upload into a folder under a name that says what it is; returns its place.

    Raises InputError for what is neither NIfTI nor a zip file, for a zip file where DICOM cannot be read, for a header
    that cannot be read, for more voxels than MOST_VOXELS, for voxels that begin far behind it, and for a file that
    unpacks to more than its header promises.
    """
    shown, kind = safe_name(name), kind_of(file)
    if not kind:
        raise InputError(
            f"{shown}: neither NIfTI nor a zip file, by its content; expected NIfTI (.nii, .nii.gz), or a DICOM study "
            "as one .zip"
        )
    if kind == ".zip" and (lacking := [name for name in _DICOM if find_spec(name) is None]):
        raise InputError(
            f"{shown}: a .zip is taken for a DICOM study, and {', '.join(lacking)} is not installed here; pip install "
            "'medmap[dicom]', or give NIfTI files"
        )
    base = stem(Path(shown)) if shown.lower().endswith(SUFFIXES) else Path(shown).stem
    place = folder / f"{base}{kind}"
    number = 2
    while place.exists():
        place, number = folder / f"{base}-{number}{kind}", number + 1
    file.rename(place)
    if kind != ".zip":
        try:
            _refuse_bomb(place)
        except BaseException:  # whatever it is, nothing of the file stays
            place.unlink(missing_ok=True)
            raise
    return place


def _refuse_bomb(file: Path) -> None:
    """Raises InputError for a file that promises too much, or holds more than it promises: by its first bytes and by
    counting, before nibabel makes room for what these say."""
    packed = file.name.endswith(".gz")
    try:
        with gzip.open(file, "rb") if packed else open(file, "rb") as stream:
            most, shape = _promised(file, stream.read(_HEADER_BYTES))
            unpacked = _HEADER_BYTES
            while packed and (block := stream.read(2**20)):
                unpacked += len(block)
                if unpacked > most:
                    raise InputError(
                        f"{file}: unpacks to more than the {shape} voxels of its header; do not trust it, or export it "
                        "again"
                    )
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{file}: damaged or cut off while it was written ({error}); copy or download it again"
        ) from error
    read_header(file)


def _promised(file: Path, start: bytes) -> tuple[int, str]:
    """How many bytes a file may have by its header, and its shape."""
    kind = next((kind for kind in (Nifti1Header, Nifti2Header) if kind.may_contain_header(start)), None)
    if kind is None:
        raise InputError(f"{file}: something else inside, a NIfTI file is expected; copy or download it again")
    header = kind(start[: kind.sizeof_hdr], check=False)
    try:
        shape, voxel_bytes = [int(n) for n in header.get_data_shape()], header.get_data_dtype().itemsize
    except (HeaderDataError, KeyError) as error:  # of a type that nobody knows
        raise InputError(f"{file}: damaged header ({error}); copy or download it again") from error
    shown = "×".join(map(str, shape))
    if prod(shape) > MOST_VOXELS:
        raise InputError(
            f"{file}: {shown} voxels, at most {MOST_VOXELS:,} are taken here; use medmap predict, or a coarser image"
        )
    offset = float(header["vox_offset"])
    if not offset <= MOST_OFFSET_BYTES:  # not a number either
        raise InputError(
            f"{file}: its header says that voxels begin at byte {offset:.0f}, at most {MOST_OFFSET_BYTES:,} is taken; "
            "do not trust it, or export it again without extensions of its header"
        )
    return prod(shape) * voxel_bytes + _SLACK_BYTES, shown

"""What came in: known by its content, named without folders, no larger than it may be."""

from __future__ import annotations

import gzip
import re
import zlib
from math import prod
from pathlib import Path

from medmap.data.nifti import SUFFIXES, read_header, stem
from medmap.errors import InputError

MOST_VOXELS = 2**27
"""512 × 512 × 512: what a header promises is made room for before it is read."""
_SLACK_BYTES = 2**24
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

    Raises InputError for what is neither NIfTI nor a zip file, for a header that cannot be read, for more voxels than
    MOST_VOXELS, and for a file that unpacks to more than its header promises.
    """
    shown, kind = safe_name(name), kind_of(file)
    if not kind:
        raise InputError(
            f"{shown}: neither NIfTI nor a zip file, by its content; expected NIfTI (.nii, .nii.gz), or a DICOM study "
            "as one .zip"
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
    header = read_header(file)
    shape = "×".join(map(str, header.shape))
    if prod(header.shape) > MOST_VOXELS:
        raise InputError(
            f"{file}: {shape} voxels, at most {MOST_VOXELS:,} are taken here; use medmap predict, or a coarser image"
        )
    if not file.name.endswith(".gz"):
        return
    most = prod(header.shape) * header.dtype.itemsize + _SLACK_BYTES
    unpacked = 0
    try:
        with gzip.open(file, "rb") as stream:
            while block := stream.read(2**20):
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

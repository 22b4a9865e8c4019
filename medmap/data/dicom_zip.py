"""A study in a zip file, unpacked without trust: names are not believed, nor are sizes."""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from pathlib import Path
from typing import IO

from medmap.data.dicom import begins_as_dicom
from medmap.errors import InputError

MOST_BYTES = 8 * 2**30
"""A study is no larger unpacked; the largest of the brain have 2 GiB."""
MOST_FILES = 100_000
MOST_GROWTH = 200
"""Images shrink to a third, black ones to a thirtieth; what shrinks more than this was made to fill a disk."""
_FREE_BYTES = 100 * 2**20
_BLOCK = 2**20


def unpack(archive: Path, folder: Path) -> None:
    """Put the DICOM files of an archive into a folder, under names made here; everything else is left in it.

    Raises InputError for what is no zip file, is damaged or locked, names a place outside of it, holds no DICOM, or
    would grow past MOST_BYTES or, above 100 MiB, past MOST_GROWTH times its own size.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _refuse(archive, members)
            limit = min(MOST_BYTES, max(_FREE_BYTES, MOST_GROWTH * archive.stat().st_size))
            for number, member in enumerate(members):
                name = re.sub(r"[^\w.-]", "_", Path(member.filename).name)[-60:].lstrip(".")
                with opened.open(member) as stream:
                    limit -= _copied(stream, folder / f"{number:06d}-{name}", limit, archive)
    except _BROKEN as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); expected a zip file of DICOM files") from error
    except OSError as error:
        raise InputError(f"{archive}: cannot be unpacked ({error.strerror or error}); check it and the disk") from error
    if not any(folder.iterdir()):
        raise InputError(f"{archive}: found {len(members)} files and no DICOM among them; expected one study")


def _refuse(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MOST_FILES:
        raise InputError(f"{archive}: holds {len(members):,} files, at most {MOST_FILES:,} are expected of a study")
    for member in members:
        parts = re.split(r"[/\\]", member.filename)
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise InputError(f"{archive}: names a place outside of itself ({member.filename!r}); do not trust it")
        if member.flag_bits & 1:
            raise InputError(f"{archive}: is locked with a password; unpack it first and give the folder")


def _copied(stream: IO[bytes], file: Path, limit: int, archive: Path) -> int:
    """Bytes written: those of a DICOM file, 0 for another one. Counts what comes out, whatever was promised."""
    block = stream.read(_BLOCK)
    if not begins_as_dicom(block[:132]):
        return 0
    written = 0
    with open(file, "wb") as out:
        while block:
            written += len(block)
            if written > limit:
                raise InputError(
                    f"{archive}: unpacks to far more than its size, or than {MOST_BYTES // 2**30} GiB; expected one "
                    "study; unpack it yourself if you trust it, and give the folder"
                )
            out.write(block)
            block = stream.read(_BLOCK)
    return written


_BROKEN = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError),
    *(zlib.error, lzma.LZMAError),
    *(UnicodeDecodeError, IndexError),  # names of members that are no text, or empty
)
"""What `zipfile` raises of an archive that is damaged, or packed in a way that it does not know."""

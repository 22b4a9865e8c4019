"""What a file's name says: whose image it is and of which sequence. Nothing here opens a file, or imports who does."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from medmap.core.modality import ALIASES
from medmap.errors import InputError

SUFFIXES = (".nii.gz", ".nii")
"""How the names of NIfTI files end."""


def stem(path: Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``.

    >>> stem(Path("BraTS2021_00000_t1ce.nii.gz"))
    'BraTS2021_00000_t1ce'
    """
    lower = path.name.lower()
    return next((path.name[: -len(end)] for end in SUFFIXES if lower.endswith(end)), path.name)


def refuse_foreign(*paths: Path) -> None:
    """Raises InputError for a name whose bytes are not UTF-8: no JSON could hold it, no message show it."""
    for path in paths:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            shown, folder = (os.fsencode(p).decode("utf-8", "backslashreplace") for p in (path, path.parent))
            raise InputError(
                f"{shown}: the name is not in UTF-8, as names must be that are written down with results; rename it, "
                f"for one in Latin-1 with convmv -f latin1 -t utf8 -r --notest {folder}"
            ) from None


def by_tail(
    paths: list[Path], others: Collection[str] = ()
) -> tuple[dict[str, dict[str, Path]], dict[str, Path], list[Path]]:
    """{case: {modality: file}}, {case: segmentation}, and what is neither, by the ends of the names.

    others: sequences besides the four of BraTS that are known to occur, by their own names
    """
    images: dict[str, dict[str, Path]] = {}
    segs: dict[str, Path] = {}
    spare: list[Path] = []
    names = {name: name for name in others} | ALIASES
    for path in paths:
        match = _TAIL.fullmatch(stem(path))
        case, tail = (match["id"] or "", match["tail"].lower()) if match else ("", "")
        name = names.get(re.sub("^t2[-_]", "", tail) if "flair" in tail else tail)
        if name is not None and name not in images.get(case, {}):
            images.setdefault(case, {})[name] = path
        elif tail in SEG_WORDS and case not in segs:
            segs[case] = path
        else:
            spare.append(path)
    return images, segs, spare


def style_of(paths: Iterable[Path], old: bool = False) -> str:
    """``brats2021`` (all end in _t1 _t1ce _t2 _flair), ``brats2023`` (all in -t1n -t1c -t2w -t2f) or ``plain``.

    old: whether the ids, or other cases beside this one, are known to be of 2018–2021. Anybody calls an image _flair;
         without that, one name of the case has to end in _t1ce

    >>> style_of([Path("p7_t2.nii.gz"), Path("p7_flair.nii.gz")]), style_of([Path("p7_t1ce.nii.gz")])
    ('plain', 'brats2021')
    """
    names = [stem(path) for path in paths]
    style = next((style for style, pattern in _STYLES.items() if all(re.search(pattern, n) for n in names)), "plain")
    return "plain" if style == "brats2021" and not (old or says_t1ce(names)) else style


def says_t1ce(names: Iterable[str]) -> bool:
    """Whether one of these names without ending is that of an image _t1ce, as BraTS called it until 2021."""
    return any(name.endswith("_t1ce") for name in names)


def bids_name(path: Path) -> str | None:
    """Modality of a BIDS anatomical image, None where it is another kind of image."""
    *entities, suffix = stem(path).split("_")
    if suffix == "T1w" and any(entity.startswith("ce-") for entity in entities):
        return "t1c"
    return {"T1w": "t1n", "T2w": "t2w", "FLAIR": "t2f"}.get(suffix)


def bids_case(path: Path) -> str:
    """Subject and session of a BIDS file, e.g. ``sub-01_ses-2``."""
    return "_".join(entity for entity in stem(path).split("_") if entity.startswith(("sub-", "ses-")))


SEG_WORDS = ("seg", "segm", "segmentation", "label", "labels", "dseg")
_TAIL = re.compile(r"(?:(?P<id>.+?)[-_.])??(?P<tail>(?:t2[-_])?flair|[^-_.]+)", re.IGNORECASE)
_STYLES = {"brats2021": r"_(t1|t1ce|t2|flair)$", "brats2023": r"-(t1n|t1c|t2w|t2f)$"}

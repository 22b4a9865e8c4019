"""Colours of the codes in masks, as the viewers' own files: one look at a mask without choosing anything.

The colours are from Okabe and Ito's palette, which people tell apart whatever colours they see.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medmap.core.labels import LabelScheme
from medmap.data.whole import whole
from medmap.errors import InputError

CLASS_COLOURS = {
    "ncr": "#D55E00",
    "ed": "#56B4E9",
    "et": "#F0E442",
    "rc": "#009E73",
    "liver": "#56B4E9",
    "lesion": "#D55E00",
}
"""A class has the colour of the region that it shows in: oedema of WT, necrosis of TC, enhancing tumour of ET."""
REGION_COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#009E73", "#CC79A7")
"""In the order of a scheme's regions, as in the figures."""
CLASS_NAMES = {
    "ncr": "necrotic core",
    "ed": "oedema",
    "et": "enhancing tumour",
    "rc": "resection cavity",
    "liver": "liver",
    "lesion": "lesion",
}


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255.

    >>> rgb("#D55E00")
    (213, 94, 0)
    """
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def class_colour(scheme: LabelScheme, name: str) -> str:
    """A class's colour; for one that nobody knows the next of the palette, by its place in the scheme."""
    place = scheme.classes.index(name) - 1
    return CLASS_COLOURS.get(name, REGION_COLOURS[place % len(REGION_COLOURS)])


def itksnap(scheme: LabelScheme) -> str:
    """A label description file of ITK-SNAP: code, red, green, blue, opacity, visible, in the mesh, name.

    >>> from medmap.core.labels import SCHEMES
    >>> print(itksnap(SCHEMES["brats2023"]).splitlines()[-1])
    3 240 228 66 1 1 1 "enhancing tumour"
    """
    rows = ['0 0 0 0 0 0 0 "Clear Label"']
    rows += ['{} {} {} {} 1 1 1 "{}"'.format(code, *colour, name) for code, name, colour in _rows(scheme)]
    return "\n".join(rows) + "\n"


def slicer(scheme: LabelScheme) -> str:
    """A colour table of 3D Slicer: code, name, red, green, blue, opacity.

    >>> from medmap.core.labels import SCHEMES
    >>> print(slicer(SCHEMES["brats2021"]).splitlines()[-1])
    4 enhancing_tumour 240 228 66 255
    """
    rows = [f"# Color table of medmap, labels {scheme.name}", "0 background 0 0 0 0"]
    rows += ["{} {} {} {} {} 255".format(code, _one_word(name), *colour) for code, name, colour in _rows(scheme)]
    return "\n".join(rows) + "\n"


def freesurfer(scheme: LabelScheme) -> str:
    """A lookup table of FreeSurfer: code, name, red, green, blue, and 0, which means opaque there.

    >>> from medmap.core.labels import SCHEMES
    >>> print(freesurfer(SCHEMES["msd"]).splitlines()[1])
    1 oedema 86 180 233 0
    """
    rows = ["0 background 0 0 0 0"]
    rows += ["{} {} {} {} {} 0".format(code, _one_word(name), *colour) for code, name, colour in _rows(scheme)]
    return "\n".join(rows) + "\n"


def fsleyes(scheme: LabelScheme) -> str:
    """A lookup table of FSLeyes: code, red, green and blue from 0 to 1, name.

    >>> from medmap.core.labels import SCHEMES
    >>> print(fsleyes(SCHEMES["brats2023"]).splitlines()[0])
    1 0.83529 0.36863 0.00000 necrotic core
    """
    return "".join(
        f"{code} {' '.join(f'{part / 255:.5f}' for part in colour)} {name}\n" for code, name, colour in _rows(scheme)
    )


def write_colours(folder: Path, scheme: LabelScheme) -> list[Path]:
    """Write a file for each viewer of VIEWERS into a folder. Raises InputError where it cannot be written."""
    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in VIEWERS.items():
            file = folder / f"{scheme.name}{ending}"
            with whole(file) as (fresh,):
                fresh.write_text(text(scheme), encoding="utf-8")
            made.append(file)
    except OSError as error:
        raise InputError(
            f"{folder}: the colours cannot be written ({error.strerror or error}); name a folder that may be written to"
        ) from error
    return made


def _rows(scheme: LabelScheme) -> list[tuple[int, str, tuple[int, int, int]]]:
    """Code, name and colour of every class, by code."""
    return sorted(
        (code, CLASS_NAMES.get(name, name), rgb(class_colour(scheme, name))) for name, code in scheme.codes.items()
    )


def _one_word(name: str) -> str:
    return name.replace(" ", "_")


VIEWERS: dict[str, Callable[[LabelScheme], str]] = {
    "-itksnap.label": itksnap,
    "-slicer.ctbl": slicer,
    "-freesurfer.lut": freesurfer,
    "-fsleyes.lut": fsleyes,
}
"""{end of the file's name: what makes its text}"""

"""Verbs that take a DICOM study: the table of its series, which is which sequence, NIfTI files for the while."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmap.cli import console
from medmap.core.children import ending
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet, canonical
from medmap.data.dicom import Series
from medmap.data.dicom_guess import choose
from medmap.data.dicom_opened import OpenedStudy, frames_note, open_study
from medmap.data.nifti import stem
from medmap.errors import InputError
from medmap.inputs import Inputs, read_inputs
from medmap.segment import Task

HOW = "the series as NIfTI files, to be worked on: dcm2niix -z y -o FOLDER STUDY"
NONE = "none"
"""`--t1c none`: this sequence is to be left out."""
_WIDEST = 34


@contextmanager
def opened(path: Path, images: bool = True) -> Iterator[OpenedStudy]:
    """Look at a study, a folder or a zip file, as `open_study` does. Raises InputError as that does.

    The patient's images are unpacked for the while, and removed also where the process is told to end (SIGTERM).
    """
    with ending(), tempfile.TemporaryDirectory(prefix="medmap-") as name:
        found = open_study(path, Path(name), images)
        for note in found.study.notes:
            console.warn(note)
        yield found


def chosen_series(found: OpenedStudy, asked: Mapping[str, Path], known: ModalitySet) -> dict[str, Series]:
    """{sequence: series}: what the user names, and guesses for the rest; prints the table and what is doubtful.

    Raises InputError for a series that is not there or named twice, and where none is left.
    """
    named = {canonical(name): str(value) for name, value in asked.items()}
    chosen = {name: found.study.find(value) for name, value in named.items() if value.lower() != NONE}
    labels = [series.label + series.uid for series in chosen.values()]
    twice = next((series for series in chosen.values() if labels.count(series.label + series.uid) > 1), None)
    if twice:
        names = " and ".join(name for name, series in chosen.items() if series is twice)
        raise InputError(f"{twice.name}: is named as {names}; each sequence has a series of its own")
    taken = {id(series) for series in chosen.values()}
    open_ = [i for i, series in enumerate(found.study.series) if id(series) not in taken]
    wanted = [name for name in known if name not in named]
    guessed, notes = choose([found.study.series[i] for i in open_], [found.guesses[i] for i in open_], wanted)
    chosen |= guessed
    _say_table(rows(found, chosen))
    for note in notes:
        console.warn(note)
    if not any(name in known for name in chosen):
        raise InputError(_nothing(found, known))
    for note in frames_note(chosen.values()):
        console.warn(note)
    return chosen


def inputs_of(found: OpenedStudy, chosen: Mapping[str, Series], known: ModalitySet, resample: bool) -> Inputs:
    """The patient, in NIfTI files of the scratch folder. Raises InputError as `convert` and `read_inputs`."""
    usable = {name: series for name, series in chosen.items() if name in known}
    files = {name: found.file(series) for name, series in usable.items()}
    try:
        inputs = read_inputs(files, resample, known=known, id=found.name)
    except InputError as error:
        raise InputError(f"{found.worded(error)}; {HOW}") from error
    place = {"study": os.path.abspath(found.path)}  # where `medmap report` looks for the series
    return replace(inputs, sources={name: place | found.source(series) for name, series in usable.items()})


def seg_path(mask: Path) -> Path:
    """The DICOM SEG beside a mask."""
    return mask.with_name(f"{stem(mask)}.dcm")


def say_how(record: Mapping[str, Any]) -> None:
    """What to do about series that are not ready: tools for that read NIfTI."""
    if any(warning.startswith("not skull-stripped") for warning in record["warnings"]):
        console.say(HOW)


def write_seg(
    found: OpenedStudy, made: Task, chosen: Mapping[str, Series], scheme: LabelScheme, record: Mapping[str, Any]
) -> None:
    """Write the DICOM SEG beside a mask, with the regions that it tells of."""
    made_from = [chosen[name] for name in made.inputs.headers]
    out = found.write_seg(made.mask, made_from, scheme, record, seg_path(made.mask))
    told = [region for region in scheme.regions if region not in record["left_out"]]
    console.answer(f"{out}: DICOM SEG on {made_from[0].name}, {', '.join(told)}")


def rows(found: OpenedStudy, chosen: Mapping[str, Series]) -> list[dict[str, Any]]:
    """The table: one row a volume."""
    taken = {id(series): name for name, series in chosen.items()}
    return [
        {
            "series": each.label,
            "description": each.name.partition("(")[2].removesuffix(")"),
            "matrix": f"{each.shape[0]}×{each.shape[1]}",
            "slices": each.shape[2],
            "guess": guess.name,
            "sure": guess.sure,
            "used_as": taken.get(id(each)),
            "why": found.why(each),
        }
        for each, guess in zip(found.study.series, found.guesses, strict=True)
    ]


def _say_table(table: list[dict[str, Any]]) -> None:
    head = {"series": "series", "description": "description", "matrix": "matrix", "slices": "slices"}
    lines = [{**head, "used_as": "used as", "guess": "guess", "why": "why"}]
    lines += [
        {
            **{key: str(row[key] or "–") for key in ("series", "matrix", "slices", "used_as", "why")},
            "description": _short(row["description"]),
            "guess": "–" if row["matrix"] == "0×0" else f"{row['guess']}, {row['sure']}",
        }
        for row in table
    ]
    keys = ("series", "description", "matrix", "slices", "guess", "used_as", "why")
    widths = {key: max(len(line[key]) for line in lines) for key in keys[:-1]}
    for line in lines:
        console.say("  ".join([*(line[key].ljust(width) for key, width in widths.items()), line["why"]]).rstrip())


def _short(text: str) -> str:
    """Names of series may be long.

    >>> _short("AX T2 FLAIR")
    'AX T2 FLAIR'
    """
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _nothing(found: OpenedStudy, known: ModalitySet) -> str:
    """Why no series can be used."""
    told = []
    for series, guess in zip(found.study.series, found.guesses, strict=True):
        told.append(f"{series.name} is {series.fault or guess.aside or guess.name}")
        if series.fault:
            told[-1] = f"{series.name}: {series.fault}"
    more = f", and {len(told) - 6} more" if len(told) > 6 else ""
    return (
        f"{found.name}: no series that the model can use; found {'; '.join(told[:6])}{more}; expected one of "
        f"{', '.join(known)}; where a guess is wrong, name the series: medmap predict --{known.names[0]} SERIES"
    )

"""A DICOM study on the page: a row a series, and which of them is which sequence, by the number of the row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from medmap.data.dicom import Series
from medmap.data.dicom_guess import choose
from medmap.data.dicom_opened import OpenedStudy
from medmap.errors import InputError


def rows_of(opened: OpenedStudy) -> list[dict[str, Any]]:
    """A row a series, as the page lists them."""
    return [
        {
            "key": str(number),
            "name": series.name,
            "about": "×".join(map(str, series.shape)),
            "why": opened.why(series),
            "usable": not series.fault,
        }
        for number, series in enumerate(opened.study.series)
    ]


def guessed(opened: OpenedStudy, wanted: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """{key of a row: sequence} for the sequences that a study has, and what was doubtful."""
    chosen, notes = choose(opened.study.series, opened.guesses, wanted)
    return {str(opened.place(series)): name for name, series in chosen.items()}, [*opened.study.notes, *notes]


def series_of(opened: OpenedStudy, key: str) -> Series:
    """The series of a row. Raises InputError for one with a fault."""
    series = opened.study.series[int(key)]
    if series.fault:
        raise InputError(f"{series.name} cannot be used: {series.fault}; name another series")
    return series

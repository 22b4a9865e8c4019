"""A DICOM study that is worked on: series with guesses, NIfTI files of them for the while, a SEG for the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medmap.core.labels import LabelScheme
from medmap.data.dicom import Series, Study, in_words
from medmap.data.dicom_guess import Guess, guess_all
from medmap.errors import InputError


@dataclass(frozen=True)
class OpenedStudy:
    """A study, what its series seem to be, and a folder that is the caller's to remove.

    path: the folder or archive, and its name; guesses: one a series; files: {place of a series: its NIfTI file}, as
    asked for
    """

    path: Path
    name: str
    study: Study
    guesses: tuple[Guess, ...]
    folder: Path
    files: dict[int, Path] = field(default_factory=dict)

    def place(self, series: Series) -> int:
        """Where a series stands in the study."""
        return next(i for i, one in enumerate(self.study.series) if one is series)

    def why(self, series: Series) -> str:
        """What is wrong with a series, or what its guess rests on."""
        guess = self.guesses[self.place(series)]
        return series.fault or "; ".join([*([f"set aside: {guess.aside}"] if guess.aside else []), *guess.why])

    def file(self, series: Series) -> Path:
        """A series as a NIfTI file. Raises InputError as `medmap.data.dicom_convert.convert` does."""
        from medmap.data.dicom_convert import convert

        place = self.place(series)
        if place not in self.files:
            folder = self.folder / str(place)
            folder.mkdir(exist_ok=True)
            self.files[place] = convert(series, folder)
        return self.files[place]

    def source(self, series: Series) -> dict[str, Any]:
        """What a record says of a series."""
        guess = self.guesses[self.place(series)]
        said = {"sure": guess.sure, "why": self.why(series), "sequence": guess.name}
        return {"called": series.name, "series_uid": series.uid, "slices": series.shape[2], "guess": said}

    def recorded(self, inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
        """{sequence: NIfTI file} of the series that a record tells of; whether they are the same, their hashes say.

        Raises InputError where one is not in this study, and as `file` does.
        """
        return {sequence: self.file(self._recorded(entry)) for sequence, entry in inputs.items()}

    def _recorded(self, entry: Mapping[str, Any]) -> Series:
        told = entry["series_uid"], entry["called"]  # parts of one series share its UID
        found = next((series for series in self.study.series if (series.uid, series.name) == told), None)
        if found is None:
            there = ", ".join(series.name for series in self.study.series)
            raise InputError(
                f"{self.name}: has no {entry['called']} with the UID {entry['series_uid']}, found {there}; name the "
                "study that the mask was made from"
            )
        return found

    def worded(self, error: InputError) -> str:
        """What an error says, with series called by their names."""
        return in_words(str(error), {file: self.study.series[place].name for place, file in self.files.items()})

    def write_seg(
        self, mask: Path, made_from: Iterable[Series], scheme: LabelScheme, record: Mapping[str, Any], out: Path
    ) -> Path:
        """A mask as DICOM SEG with the regions that its record tells of. made_from: first the series with its grid."""
        from medmap.data.dicom_seg import write_seg

        weights = "\n".join(record["model"]["weights_sha256"].values())
        first, *others = made_from
        return write_seg(out, mask, scheme, first, others, weights, record["left_out"])


def open_study(path: Path, folder: Path, images: bool = True) -> OpenedStudy:
    """Look at a study, a folder or a zip file, which is unpacked into a folder.

    images: where headers leave open which sequence a series is, convert it and ask its image

    Raises InputError as `medmap.data.dicom_read.read_study` and `medmap.data.dicom_zip.unpack` do.
    """
    from medmap.data.dicom_read import read_study
    from medmap.data.dicom_zip import unpack

    root, name = path, path.resolve().name
    if path.is_file():
        root, name = folder / "unpacked", path.stem
        root.mkdir(parents=True)
        unpack(path, root)
    try:
        study = read_study(root)
    except InputError as error:
        raise InputError(str(error).replace(str(root), str(path))) from error
    opened = OpenedStudy(path, name, study, tuple(guess_all(study.series)), folder)
    if not images:
        return opened
    from medmap.data.dicom_image import by_image

    return replace(opened, guesses=tuple(by_image(study.series, opened.guesses, opened.file)))


def frames_note(series: Iterable[Series]) -> list[str]:
    """What to know of series that may not lie on one another."""
    series = list(series)
    frames = {str(each.headers.get("FrameOfReferenceUID")) for each in series}
    if len(frames) < 2:
        return []
    names = ", ".join(each.label for each in series)
    return [f"series {names} have {len(frames)} frames of reference: right only where they are registered"]

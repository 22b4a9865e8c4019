"""A patient on the page: files in a folder of their own, which is which sequence, and the answers there are so far."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medmap.core.witnesses import Witnesses
from medmap.data.dicom_opened import OpenedStudy, open_study
from medmap.data.filenames import by_tail
from medmap.data.nifti import read_header
from medmap.errors import InputError
from medmap.inputs import Inputs, read_inputs
from medmap.report.viewer import Study
from medmap.serve.study import guessed, rows_of, series_of
from medmap.serve.uploads import taken_in

MOST_FILES = 12
"""Of one patient; a study is one zip file."""


@dataclass(frozen=True)
class Answer:
    """A mask that was made, what is written beside it, and the volumes it was made from, by key."""

    mask: Path
    record: dict[str, Any]
    keys: list[str]


@dataclass
class Patient:
    """One patient.

    id:      a name that nobody can guess
    folder:  everything of the patient is in it
    files:   {key: NIfTI file}, as they came
    chosen:  {sequence: key of a volume}, in the model's order; what was checked last
    answers: {subset: mask}; they hold for ``chosen``
    witnesses: masks of subsets that say how far an answer can be trusted; they hold for ``chosen``
    shown:   the images that the page has, and a number that changes with them
    held_bytes: of all that was taken in and not refused
    """

    id: str
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    archive: Path | None = None
    study: OpenedStudy | None = None
    chosen: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    witnesses: Witnesses | None = None
    case: str = ""
    shown: Study | None = None
    frame: int = 0
    held_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, upload: Path, name: str) -> None:
        """Add a file. Raises InputError for what cannot be used; nothing of it stays."""
        with self._lock:
            self._take(upload, name)

    def _take(self, upload: Path, name: str) -> None:
        try:
            if len(self.files) >= MOST_FILES:
                raise InputError(f"{len(self.files)} files are here already; drop the images of one patient")
            place = self.folder / "files"
            place.mkdir(exist_ok=True)
            file = taken_in(upload, name, place)
            zipped = file.suffix == ".zip"
            if self.archive is not None or (zipped and self.files):
                file.unlink()
                raise InputError(f"{file.name}: a DICOM study is one .zip on its own; begin anew with that file alone")
        except InputError as error:
            raise self.worded(error) from error
        finally:
            upload.unlink(missing_ok=True)
        if zipped:
            self.archive = file
        else:
            self.files[str(len(self.files))] = file

    def worded(self, error: InputError) -> InputError:
        """The error in the words of the patient's own files: no folder of this machine."""
        if self.study is not None:
            error = InputError(self.study.worded(error))
        text = str(error)
        for place in (self.folder / "files", self.folder):
            text = text.replace(f"{place}/", "")
        return InputError(text)

    # ---- which is which ---------------------------------------------------------------------------------------

    def look(self) -> None:
        """Unpack a study. Raises InputError for what is none; then nothing of it stays."""
        if self.archive is None or self.study is not None:
            return
        folder = self.folder / "study"
        try:
            self.study = open_study(self.archive, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(FileNotFoundError):  # forgotten meanwhile
                self.held_bytes -= self.archive.stat().st_size
            self.archive.unlink(missing_ok=True)
            self.archive = None
            raise

    def volumes(self) -> list[dict[str, Any]]:
        """What there is to choose from, a row each."""
        if self.study is not None:
            return rows_of(self.study)
        shapes = {key: "×".join(map(str, read_header(file).shape)) for key, file in dict(self.files).items()}
        return [
            {"key": key, "name": self.files[key].name, "about": shape, "why": "", "usable": True}
            for key, shape in shapes.items()
        ]

    def guessed(self, wanted: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
        """{key of a volume: sequence}, and what was doubtful."""
        if self.study is not None:
            return guessed(self.study, wanted)
        files = dict(self.files)  # another one may come in meanwhile
        found, _, _ = by_tail(list(files.values()))
        names = {file: name for images in found.values() for name, file in images.items() if name in wanted}
        keys = {key: names[file] for key, file in files.items() if file in names}
        unknown = [file.name for file in files.values() if file not in names]
        said = "its name does" if len(unknown) == 1 else "their names do"
        notes = [f"{', '.join(unknown)}: {said} not say which sequence it is; choose it above"] if unknown else []
        cases = [case for case in found if case]
        if len(cases) > 1:
            notes.append(f"the names speak of {len(cases)} patients ({', '.join(cases)}); drop the images of one")
        return keys, notes

    def choose(self, named: Mapping[str, str], known: tuple[str, ...]) -> None:
        """Say which volume is which sequence: {key: sequence}. Answers of another choice are forgotten.

        Raises InputError for a sequence or a volume that is not there, and for a sequence that is named twice.
        """
        there = {row["key"]: row["name"] for row in self.volumes()}
        chosen: dict[str, str] = {}
        for key, name in named.items():
            if key not in there or name not in known:
                raise InputError(f"{name!r} for volume {key!r}: expected a volume of this patient and one of {known}")
            if name in chosen:
                twin = there[chosen[name]]
                raise InputError(f"{name} is named twice: {twin} and {there[key]}; name each sequence once")
            chosen[name] = key
        if not chosen:
            raise InputError("no image at all; choose at least one sequence")
        ordered = {name: chosen[name] for name in known if name in chosen}
        if ordered != self.chosen:
            self._forget()
            self.chosen = ordered

    def inputs(self, subset: list[str], known: tuple[str, ...]) -> Inputs:
        """The images of some sequences, as `medmap predict` takes them in this order. Raises InputError as
        `read_inputs` does."""
        absent = [name for name in subset if name not in self.chosen]
        if absent:
            raise InputError(f"{', '.join(absent)}: not there; this patient has {', '.join(self.chosen)}")
        keys = {name: self.chosen[name] for name in self.chosen if name in subset}
        files = {name: self.file(key) for name, key in keys.items()}
        inputs = read_inputs(files, known=known, id=self.case or None)
        sources = {
            name: self.study.source(series_of(self.study, key))
            if self.study
            else {"file": files[name].name, "called": files[name].name}
            for name, key in keys.items()
        }
        return replace(inputs, sources=sources)

    def file(self, key: str) -> Path:
        """The NIfTI file of a volume. Raises InputError for a series that cannot be converted."""
        return self.study.file(series_of(self.study, key)) if self.study else self.files[key]

    def name_case(self, known: tuple[str, ...]) -> None:
        """What the patient is called: what all files' names share, or the archive's name."""
        self.case = self.archive.stem if self.archive else ""
        self.case = self.case or self.inputs(list(self.chosen), known).id

    def _forget(self) -> None:
        self.chosen, self.answers, self.shown, self.case = {}, {}, None, ""
        self.witnesses = None
        shutil.rmtree(self.folder / "masks", ignore_errors=True)

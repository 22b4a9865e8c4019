"""A patient's files: looked at by their headers, then read, with what is odd about them.

Nothing here imports torch: what the headers tell is said before anything heavy starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.case import Case, Grid
from medmap.core.modality import GLIOMA_MRI, ModalitySet, canonical
from medmap.data.cases import CaseFiles, ImageRef, grid_conflict, read_case, unit_fault
from medmap.data.dicom import in_words, is_study, looks_dicom
from medmap.data.faults import Look, duplicates
from medmap.data.filenames import by_tail, refuse_foreign, stem
from medmap.data.nifti import Header, looks_cut_off, read_header, read_volume, sha256
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.predict import Predictor


@dataclass(frozen=True)
class Inputs:
    """The images of one patient, looked at but not read.

    files:   the usable images, in the order in which they were named
    headers: one for each
    ignored: sequences that the model does not know
    moved:   images that lie on another grid than the first, which is the grid of the mask
    sources: {sequence: what the record says instead of its file}, where files are not the user's own but were made of
             something that is ``called`` by a name
    """

    files: CaseFiles
    headers: Mapping[str, Header]
    ignored: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The patient's name."""
        return self.files.id

    @property
    def reference(self) -> Header:
        """The image whose grid the mask gets."""
        return next(iter(self.headers.values()))

    def worded(self, text: str) -> str:
        """A sentence about the files in the words of their sources."""
        names = {ref.path: self.sources[n]["called"] for n, ref in self.files.images.items() if n in self.sources}
        return in_words(text, names)


def read_inputs(
    images: Mapping[str, Path | ImageRef],
    resample: bool = False,
    *,
    known: Iterable[str] | None = None,
    id: str | None = None,
) -> Inputs:
    """Look at the headers of a patient's images.

    images:   {sequence, any alias: file}; the mask gets the grid of the first that the model knows
    resample: allow images on other grids; they must be registered, so that millimetres mean the same place
    known:    sequences that the model knows, all where None; others are ignored
    id:       the patient's name; what the files' names say where None

    Raises InputError for no image, a sequence or a file named twice, none that the model knows, files that cannot be
    read, are 4-D, do not count in mm, or lie on different grids where ``resample`` does not allow it.
    """
    refs = _named_once(images)
    if not refs:
        raise InputError("no image at all; name at least one sequence, such as --t2f FILE")
    model = tuple(refs if known is None else known)
    wanted = [name for name in refs if name in model]
    if not wanted:
        raise InputError(
            f"no sequence in common: the input has {', '.join(refs)}, the model knows {', '.join(model)}; name at "
            "least one of these"
        )
    headers = {name: _header(name, refs[name]) for name in wanted}
    first = headers[wanted[0]]
    conflicts = {name: what for name in wanted if (what := grid_conflict(first, headers[name]))}
    case_id = id or _case_of([refs[name].path for name in wanted])
    files = CaseFiles(case_id, case_id, "", {name: refs[name] for name in wanted}, None)
    if conflicts and not resample:
        what, cure = next(iter(conflicts.values()))
        raise InputError(f"case {case_id}: {what}; {cure}{_and_raw(files)}")
    return Inputs(files, headers, tuple(name for name in refs if name not in wanted), tuple(conflicts))


# ---- what is there --------------------------------------------------------------------------------------------


def _named_once(images: Mapping[str, Path | ImageRef]) -> dict[str, ImageRef]:
    refs: dict[str, ImageRef] = {}
    for given, where in images.items():
        name, ref = canonical(given), where if isinstance(where, ImageRef) else ImageRef(Path(where))
        if name in refs:
            raise InputError(f"{name} is named twice: {refs[name].path} and {ref.path}; name each sequence once")
        twin = next((n for n, r in refs.items() if r.channel == ref.channel and _same(r.path, ref.path)), None)
        if twin:
            raise InputError(f"{ref.path} is named as {twin} and as {name}; each sequence has a file of its own")
        refs[name] = ref
    return refs


def _and_raw(files: CaseFiles) -> str:
    """What else has to be done to images that cannot be used as they lie, where they are heads with a skull: said at
    once, although it takes their voxels."""
    if not set(files.images) <= set(GLIOMA_MRI):
        return ""  # perhaps of another organ
    faults = Look.at(files, next(iter(files.images.values())).path.parent, (), deep=True).faults
    return "".join(f". Also {fault.what}; then {fault.cure}" for fault in faults if fault.kind == "raw")


def _case_of(paths: list[Path]) -> str:
    """The part of the names that is not the sequence, where they share it; else the first file's name."""
    cases = list(by_tail(paths)[0])
    return cases[0] if len(cases) == 1 and cases[0] else stem(paths[0])


def _same(one: Path, two: Path) -> bool:
    return one.exists() and two.exists() and one.samefile(two)


def _header(name: str, ref: ImageRef) -> Header:
    refuse_foreign(ref.path)
    _refuse_dicom(name, ref.path)
    header = read_header(ref.path)
    if looks_cut_off(header):
        raise InputError(f"{ref.path}: cut off: fewer bytes than its header promises; copy or download it again")
    if ref.channel is None and header.channels > 1:
        shape = "×".join(map(str, header.shape))
        raise InputError(
            f"{ref.path}: a 4-D file ({shape}); {name} must be one 3-D volume; split it (fslsplit), or give the folder "
            "of the data set with -i"
        )
    if wrong := unit_fault(header):
        raise InputError(f"{ref.path.parent / wrong[0]}; {wrong[1]}")
    return header


def _refuse_dicom(name: str, path: Path) -> None:
    """Raises InputError for a study, or a slice of one, in the place of a file."""
    slice_ = looks_dicom(path)
    if slice_ or is_study(path):
        found = "a .zip file" if path.is_file() and not slice_ else "DICOM"
        raise InputError(
            f"{path}: found {found}; {name} must be one NIfTI file. A DICOM study is named whole, a folder or .zip, "
            f"and its series are told apart: medmap predict -i {path.parent if slice_ else path} -o MASK"
        )


# ---- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """A patient's images as a model wants them.

    case: the images that the model knows, on one grid; warnings: what a reader should know of them
    origin: files with hashes, and which sequences are used, missing and ignored, for a JSON
    """

    case: Case
    origin: dict[str, Any]
    warnings: list[str]


def read_patient(inputs: Inputs, predictor: Predictor) -> Patient:
    """Read the images that a model knows. Raises InputError for an image that would mislead."""
    known = predictor.usable(inputs.files.images)
    files = replace(inputs.files, images={n: ref for n, ref in inputs.files.images.items() if n in known})
    brain = "WT" in predictor.card.scheme.regions
    warnings = examine(replace(inputs, files=files), brain)
    case = _read(files, inputs)
    if brain and inputs.moved:
        warnings += [told for told in _together(case, inputs) if told not in warnings]
    return Patient(case, _provenance(files, inputs, predictor.card.modalities), warnings)


def examine(inputs: Inputs, brain: bool = True) -> list[str]:
    """Look at the voxels of a patient's images, of a brain or of another organ.

    Returns warnings, each with its cure. Raises InputError for an image that would mislead.
    """
    look = Look.at(inputs.files, inputs.reference.path.parent, (), deep=True, brain=brain)
    faults = [*look.faults, *duplicates([look], deep=True)]
    onto = inputs.worded(inputs.reference.path.name)
    for fault in faults:
        if fault.severity == "error" and fault.kind not in ("grid", "affine"):
            raise InputError(inputs.worded(f"case {inputs.id}: {fault.what}; {fault.cure}"))
    return [inputs.worded(f"{fault.what}; {fault.cure}") for fault in faults if fault.severity == "warning"] + [
        f"{name} was resampled onto the grid of {onto}: right only where the two are registered"
        for name in inputs.moved
        if name in inputs.files.images
    ]


def _together(case: Case, inputs: Inputs) -> list[str]:
    """What brains say about each other once they are on one grid, as `examine` says of those that were: warnings.

    Names are not looked at again. Raises InputError for an image that would mislead.
    """
    from medmap.data.siblings import KINDS, findings
    from medmap.data.views import View

    views = {name: view for name, image in case.images.items() if (view := View.of(image, case.affine))}
    found = [finding for finding in findings(views) if finding.kind != "named"] if views else []
    for one in found:
        if KINDS[one.kind] == "error":
            raise InputError(inputs.worded(f"case {inputs.id}: {one.what}; {one.cure}"))
    return [inputs.worded(f"{one.what}; {one.cure}") for one in found if KINDS[one.kind] == "warning"]


def _read(files: CaseFiles, inputs: Inputs) -> Case:
    if not inputs.moved:
        return read_case(files)
    target = inputs.reference.grid
    images = {
        name: _onto(read_volume(ref.path, ref.channel)[0], inputs.headers[name].grid, target)
        for name, ref in files.images.items()
    }
    return Case(inputs.id, images, target.affine)


def _onto(volume: NDArray[np.float32], source: Grid, target: Grid) -> NDArray[np.float32]:
    """A skull-stripped image on another grid; its rim is not darkened by the background's 0."""
    from medmap.core.volume import resample

    if source.matches(target):
        return volume
    share = resample(volume != 0, source, target, order=1)
    image = resample(volume, source, target, order=1)
    return np.divide(image, share, out=np.zeros_like(image), where=share >= 0.5)


def _provenance(files: CaseFiles, inputs: Inputs, modalities: ModalitySet) -> dict[str, Any]:
    """Inputs with their hashes, and which sequences were used, missing and ignored."""
    return {
        "inputs": {
            name: {
                **inputs.sources.get(name, {"file": os.path.abspath(ref.path)}),
                **({} if ref.channel is None else {"volume": ref.channel}),
                "sha256": sha256(ref.path),
                "resampled": name in inputs.moved,
            }
            for name, ref in files.images.items()
        },
        "sequences": {
            "used": [name for name in modalities if name in files.images],
            "missing": [name for name in modalities if name not in files.images],
            "ignored": list(inputs.ignored),
        },
    }

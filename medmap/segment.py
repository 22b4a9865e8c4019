"""A patient's files in, a mask on their own grid out, and beside it a JSON that says where the mask came from.

    NAME.nii.gz              UInt8 codes on the grid, affine, qform and sform of the first image
    NAME.medmap.json         inputs with hashes, sequences, model, codes, volumes, warnings, what to expect
    NAME-WT.nii.gz …         one mask a region, where asked for
    NAME-probabilities.npz   Float16 [X Y Z] a region, and the affine, where asked for

Nothing here imports torch: what the headers tell is said before anything heavy starts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import medmap
from medmap.card import ModelFolder, choose_scheme
from medmap.core.case import Case, Grid, Prediction
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet, canonical
from medmap.data.cases import CaseFiles, ImageRef, grid_conflict, read_case
from medmap.data.faults import Look, duplicates
from medmap.data.filenames import by_tail
from medmap.data.nifti import Header, read_header, read_volume, sha256, stem, write_mask
from medmap.errors import InputError
from medmap.scale import Staged

if TYPE_CHECKING:
    from medmap.inference import SubsetAnswer
    from medmap.predict import Begun, Predictor


@dataclass(frozen=True)
class Inputs:
    """The images of one patient, looked at but not read.

    files:   the usable images, in the order in which they were named
    headers: one for each
    ignored: sequences that the model does not know
    moved:   images that lie on another grid than the first, which is the grid of the mask
    """

    files: CaseFiles
    headers: Mapping[str, Header]
    ignored: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The patient's name."""
        return self.files.id

    @property
    def reference(self) -> Header:
        """The image whose grid the mask gets."""
        return next(iter(self.headers.values()))


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
    read, are 4-D, or lie on different grids where ``resample`` does not allow it.
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
    if conflicts and not resample:
        what, cure = next(iter(conflicts.values()))
        raise InputError(f"case {case_id}: {what}; {cure}")
    files = CaseFiles(case_id, case_id, "", {name: refs[name] for name in wanted}, None)
    return Inputs(files, headers, tuple(name for name in refs if name not in wanted), tuple(conflicts))


def segment_case(
    predictor: Predictor,
    case: Inputs | CaseFiles,
    out: Path,
    *,
    scheme: LabelScheme | None = None,
    regions: bool = False,
    probabilities: bool | str = False,
    clean: bool = True,
    model: ModelFolder | None = None,
) -> Path:
    """Segment one patient into ``out`` (.nii.gz) and write the JSON beside it, last; returns ``out``.

    case:          what `read_inputs` returned, or one of the cases that `medmap.data.layouts.recognise` found
    scheme:        codes of the mask; `choose_scheme` where None
    regions:       also one mask a region
    probabilities: also each region's probability; a type's name such as float32, or True for float16
    clean:         drop an enhancing tumour too small to be believed
    model:         named in the JSON, with hashes and what to expect

    Raises InputError for images that cannot be used (each names its cure) and a place that cannot be written.
    """
    segmenter = Segmenter(predictor, scheme, regions, probabilities, clean, model)
    inputs = case if isinstance(case, Inputs) else read_inputs(case.images, known=predictor.card.modalities, id=case.id)
    segmenter(Task(inputs, out))
    return out


@dataclass(frozen=True)
class Task:
    """One mask to be made."""

    inputs: Inputs
    mask: Path


@dataclass(frozen=True)
class _Read:
    task: Task
    files: CaseFiles
    record: dict[str, Any]
    warnings: list[str]
    begun: Begun
    seconds: float


@dataclass(frozen=True)
class Segmenter(Staged[Task, dict[str, Any]]):
    """Makes one mask after the other, and returns the JSON beside it; the arguments are those of `segment_case`.

    A patient is read, answered and written, so that one can be read and another be written while the network is at a
    third.
    """

    predictor: Predictor
    scheme: LabelScheme | None = None
    regions: bool = False
    probabilities: bool | str = False
    clean: bool = True
    model: ModelFolder | None = None

    @classmethod
    def load(
        cls, model: ModelFolder, device: str, precision: str, engine: str, options: Mapping[str, Any]
    ) -> Segmenter:
        """With the networks of a model. options: scheme, regions, probabilities, clean"""
        from medmap.predict import Predictor

        where = {"which": model.which, "device": device, "precision": precision, "engine": engine}
        return cls(Predictor.load(model.path, **where), **options, model=model)

    def read(self, task: Task) -> _Read:
        """Files → a patient that the network can look at."""
        began = time.perf_counter()
        inputs, modalities = task.inputs, self.predictor.card.modalities
        known = self.predictor.usable(inputs.files.images)
        files = replace(inputs.files, images={n: ref for n, ref in inputs.files.images.items() if n in known})
        warnings = _examined(files, inputs)
        begun = self.predictor.begin(_read(files, inputs))
        record = {"case": inputs.id, "mask": task.mask.name, **_provenance(files, inputs, modalities)}
        return _Read(task, files, record, warnings, begun, time.perf_counter() - began)

    def compute(self, read: _Read) -> tuple[_Read, SubsetAnswer]:
        """A patient → probabilities."""
        began = time.perf_counter()
        answer = self.predictor.answer(read.begun)
        return replace(read, seconds=read.seconds + time.perf_counter() - began), answer

    def write(self, computed: tuple[_Read, SubsetAnswer]) -> dict[str, Any]:
        """Probabilities → files."""
        began = time.perf_counter()
        read, answer = computed
        scheme = self.scheme or choose_scheme(self.predictor.card.scheme)
        wanted = bool(self.probabilities)
        prediction = self.predictor.finish(read.begun, answer, probabilities=wanted, clean=self.clean)
        record = {
            **read.record,
            "model": _about(self.predictor, self.model, answer),
            "labels": {"scheme": scheme.name, "codes": dict(scheme.codes)},
            "small_enhancing_tumour_dropped_below_ml": self.predictor.et_min_ml if self.clean else None,
            "volumes_ml": _volumes_ml(prediction, scheme),
            "expected": self.model.expected("+".join(prediction.used), self.clean) if self.model else None,
            "warnings": [*read.warnings, *prediction.notes],
            "versions": {"medmap": medmap.__version__, "torch": version("torch")},
            "seconds": round(read.seconds + time.perf_counter() - began, 2),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        kind = np.dtype("float16" if self.probabilities is True else str(self.probabilities)) if wanted else None
        like = read.task.inputs.reference.path
        _write(read.task.mask, prediction, scheme, like, record, self.regions, kind)
        return record


def record_path(mask: Path) -> Path:
    """The JSON beside a mask."""
    return mask.with_name(f"{stem(mask)}.medmap.json")


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


def _case_of(paths: list[Path]) -> str:
    """The part of the names that is not the sequence, where they share it; else the first file's name."""
    cases = list(by_tail(paths)[0])
    return cases[0] if len(cases) == 1 and cases[0] else stem(paths[0])


def _same(one: Path, two: Path) -> bool:
    return one.exists() and two.exists() and one.samefile(two)


def _header(name: str, ref: ImageRef) -> Header:
    header = read_header(ref.path)
    if ref.channel is None and header.channels > 1:
        shape = "×".join(map(str, header.shape))
        raise InputError(
            f"{ref.path}: a 4-D file ({shape}); {name} must be one 3-D volume; split it (fslsplit), or give the folder "
            "of the data set with -i"
        )
    return header


# ---- reading --------------------------------------------------------------------------------------------------


def _examined(files: CaseFiles, inputs: Inputs) -> list[str]:
    """Warnings about the voxels. Raises InputError for an image that would mislead."""
    look = Look.at(files, inputs.reference.path.parent, (), deep=True)
    faults = [*look.faults, *duplicates([look], deep=True)]
    for fault in faults:
        if fault.severity == "error" and fault.kind not in ("grid", "affine"):
            raise InputError(f"case {inputs.id}: {fault.what}; {fault.cure}")
    return [f"{fault.what}; {fault.cure}" for fault in faults if fault.severity == "warning"] + [
        f"{name} was resampled onto the grid of {inputs.reference.path.name}: right only where the two are registered"
        for name in inputs.moved
        if name in files.images
    ]


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


# ---- writing --------------------------------------------------------------------------------------------------


def _provenance(files: CaseFiles, inputs: Inputs, modalities: ModalitySet) -> dict[str, Any]:
    """Inputs with their hashes, and which sequences were used, missing and ignored."""
    return {
        "inputs": {
            name: {
                "file": str(ref.path),
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


def _about(predictor: Predictor, model: ModelFolder | None, answer: SubsetAnswer) -> dict[str, Any]:
    about: dict[str, Any] = {
        "networks": len(predictor.networks),
        "device": str(predictor.device),
        "precision": predictor.precision,
        "engine": "torch" if answer.agreement is None else "openvino",
        "engines_agree": answer.agreement,
    }
    if model is not None:
        about |= {"folder": str(model.path), "checkpoint": model.which, "weights_sha256": model.weights_sha256}
        about |= {"about": model.about} if model.about else {}
    return about


def _volumes_ml(prediction: Prediction, scheme: LabelScheme) -> dict[str, float]:
    voxel_ml = abs(float(np.linalg.det(prediction.grid.affine[:3, :3]))) / 1000
    masks = {region: scheme.region_mask(prediction.classes, region) for region in scheme.regions}
    return {region: round(int(mask.sum()) * voxel_ml, 3) for region, mask in masks.items()}


def _write(
    out: Path,
    prediction: Prediction,
    scheme: LabelScheme,
    like: Path,
    record: dict[str, Any],
    regions: bool,
    kind: np.dtype[Any] | None,
) -> None:
    """The JSON goes first and comes last: where there is one, it belongs to the mask beside it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        record_path(out).unlink(missing_ok=True)
        for region in scheme.regions if regions else ():
            write_mask(
                out.with_name(f"{stem(out)}-{region}.nii.gz"), scheme.region_mask(prediction.classes, region), like
            )
        if kind is not None:
            _write_probabilities(out.with_name(f"{stem(out)}-probabilities.npz"), prediction, kind)
        write_mask(out, scheme.decode(prediction.classes), like)
        _write_text(record_path(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); choose a place with -o that may be written to and "
            "has room"
        ) from error


def _write_probabilities(file: Path, prediction: Prediction, kind: np.dtype[Any]) -> None:
    assert prediction.probabilities is not None
    arrays = {region: p.astype(kind) for region, p in prediction.probabilities.items()}
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    with fresh.open("wb") as stream:
        np.savez_compressed(stream, affine=prediction.grid.affine, **arrays)
    os.replace(fresh, file)


def _write_text(file: Path, text: str) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)

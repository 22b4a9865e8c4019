"""A patient's files in, a mask on their own grid out, and beside it a JSON that says where the mask came from.

    NAME.nii.gz              UInt8 codes on the grid, affine, qform and sform of the first image
    NAME.medmap.json         inputs with hashes, sequences, model, codes, volumes, warnings, what to expect and leave
                             out, and how far this mask can be trusted (`medmap.confidence`)
    NAME-WT.nii.gz …         one mask a region, where asked for
    NAME-probabilities.npz   Float16 [X Y Z] a region, and the affine, where asked for; with the temperature that the
                             JSON names, where the model's confidence.json has one

Nothing here imports torch: what the headers tell is said before anything heavy starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import medmap
from medmap.card import ModelFolder, choose_scheme
from medmap.confidence import NOTHING, Confidence, read_confidence
from medmap.core.case import Prediction
from medmap.core.labels import LabelScheme
from medmap.core.witnesses import Witnesses
from medmap.data.cases import CaseFiles
from medmap.data.filenames import stem
from medmap.data.nifti import sha256, write_mask
from medmap.data.whole import whole
from medmap.errors import InputError
from medmap.inputs import Inputs, read_inputs, read_patient
from medmap.run import read_run
from medmap.scale import Staged

if TYPE_CHECKING:
    from medmap.inference import SubsetAnswer
    from medmap.predict import Begun, Predictor


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
    abstain: float | None = None,
    qc: bool = False,
) -> Path:
    """Segment one patient into ``out`` (.nii.gz) and write the JSON beside it, last; returns ``out``.

    case:          what `read_inputs` returned, or one of the cases that `medmap.data.layouts.recognise` found
    scheme:        codes of the mask; `choose_scheme` where None
    regions:       also one mask a region
    probabilities: also each region's probability; a type's name such as float32, or True for float16
    clean:         drop an enhancing tumour too small to be believed
    model:         named in the JSON, with hashes and what to expect
    abstain:       leave out regions whose Dice is expected to be below this, by the model's card
    qc:            where the model has a confidence.json, decode every subset and say how far the mask can be trusted

    Raises InputError for images that cannot be used (each names its cure) and a place that cannot be written.
    """
    segmenter = Segmenter(predictor, scheme, regions, probabilities, clean, model, abstain, qc)
    inputs = case if isinstance(case, Inputs) else read_inputs(case.images, known=predictor.card.modalities, id=case.id)
    segmenter(Task(inputs, out))
    return out


@dataclass(frozen=True)
class Task:
    """One mask to be made; ``notes`` go into the record as they are."""

    inputs: Inputs
    mask: Path
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Read:
    task: Task
    record: dict[str, Any]
    warnings: list[str]
    begun: Begun
    left_out: dict[str, str]
    seconds: float
    trust: dict[str, Any] | None = None


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
    abstain: float | None = None
    qc: bool = False

    @classmethod
    def load(
        cls, model: ModelFolder, device: str, precision: str, engine: str, options: Mapping[str, Any]
    ) -> Segmenter:
        """With the networks of a model. options: scheme, regions, probabilities, clean, abstain, qc"""
        from medmap.predict import Predictor

        where = {"which": model.which, "device": device, "precision": precision, "engine": engine}
        return cls(Predictor.load(model.path, **where), **options, model=model)

    def read(self, task: Task) -> _Read:
        """Files → a patient that the network can look at."""
        began = time.perf_counter()
        patient = read_patient(task.inputs, self.predictor)
        begun = self.predictor.begin(patient.case)
        left_out = self._left_out(begun)
        record = {**task.notes, "case": task.inputs.id, "mask": task.mask.name, **patient.origin}
        return _Read(task, record, patient.warnings, begun, left_out, time.perf_counter() - began)

    def witnesses(self, read: _Read) -> Witnesses:
        """A place for the masks of a patient's subsets; none is made yet."""
        grid = read.begun.prepared.grid
        return Witnesses(self.predictor.card.scheme, grid.shape, grid.spacing_mm, self.predictor.et_min_ml)

    def compute(self, read: _Read, seen: Witnesses | None = None) -> tuple[_Read, SubsetAnswer]:
        """A patient → probabilities, and what speaks for them. seen: masks of the same images from other subsets, which
        are not made again; those that are made are added."""
        began = time.perf_counter()
        answer = self.predictor.answer(read.begun)
        trust = self._trust(read, answer, seen)
        return replace(read, trust=trust, seconds=read.seconds + time.perf_counter() - began), answer

    @cached_property
    def confidence(self) -> Confidence | None:
        """What is known of the model's masks and probabilities; None where nobody measured."""
        return read_confidence(self.model) if self.model is not None else None

    def _temperature(self, used: Collection[str]) -> float | None:
        return None if self.confidence is None else self.confidence.temperatures.get("+".join(used))

    def _trust(self, read: _Read, answer: SubsetAnswer, seen: Witnesses | None) -> dict[str, Any] | None:
        if self.confidence is None or not self.qc:
            return None
        from medmap.predict import answerable

        predictor, prepared, used = self.predictor, read.begun.prepared, read.begun.used
        witnesses = self.witnesses(read) if seen is None else seen
        parts = [subset for subset in answerable(predictor.networks, used) if len(subset) < len(used)]
        parts = [subset for subset in parts if str(subset) not in witnesses]
        for part in predictor.answers(prepared, parts) if parts else ():
            witnesses.add(str(part.subset), part.box, part.probabilities)
        witnesses.add(str(used), answer.box, answer.probabilities)
        found = self.confidence.about(witnesses, str(used), self.clean)
        told = {region: row for region, row in found["regions"].items() if region not in read.left_out}
        return {**found, "regions": told}

    def write(self, computed: tuple[_Read, SubsetAnswer]) -> dict[str, Any]:
        """Probabilities → files."""
        began = time.perf_counter()
        read, answer = computed
        wanted = bool(self.probabilities)
        kind = np.dtype("float16" if self.probabilities is True else str(self.probabilities)) if wanted else None
        temperature = self._temperature(tuple(read.begun.used)) if wanted else None
        how = {"probabilities": wanted, "clean": self.clean, "temperature": temperature or 1.0}
        prediction = self.predictor.finish(read.begun, answer, **how)
        every = self.scheme or choose_scheme(self.predictor.card.scheme)
        prediction, scheme, undivided = _told(prediction, every, read.left_out)
        volumes_ml = _volumes_ml(prediction, scheme)
        record = {
            **read.record,
            "sequences": _sequences(read.record["sequences"], prediction.used),
            "model": about_model(self.predictor, self.model, answer.agreement),
            "labels": {"scheme": scheme.name, "codes": dict(scheme.codes), "undivided": undivided},
            "small_enhancing_tumour_dropped_below_ml": self.predictor.et_min_ml if self.clean else None,
            "volumes_ml": volumes_ml,
            "expected": self.model.expected("+".join(prediction.used), self.clean) if self.model else None,
            "confidence": read.trust and _of_this_mask(read.trust, volumes_ml),
            "probabilities": {"type": kind.name, "temperature": temperature} if kind else None,
            "abstain": self.abstain,
            "left_out": read.left_out,
            "warnings": [*read.warnings, *prediction.notes],
            "versions": {"medmap": medmap.__version__, "torch": version("torch")},
            "seconds": round(read.seconds + time.perf_counter() - began, 2),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        earlier = companions(read.task.mask, every.regions, True) if record_path(read.task.mask).is_file() else []
        like = read.task.inputs.reference.path
        return _write(read.task.mask, prediction, scheme, like, record, self.regions, kind, earlier)

    def _left_out(self, begun: Begun) -> dict[str, str]:
        if self.abstain is None:
            return {}
        if self.model is None:
            raise InputError("to leave regions out, name the model folder whose card says what to expect")
        return self.model.regions_below(self.abstain, "+".join(begun.used), self.clean)


def record_path(mask: Path) -> Path:
    """The JSON beside a mask; of a mask named as in BIDS it is BIDS's sidecar."""
    return mask.with_name(f"{stem(mask)}{'' if stem(mask).endswith('_dseg') else '.medmap'}.json")


def as_made(mask: Path) -> bool:
    """Whether the JSON beside a mask says that medmap made it, and the mask, where there is one, is as it was made."""
    try:
        record = json.loads(record_path(mask).read_text(encoding="utf-8"))
        return "medmap" in record["versions"] and (not mask.exists() or record["mask_sha256"] == sha256(mask))
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return False


def made_so(
    model: ModelFolder,
    scheme: LabelScheme,
    abstain: float | None,
    clean: bool,
    regions: bool,
    probabilities: str | None,
    trust: bool,
    mask: Path,
    inputs: Inputs,
) -> bool:
    """Whether a mask that is there, whole, was made by this model from these very images with these options.

    probabilities: their type, if there are to be any
    trust:         whether the record must say how far the mask can be trusted
    """
    images, settings = inputs.files.images, read_run(model.runs[0])[0].predict
    try:
        record = json.loads(record_path(mask).read_text(encoding="utf-8"))
        if record["mask_sha256"] != sha256(mask) or (trust and record["confidence"] is None):
            return False
        by, labels, sequences = record["model"]["weights_sha256"], record["labels"]["scheme"], record["sequences"]
        given = {*sequences["used"], *(name for name in sequences["ignored"] if name in model.modalities)}
        if (by, labels, given, record["abstain"]) != (model.weights_sha256, scheme.name, set(images), abstain):
            return False
        how = record["model"]["mirror"], record["small_enhancing_tumour_dropped_below_ml"]
        if how != (list(settings.mirror), settings.et_min_ml if clean else None):
            return False
        if probabilities and record["probabilities"]["type"] != probabilities:
            return False
        for name, was in record["inputs"].items():
            if (was["sha256"], was["resampled"]) != (sha256(images[name].path), name in inputs.moved):
                return False
        told = [region for region in scheme.regions if region not in record["left_out"]]
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return False
    return all(file.exists() for file in companions(mask, told if regions else (), bool(probabilities)))


# ---- writing --------------------------------------------------------------------------------------------------


def about_model(predictor: Predictor, model: ModelFolder | None, agreement: float | None = None) -> dict[str, Any]:
    """What gave an answer, for a JSON: networks, arithmetic, and the folder with the hashes of its weights."""
    about: dict[str, Any] = {
        "networks": len(predictor.networks),
        "device": str(predictor.device),
        "precision": predictor.precision,
        "mirror": list(predictor.mirror),
        "engine": "torch" if agreement is None else "openvino",
        "engines_agree": agreement,
    }
    if model is not None:
        about |= {"folder": str(model.path), "checkpoint": model.which, "weights_sha256": model.weights_sha256}
        about |= {"about": model.about} if model.about else {}
    return about


def _told(
    prediction: Prediction, scheme: LabelScheme, left_out: Collection[str]
) -> tuple[Prediction, LabelScheme, dict[str, str]]:
    """The answer and the scheme without some regions, and {class: the region that it stands for, undivided}."""
    if not left_out:
        return prediction, scheme, {}
    table, undivided = scheme.without(left_out)
    told = replace(scheme, regions={r: members for r, members in scheme.regions.items() if r not in left_out})
    probabilities = prediction.probabilities
    if probabilities is not None:
        probabilities = {region: probabilities[region] for region in told.regions}
    return replace(prediction, classes=table[prediction.classes], probabilities=probabilities), told, undivided


def _sequences(given: Mapping[str, list[str]], used: Sequence[str]) -> dict[str, list[str]]:
    """Which sequences were used: one that the model could not use beside the others was given and ignored."""
    answered, left = ([name for name in given["used"] if (name in used) is wanted] for wanted in (True, False))
    return {**given, "used": answered, "ignored": [*given["ignored"], *left]}


def _of_this_mask(trust: Mapping[str, Any], volumes_ml: Mapping[str, float]) -> dict[str, Any]:
    """What is said of a mask, which was looked at on the model's grid: nothing of a region that is empty on its own."""
    empty = {**NOTHING, "why": "the mask is empty, so it has no soft Dice"}
    regions = {name: row if volumes_ml[name] else {**row, **empty} for name, row in trust["regions"].items()}
    return {**trust, "regions": regions}


def _volumes_ml(prediction: Prediction, scheme: LabelScheme) -> dict[str, float]:
    voxel_ml = abs(float(np.linalg.det(prediction.grid.affine[:3, :3]))) / 1000
    masks = {region: scheme.region_mask(prediction.classes, region) for region in scheme.regions}
    return {region: round(int(mask.sum()) * voxel_ml, 3) for region, mask in masks.items()}


def region_path(mask: Path, region: str) -> Path:
    """The mask of one region beside a mask."""
    return mask.with_name(f"{stem(mask)}-{region}.nii.gz")


def probabilities_path(mask: Path) -> Path:
    """The probabilities beside a mask."""
    return mask.with_name(f"{stem(mask)}-probabilities.npz")


def companions(mask: Path, regions: Iterable[str], probabilities: bool) -> list[Path]:
    """What lies beside a mask and its JSON: masks of regions, and probabilities."""
    return [*(region_path(mask, region) for region in regions), *([probabilities_path(mask)] if probabilities else [])]


def _write(
    out: Path,
    prediction: Prediction,
    scheme: LabelScheme,
    like: Path,
    record: dict[str, Any],
    regions: bool,
    kind: np.dtype[Any] | None,
    earlier: Iterable[Path],
) -> dict[str, Any]:
    """All or nothing; returns the record, with the mask's SHA-256.

    The JSON goes first and comes last: where there is one, it belongs to the mask beside it.

    earlier: what an earlier answer left beside its mask, which this one may not have
    """
    told = tuple(scheme.regions) if regions else ()
    also = companions(out, told, kind is not None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out, *also, record_path(out)) as (mask, *others, about):
            write_mask(mask, scheme.decode(prediction.classes), like)
            for file, region in zip(others, told, strict=False):
                write_mask(file, scheme.region_mask(prediction.classes, region), like)
            if kind is not None:
                _write_probabilities(others[-1], prediction, kind)
            record = {**record, "mask_sha256": sha256(mask)}
            about.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            for file in (record_path(out), *earlier):
                file.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); choose a place with -o that may be written to and "
            "has room"
        ) from error
    return record


def _write_probabilities(file: Path, prediction: Prediction, kind: np.dtype[Any]) -> None:
    assert prediction.probabilities is not None
    arrays = {region: p.astype(kind) for region, p in prediction.probabilities.items()}
    np.savez_compressed(file, affine=prediction.grid.affine, **arrays)

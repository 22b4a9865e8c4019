"""What the worker does for the page: check a patient, segment a subset of sequences, write a report or a SEG."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medmap.card import GOOD_DICE, ModelFolder, choose_scheme, expectation, percent
from medmap.confidence import broken_promises
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet
from medmap.data.dicom_opened import frames_note
from medmap.data.nifti import read_labels, read_volume, stem
from medmap.errors import InputError
from medmap.figures.style import REGION_NAMES
from medmap.inputs import Inputs, read_patient
from medmap.report.case import case_report
from medmap.report.html import render
from medmap.report.viewer import inlined, inlined_mask, show, with_mask
from medmap.segment import Segmenter, Task, record_path
from medmap.serve.desk import Tell
from medmap.serve.patients import Answer, Patient
from medmap.serve.study import series_of


class Engine:
    """A model that is loaded when it is first needed, and keeps the latents of the patient it last looked at."""

    def __init__(self, model: ModelFolder, device: str = "auto", precision: str = "auto") -> None:
        self.model, self._device, self._precision = model, device, precision
        self.known = model.modalities.names
        self.scheme = choose_scheme(model.scheme)
        self._segmenter: Segmenter | None = None

    def loaded(self, tell: Tell) -> Segmenter:
        """With torch, which takes seconds to be imported; as `medmap predict` does one patient: by torch itself."""
        if self._segmenter is None:
            tell("Loading the model")
            options = {"scheme": self.scheme, "qc": True}
            made = Segmenter.load(self.model, self._device, self._precision, "torch", options)
            self._segmenter = replace(made, predictor=made.predictor.remembering())
        return self._segmenter

    # ---- check ------------------------------------------------------------------------------------------------

    def check(self, patient: Patient, named: dict[str, str] | None, tell: Tell) -> dict[str, Any]:
        """Which volume is which sequence, and whether a mask can be made: ``refused`` says why not.

        named: {key of a volume: sequence}; guesses where None
        """
        tell("Reading the files")
        try:
            patient.look()
            guesses, notes = patient.guessed(self.known)
        except InputError as error:
            refused = {"volumes": [], "chosen": {}, "refused": str(patient.worded(error)), "warnings": []}
            return {**refused, "held_bytes": patient.held_bytes}
        named = guesses if named is None else named
        told: dict[str, Any] = {"volumes": patient.volumes(), "chosen": named, "refused": "", "warnings": []}
        told["held_bytes"] = patient.held_bytes
        try:
            patient.choose(named, self.known)
            patient.name_case(self.known)
            inputs = patient.inputs(list(patient.chosen), self.known)
            tell("Checking the images")
            told["warnings"] = [*notes, *read_patient(inputs, self.loaded(tell).predictor).warnings]
            if patient.study is not None:
                told["warnings"] += frames_note(series_of(patient.study, key) for key in patient.chosen.values())
        except InputError as error:
            told |= {"refused": str(patient.worded(error)), "warnings": notes}
            patient.chosen = {}
        dicom = patient.study is not None
        return {**told, "case": patient.case, "sequences": list(patient.chosen), "dicom": dicom}

    # ---- segment ----------------------------------------------------------------------------------------------

    def segment(self, patient: Patient, subset: list[str], frame: int, tell: Tell) -> dict[str, Any]:
        """The answer from some sequences. frame: the number of the images that the page has already; 0 for none

        Raises InputError as `segment_case` does; then nothing of it stays on the disk.
        """
        answer = self.answered(patient, subset, tell)
        tell("Drawing")
        return {**self._words(answer), **_pictures(patient, answer, self.scheme, frame)}

    def answered(self, patient: Patient, subset: list[str], tell: Tell) -> Answer:
        """The mask from some sequences, made where it is not there yet."""
        if not patient.chosen:
            raise InputError("these images were not checked, or refused; choose which image is which sequence first")
        if not subset:
            raise InputError("no sequence is switched on; at least one is needed")
        try:
            inputs = patient.inputs(subset, self.known)
            name = str(ModalitySet(tuple(inputs.files.images)))
            if name not in patient.answers:
                patient.answers[name] = self._made(patient, inputs, name, tell)
        except InputError as error:
            raise patient.worded(error) from error
        return patient.answers[name]

    def _made(self, patient: Patient, inputs: Inputs, name: str, tell: Tell) -> Answer:
        segmenter = self.loaded(tell)
        folder = patient.folder / "masks" / name
        try:
            tell("Reading the images")
            read = segmenter.read(Task(inputs, folder / f"{inputs.id}-{name.replace('+', '-')}.nii.gz"))
            tell("Segmenting")
            if patient.witnesses is None:  # of the same images, so that a switch makes no mask twice
                patient.witnesses = segmenter.witnesses(read)
            computed = segmenter.compute(read, patient.witnesses)
            tell("Writing the mask")
            record = segmenter.write(computed)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Answer(read.task.mask, record, [patient.chosen[n] for n in inputs.files.images])

    def _words(self, answer: Answer) -> dict[str, Any]:
        record, expected = answer.record, answer.record["expected"]
        dice = expected["dice"] if expected else {}
        trust = record["confidence"] or {"regions": {}}
        regions = [
            {
                "name": region,
                "meaning": REGION_NAMES.get(region, ""),
                "ml": ml,
                "expected": _shown(dice.get(region), "mean"),
                "good": region not in dice or (dice[region]["mean"] or 0) >= GOOD_DICE,
                "predicted": _shown(trust["regions"].get(region), "dice"),
                "trust": trust["regions"].get(region),
            }
            for region, ml in record["volumes_ml"].items()
        ]
        return {
            "subset": record["sequences"]["used"],
            "regions": regions,
            "expected": list(expectation(expected)) if expected else [],
            "trust": _trust(record["confidence"]),
            "warnings": record["warnings"],
            "seconds": record["seconds"],
            "mask_file": answer.mask.name,
        }

    # ---- to take away -----------------------------------------------------------------------------------------

    def made(self, patient: Patient, subset: list[str], what: str, tell: Tell) -> dict[str, Any]:
        """The file that is asked for: ``mask``, ``json``, ``report`` or ``seg``. Raises InputError for any other."""
        answer = self.answered(patient, subset, tell)
        try:
            if what == "report":
                tell("Writing the report")
                return {"file": str(_report(patient, answer))}
            if what == "seg" and patient.study is not None:
                tell("Writing the DICOM SEG")
                out = answer.mask.with_name(f"{stem(answer.mask)}.dcm")
                made_from = [series_of(patient.study, key) for key in answer.keys]
                return {"file": str(patient.study.write_seg(answer.mask, made_from, self.scheme, answer.record, out))}
        except InputError as error:
            raise patient.worded(error) from error
        if what not in ("mask", "json"):
            raise InputError(f"{what}: expected mask, json or report, and of a DICOM study seg")
        return {"file": str(answer.mask if what == "mask" else record_path(answer.mask))}


def _report(patient: Patient, answer: Answer) -> Path:
    """The page of a mask, told where the images lie, which its record does not say."""
    places = {n: patient.file(key) for n, key in zip(answer.record["inputs"], answer.keys, strict=True)}
    return case_report(answer.mask, images=places)


def _shown(row: dict[str, Any] | None, middle: str) -> list[str]:
    """A Dice and the ends of its interval as the terminal prints them, in %; empty where nobody measured."""
    return [] if row is None else [percent(row[key]) for key in (middle, "low", "high")]


def _trust(told: dict[str, Any] | None) -> dict[str, Any] | None:
    """How far the mask can be trusted, in words of the page; None where nobody measured."""
    if told is None:
        return None
    about = {"patients": told["patients"], "of_ten": round(10 * told["level"])}
    return {**about, "broken": broken_promises(told)}


# ---- pictures ----------------------------------------------------------------------------------------------------


def _pictures(patient: Patient, answer: Answer, scheme: LabelScheme, frame: int) -> dict[str, Any]:
    """The mask for the images that the page has, or images and mask where it has none or they do not go together."""
    codes, affine = read_labels(answer.mask)
    study = patient.shown and with_mask(patient.shown, codes, affine)
    if study is None:
        images = {name: read_volume(patient.file(key))[0] for name, key in patient.chosen.items()}
        study = show(images, codes.astype(np.uint8), affine, scheme)
        patient.frame += 1
    patient.shown = study
    if frame == patient.frame:
        return {"frame": frame, "mask": inlined_mask(study)}
    return {"frame": patient.frame, "viewer": render("viewer.html.j2", study=inlined(study))}

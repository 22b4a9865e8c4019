"""Many simulated patients on disk, in the layout of BraTS 2023, beside a manifest of every number that was drawn.

    OUT/phantoms.json
    OUT/PHANTOM-00000-000/PHANTOM-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz

A patient's folder appears at once and whole, under its name, so that an interrupted run can be started again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import InputError
from medmap.phantom.patient import draw_patient
from medmap.phantom.simulate import check_request, simulate

MANIFEST = "phantoms.json"

Progress = Callable[[int, int, str], None]


def write_phantoms(
    out: Path,
    count: int,
    seed: int,
    *,
    modalities: ModalitySet = GLIOMA_MRI,
    spacing_mm: float = 2.0,
    noise: float = 0.03,
    missing: float = 0.0,
    on_progress: Progress | None = None,
) -> list[str]:
    """Simulate patients into a folder and return their ids, PHANTOM-00000-000 onwards.

    out:         folder, made where it is absent
    count:       number of patients, at least 1; a larger count later adds patients and changes none
    seed:        with a patient's number it decides everything about that patient
    modalities, spacing_mm, noise: as in `simulate`
    missing:     probability 0 … 1 with which each sequence of a patient does not exist; one always stays
    on_progress: called after each patient with (done, count, id)

    Whole patients that are there already are kept. Raises InputError, before anything is written, for an impossible
    request, a folder that cannot be written, and a folder of phantoms that were made with other settings.
    """
    settings = _settings(seed, modalities, spacing_mm, noise, missing)
    _check(count, seed, missing)
    check_request(modalities, spacing_mm, noise)
    _check_writable(out)
    known = _known(out, settings)
    ids = []
    for index in range(count):
        id = f"PHANTOM-{index:05d}-000"
        patient_seed = _patient_seed(seed, index)
        there = _sequences(seed, index, modalities, missing)
        known[id] = {"id": id, "sequences": list(there), **draw_patient(patient_seed).to_dict()}
        try:
            if not _whole(out / id, id, there):
                _write_case(out, simulate(patient_seed, modalities=there, spacing_mm=spacing_mm, noise=noise, id=id))
            _write_manifest(out, settings, known)
        except OSError as error:
            raise InputError(
                f"{out / id}: cannot be written ({error.strerror}); {index} of {count} patients are whole and will be "
                "kept: make room and run again"
            ) from error
        ids.append(id)
        if on_progress is not None:
            on_progress(index + 1, count, id)
    return ids


def _settings(seed: int, modalities: ModalitySet, spacing_mm: float, noise: float, missing: float) -> dict[str, Any]:
    return {
        "format": 1,
        "labels": "brats2023",
        "seed": seed,
        "spacing_mm": spacing_mm,
        "modalities": list(modalities),
        "noise": noise,
        "missing": missing,
    }


def _check(count: int, seed: int, missing: float) -> None:
    if count < 1:
        raise InputError(f"count: found {count} patients; expected at least 1")
    if seed < 0:
        raise InputError(f"seed: found {seed}; expected a whole number of at least 0")
    if not 0 <= missing <= 1:
        raise InputError(f"missing: found {missing}; expected a probability from 0 to 1")


def _known(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cases listed by the folder's manifest, by id, once its settings are found to be the same."""
    path = out / MANIFEST
    if not path.exists():
        if any(out.glob("PHANTOM-*")):
            raise InputError(f"{out}: holds phantoms but no {MANIFEST} to tell how they were made; use a new folder")
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        cases = {case["id"]: case for case in manifest["cases"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable manifest of phantoms ({error!r}); use a new folder") from error
    for key, value in settings.items():
        if manifest.get(key) != value:
            raise InputError(
                f"{out}: holds phantoms made with {key} = {manifest.get(key)!r}, asked for {value!r}; "
                "use a new folder or the same settings"
            )
    return cases


def _check_writable(out: Path) -> None:
    probe = out / f".write-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose a folder you may write to") from error


def _patient_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _sequences(seed: int, index: int, modalities: ModalitySet, missing: float) -> ModalitySet:
    """The sequences that exist: each is lost with probability ``missing``, but never all."""
    generator = np.random.default_rng([seed, index, *b"missing"])
    lost = generator.random(len(modalities)) < missing
    lost[generator.integers(len(modalities))] &= not lost.all()
    return modalities.pick(name for name, gone in zip(modalities, lost, strict=True) if not gone)


def _file_name(id: str, what: str) -> str:
    return f"{id}-{what}.nii.gz"


def _whole(folder: Path, id: str, there: ModalitySet) -> bool:
    return all((folder / _file_name(id, what)).is_file() for what in (*there, "seg"))


def _write_case(out: Path, case: Case) -> None:
    part = out / f".{case.id}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    assert case.labels is not None
    for name, image in case.images.items():
        _write_volume(part / _file_name(case.id, name), image.astype(np.int16), case.affine)
    _write_volume(part / _file_name(case.id, "seg"), case.labels, case.affine)
    folder = out / case.id
    if not folder.exists():
        os.replace(part, folder)
        return
    for path in part.iterdir():  # somebody took files out of a patient's folder
        os.replace(path, folder / path.name)
    part.rmdir()


def _write_volume(path: Path, volume: NDArray[Any], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def _write_manifest(out: Path, settings: dict[str, Any], cases: dict[str, dict[str, Any]]) -> None:
    part = out / f".{MANIFEST}.part"
    manifest = {**settings, "cases": [cases[id] for id in sorted(cases)]}
    part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(part, out / MANIFEST)

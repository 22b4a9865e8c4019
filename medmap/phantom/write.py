"""Many simulated patients on disk, in the layout of BraTS 2023, beside a manifest of every number that was drawn.

    OUT/phantoms.json
    OUT/PHANTOM-00000-000/PHANTOM-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz

A patient's folder appears at once and whole, under its name, so that an interrupted run can be started again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.core.modality import ModalitySet
from medmap.errors import InputError
from medmap.phantom.patient import organ_named
from medmap.phantom.simulate import PLAIN, Settings, patient_of, simulate

MANIFEST = "phantoms.json"

Progress = Callable[[int, int, str], None]


def write_phantoms(
    out: Path,
    count: int,
    seed: int,
    settings: Settings = PLAIN,
    *,
    missing: float = 0.0,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Simulate patients into a folder and return their ids, PHANTOM-00000-000 onwards.

    out:         folder, made where it is absent
    count:       number of patients, at least 1; a larger count later adds patients and changes none
    seed:        with a patient's number it decides everything about that patient
    settings:    as in `simulate`
    missing:     probability 0 … 1 with which each sequence of a patient does not exist; one always stays
    workers:     processes; by default one per core, and none but this one for a few patients
    on_progress: called after each patient with (done, count, id)

    Whole patients that are there already are kept. Raises InputError, before anything is written, for an impossible
    request, a folder that cannot be written or has no room, and a folder of phantoms made with other settings.
    """
    _check(count, seed, missing)
    _check_writable(out)
    known = _known(out, _described(settings, seed, missing))
    plan = [_planned(index, seed, settings, missing) for index in range(count)]
    todo = [job for job in plan if not _whole(out / job[0], job[0], job[2])]
    _check_room(out, len(todo), settings)
    for id, patient_seed, there in plan:
        known[id] = {"id": id, "sequences": list(there), **patient_of(patient_seed, settings).to_dict()}
    _write_manifest(out, _described(settings, seed, missing), known)
    done = count - len(todo)
    try:
        for id in _worked(out, todo, settings, workers):
            done += 1
            if on_progress is not None:
                on_progress(done, count, id)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); {done} of {count} patients are whole and will be "
            "kept: make room and run again"
        ) from error
    return [id for id, _, _ in plan]


Job = tuple[str, int, ModalitySet]
"""Id, seed and the sequences that exist."""


def _planned(index: int, seed: int, settings: Settings, missing: float) -> Job:
    patient_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    return f"PHANTOM-{index:05d}-000", patient_seed, _sequences(seed, index, settings.names, missing)


def _worked(out: Path, jobs: Sequence[Job], settings: Settings, workers: int | None) -> Iterator[str]:
    """Does the jobs and gives each one's id when its patient is on disk."""
    if workers is None:
        workers = min(os.cpu_count() or 1, len(jobs) // 8)  # a process takes seconds to start
    if workers <= 1:
        yield from (_work(out, job, settings) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            yield from pool.map(_work, *zip(*((out, job, settings) for job in jobs), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _work(out: Path, job: Job, settings: Settings) -> str:
    id, seed, there = job
    _write_case(out, simulate(seed, replace(settings, modalities=there), id=id))
    return id


def _described(settings: Settings, seed: int, missing: float) -> dict[str, Any]:
    plain = asdict(settings) | {"modalities": list(settings.names)}
    return {"format": 2, "labels": _labels(settings), "seed": seed, **plain} | {"missing": missing}


def _labels(settings: Settings) -> str:
    """The scheme of the codes that occur: 4 is in use only after surgery."""
    scheme = organ_named(settings.organ).scheme.name
    return "brats2023" if scheme == "brats2024" and not settings.operated else scheme


def _check(count: int, seed: int, missing: float) -> None:
    if count < 1:
        raise InputError(f"count: found {count} patients; expected at least 1")
    if seed < 0:
        raise InputError(f"seed: found {seed}; expected a whole number of at least 0")
    if not 0 <= missing <= 1:
        raise InputError(f"missing: found {missing}; expected a probability from 0 to 1")


def _check_room(out: Path, count: int, settings: Settings) -> None:
    """Compressed noise takes about 1.6 bytes a voxel of the head, which fills a third of its box."""
    voxels = float(np.prod(organ_named(settings.organ).extent_mm)) / settings.spacing_mm**3 / 3
    need, free = 1.6 * voxels * (len(settings.names) + 0.05) * count, shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"{out}: {count} patients need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, "
            "ask for fewer patients or sequences, or choose a larger spacing"
        )


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

"""Many simulated patients on disk, named as BraTS names its own, beside a manifest of every number that was drawn.

    OUT/phantoms.json
    OUT/PHANTOM-00000-000/PHANTOM-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz      or as `LAYOUTS` says

A patient's folder appears at once and whole, under its name, so that an interrupted run can be started again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.core.labels import scheme_named
from medmap.core.modality import ModalitySet
from medmap.errors import InputError
from medmap.phantom.patient import organ_named, seed_of
from medmap.phantom.simulate import PLAIN, Settings, alone_on_its_core, patient_of, simulate

MANIFEST = "phantoms.json"


class Layout(NamedTuple):
    """What a collection calls its files, and the codes of its labels.

    name, file: of the layout; pattern of its file names
    words:      {sequence: its word in a file's name}, all there are; empty: any sequence, by its own name
    scheme:     the label scheme; where the table leaves it empty, the one of what is simulated
    """

    name: str
    file: str
    words: Mapping[str, str]
    scheme: str

    def file_name(self, id: str, what: str) -> str:
        """Name of the file of a sequence, or of the segmentation ``seg``."""
        return self.file.format(id=id, what=self.words.get(what, what))


Progress = Callable[[int, int, str], None]


def write_phantoms(
    out: Path,
    count: int,
    seed: int,
    settings: Settings = PLAIN,
    *,
    layout: str = "brats2023",
    missing: float = 0.0,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Simulate patients into a folder and return their ids, PHANTOM-00000-000 onwards.

    out:         folder, made where it is absent
    count:       number of patients, at least 1; a larger count later adds patients and changes none
    seed:        with a patient's number it decides everything about that patient
    settings:    as in `simulate`
    layout:      names of the files and codes of the labels, a key of `LAYOUTS`
    missing:     probability 0 … 1 with which each sequence of a patient does not exist; one always stays
    workers:     processes; by default one per core, and none but this one for a few patients
    on_progress: called after each patient with (done, count, id)

    Whole patients that are there already are kept. Raises InputError, before anything is written, as `plan_phantoms`
    does, and for a folder that cannot be written.
    """
    plan = plan_phantoms(out, count, seed, settings, layout=layout, missing=missing)
    _check_writable(out)
    known = plan.known | {
        id: {"id": id, "sequences": list(there), **patient_of(patient_seed, settings).to_dict()}
        for id, patient_seed, there in plan.jobs
    }
    _write_manifest(out, plan.described, known)
    done = count - len(plan.todo)
    try:
        for id in _worked(out, plan.todo, settings, plan.files, workers):
            done += 1
            if on_progress is not None:
                on_progress(done, count, id)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); {done} of {count} patients are whole and will be "
            "kept: make room and run again"
        ) from error
    return [id for id, _, _ in plan.jobs]


Job = tuple[str, int, ModalitySet]
"""Id, seed and the sequences that exist."""


class Plan(NamedTuple):
    """What is asked of `write_phantoms`.

    files:     names and codes of the files
    described: the settings as the manifest says them
    known:     {id: what the manifest there says of a patient}
    jobs:      the patients asked for
    todo:      those of them that are not there yet
    """

    files: Layout
    described: dict[str, Any]
    known: dict[str, dict[str, Any]]
    jobs: list[Job]
    todo: list[Job]


def plan_phantoms(
    out: Path, count: int, seed: int, settings: Settings = PLAIN, *, layout: str = "brats2023", missing: float = 0.0
) -> Plan:
    """What `write_phantoms`, with the same arguments, would do; nothing is written.

    Raises InputError for an impossible request, a folder that holds something else or phantoms made with other
    settings, and a disk without room.
    """
    _check(count, seed, missing)
    files = layout_for(layout, settings)
    described = _described(settings, files, seed, missing)
    known = _known(out, described)
    jobs = [_planned(index, seed, settings, missing) for index in range(count)]
    todo = [job for job in jobs if not _whole(out / job[0], files, job)]
    _check_room(out, len(todo), settings)
    return Plan(files, described, known, jobs, todo)


def layout_for(name: str, settings: Settings) -> Layout:
    """A layout by name, for patients of these settings.

    Raises InputError for an unknown layout, and where it has no name for a sequence or no code for a class.

    >>> layout_for("brats2021", PLAIN).file_name("A", "t2f")
    'A_flair.nii.gz'
    """
    if name not in LAYOUTS:
        raise InputError(f"layout {name!r}: not known; expected one of {', '.join(LAYOUTS)}")
    layout, made = LAYOUTS[name], scheme_named(settings.scheme_name)
    if strange := [modality for modality in settings.names if layout.words and modality not in layout.words]:
        raise InputError(
            f"layout {name}: has no name for {', '.join(strange)}; expected any of {', '.join(layout.words)}, "
            "or another layout"
        )
    scheme = scheme_named(layout.scheme or made.name)
    if not scheme.same_classes(made):
        without = [label for label in made.classes if label not in scheme.classes] or made.classes[1:]
        raise InputError(
            f"layout {name}: has no label for {', '.join(without)}; expected a brain and operated = 0, "
            "or another layout"
        )
    return layout._replace(scheme=scheme.name)


def _planned(index: int, seed: int, settings: Settings, missing: float) -> Job:
    return f"PHANTOM-{index:05d}-000", seed_of(seed, index), _sequences(seed, index, settings.names, missing)


def _worked(out: Path, jobs: Sequence[Job], settings: Settings, layout: Layout, workers: int | None) -> Iterator[str]:
    """Does the jobs and gives each one's id when its patient is on disk."""
    if workers is None:
        workers = min(os.cpu_count() or 1, len(jobs) // 8)  # a process takes seconds to start
    if workers <= 1:
        yield from (_work(out, job, settings, layout) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), alone_on_its_core, (os.getpid(),)) as pool:
        try:
            yield from pool.map(_work, *zip(*((out, job, settings, layout) for job in jobs), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _work(out: Path, job: Job, settings: Settings, layout: Layout) -> str:
    id, seed, there = job
    case = simulate(seed, replace(settings, modalities=there), id=id)
    assert case.labels is not None
    classes = scheme_named(settings.scheme_name).encode(case.labels, id)
    _write_case(out, replace(case, labels=scheme_named(layout.scheme).decode(classes)), layout)
    return id


def _described(settings: Settings, layout: Layout, seed: int, missing: float) -> dict[str, Any]:
    made = {"modalities": list(settings.names), "shape": list(settings.box), "missing": missing}
    plain = asdict(settings) | made
    return {"format": 4, "layout": layout.name, "labels": layout.scheme, "seed": seed, **plain}


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
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    need, free = 1.6 * voxels * (len(settings.names) + 0.05) * count, shutil.disk_usage(place).free
    if need > free:
        raise InputError(
            f"{out}: {count} patients need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, "
            "ask for fewer patients or sequences, or choose a larger spacing"
        )


def _known(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cases listed by the folder's manifest, by id, once its settings are found to be the same."""
    path = out / MANIFEST
    if not path.exists():
        there = sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) if out.is_dir() else []
        if any(name.startswith("PHANTOM-") for name in there):
            raise InputError(f"{out}: holds phantoms but no {MANIFEST} to tell how they were made; use a new folder")
        if there:  # its patients would be taken for phantoms
            names = ", ".join(there[:3]) + (" …" if len(there) > 3 else "")
            raise InputError(
                f"{out}: found {names}, and no {MANIFEST}; expected nothing, or phantoms; use a new folder"
            )
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


def _whole(folder: Path, layout: Layout, job: Job) -> bool:
    id, _, there = job
    return all((folder / layout.file_name(id, what)).is_file() for what in (*there, "seg"))


def _write_case(out: Path, case: Case, layout: Layout) -> None:
    part = out / f".{case.id}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    assert case.labels is not None
    for name, image in case.images.items():
        _write_volume(part / layout.file_name(case.id, name), image.astype(np.int16), case.affine)
    _write_volume(part / layout.file_name(case.id, "seg"), case.labels, case.affine)
    folder = out / case.id
    if not folder.exists():
        os.replace(part, folder)
        return
    for path in part.iterdir():  # somebody took files out of a patient's folder
        os.replace(path, folder / path.name)
    part.rmdir()


def _write_volume(path: Path, volume: NDArray[Any], affine: NDArray[np.float64]) -> None:
    nifti: Any = nib.Nifti1Image  # whose methods carry no types
    image = nifti(volume, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def _write_manifest(out: Path, settings: dict[str, Any], cases: dict[str, dict[str, Any]]) -> None:
    part = out / f".{MANIFEST}.part"
    manifest = {**settings, "cases": [cases[id] for id in sorted(cases)]}
    part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(part, out / MANIFEST)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("brats2023", "{id}-{what}.nii.gz", {}, ""),
        Layout(
            "brats2021",
            "{id}_{what}.nii.gz",
            {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"},
            "brats2021",
        ),
    )
}
"""What a set can be written as; a new one is a row."""

"""The training store: prepared cases as memory-mapped arrays, with a manifest that knows where each came from.

A case folder gets its name only when it is whole, so an interrupted `write_store` goes on where it stopped. How a
store lies on disk: `medmap.data.record`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medmap.core.case import Case, Prepared
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.core.volume import check_spacing, grid_with_spacing, ras_grid
from medmap.data import record as disk
from medmap.data.check import CheckReport, checked
from medmap.data.layouts import CaseFiles, DataFolder, read_case
from medmap.data.nifti import read_header
from medmap.data.preprocess import prepare_case
from medmap.data.sources import describe_sources, same_sources
from medmap.errors import InputError, MedmapError

_SETTINGS = ("spacing_mm", "scheme")
_FILLED = 0.5
"""Share of a volume that its brain box takes, for the estimate of disk space; about 0.4 in skull-stripped brains."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StoreReport:
    """What `write_store` did: ids written, ids left as they were, and {id: why} of those that could not be prepared."""

    done: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def write_store(
    folder: DataFolder,
    out: Path,
    spacing_mm: float | None = None,
    *,
    report: CheckReport | None = None,
    on_progress: Progress | None = None,
) -> StoreReport:
    """Prepare every case of a data folder into a store; go on where an earlier call was interrupted.

    folder:      what `recognise` found
    out:         the store: a new or empty folder, or a store with the same settings
    spacing_mm:  edge of the cubic voxels in mm; None keeps each case's own spacing
    report:      what `check` found; where None, headers and files' bytes are looked at here
    on_progress: called after each case with (cases finished, cases in all, id)

    A case whose source files did not change (size and time, or else SHA-256) is skipped. A case with an error in the
    report of `check`, or that cannot be read or prepared, is named and leaves nothing behind; the others go on.

    Raises InputError, before any work: labels without a scheme, a folder that is no store, other settings, cases that
    the data no longer hold, no room on the disk; and during the work where the disk cannot be written.
    """
    out = Path(out)
    settings, stored, pending = plan_store(folder, out, spacing_mm)
    unusable = (report or checked(folder)).reasons
    pending |= set(unusable)
    if pending:
        with disk.writing(out):
            disk.sweep(out)
            _write_manifest(out, settings, stored, None)
    done: list[str] = []
    failed: dict[str, str] = {}
    for number, files in enumerate(folder.cases, start=1):
        if files.id in pending:
            stored.pop(files.id, None)
            record, reason = _add_case(files, folder, out, spacing_mm, unusable.get(files.id))
            if record is not None:
                stored[files.id] = record
                done.append(files.id)
            else:
                failed[files.id] = reason
        if on_progress:
            on_progress(number, len(folder.cases), files.id)
    with disk.writing(out):
        _write_manifest(out, settings, stored, failed)
    skipped = tuple(files.id for files in folder.cases if files.id not in pending)
    return StoreReport(tuple(done), skipped, failed)


def plan_store(
    folder: DataFolder, out: Path, spacing_mm: float | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], set[str]]:
    """Settings of the store, records of the cases in it, ids of those that are to be made. Raises as `write_store`."""
    settings = _settings(folder, spacing_mm)
    with disk.writing(out):
        stored = _stored(out, settings)
    _check_strangers(out, stored, folder.cases)
    pending = {files.id for files in folder.cases if not _unchanged(files, stored.get(files.id), out)}
    _check_room(out, [files for files in folder.cases if files.id in pending], spacing_mm)
    return settings, stored, pending


class Store:
    """A finished store, read-only; arrays are mapped, so opening a case costs no more than what is then looked at.

    Raises InputError for a folder that is no store, a manifest that is damaged or of another format, a store whose
    preparation was interrupted, and one without any case.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = disk.read_manifest(self.path)
        if not self.manifest["complete"]:
            raise InputError(
                f"{path}: its preparation was interrupted; run medmap prepare again, it goes on from there"
            )
        if not self.manifest["cases"]:
            raise InputError(f"{path}: holds no case, all of them failed; medmap prepare names the reasons")

    @property
    def ids(self) -> tuple[str, ...]:
        """Case ids, sorted."""
        return tuple(sorted(self.manifest["cases"]))

    @property
    def scheme(self) -> LabelScheme | None:
        """Classes and regions of the labels; None where the data have none."""
        data = self.manifest["scheme"]
        return None if data is None else LabelScheme.from_dict(data)

    @property
    def modalities(self) -> ModalitySet:
        """Every sequence that at least one case has."""
        return ModalitySet(tuple(self.manifest["modalities"]))

    @property
    def spacing_mm(self) -> float | None:
        """Edge of the cubic voxels that all cases share, by resampling or by nature; None where they differ."""
        spacings = np.array([disk.grid_of(record["grid"]).spacing_mm for record in self.manifest["cases"].values()])
        return round(float(spacings.mean()), 4) if np.ptp(spacings) < 1e-3 else None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of what the arrays follow from: settings, source hashes, grids, boxes, patients and groups.

        Paths and times are left out: the same data prepared elsewhere have the same hash.
        """
        matter = {key: self.manifest[key] for key in _SETTINGS}
        matter["cases"] = {case: _without_places(record) for case, record in self.manifest["cases"].items()}
        return hashlib.sha256(json.dumps(matter, sort_keys=True).encode()).hexdigest()

    def patient(self, case_id: str) -> str:
        """The patient a case belongs to (one patient may have several cases)."""
        return str(self._record(case_id)["patient"])

    def group(self, case_id: str) -> str | None:
        """The grade or data set of a case, where known."""
        group: str | None = self._record(case_id)["group"]
        return group

    def roster(self) -> list[tuple[str, str, str | None]]:
        """(id, patient, group) of every case: what `medmap.data.splits.kfold` draws from."""
        return [(case_id, self.patient(case_id), self.group(case_id)) for case_id in self.ids]

    def sequences(self, case_id: str) -> tuple[str, ...]:
        """The sequences that a case really has."""
        return tuple(self._record(case_id)["images"])

    def digests(self, case_id: str) -> frozenset[str]:
        """SHA-256 (hex) of a case's image files."""
        record = self._record(case_id)
        return frozenset(record["sources"][name]["sha256"] for name in record["images"])

    def has_labels(self, case_id: str) -> bool:
        """Whether a case has a segmentation."""
        return self._record(case_id)["labels"] is not None

    def brain_ml(self, case_id: str) -> dict[str, float]:
        """Volume of each sequence's non-zero voxels in its file, ml."""
        return {name: float(image["brain_ml"]) for name, image in self._record(case_id)["images"].items()}

    def expect(self, ids: Iterable[str]) -> None:
        """Cases that will be asked for soon: nothing to be done, their arrays are mapped."""

    def provenance(self) -> dict[str, Any]:
        """What a run folder notes, to find the same patients again."""
        return {"store": str(self.path.resolve()), "store_sha256": self.sha256}

    def load(self, case_id: str) -> Prepared:
        """One case, its arrays mapped read-only. Raises InputError for an unknown id or a damaged array."""
        record = self._record(case_id)
        folder = disk.case_folder(self.path, case_id)
        images = {
            name: disk.read_boxed(folder / disk.array_file(name), image, np.float16)
            for name, image in record["images"].items()
        }
        labels = record["labels"] and disk.read_boxed(folder / disk.array_file(disk.LABELS), record["labels"], np.uint8)
        return Prepared(case_id, disk.grid_of(record["grid"]), disk.grid_of(record["native"]), images, labels)

    def _record(self, case_id: str) -> dict[str, Any]:
        if case_id not in self.manifest["cases"]:
            near = get_close_matches(case_id, self.ids, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"{self.path}: no case {case_id}; {hint}it holds {len(self.ids)} cases, {self.ids[0]} …")
        record: dict[str, Any] = self.manifest["cases"][case_id]
        return record


def refuse_other_spacing(store: Store, spacing_mm: float | None) -> None:
    """Raises InputError for a store at another spacing than is needed; any will do where that is None."""
    if spacing_mm is None or (store.spacing_mm is not None and abs(store.spacing_mm - spacing_mm) <= 0.01):
        return
    found = "several spacings" if store.spacing_mm is None else f"{store.spacing_mm:g} mm"
    raise InputError(
        f"{store.path}: is prepared at {found}, {spacing_mm:g} mm is needed; name the folder of cases itself, or "
        f"prepare it with --spacing {spacing_mm:g}"
    )


# What there is, and whether it may be added to


def _settings(folder: DataFolder, spacing_mm: float | None) -> dict[str, Any]:
    if not folder.cases:
        raise InputError(f"{folder.root}: no case to prepare; medmap check says what was found")
    if spacing_mm is not None:
        check_spacing(spacing_mm)
    if disk.LABELS in folder.modalities:
        raise InputError(f"{folder.root}: a sequence is named {disk.LABELS}, as the segmentation is; rename it")
    if folder.undecided:
        raise InputError(
            f"{folder.root}: what the labels of {len(folder.undecided)} cases mean ({', '.join(folder.undecided[:3])}) "
            f"is undecided: {folder.evidence}; name the scheme with --labels ({', '.join(SCHEMES)})"
        )
    schemes = [files.scheme for files in folder.cases if files.labels is not None and files.scheme is not None]
    scheme = schemes[0] if schemes else None
    other = next((s for s in schemes if not s.same_classes(schemes[0])), None)
    if scheme is not None and other is not None:
        raise InputError(
            f"{folder.root}: some cases are labelled as {scheme.name}, others as {other.name}, and their classes "
            "differ; prepare them into two stores"
        )
    return {
        "format": disk.FORMAT,
        "spacing_mm": spacing_mm,
        "scheme": None if scheme is None else scheme.to_dict(),
        "family": folder.family,
        "evidence": folder.evidence,
    }


def _stored(out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of the cases that are whole in ``out``; {} where it is new."""
    manifest_file = out / disk.MANIFEST
    if not manifest_file.exists():
        if out.exists() and (not out.is_dir() or set(out.iterdir()) - {disk.temporary(manifest_file)}):
            raise InputError(f"{out}: exists and is no store; expected a new or empty folder, or a store to go on with")
        return {}
    manifest = disk.read_manifest(out)
    paths = [path for path in sorted((out / "cases").glob(f"*/{disk.RECORD}")) if path.parent.name[0] != "."]
    stored = {record["id"]: record for path in paths if (record := disk.read_record(path))}
    for key in _SETTINGS:
        if stored and manifest[key] != settings[key]:
            raise InputError(
                f"{out}: was prepared with {key} {_brief(manifest[key])}, now {_brief(settings[key])} is asked for; "
                "give another -o, or delete the store first"
            )
    return stored


def _check_strangers(out: Path, stored: Iterable[str], cases: Iterable[CaseFiles]) -> None:
    strangers = sorted(set(stored) - {files.id for files in cases})
    if strangers:
        raise InputError(
            f"{out}: holds {len(strangers)} cases that the data do not ({', '.join(strangers[:3])}); one store is made "
            f"of one data folder: give another -o, or delete their folders below {out / 'cases'}"
        )


def _unchanged(files: CaseFiles, record: Mapping[str, Any] | None, out: Path) -> bool:
    if record is None or any(record[key] != value for key, value in _standing(files).items()):
        return False
    place = disk.case_folder(out, files.id)
    whole = all((place / disk.array_file(name)).is_file() for name in record["sources"])
    return whole and same_sources(files, record["sources"])


def _check_room(out: Path, pending: Iterable[CaseFiles], spacing_mm: float | None) -> None:
    """An estimate: all cases like the first whose header can be read."""
    volumes = [2 * len(files.images) + bool(files.labels) for files in pending]
    voxels = next((n for files in pending if (n := _voxels(files, spacing_mm))), 0)
    needed = int(sum(volumes) * voxels * _FILLED)
    place = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{out}: about {needed / 1e9:.1f} GB are needed for {len(volumes)} cases, {free / 1e9:.1f} GB are free; "
            "make room, choose another disk with -o, or a coarser --spacing"
        )


def _voxels(files: CaseFiles, spacing_mm: float | None) -> int:
    try:
        grid = ras_grid(read_header(next(iter(files.images.values())).path).grid)
    except InputError:
        return 0  # the case will be named as failed when its turn comes
    return math.prod((grid if spacing_mm is None else grid_with_spacing(grid, spacing_mm)).shape)


# One case


def _add_case(
    files: CaseFiles, folder: DataFolder, out: Path, spacing_mm: float | None, unusable: str | None
) -> tuple[dict[str, Any] | None, str]:
    """The case's record once it is in the store, or None and the reason why it could not be prepared."""
    place = disk.case_folder(out, files.id)
    try:
        if unusable is not None:
            raise InputError(unusable)
        sources = describe_sources(files, folder.root)
        case = read_case(files)
        prepared = prepare_case(case, files.scheme, spacing_mm)
    except MedmapError as error:
        with disk.writing(out):
            shutil.rmtree(place, ignore_errors=True)
        return None, str(error)
    record = {
        "id": files.id,
        **_standing(files),
        "sources": sources,
        "native": disk.plain_grid(prepared.native),
        "grid": disk.plain_grid(prepared.grid),
        "images": {
            name: {**disk.plain_box(boxed.box), "brain_ml": _brain_ml(case, name)}
            for name, boxed in prepared.images.items()
        },
        "labels": None if prepared.labels is None else disk.plain_box(prepared.labels.box),
    }
    with disk.writing(out):
        disk.write_case(place, prepared, record)
    return record, ""


def _standing(files: CaseFiles) -> dict[str, Any]:
    """What is known of a case besides its voxels; another reading of the same files makes the case anew."""
    name = None if files.scheme is None else files.scheme.name
    return {"patient": files.patient, "group": files.group or None, "scheme": name}


def _brain_ml(case: Case, name: str) -> float:
    mm3 = abs(float(np.linalg.det(case.affine[:3, :3])))
    return round(int(np.count_nonzero(case.images[name])) * mm3 / 1000, 3)


# The manifest


def _write_manifest(
    out: Path, settings: Mapping[str, Any], stored: Mapping[str, Any], failed: Mapping[str, str] | None
) -> None:
    """``failed`` is None while the work goes on."""
    out.mkdir(parents=True, exist_ok=True)
    names = {name for record in stored.values() for name in record["images"]}
    usual = [name for name in GLIOMA_MRI if name in names]
    manifest = {
        **settings,
        "complete": failed is not None,
        "modalities": usual + sorted(names - set(usual)),
        "failed": dict(failed or {}),
        "cases": {case_id: stored[case_id] for case_id in sorted(stored)},
    }
    disk.write_json(out / disk.MANIFEST, manifest)


def _without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    sources = {name: (source["sha256"], source["channel"]) for name, source in record["sources"].items()}
    return {**record, "sources": sources}


def _brief(setting: Any) -> str:
    if isinstance(setting, Mapping):
        return str(setting["name"])
    return "native" if setting is None else str(setting)

"""Folders of patients as the public collections lay them out: which file is which sequence of which patient.

A layout is a function from a folder to its cases, empty where the folder is not of that kind; LAYOUTS at the foot
lists them in the order in which they are asked. Only names are read here, and small JSON or CSV tables; headers and
voxels are read by `read_case`, and by `recognise` where ``deep`` allows it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmap.core.labels import LabelScheme, scheme_named
from medmap.core.modality import GLIOMA_MRI, canonical
from medmap.data.bids import truths
from medmap.data.cases import CaseFiles, DataFolder, ImageRef, ordered, read_case
from medmap.data.dicom import looks_dicom
from medmap.data.filenames import SEG_WORDS, bids_case, bids_name, by_tail, refuse_foreign, says_t1ce, style_of
from medmap.data.folders import files_below, json_table, walk
from medmap.data.labelmaps import OLD_IDS, LabelMap, decided, from_json, from_names, from_values, group_of, patient_of
from medmap.data.nifti import is_nifti, read_labels, stem
from medmap.data.own import by_medmap, no_truth
from medmap.errors import InputError

__all__ = ["FAMILIES", "LAYOUTS", "CaseFiles", "DataFolder", "ImageRef", "read_case", "recognise"]


class Found(NamedTuple):
    """What a layout function answers: cases (none: not this layout) and notes."""

    cases: Sequence[CaseFiles] = ()
    notes: Sequence[str] = ()


def recognise(path: Path | str, labels: str | None = None, deep: bool = False) -> DataFolder:
    """Find the cases below a folder (or in a CSV table) and the label map of their segmentations.

    labels: name of the label map, where the user says so
    deep:   read the segmentations of undecided cases and see what their codes rule out

    Raises InputError for a path that does not exist, a folder without NIfTI files or without names that tell the
    sequences apart, DICOM folders, an unknown map, and a case id that occurs twice.
    """
    root = Path(path)
    forced = None if labels is None else scheme_named(labels)
    if not root.exists():
        raise InputError(f"{root}: no such folder; check the path")
    if root.is_file() and root.suffix.lower() != ".csv":
        raise InputError(f"{root}: is one file; expected a folder of cases, or a CSV table with the columns {_COLUMNS}")
    found = next((answer for layout in LAYOUTS.values() if (answer := layout(root)).cases), None)
    if found is None:
        raise _nothing_in(root)
    cases = sorted(found.cases, key=lambda case: case.id)
    refuse_foreign(*(ref.path for case in cases for ref in case.files.values()))
    _refuse_twins(cases)
    if forced is not None:
        asked = LabelMap((forced.name,), "asked for with --labels", forced)
        cases = [replace(case, map=asked) for case in cases]
    elif deep:
        cases = _settled(cases)
    scheme, evidence = _shared_map(cases)
    families = {case.family for case in cases}
    family = families.pop() if len(families) == 1 else "mixed"
    return DataFolder(root, family, scheme, evidence, tuple(cases), tuple(found.notes))


# ---- layouts ---------------------------------------------------------------------------------------------------


def phantoms(root: Path) -> Found:
    """A folder with ``phantoms.json``, which lists its cases and their label map, and files with the names of BraTS.

    Cases that it does not list are no phantoms: they are what their names say.
    """
    table = json_table(root / "phantoms.json")
    if table is None:
        return Found()
    scheme = scheme_named(str(table.get("labels", "brats2023")))
    try:
        listed, others = {case["id"] for case in table["cases"]}, [str(name) for name in table.get("modalities", ())]
    except (KeyError, TypeError) as error:
        what = f"found no list of cases with ids, or of modalities ({error!r}), as `medmap simulate` writes them"
        raise InputError(f"{root / 'phantoms.json'}: {what}; simulate again into a new folder") from error
    cases, notes = brats(root, others)
    known = LabelMap((scheme.name,), f"phantoms.json says {scheme.name}", scheme)
    made = {case.id: replace(case, family="phantom", map=known, group="") for case in cases if case.id in listed}
    return Found([made.get(case.id, case) for case in cases], notes)


def csv_table(root: Path) -> Found:
    """A table ``case,t1n,t1c,t2w,t2f,seg``: one row a case, empty cell = missing, paths from the table's folder.

    Any other column names a sequence of its own; ``patient`` and ``group`` are optional. A column without a name is
    not read.
    """
    tables = [root] if root.is_file() else sorted(root.glob("*.csv"))
    for table in tables:
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file)
                columns = [name.strip().lower() for name in next(reader, [])]
                rows = [(reader.line_num, row) for row in reader if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            if root.is_file():
                raise InputError(f"{table}: cannot be read as a CSV table in UTF-8 ({error})") from error
            continue
        if "case" in columns and any(canonical(name) in GLIOMA_MRI for name in columns):
            found = _rows(table, columns, rows)
            if root.is_file() and not found.cases:
                raise InputError(f"{table}: holds no case with an image; expected one row a case: {_COLUMNS}")
            return found
        if root.is_file():
            raise InputError(f"{table}: found the columns {', '.join(columns) or '(none)'}; expected {_COLUMNS}")
    return Found()


def nnunet(root: Path) -> Found:
    """nnU-Net v2: ``imagesTr/ID_0000.nii.gz``, ``labelsTr/ID.nii.gz``; ``dataset.json`` names channels, labels."""
    folder, table = _task(root)
    found: dict[str, dict[int, Path]] = {}
    for path in _niftis(folder):
        if match := re.fullmatch(r"(.+)_(\d{4})", stem(path)):
            found.setdefault(match[1], {})[int(match[2])] = path
    if table is None or not found:
        return Found()
    where = folder.parent / "dataset.json"
    names = _channels(table.get("channel_names") or table.get("modality"), where)
    strange = sorted({channel for files in found.values() for channel in files} - set(names))
    if strange:
        raise InputError(
            f"{where}: names no channel {strange[0]}, but there are files …_{strange[0]:04d}; add its name"
        )
    images = {case: {names[c]: ImageRef(path) for c, path in sorted(files.items())} for case, files in found.items()}
    return _task_cases(folder, images, "nnunet", from_json(table.get("labels"), "dataset.json"))


def msd(root: Path) -> Found:
    """Medical Segmentation Decathlon: 4-D ``imagesTr/BRATS_001.nii.gz``, channels as ``dataset.json`` lists them."""
    folder, table = _task(root)
    paths = [path for path in _niftis(folder) if not re.search(r"_\d{4}$", stem(path))]
    if not paths or (table is None and not all(stem(path).startswith("BRATS_") for path in paths)):
        return Found()
    names = _channels((table or {}).get("modality") or _MSD_CHANNELS, folder.parent / "dataset.json")
    images = {
        stem(path): {name: ImageRef(path, c if len(names) > 1 else None) for c, name in names.items()} for path in paths
    }
    labels = (table or {}).get("labels")
    known = from_json(labels, "dataset.json")
    if not labels and all(stem(path).startswith("BRATS_") for path in paths):
        known = decided("msd", "file names BRATS_… of MSD Task01")
    return _task_cases(folder, images, "msd", known)


def bids(root: Path) -> Found:
    """BIDS: ``sub-*/[ses-*/]anat/sub-*_{T1w,T2w,FLAIR}.nii.gz``, T1w with a ``ce-`` entity = t1c; ``*_dseg`` below
    ``derivatives/``, but for those that medmap made."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted([*root.glob("sub-*/anat/*.nii*"), *root.glob("sub-*/ses-*/anat/*.nii*")]):
        if is_nifti(path) and (name := bids_name(path)):
            found.setdefault(bids_case(path), {}).setdefault(name, []).append(path)
    segmentations, own = truths(root, found)
    cases, notes = [], [no_truth(root.resolve().name, own)] * bool(own)
    for case, files in found.items():
        chosen = {name: min(paths, key=lambda path: (len(path.name), path.name)) for name, paths in files.items()}
        notes += [
            f"{case}: {len(paths)} files for {name}; {chosen[name].name} is used"
            for name, paths in files.items()
            if len(paths) > 1
        ]
        images = {name: ImageRef(chosen[name]) for name in ordered(files)}
        cases.append(
            CaseFiles(case, patient_of(case), "", images, segmentations.get(case), "bids", from_names(case, "plain"))
        )
    return Found(cases, notes)


def brats(root: Path, others: Collection[str] = ()) -> Found:
    """Names that end in a sequence: BraTS 2018–2021 ``ID/ID_t1ce.nii.gz``, 2023–2025 ``ID/ID-t1c.nii.gz``, and the
    same with ids or separators of one's own; in folders of a case each, all in one folder, or one single case.

    others: further sequences that are known to occur
    """
    if root.is_file():
        return Found()
    cases: list[CaseFiles] = []
    notes: list[str] = []
    niftis = {folder: [path for path in files if is_nifti(path)] for folder, files in walk(root, depth=4)}
    old = says_t1ce(stem(path) for paths in niftis.values() for path in paths)
    for folder, paths in niftis.items():
        cases += _named_cases(root, folder, paths, notes, others, old)
    return Found(cases, notes)


# ---- parts of layouts ------------------------------------------------------------------------------------------


def _named_cases(
    root: Path, folder: Path, paths: list[Path], notes: list[str], others: Collection[str], old: bool
) -> Iterator[CaseFiles]:
    """Cases of one folder; ``old``: whether the data set has names of BraTS 2018–2021."""
    images, segs, spare = by_tail(paths, others)
    if not images:
        return
    if own := [path for path in (*segs.values(), *spare) if by_medmap(path, root)]:
        notes.append(no_truth(folder.name, own))
        images, segs, spare = by_tail([path for path in paths if path not in own], others)
    # One BraTS 2020 case names its segmentation W39_1998.09.19_Segm: what says seg beside one case belongs to it.
    alone = next(iter(images)) if len(images) == 1 else None
    spare += [segs.pop(case) for case in list(segs) if case not in images]
    loose = [path for path in spare if "seg" in path.name.lower()]
    if alone is not None and alone not in segs and len(loose) == 1:
        segs[alone] = loose[0]
        spare.remove(loose[0])
        notes.append(f"{folder.name}: {loose[0].name} is taken for the segmentation, as its name says seg")
    if spare:
        names = ", ".join(path.name for path in spare[:4]) + (" …" if len(spare) > 4 else "")
        notes.append(f"{folder.name}: left out {names}: neither one more sequence nor the segmentation")
    above = [*root.resolve().parts[-2:], *folder.relative_to(root).parts]
    for case, slot in images.items():
        name = case or folder.resolve().name
        style = style_of(slot.values(), old or re.match(OLD_IDS, name) is not None)
        known = from_names(name, style)
        plain = style == "plain" or known.scheme is None
        family = {"brats2023": "brats2023+"}.get(style, style) if plain else known.candidates[0]
        refs = {name: ImageRef(slot[name]) for name in ordered(slot)}
        yield CaseFiles(name, patient_of(name), group_of(name, above), refs, segs.get(case), family, known)


def _rows(table: Path, columns: list[str], rows: list[tuple[int, list[str]]]) -> Found:
    _refuse_twin_columns(table, columns)
    cases, notes = [], []
    for line, row in rows:
        cells = _cells(f"{table}, line {line}", columns, row)
        case = cells.pop("case", "")
        if not case:
            raise InputError(f"{table}, line {line}: the cell `case` is empty; give every row a name")
        patient, group = cells.pop("patient", "") or patient_of(case), cells.pop("group", "") or group_of(case)
        paths = {canonical(key): table.parent / value for key, value in cells.items() if value}
        seg = next((paths.pop(word) for word in SEG_WORDS if word in paths), None)
        if not paths:
            notes.append(f"{table.name}, line {line}: case {case} is left out: no image in its row")
            continue
        if seg is not None and by_medmap(seg, table.parent):
            notes.append(no_truth(f"{table.name}, line {line}", [seg]))
            seg = None
        images = {name: ImageRef(paths[name]) for name in ordered(paths)}
        cases.append(CaseFiles(case, patient, group, images, seg, "csv", from_names(case, "plain")))
    return Found(cases, notes)


def _cells(where: str, columns: list[str], row: list[str]) -> dict[str, str]:
    """{column: cell} of the columns with a name. A short row ends in empty cells; what is too long may be shifted."""
    if any(cell.strip() for cell in row[len(columns) :]):
        raise InputError(
            f"{where}: found {len(row)} cells, expected {len(columns)}, one a column; put a path that holds a comma "
            "in double quotes"
        )
    return {name: cell.strip() for name, cell in zip(columns, row, strict=False) if name}


def _refuse_twin_columns(table: Path, columns: list[str]) -> None:
    seen: dict[str, str] = {}
    for number, name in enumerate(columns, start=1):
        key, told = "seg" if name in SEG_WORDS else canonical(name), f"{number} ({name})"
        if name and key in seen:
            raise InputError(
                f"{table}: columns {seen[key]} and {told} both mean {key}; expected one column of each; leave one out"
            )
        seen[key] = told


def _task(root: Path) -> tuple[Path, dict[str, Any] | None]:
    """The image folder of an MSD or nnU-Net task, and its dataset.json."""
    folder = root if root.name in ("imagesTr", "imagesTs") else root / "imagesTr"
    return folder, json_table(folder.parent / "dataset.json")


def _task_cases(folder: Path, images: dict[str, dict[str, ImageRef]], family: str, known: LabelMap) -> Found:
    truth = folder.parent / folder.name.replace("images", "labels")
    masks = _niftis(truth)
    own = [path for path in masks if by_medmap(path, folder.parent)]
    segs = {stem(path): path for path in masks if path not in own}
    cases = []
    for case, refs in images.items():
        sorted_refs = {name: refs[name] for name in ordered(refs)}
        cases.append(CaseFiles(case, patient_of(case), group_of(case), sorted_refs, segs.get(case), family, known))
    tests = len(_niftis(folder.parent / "imagesTs")) if folder.name == "imagesTr" else 0
    notes = [f"imagesTs: {tests} files without labels left out; name that folder to read it"] * bool(tests)
    return Found(cases, [*notes, *[no_truth(truth.name, own)] * bool(own)])


def _channels(names: Any, where: Path) -> dict[int, str]:
    try:
        channels = {int(key): canonical(str(name)) for key, name in names.items()}
    except (AttributeError, ValueError) as error:
        example = '{"0": "T1", "1": "FLAIR"}'
        raise InputError(f"{where}: expected channel_names such as {example}, found {names!r}") from error
    twice = [name for name, count in Counter(channels.values()).items() if count > 1]
    if twice:
        raise InputError(f"{where}: two channels are called {twice[0]}; give each its own name")
    return channels


def _niftis(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_nifti(path)) if folder.is_dir() else []


def _refuse_twins(cases: list[CaseFiles]) -> None:
    for one, two in pairwise(cases):
        if one.id == two.id:
            where = [next(iter(case.images.values())).path.parent for case in (one, two)]
            raise InputError(f"case {one.id} is found twice, in {where[0]} and {where[1]}; name one data set at a time")


def _settled(cases: list[CaseFiles]) -> list[CaseFiles]:
    """Undecided cases, with the codes of all segmentations of the same kind taken together."""
    codes: dict[LabelMap, list[set[int]]] = {}
    for case in cases:
        if case.labels is not None and case.scheme is None:
            codes.setdefault(case.map, []).append(_codes(case.labels))
    settled = {known: from_values(set().union(*found), len(found), known) for known, found in codes.items()}
    return [replace(case, map=settled.get(case.map, case.map)) if case.scheme is None else case for case in cases]


def _codes(path: Path) -> set[int]:
    try:
        return {int(code) for code in np.unique(read_labels(path)[0])}
    except InputError:
        return set()  # `check` reports it; a broken file is no evidence


def _shared_map(cases: list[CaseFiles]) -> tuple[LabelScheme | None, str]:
    asked = [case for case in cases if case.labels is not None] or cases
    reasons = Counter(case.map.evidence for case in asked)
    names = {case.scheme.name if case.scheme else None for case in asked}
    words = [why if len(reasons) == 1 else f"{count} × {why}" for why, count in reasons.most_common()]
    return asked[0].scheme if len(names) == 1 else None, "; ".join(words)


def _nothing_in(root: Path) -> InputError:
    """Why a folder holds no case, in the words that help."""
    files = files_below(root)
    niftis = [path for path in files if is_nifti(path)]
    if niftis:
        names = ", ".join(path.name for path in niftis[:3]) + (" …" if len(niftis) > 3 else "")
        return InputError(
            f"{root}: found {len(niftis)} NIfTI files ({names}), but no names that tell the sequences apart; "
            f"expected one of: {'; '.join(FAMILIES[family] for family in _TOLD)}. "
            f"A CSV table with the columns {_COLUMNS} describes any other folder"
        )
    dicoms = [path for path in files if _is_dicom(path)]
    if dicoms:
        return InputError(
            f"{root}: found {len(dicoms)} DICOM files and no NIfTI, which is expected here; of one study `medmap check "
            "STUDY` shows the series and `medmap predict -i STUDY` makes the mask; for anything else convert it first, "
            f"dcm2niix -z y -o OUT {root}"
        )
    found = f"{len(files)} files, none of them NIfTI" if files else "no file at all"
    return InputError(f"{root}: found {found}; expected a folder of cases with .nii.gz files")


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() in (".dcm", ".dicom", ".ima") or looks_dicom(path)


LAYOUTS: dict[str, Callable[[Path], Found]] = {
    "phantom": phantoms,
    "csv": csv_table,
    "nnunet": nnunet,
    "msd": msd,
    "bids": bids,
    "brats": brats,
}
"""Asked in this order: what declares itself by a table or a folder structure comes before what only names files."""

FAMILIES: dict[str, str] = {
    "phantom": "phantoms of medmap simulate (phantoms.json)",
    "csv": "a CSV table",
    "nnunet": "nnU-Net v2 (imagesTr/ID_0000.nii.gz, dataset.json)",
    "msd": "Medical Segmentation Decathlon (4-D imagesTr/BRATS_001.nii.gz)",
    "bids": "BIDS (sub-*/anat/sub-*_T1w.nii.gz)",
    "brats2021": "BraTS 2018–2021 (ID/ID_t1ce.nii.gz)",
    "brats2023": "BraTS 2023 (ID/ID-t1c.nii.gz)",
    "brats2024": "BraTS 2024/25, after treatment (ID/ID-t1c.nii.gz)",
    "brats2023+": "file names as in BraTS 2023 and later (ID/ID-t1c.nii.gz)",
    "plain": "file names that end in a sequence, of no BraTS year",
}
"""What a family of names is called. ``brats`` tells the BraTS years apart case by case, since folders mix them."""

_TOLD = ("brats2021", "brats2023", "msd", "nnunet", "bids")
_COLUMNS = "case,t1n,t1c,t2w,t2f,seg"
_MSD_CHANNELS = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}

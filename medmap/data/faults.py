"""The faults that a case or a folder can have; SEVERITY at the foot lists them.

An *error* is what cannot be prepared or trained on as it is; a *warning* can, but had better not; a *note* is worth
knowing. A missing sequence is a fact, not a fault.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.modality import GLIOMA_MRI
from medmap.data.cases import MEND, STRIP, CaseFiles, DataFolder, ImageRef, grid_conflict, unit_fault
from medmap.data.nifti import Header, looks_cut_off, read_header, read_labels, read_volume, sha256
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.data.siblings import Finding
    from medmap.data.views import View

BRAIN_LIMIT_ML = 2200.0
"""More voxels than this are not 0 only where the skull is still there: brains have 1–2 litres, heads 2.5–5."""

SMALL_ML, SMALL_VOXELS, ROOM_ML = 200.0, 20_000, 1000.0
"""So many voxels make a whole brain, at 4 mm, and a grid of so much volume has room for one; that they fill less than
this, or that less is not 0, is part of one, nearly nothing, or a wrong voxel size."""

FORMS_MM = 0.5
"""Quaternions are rounded to float32, which moves no voxel so far."""

SMALL_SHARE = 0.5
"""An image with less than this share of its siblings' volume shows something else than they do."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, or worth knowing.

    case:     id, empty where the whole folder is meant
    file:     path from the folder checked, empty where no single file is to blame
    what:     what was found
    cure:     what to do
    severity: error, warning or note
    kind:     key of SEVERITY
    """

    case: str
    file: str
    what: str
    cure: str
    severity: str
    kind: str


@dataclass(frozen=True)
class Look:
    """What was seen of one case: faults, headers that could be read, codes; by modality, digests of images and how much
    of them is not 0."""

    case: CaseFiles
    root: Path
    faults: list[Fault]
    headers: dict[str, Header]
    codes: set[int]
    digests: dict[str, str]
    volumes_ml: dict[str, float]

    @classmethod
    def at(cls, case: CaseFiles, root: Path, expected: tuple[str, ...], deep: bool, brain: bool = True) -> Look:
        """Look at one case of the folder ``root``; ``expected`` names what it may be expected to have.

        Voxels are read where ``deep`` asks for it. Images are looked at as those of a brain, unless ``brain`` or the
        case's label map says that they are of another organ.
        """
        look = cls(case, root, [], {}, set(), {}, {})
        look._presence(expected)
        for name, ref in case.files.items():
            look._header(name, ref)
        look._grids()
        if deep:
            look._voxels(brain and (case.scheme is None or "WT" in case.scheme.regions))
        return look

    def _add(self, kind: str, what: str, cure: str, path: Path | None = None) -> None:
        file = "" if path is None else relative(path, self.root)
        self.faults.append(Fault(self.case.id, file, what, cure, SEVERITY[kind], kind))

    def _error(self, kind: str, error: InputError, path: Path) -> None:
        what, _, cure = str(error).removeprefix(f"{path}: ").partition("; ")
        self._add(kind, f"{path.name}: {what}", cure or "repair or replace the file", path)

    def _presence(self, expected: tuple[str, ...]) -> None:
        if missing := [name for name in expected if name not in self.case.images and name != "seg"]:
            words = f"{', '.join(missing)} missing"
            self._add("missing", words, "nothing to do: missing sequences are allowed")
        if "seg" in expected and self.case.labels is None:
            self._add("no-labels", "no segmentation", "nothing to do for prediction; training leaves it out")

    def _header(self, name: str, ref: ImageRef) -> None:
        try:
            header = read_header(ref.path)
            if looks_cut_off(header):
                raise InputError(
                    f"{ref.path}: cut off: fewer bytes than its header promises; copy or download it again"
                )
        except (InputError, OSError) as error:
            self._error("unreadable", InputError(error), ref.path)
            return
        if ref.channel is None and header.channels > 1:
            shape = "×".join(map(str, header.shape))
            cure = "split it into one file a volume (fslsplit); the layout of the MSD alone has 4-D files"
            self._add("four-d", f"{ref.path.name}: 4-D ({shape}), a 3-D volume is expected", cure, ref.path)
        elif ref.channel is not None and ref.channel >= header.channels:
            what = f"{ref.path.name}: {name} would be volume {ref.channel + 1}, the file holds {header.channels}"
            self._add("four-d", what, "mend the list of channels in dataset.json, or the file", ref.path)
        elif wrong := unit_fault(header):
            self._add("units", *wrong, ref.path)
        else:
            self.headers[name] = header
            if not header.oriented and (ref.channel or 0) == 0:
                what = f"{ref.path.name}: neither qform nor sform is set, so left and right are a guess"
                self._add("orientation", what, "export it again from its source, with orientation", ref.path)
            if header.forms_apart > FORMS_MM and (ref.channel or 0) == 0:
                what = f"qform and sform disagree by {header.forms_apart:.3g} mm; medmap uses the sform"
                cure = "find out which is right, and copy it over the other (fslorient -copysform2qform FILE)"
                self._add("forms", f"{ref.path.name}: {what}", cure, ref.path)

    def _grids(self) -> None:
        first = next(iter(self.headers.values()), None)
        done = set()
        for header in self.headers.values():
            if first is None or header.path in done:
                continue
            done.add(header.path)
            if conflict := grid_conflict(first, header):
                kind = "affine" if first.shape[:3] == header.shape[:3] else "grid"
                self._add(kind, *conflict, header.path)

    def _voxels(self, brain: bool) -> None:
        heads: list[str] = []
        views: dict[str, View] = {}
        for name, header in self.headers.items():
            ref = self.case.files[name]
            try:
                if name == "seg":
                    self._segmentation(read_labels(ref.path)[0], ref.path)
                    continue
                self._brain(name, read_volume(ref.path, ref.channel)[0], header, views, heads)
            except InputError as error:
                self._error("unreadable", error, ref.path)
        if heads and brain:
            names = ", ".join(heads) + (" looks like a raw head" if len(heads) == 1 else " look like raw heads")
            what = f"not skull-stripped: {names}"
            self._add("raw", what, STRIP)
        if brain:
            cut_short = self._siblings(views)
            self._small([name for name in self.volumes_ml if name not in heads], cut_short)

    def _brain(
        self, name: str, volume: NDArray[np.float32], header: Header, views: dict[str, View], heads: list[str]
    ) -> None:
        """Note the faults of one image, and whether it is a head; keep a view of a new, whole, skull-stripped one."""
        from medmap.data.siblings import odd_values
        from medmap.data.views import View

        noted, digests = len(self.faults), set(self.digests.values())
        if self._image(name, volume, header):
            heads.append(name)
        elif len(self.faults) == noted and self.digests[name] not in digests:
            view = View.of(volume, header.affine)
            if view is not None:
                self._found(odd_values(name, volume))
                views[name] = view

    def _small(self, names: list[str], told: Collection[str]) -> None:
        """Note images of brains with far less volume than their siblings, of which nobody has told, or than a brain."""
        odd = set(told)
        for name in names:
            others = [self.volumes_ml[other] for other in names if other != name]
            ml, usual = self.volumes_ml[name], float(np.median(others)) if others else 0.0
            if name not in odd and ml < SMALL_SHARE * usual:
                odd.add(name)
                what = f"only {ml:.3g} ml of {name} are not 0, {usual:.3g} ml of the other sequences"
                cure = (
                    "look at it: part of a brain, or no image of it; leave it out then, a missing sequence is allowed"
                )
                self._add("small", what, cure, self.headers[name].path)
        small = [name for name in names if name not in odd and self._too_small(name)]
        if small:
            size, most = self.headers[small[0]].grid.spacing_mm, max(self.volumes_ml[name] for name in small)
            what = f"only {most:.3g} ml of {', '.join(small)} are not 0, a brain has 1000 to 2000 ml"
            edges = "×".join(f"{mm:.3g}" for mm in size)
            self._add("small", what, f"nothing if that is all there is; if voxels are not of {edges} mm, {MEND}")

    def _too_small(self, name: str) -> bool:
        """Whether an image that is large enough for a brain, by its voxels or by its grid, shows hardly any of it."""
        ml, header = self.volumes_ml[name], self.headers[name]
        large = ml >= SMALL_VOXELS * _voxel_ml(header) or np.prod(header.shape[:3]) * _voxel_ml(header) >= ROOM_ML
        return bool(large and ml < SMALL_ML)

    def _siblings(self, views: dict[str, View]) -> set[str]:
        """What the images of brains say about each other, and which lack slices; no place is compared across grids."""
        from medmap.data.siblings import findings

        if not views:
            return set()
        first = self.headers[next(iter(views))].grid
        apart = frozenset(name for name in views if not self.headers[name].grid.matches(first))
        found = findings(views, apart)
        self._found(found)
        return {one.name for one in found if one.kind == "partial"}

    def _found(self, found: Iterable[Finding]) -> None:
        from medmap.data.siblings import KINDS

        for one in found:
            path = self.case.files[one.name].path
            self.faults.append(
                Fault(self.case.id, relative(path, self.root), one.what, one.cure, KINDS[one.kind], one.kind)
            )

    def _image(self, name: str, volume: NDArray[np.float32], header: Header) -> bool:
        """Note the faults of one image; True where it is a head with its skull."""
        file = header.path.name if self.case.files[name].channel is None else f"{header.path.name} ({name})"
        bad = int(volume.size - np.count_nonzero(np.isfinite(volume)))
        if bad:
            cure = "find out why, or set them to 0: the image may be damaged elsewhere too"
            self._add("nan", f"{file}: {bad:,} voxels are NaN or infinite", cure, header.path)
            return False
        low, high = float(volume.min()), float(volume.max())
        if low == high:
            what = f"{file}: empty, every voxel is 0" if low == 0 else f"{file}: constant, every voxel is {low:g}"
            self._add(
                "constant",
                what,
                "remove the file: a missing sequence is allowed, an empty one misleads",
                header.path,
            )
            return False
        if not ((low < volume) & (volume < high)).any():
            what = f"{file}: constant inside the brain, every voxel is {low:g} or {high:g}: a mask, not an image"
            self._add("constant", what, "name its own file, or none: a missing sequence is allowed", header.path)
            return False
        from medmap.data.siblings import coded

        if (codes := coded(name, volume)) is not None:
            self._found([codes])
            return False
        self.digests[name] = hashlib.sha256(volume.tobytes()).hexdigest()
        corners = volume[np.ix_(*([0, -1],) * 3)]
        if corners[0, 0, 0] != 0 and (corners == corners[0, 0, 0]).all():
            what = f"{file}: the background is {corners[0, 0, 0]:g}, 0 is expected: the brain cannot be told from it"
            self._add("background", what, "set the background to 0 (before any z-score)", header.path)
            return False
        self.volumes_ml[name] = np.count_nonzero(volume) * _voxel_ml(header)
        return bool(self.volumes_ml[name] > BRAIN_LIMIT_ML or np.count_nonzero(corners) > 4)

    def _segmentation(self, codes: NDArray[Any], path: Path) -> None:
        values, counts = np.unique(codes, return_counts=True)
        found = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value != 0}
        self.codes.update(found)
        if not found:
            self._add("empty-labels", f"{path.name}: marks nothing", "nothing, if there is no tumour", path)
        scheme = self.case.scheme
        if scheme is None:
            return
        strange = {code: count for code, count in found.items() if code not in scheme.codes.values()}
        if strange:
            listed = ", ".join(
                f"{code} ({count:,} voxel{'s' * (count > 1)})" for code, count in list(strange.items())[:5]
            )
            known = ", ".join(f"{code} = {name}" for name, code in scheme.codes.items())
            what = f"{path.name}: label {listed} is outside the map {scheme.name} ({known})"
            self._add("label", what, "name the right map with --labels, or mend the file", path)


def _voxel_ml(header: Header) -> float:
    return abs(float(np.linalg.det(header.affine[:3, :3]))) / 1000


def expected(folder: DataFolder) -> tuple[str, ...]:
    """What a case of this folder may be expected to have: the sequences of BraTS, or all that occur; and ``seg``."""
    found = folder.modalities
    images = GLIOMA_MRI.names if set(found) <= set(GLIOMA_MRI) else found
    return (*images, "seg") if any(case.labels for case in folder.cases) else images


def undecided(folder: DataFolder, deep: bool) -> Iterator[Fault]:
    """Label maps that nobody has decided, one fault for all cases of the same kind."""
    open_maps = Counter(case.map for case in folder.cases if case.labels is not None and case.scheme is None)
    for known, count in open_maps.items():
        whose = "1 segmentation" if count == 1 else f"{count} segmentations"
        cure = f"name the map with --labels {' or '.join(known.candidates) or '(none known here fits for certain)'}"
        if known.candidates and not deep:
            cure += ", or read the voxels with --deep"
        yield _whole("", "undecided", f"the label map of {whose} is undecided: {known.evidence}", cure)


def duplicates(looks: list[Look], deep: bool) -> Iterator[Fault]:
    """Equal images under two names or in two cases: of their voxels where they were read, else of the files' bytes."""
    images = [(look, name) for look in looks for name in look.headers if name != "seg"]
    digests = [look.digests.get(name) for look, name in images] if deep else _file_digests(images)
    same: dict[str, list[tuple[CaseFiles, str]]] = {}
    for (look, name), digest in zip(images, digests, strict=True):
        if digest is not None:
            same.setdefault(digest, []).append((look.case, name))
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for group in same.values():
        (first, a), *copies = group
        for copy, b in copies:
            pairs.setdefault((copy.id, first.id), []).append((b, a))
    patients = {look.case.id: look.case.patient for look in looks}
    for (one, two), names in pairs.items():
        yield _duplicate(one, two, names, patients)


def _duplicate(one: str, two: str, names: list[tuple[str, str]], patients: dict[str, str]) -> Fault:
    if one == two:
        what = (
            " and ".join(dict.fromkeys(name for pair in names for name in reversed(pair)))
            + " are one image under two names"
        )
        return _whole(one, "duplicate", what, "find out which name is right and remove the other: it may be missing")
    what = f"the same image as in {two}: " + ", ".join(a if a == b else f"{a} (there {b})" for a, b in names)
    if patients[one] == patients[two]:
        return _whole(one, "same-patient", what, f"nothing: both are patient {patients[one]}, on one side of any split")
    cure = "remove one of the two, or give both one patient (column patient of a CSV table)"
    return _whole(one, "duplicate", what, cure)


def _file_digests(images: list[tuple[Look, str]]) -> list[str | None]:
    """SHA-256 of files, only where another one has the same size and the same 64 KiB in its middle."""
    marks: list[tuple[int, bytes] | None] = []
    sizes = [look.headers[name].path.stat().st_size for look, name in images]
    often = Counter(sizes)
    for (look, name), size in zip(images, sizes, strict=True):
        # one file may hold several sequences (4-D): they are told apart by voxels only
        alone = look.case.images[name].channel is None
        marks.append((size, _middle(look.headers[name].path, size)) if alone and often[size] > 1 else None)
    alike = Counter(marks)
    return [
        sha256(look.headers[name].path) if mark is not None and alike[mark] > 1 else None
        for (look, name), mark in zip(images, marks, strict=True)
    ]


def _middle(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, size // 2 - 2**15))
        return hashlib.sha256(file.read(2**16)).digest()


def relative(path: Path, root: Path) -> str:
    """A path as it is shown: from the folder checked where it lies below it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _whole(case: str, kind: str, what: str, cure: str) -> Fault:
    return Fault(case, "", what, cure, SEVERITY[kind], kind)


SEVERITY: dict[str, str] = {
    "unreadable": "error",
    "four-d": "error",
    "grid": "error",
    "affine": "error",
    "units": "error",
    "undecided": "error",
    "nan": "error",
    "constant": "error",
    "label": "error",
    "duplicate": "error",
    "orientation": "warning",
    "forms": "warning",
    "background": "warning",
    "raw": "warning",
    "small": "warning",
    "missing": "note",
    "no-labels": "note",
    "empty-labels": "note",
    "same-patient": "note",
}
"""Every kind of fault."""

"""What is in a data set, and what is wrong with it: every fault in one line, with its cure.

Headers are enough for most faults; voxels are read where ``deep`` asks for it. A missing sequence is a fact, not a
fault. An *error* is what cannot be prepared or trained on as it is; a *warning* can, but had better not; a *note*
is worth knowing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medmap.data.cases import CaseFiles, DataFolder
from medmap.data.check_text import render
from medmap.data.faults import Fault, Look, duplicates, expected, relative, undecided
from medmap.data.layouts import FAMILIES, recognise
from medmap.data.nifti import Header

__all__ = ["CheckReport", "Fault", "check", "render"]


@dataclass(frozen=True)
class CheckReport:
    """A data set as it was found.

    folder:       layout, cases, label map
    faults:       errors first
    who_has_what: how many cases have each combination of sequences (and ``seg``), the most frequent first
    grids:        how many images share shape, voxel size in mm, storage orientation and type on disk
    codes:        in how many segmentations each code occurs; empty where voxels were not read
    deep:         whether voxels were read
    """

    folder: DataFolder
    faults: tuple[Fault, ...]
    who_has_what: tuple[tuple[tuple[str, ...], int], ...]
    grids: tuple[tuple[tuple[Any, ...], int], ...]
    codes: dict[int, int]
    deep: bool

    @property
    def unusable(self) -> tuple[str, ...]:
        """Ids of the cases that cannot be prepared as they are."""
        bad = {*self.reasons, *self.folder.undecided}
        return tuple(case.id for case in self.folder.cases if case.id in bad)

    @property
    def reasons(self) -> dict[str, str]:
        """{id: errors and cures} of the cases that have any."""
        told: dict[str, list[str]] = {}
        for fault in self.faults:
            if fault.severity == "error" and fault.case:
                told.setdefault(fault.case, []).append(f"{fault.what}; {fault.cure}")
        return {case: ". Also ".join(sentences) for case, sentences in told.items()}

    @property
    def exit_code(self) -> int:
        """1 where there is an error, else 0."""
        return int(any(fault.severity == "error" for fault in self.faults))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        folder, root = self.folder, self.folder.root
        return {
            "path": str(root),
            "layout": {"family": folder.family, "title": FAMILIES.get(folder.family, folder.family)},
            "labels": {
                "scheme": None if folder.scheme is None else folder.scheme.to_dict(),
                "evidence": folder.evidence,
                "undecided": list(folder.undecided),
                "codes_found": {str(code): count for code, count in self.codes.items()},
            },
            "cases": [_case_dict(case, root) for case in folder.cases],
            "who_has_what": [{"has": list(names), "cases": count} for names, count in self.who_has_what],
            "grids": [
                {"shape": list(s), "spacing_mm": list(mm), "stored": axes, "dtype": dtype, "images": count}
                for (s, mm, axes, dtype), count in self.grids
            ],
            "faults": [asdict(fault) for fault in self.faults],
            "notes": list(folder.notes),
            "unusable": list(self.unusable),
            "deep": self.deep,
            "exit_code": self.exit_code,
        }


def check(
    path: Path | str,
    labels: str | None = None,
    deep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Look through a data set.

    labels:   name of the label map, where the user says so
    deep:     read voxels: NaN, constant images, codes outside the map, heads with their skull, equal images, images
              that are not what their names say
    progress: called with (cases done, cases in all)

    Raises InputError as `recognise` does; whatever is wrong with single cases is reported instead.
    """
    return checked(recognise(path, labels, deep), deep, progress)


def checked(folder: DataFolder, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Look through a data set that was recognised, as `check` does."""
    looks, names = [], expected(folder)
    for number, case in enumerate(folder.cases, start=1):
        looks.append(Look.at(case, folder.root, names, deep))
        if progress is not None:
            progress(number, len(folder.cases))
    faults = [*undecided(folder, deep), *(fault for look in looks for fault in look.faults), *duplicates(looks, deep)]
    has = Counter(tuple(case.files) for case in folder.cases)
    codes = Counter(code for look in looks for code in look.codes)
    grids = Counter(_grid_key(h) for look in looks for name, h in look.headers.items() if name != "seg")
    return CheckReport(
        folder,
        tuple(sorted(faults, key=lambda fault: (_ORDER.index(fault.severity), fault.case, fault.kind))),
        tuple(has.most_common()),
        tuple(grids.most_common()),
        {code: codes[code] for code in sorted(codes)},
        deep,
    )


def _grid_key(header: Header) -> tuple[Any, ...]:
    spacing_mm = tuple(round(mm, 3) for mm in header.grid.spacing_mm)
    return header.shape[:3], spacing_mm, header.orientation, str(header.dtype.newbyteorder("="))


def _case_dict(case: CaseFiles, root: Path) -> dict[str, Any]:
    return {
        "id": case.id,
        "patient": case.patient,
        "group": case.group,
        "family": case.family,
        "images": {m: {"file": relative(ref.path, root), "channel": ref.channel} for m, ref in case.images.items()},
        "labels": None if case.labels is None else relative(case.labels, root),
        "scheme": case.scheme.name if case.scheme else None,
        "evidence": case.map.evidence,
    }


_ORDER = ("error", "warning", "note")

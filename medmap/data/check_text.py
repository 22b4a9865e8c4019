"""A check report as plain text that a stranger can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from medmap.core.labels import LabelScheme
from medmap.data.layouts import FAMILIES

if TYPE_CHECKING:
    from medmap.data.check import CheckReport
    from medmap.data.faults import Fault

ALIKE = 12
"""Notes with the same words are listed up to this many times, then counted; errors and warnings all stand."""


def render(report: CheckReport) -> str:
    """Layout, label map, who has what, grids, faults, verdict."""
    blocks = [_summary(report), _who(report), _grids(report), _faults(report), [_verdict(report)]]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _summary(report: CheckReport) -> list[str]:
    folder = report.folder
    rows = [
        *_rows("layout", _each(FAMILIES[case.family] for case in folder.cases)),
        *_label_rows(report),
        ("cases", _patients([case.patient for case in folder.cases])),
    ]
    if any(case.group for case in folder.cases):
        groups = Counter(case.group or "(unknown)" for case in folder.cases)
        rows.append(("groups", ", ".join(f"{name} {count}" for name, count in groups.most_common())))
    rows += _rows("note", folder.notes)
    return [str(folder.root), *(f"  {name:<10} {text}" for name, text in rows)]


def _label_rows(report: CheckReport) -> list[tuple[str, str]]:
    folder = report.folder
    segmented = [case for case in folder.cases if case.labels is not None]
    if not segmented:
        return [("label map", "none needed: no case has a segmentation")]
    schemes = {case.scheme.name: case.scheme for case in segmented if case.scheme is not None}
    lines = [f"{name}: {_codes(scheme)}" for name, scheme in sorted(schemes.items())]
    if folder.undecided:
        lines.append("UNDECIDED" if not lines else f"UNDECIDED for {_cases(len(folder.undecided))}")
    rows = [*_rows("label map", lines), *_rows("evidence", _each(case.map.evidence for case in segmented))]
    if report.codes:
        found = ", ".join(f"{code} in {count}" for code, count in report.codes.items())
        rows.append(("found", f"label {found} of {len(segmented)} segmentations"))
    return rows


def _rows(name: str, lines: Iterable[str]) -> list[tuple[str, str]]:
    return [(name if index == 0 else "", line) for index, line in enumerate(lines)]


def _each(words: Iterable[str]) -> list[str]:
    """Different words, the frequent ones first, with their numbers of cases where they differ."""
    counts = Counter(words)
    if len(counts) == 1:
        return list(counts)
    return [f"{word} ({_cases(count)})" for word, count in counts.most_common()]


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"


def _patients(patients: list[str]) -> str:
    counts = Counter(patients)
    several = [patient for patient, count in counts.items() if count > 1]
    if not several:
        return str(len(patients))
    names = ", ".join(several[:3]) + (" …" if len(several) > 3 else "")
    return f"{len(patients)} of {len(counts)} patients ({names}: more than one case, kept on one side of a split)"


def _codes(scheme: LabelScheme) -> str:
    codes = ", ".join(f"{code} = {name}" for name, code in scheme.codes.items())
    regions = ", ".join(
        f"{name} = {'+'.join(str(code) for code in sorted(scheme.codes[m] for m in parts))}"
        for name, parts in scheme.regions.items()
    )
    return f"{codes}  ({regions})"


def _who(report: CheckReport) -> list[str]:
    names = [*report.folder.modalities, "seg"]
    widths = [max(4, len(name)) for name in names]
    head = "  " + "  ".join(f"{name:^{width}}" for name, width in zip(names, widths, strict=True)) + "   cases"
    rows = [
        "  "
        + "  ".join(f"{'•' if name in has else '–':^{width}}" for name, width in zip(names, widths, strict=True))
        + f"  {n:>6}"
        for has, n in report.who_has_what
    ]
    return ["Who has what", head, *rows]


def _grids(report: CheckReport) -> list[str]:
    rows = [
        ("×".join(map(str, shape)), "×".join(f"{mm:g}" for mm in spacing_mm), axes, dtype, str(count))
        for (shape, spacing_mm, axes, dtype), count in report.grids
    ]
    if not rows:
        return []
    table = [("voxels", "mm", "stored", "type", "images"), *rows[:ALIKE]]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    more = [f"  … and {len(rows) - ALIKE} more kinds of grid"] if len(rows) > ALIKE else []
    return ["Grids", *lines, *more]


def _faults(report: CheckReport) -> list[str]:
    if not report.faults:
        return []
    counts = Counter(fault.severity for fault in report.faults)
    title = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in counts.items())
    lines: list[str] = []
    seen: Counter[tuple[str, str]] = Counter()
    for fault in report.faults:
        seen[fault.kind, fault.what] += 1
        if fault.severity != "note" or seen[fault.kind, fault.what] <= ALIKE:
            lines.append(_line(fault))
    lines += [f"  note     {what}: {n - ALIKE} more cases (all of them with --json)" for what, n in _many(report, seen)]
    return [title, *lines]


def _many(report: CheckReport, seen: Counter[tuple[str, str]]) -> list[tuple[str, int]]:
    notes = {(fault.kind, fault.what) for fault in report.faults if fault.severity == "note"}
    return [(what, n) for (kind, what), n in seen.items() if (kind, what) in notes and n > ALIKE]


def _line(fault: Fault) -> str:
    where = "" if not fault.case or fault.what.startswith(fault.case) else f"{fault.case}: "
    return f"  {fault.severity:<7}  {where}{fault.what}; {fault.cure}"


def _verdict(report: CheckReport) -> str:
    cases, bad = len(report.folder.cases), len(report.unusable)
    depth = "" if report.deep else " Only names and headers were read; --deep reads the voxels too."
    if report.exit_code:
        return f"Not ready: {bad} of {cases} cases cannot be used as they are.{depth}"
    warnings = sum(fault.severity == "warning" for fault in report.faults)
    state = "Ready, but mind the warnings" if warnings else "Ready"
    return f"{state}: {'the case' if cases == 1 else f'all {cases} cases'} can be used.{depth}"

"""Which label map a data set uses, and on what evidence; which patient and group an id stands for.

Code 4 is enhancing tumour up to BraTS 2021 and resection cavity from 2024 on, so values alone never decide. Ids and
file names do; where they cannot, or contradict each other, the map is *undecided* until the voxels rule out all
readings but one, or the user names the map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medmap.core.labels import SCHEMES, LabelScheme
from medmap.errors import InputError


@dataclass(frozen=True)
class LabelMap:
    """A label map, or the maps that are still possible.

    candidates: names of the schemes that are possible, the likelier first; none where no scheme here fits
    evidence:   why, in words
    scheme:     the scheme, once decided
    """

    candidates: tuple[str, ...]
    evidence: str
    scheme: LabelScheme | None = None


def decided(name: str, evidence: str) -> LabelMap:
    """A known scheme with the reason for it."""
    return LabelMap((name,), evidence, SCHEMES[name])


def from_names(case_id: str, style: str) -> LabelMap:
    """The label map that an id and its file names stand for.

    style: ``brats2021`` (``_t1ce``), ``brats2023`` (``-t1c``) or ``plain``, a key of STYLE_RULES, as `style_of` finds

    >>> from_names("BraTS-GLI-02073-100", "brats2023").scheme.name
    'brats2024'
    >>> from_names("hospital-7", "brats2023").candidates
    ('brats2023', 'brats2021', 'brats2024')
    """
    by_style, style_words = STYLE_RULES[style]
    rule = next(((names, words) for pattern, names, words in ID_RULES if re.match(pattern, case_id)), None)
    if rule is None:
        if len(by_style) == 1:
            return decided(by_style[0], style_words)
        return LabelMap(by_style or _ANY, f"ids of no known collection, {style_words}")
    by_id, id_words = rule
    if by_id and style in _YEARS and not set(by_id) & set(_YEARS[style]):
        both = tuple(dict.fromkeys([*by_id, *_YEARS[style]]))
        return LabelMap(both, f"{id_words}, but {style_words}: they contradict each other")
    if len(by_id) == 1:
        return decided(by_id[0], id_words if style == "plain" else f"{id_words}, {style_words}")
    return LabelMap(by_id, id_words)


def from_values(codes: Iterable[int], masks: int, before: LabelMap) -> LabelMap:
    """Settle an undecided map with the codes that occur in the segmentations of all its cases.

    codes: the codes found; 0 is ignored
    masks: in how many segmentations

    A scheme that does not know a code is ruled out. What remains is taken where it gives every code found one
    meaning. 1, 2 and 4 without any 3 reads as brats2021 where no id says otherwise; anything else stays undecided.
    """
    found = sorted(set(codes) - {0})
    text = f"{before.evidence}; voxels hold {', '.join(map(str, found)) or 'no label'} in {masks} segmentation" + (
        "s" if masks != 1 else ""
    )
    names = {name: {code: what for what, code in SCHEMES[name].codes.items()} for name in before.candidates}
    possible = [name for name in before.candidates if set(found) <= set(names[name])]
    if not possible:
        return LabelMap((), f"{text}: no map known here has these" if before.candidates else text)
    meanings = {tuple(names[name][code] for code in found) for name in possible}
    if len(meanings) == 1 and found:
        others = [name for name in before.candidates if name not in possible]
        why = (
            f", which rules out {' and '.join(others)}"
            if others
            else ", which mean the same in " + " and ".join(possible)
        )
        return decided(possible[0], text + why)
    if found == [1, 2, 4] and possible[0] == "brats2021":
        return decided("brats2021", f"{text}, never 3: 4 is read as enhancing tumour (--labels brats2024 if it is not)")
    return LabelMap(tuple(possible), f"{text}, which could be {' or '.join(possible)}")


def from_json(labels: Any, where: str) -> LabelMap:
    """The map that a ``dataset.json`` spells out, in nnU-Net's ({name: code or list}) or the MSD's ({code: name}) form.

    Names of tumour parts are recognised in their usual spellings. Lists are regions: the classes are then what the
    regions tell apart. Without lists, a glioma's parts have WT, TC, ET and RC; any other class is a region by itself.
    With nnU-Net's ``ignore`` the map stays undecided: voxels nobody annotated must not become a class; so it does
    where there is no label at all. Raises InputError for entries that are neither.

    >>> dict(from_json({"edema": 1, "enhancing": 2, "necrosis": 3}, "dataset.json").scheme.regions)
    {'WT': ('ncr', 'ed', 'et'), 'TC': ('ncr', 'et'), 'ET': ('et',)}
    """
    entries, evidence = _entries(labels, where), f"labels of {where}"
    if not entries:
        return LabelMap(_ANY, f"{where} names no labels")
    if ignored := [codes[0] for name, codes in entries.items() if _plain(name) == "ignore"]:
        return LabelMap((), f"{evidence}, {_IGNORES.format(code=ignored[0], where=where)}")
    regions = {name: tuple(codes) for name, codes in entries.items() if len(codes) > 1}
    if regions:
        # nnU-Net may write the innermost region as a single code
        regions |= {name: tuple(codes) for name, codes in entries.items() if name not in regions}
        classes = _classes_of(regions)
    else:
        plain = {_plain(name).replace(" ", "_"): codes[0] for name, codes in entries.items()}
        classes = {_PARTS.get(name.replace("_", " "), name): code for name, code in plain.items()}
        if len(classes) < len(plain):  # two codes for one part, such as necrosis beside non-enhancing tumour
            classes = plain
        if len(plain) < len(entries) or "" in plain:  # told apart by signs or capitals only
            classes = {name: codes[0] for name, codes in entries.items()}
    for known in SCHEMES.values():
        if dict(known.codes) == classes:
            return LabelMap((known.name,), f"{evidence}, the same as {known.name}", known)
    order = [c for c in SCHEMES["brats2024"].classes if c in classes] + [c for c in classes if c not in _PARTS.values()]
    by_code = {code: name for name, code in classes.items()}
    unions = {_REGION_NAMES.get(_plain(r), r): tuple(by_code[c] for c in codes) for r, codes in regions.items()}
    if len(unions) < len(regions):  # two names for one region
        unions = {r: tuple(by_code[c] for c in codes) for r, codes in regions.items()}
    scheme = LabelScheme("dataset.json", ("background", *order), classes, unions or _regions_of(order))
    return LabelMap((scheme.name,), evidence, scheme)


def patient_of(case_id: str) -> str:
    """The patient behind a case: time points and copies of one patient share it.

    >>> patient_of("BraTS-GLI-00005-101"), patient_of("BraTS-SSA-00121-000")
    ('BraTS-GLI-00005', 'BraTS-SSA-00115')
    >>> patient_of("TCGA-02-0006_1996.08.23"), patient_of("UCSF-PDGM-0138_FU003d")
    ('TCGA-02-0006', 'UCSF-PDGM-0138')
    """
    for pattern in PATIENT_PATTERNS:
        if match := re.match(pattern, case_id):
            case_id = match[1]
            break
    return SAME_PATIENT.get(case_id, case_id)


def group_of(case_id: str, folders: Iterable[str] = ()) -> str:
    """Grade where a folder above says so (HGG, LGG), else the collection or site in the id; empty where unknown.

    >>> group_of("Brats18_CBICA_AAB_1", ["MICCAI_BraTS18", "HGG"]), group_of("BraTS-SSA-00002-000")
    ('HGG', 'BraTS-SSA')
    """
    grade = next((name.upper() for name in folders if name.upper() in ("HGG", "LGG")), None)
    match = re.match(GROUP_PATTERN, case_id)
    return grade or (match[0] if match else "")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.lower().replace("tumour", "tumor").replace("oedema", "edema")).strip()


def _entries(labels: Any, where: str) -> dict[str, list[int]]:
    entries: dict[str, list[int]] = {}
    if labels is None:
        return entries
    if not isinstance(labels, Mapping):
        raise InputError(
            f'{where}: labels: found a {type(labels).__name__}; expected an object such as {{"edema": 1}}; mend it'
        )
    try:
        for key, value in labels.items():
            name, codes = (str(value), [int(key)]) if str(key).isdigit() else (str(key), value)
            codes = [int(code) for code in (codes if isinstance(codes, (list, tuple)) else [codes])]
            if codes not in ([0], []):
                entries[name] = codes
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: label {key!r}: {value!r} is neither NAME: CODE nor CODE: NAME; mend it") from error
    return entries


def _classes_of(regions: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """{class: code}: tumour parts where the regions are those of BraTS, else one nameless class a code."""
    codes = sorted({code for region in regions.values() for code in region})
    names = {_REGION_NAMES.get(_plain(name), ""): region for name, region in regions.items()}
    inside = [frozenset(name for name, region in names.items() if code in region) for code in codes]
    if len(names) == len(regions) and len(set(inside)) == len(codes) and set(inside) <= set(_NESTED):
        return {_NESTED[where]: code for where, code in zip(inside, codes, strict=True)}
    return {f"label{code}": code for code in codes}


def _regions_of(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{region: its classes}: WT, TC, ET and RC where ncr, ed and et are all there; each class left is one by itself."""
    parts = {_PARTS.get(name.replace("_", " "), name) for name in classes}
    whole = {"ncr", "ed", "et"} <= set(classes) and len(parts) == len(classes)  # no part has two codes
    known = SCHEMES["brats2024"].regions if whole else {}
    shared = {region: members for region, members in known.items() if set(members) <= set(classes)}
    inside = {name for members in shared.values() for name in members}
    return shared | {name: (name,) for name in classes if name not in inside}


OLD_IDS = r"Brats1[789]_|BraTS20_|BraTS2021_"
"""How ids of BraTS 2017–2021 begin."""

ID_RULES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"Brats1[789]_", ("brats2021",), "ids of BraTS 2017–2019"),
    (r"BraTS20_", ("brats2021",), "ids of BraTS 2020"),
    (r"BraTS2021_", ("brats2021",), "ids of BraTS 2021"),
    (r"BraTS-GLI-\d+-0\d\d", ("brats2023",), "ids BraTS-GLI-…-0xx (2023, before treatment)"),
    (r"BraTS-GLI-\d+-[1-9]\d\d", ("brats2024",), "ids BraTS-GLI-…-1xx (2024/25, after treatment)"),
    (r"BraTS-GLI-", ("brats2023", "brats2024"), "ids BraTS-GLI without a time point (2023, or 2024 after treatment)"),
    (r"BraTS-SSA-", ("brats2023",), "ids BraTS-SSA (BraTS-Africa)"),
    (r"BraTS-MEN-(?!RT)", ("brats2023",), "ids BraTS-MEN (meningioma)"),
    (r"BraTS-MET-", ("brats2023", "brats2024"), "ids BraTS-MET (label 4 since 2025 only)"),
    (r"BraTS-(PED|MEN-RT)-", (), "ids BraTS-PED or BraTS-MEN-RT, whose codes are none of the maps known here"),
)
"""(pattern of the id, maps it allows, in words); the first match counts."""

_ANY = ("brats2023", "brats2021", "brats2024", "msd")
"""What a glioma's codes may mean where nobody says."""

_YEARS = {"brats2021": ("brats2021",), "brats2023": ("brats2023", "brats2024")}

STYLE_RULES: dict[str, tuple[tuple[str, ...], str]] = {
    "brats2021": (("brats2021",), "file names _t1 _t1ce _t2 _flair (2018–2021)"),
    "brats2023": (("brats2023", "brats2021", "brats2024"), "file names -t1n -t1c -t2w -t2f (since 2023)"),
    "plain": ((), "file names of no BraTS year"),
}
"""What file names allow. Renaming a file does not change its codes, so new names rule nothing out."""

PATIENT_PATTERNS = (
    r"(BraTS-[A-Z]+(?:-RT)?-\d+)-\d+",
    r"(BraTS2021_\d+)",
    r"(Brats1[789]_.+)_\d+$",
    r"(TCGA-[A-Za-z0-9]+-[A-Za-z0-9]+)",
    r"(UPENN-GBM-\d+)_\d+",
    r"(UCSF-PDGM-\d+)",
    r"(sub-[A-Za-z0-9]+)",
)
"""What of an id is the patient; what follows is a date, a time point or a follow-up. The first match counts."""

SAME_PATIENT = {"BraTS-SSA-00121": "BraTS-SSA-00115"}
"""Patients who are in a collection under two ids. BraTS-Africa holds this one twice, segmented by two raters."""

GROUP_PATTERN = (
    r"BraTS-[A-Z]+(-RT)?(?=-\d)|BraTS20(21)?(?=_)|Brats1[789]_[A-Za-z]+|Brats1[789]_2013|TCGA|UPENN-GBM|UCSF-PDGM"
)

_IGNORES = (
    "where ignore = {code} stands for voxels that nobody annotated: medmap has no loss that leaves voxels out. "
    "Annotate them, or take ignore out of {where}; the cases that hold a {code} are then named and left out"
)
_PARTS = {
    **dict.fromkeys(
        ("ed", "edema", "peritumoral edema", "snfh", "surrounding non enhancing flair hyperintensity"), "ed"
    ),
    **dict.fromkeys(("ncr", "net", "netc", "ncr net", "necrosis", "necrotic core", "necrotic tumor core"), "ncr"),
    **dict.fromkeys(("non enhancing tumor", "non enhancing", "nonenhancing tumor", "non enhancing tumor core"), "ncr"),
    **dict.fromkeys(("et", "enhancing tumor", "enhancing", "gd enhancing tumor", "enhancing tissue"), "et"),
    **dict.fromkeys(("rc", "resection cavity"), "rc"),
}
_REGION_NAMES = {
    **dict.fromkeys(("wt", "whole tumor", "whole"), "WT"),
    **dict.fromkeys(("tc", "tumor core", "core"), "TC"),
    **dict.fromkeys(("et", "enhancing tumor", "enhancing"), "ET"),
    **dict.fromkeys(("rc", "resection cavity"), "RC"),
}
_NESTED = {
    frozenset({"WT"}): "ed",
    frozenset({"WT", "TC"}): "ncr",
    frozenset({"WT", "TC", "ET"}): "et",
    frozenset({"RC"}): "rc",
}

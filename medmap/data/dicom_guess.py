"""Which sequence a DICOM series is: a guess from its headers, with reasons and how sure it is.

Two witnesses are heard. *Words*: what people at the scanner called it. *Physics*: TR, TE, TI (ms), flip angle
(degrees) and the kind of echo. Where both agree the guess is sure, one alone makes it likely, and where they disagree
it is unsure and the words are believed, unless the image says otherwise (`medmap.data.dicom_image`). T1 is told apart
into before and after contrast agent by words, by the agent in the header, and by the order of acquisition.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medmap.data.dicom import Series

DERIVED = "derived, not as it was measured"
FEW_SLICES = 8
"""Fewer slices than this are a localiser."""


@dataclass(frozen=True)
class Guess:
    """What a series seems to be.

    name:  t1n, t1c, t2w, t2f, pd, dwi, adc, swi or other
    sure:  sure, likely or unsure
    why:   reasons, a few words each
    aside: why it is no first choice, empty where it is one: a projection or a localiser is never chosen, a derived
           image only where there is no original
    """

    name: str
    sure: str
    why: tuple[str, ...]
    aside: str = ""


def guess_all(series: Sequence[Series]) -> list[Guess]:
    """One guess a series of a study; T1 before and after contrast agent are told apart by their order as well."""
    found = [guess(each.headers, each.shape[2]) for each in series]
    given = [when(s.headers) for s, g in zip(series, found, strict=True) if g.name == "t1c" or _named_agent(s.headers)]
    ordered = [
        _in_order(i, each, series, found, min(filter(None, given), default="")) if each.name == "t1n" else each
        for i, each in enumerate(found)
    ]
    return [_tied(each, _rivals(each.name, series, ordered)) for each in ordered]


def guess(headers: Mapping[str, Any], slices: int = 20) -> Guess:
    """What one series is, by its own headers.

    >>> guess({"SeriesDescription": "AX T2 FLAIR", "EchoTime": 120.0, "InversionTime": 2500.0})
    Guess(name='t2f', sure='sure', why=('called flair', 'TI 2500, TE 120'), aside='')
    >>> guess({"SeriesDescription": "t1 mprage sag nach KM"}).name
    't1c'
    """
    text = words(headers)
    own = text.split(" | ")[0]  # a protocol is often named after the whole examination: "with and without contrast"
    said, physical = _by_words(text), _by_physics(headers)
    if said[0] in ("t2f", "t2w") and physical[1].endswith(_NO_FAT):  # "tirm" is the name of both
        said = ("other", said[1])
    why = tuple(reason for _, reason in (said, physical) if reason)
    name = said[0] or physical[0] or "other"
    torn = False
    if name == "t1":
        name, reason, torn = _agent(headers, own)
        why += (reason,) * bool(reason)
    both = bool(said[0] and physical[0])
    agree = both and physical[0] in (said[0], _NEAR.get(said[0]))
    differ = both and not agree and said[0] != "other"  # of which physics knows nothing
    if differ:
        why = (*why[:1], f"but {why[1]} is as {physical[0]}", *why[2:])
    sure = "unsure" if differ or torn or not why else "sure" if agree else "likely"
    return Guess(name, sure, why or ("nothing in the headers tells",), _aside(headers, own, slices))


def choose(
    series: Sequence[Series], guesses: Sequence[Guess], wanted: Iterable[str]
) -> tuple[dict[str, Series], list[str]]:
    """{sequence: series} for the wanted sequences that a study has, and what the user had better know, a sentence each.

    Of several an original comes before a derived image, then any guess before an unsure one, then a T1 after contrast
    agent whose header names the agent, and one before it whose header does not, then the smaller voxel.
    The finest series comes first.
    """
    chosen: dict[str, Series] = {}
    notes: list[str] = []
    for name in wanted:
        usable = sorted(
            (
                (
                    *(guess.aside == DERIVED, guess.sure == "unsure", _header_against(name, each)),
                    *(round(each.voxel_mm3, 3), guess.sure != "sure", i),
                )
                for i, (each, guess) in enumerate(zip(series, guesses, strict=True))
                if guess.name == name and not each.fault and guess.aside in ("", DERIVED)
            )
        )
        if not usable:
            continue
        best, others = usable[0][-1], [series[rank[-1]].name for rank in usable[1:]]
        chosen[name] = series[best]
        if others:
            reason = next(why for why, a, b in zip(_REASONS, usable[0], usable[1], strict=True) if a != b)
            notes.append(f"{name}: {series[best].name} is taken before {', '.join(others)}: {reason}")
        if guesses[best].sure == "unsure" or guesses[best].aside:
            doubt = guesses[best].aside or "; ".join(guesses[best].why)
            notes.append(
                f"{name}: {series[best].name} is unsure ({doubt}); look at it, or name another: --{name} SERIES"
            )
    finest = sorted(chosen, key=lambda name: round(chosen[name].voxel_mm3, 3))
    return {name: chosen[name] for name in finest}, notes


def _header_against(name: str, series: Series) -> bool:
    """Whether a header's contrast agent, or its absence, speaks against a T1's name."""
    return name in ("t1n", "t1c") and bool(_named_agent(series.headers)) != (name == "t1c")


def words(headers: Mapping[str, Any]) -> str:
    """The names people gave, in small letters without accents, signs turned to spaces.

    A minus that belongs to a contrast agent stays, as −: "C-" is without agent, and "T1-Gd" is with it.

    >>> words({"SeriesDescription": "AX_T1-Gd", "ProtocolName": "Tête"}), words({"SeriesDescription": "T1 C- (-KM)"})
    ('ax t1 gd | tete', 't1 c− −km')
    """
    named = [str(headers.get(key) or "") for key in ("SeriesDescription", "ProtocolName")]
    plain = unicodedata.normalize("NFKD", " | ".join(dict.fromkeys(part for part in named if part)).lower())
    bare = unicodedata.normalize("NFC", "".join(c for c in plain if not unicodedata.combining(c)))
    for pattern, sign in _SIGNS:
        bare = re.sub(pattern, sign, bare)
    return re.sub(r"[\s_\-.,;/()\[\]:]+", " ", bare).strip()


def when(headers: Mapping[str, Any]) -> str:
    """When it was acquired, as text that sorts; empty where nobody says."""
    time = str(headers.get("AcquisitionTime") or headers.get("SeriesTime") or headers.get("ContentTime") or "")
    if len(time.split(".")[0]) >= 14 or not time:  # a date with its time, or nothing
        return time
    return str(headers.get("AcquisitionDate") or headers.get("SeriesDate") or "") + time


# ---- the witnesses ---------------------------------------------------------------------------------------------


def _by_words(text: str) -> tuple[str, str]:
    """Sequence and reason; the description is heard first, as the protocol's name is often the whole study's."""
    for part in text.split(" | "):
        for name, pattern in WORDS:
            if found := re.search(pattern, part):
                return name, f"called {found[0].strip()}"
    return "", ""


def _by_physics(headers: Mapping[str, Any]) -> tuple[str, str]:
    """Sequence and reason, from times in ms and the kind of echo."""
    tr, te, ti, flip = (_number(headers, key) for key in ("RepetitionTime", "EchoTime", "InversionTime", "FlipAngle"))
    kind = {str(part).upper() for part in _parts(headers.get("ScanningSequence"))}
    if (headers.get("DiffusionBValue") or 0) != 0:
        return "dwi", "it has a b-value"
    if "EP" in kind:
        return "other", "echo-planar"
    if te is None:
        return "", ""
    if ti is not None and ti >= 1500 and te >= 60:
        return "t2f", f"TI {ti:g}, TE {te:g}"
    if ti is not None and 300 <= ti < 1500 and te < 35:
        return "t1", f"TI {ti:g}, TE {te:g}"
    if ti is not None and 80 <= ti < 300 and "GR" not in kind:
        return "other", f"TI {ti:g}: {_NO_FAT}"
    if tr is None:
        return "", ""
    if kind & {"GR", "GRADIENT"} and not kind & {"SE", "SPIN"}:
        if te >= 12:
            return "swi", f"gradient echo, TE {te:g}"
        return ("t1", f"gradient echo, TR {tr:g}, TE {te:g}") if flip is None or flip >= 5 else ("", "")
    if tr <= 1100 and te <= 35:
        return "t1", f"TR {tr:g}, TE {te:g}"
    if tr >= 1500 and te <= 50:
        return "pd", f"TR {tr:g}, TE {te:g}"
    return ("t2w", f"TR {tr:g}, TE {te:g}") if tr >= 1500 and te >= 60 else ("", "")


def _agent(headers: Mapping[str, Any], text: str) -> tuple[str, str, bool]:
    """t1n or t1c, the reason, and whether the words contradict each other or name both.

    Words come first, as an agent once entered stays in the headers of all series.
    """
    text, agent = _about_agent(text), _named_agent(headers)
    without, told = re.search(WITHOUT_AGENT, text), re.search(WITH_AGENT, re.sub(WITHOUT_AGENT, " ", text))
    if both := re.search(BOTH, text):
        return "t1c" if agent else "t1n", f"called {both[0].strip()}, which is both", True
    if without and told:  # "pre" may be before anything; who writes +c means the agent
        spelled = re.fullmatch(r"pre", without[0]) and re.search(SPELLED, told[0])
        return "t1c" if spelled else "t1n", f"called {without[0].strip()} and {told[0].strip()}", True
    if found := without or told:
        return "t1n" if without else "t1c", f"called {found[0].strip()}", False
    return ("t1c", f"contrast agent {agent}", False) if agent else ("t1n", "", False)


def _about_agent(text: str) -> str:
    """What people called a series, less what is before or after something else, such as an operation."""
    return re.sub(OTHER_EVENTS, " ", text.split(" | ")[0])


def _named_agent(headers: Mapping[str, Any]) -> str:
    """The contrast agent that the header names; some write there that there was none."""
    agent = ", ".join(str(part) for part in _parts(headers.get("ContrastBolusAgent"))).strip()
    return "" if re.fullmatch(r"(no(ne)?|n/?a|0|without.*|ohne.*|sans.*)", agent.lower()) else agent


def _in_order(i: int, mine: Guess, series: Sequence[Series], found: Sequence[Guess], agent: str) -> Guess:
    """A T1 that nobody calls native, put into the order of acquisition."""
    time = when(series[i].headers)
    if not time or mine.aside or re.search(WITHOUT_AGENT, _about_agent(words(series[i].headers))):
        return mine
    if agent:
        if time > agent:
            return replace(
                mine, name="t1c", sure="likely", why=(*mine.why, "acquired after a series with contrast agent")
            )
        return replace(mine, why=(*mine.why, "acquired before contrast agent"))
    again = mine
    for j, other in enumerate(found):
        twin = other.name == "t1n" and not other.aside and _same_protocol(series[i], series[j])
        if j == i or not twin or when(series[j].headers) in ("", time):
            continue
        before = when(series[j].headers) < time
        reason = f"the same was acquired {'before' if before else 'again'} as series {series[j].label}"
        again = replace(mine, sure="unsure", why=(*mine.why, reason, "no agent is named"))
        if before:
            return replace(again, name="t1c")
    return again


def _rivals(name: str, series: Sequence[Series], found: Sequence[Guess]) -> set[bool]:
    """Whether headers name an agent, over the series of one name that may be chosen."""
    return {
        bool(_named_agent(one.headers))
        for one, told in zip(series, found, strict=True)
        if told.name == name and not told.aside and not one.fault
    }


def _tied(mine: Guess, agents: set[bool]) -> Guess:
    """A T1 is not sure where another of its name has the agent in its header and it has not, or the reverse."""
    if mine.name not in ("t1n", "t1c") or mine.sure != "sure" or mine.aside or len(agents) < 2:
        return mine
    return replace(mine, sure="likely", why=(*mine.why, f"of several {mine.name} some headers name an agent"))


def _same_protocol(one: Series, two: Series) -> bool:
    """Whether two series were taken in the same way: the second is then likely the one after contrast agent."""
    times = [(_number(one.headers, key), _number(two.headers, key)) for key in ("RepetitionTime", "EchoTime")]
    alike = all(a is not None and b is not None and abs(a - b) <= 0.1 * a for a, b in times)
    if not alike or len(one.orientation) != len(two.orientation):
        return False
    return all(abs(a - b) < 0.3 for a, b in zip(one.orientation, two.orientation, strict=True))


def _aside(headers: Mapping[str, Any], text: str, slices: int) -> str:
    kind = [str(part).upper() for part in _parts(headers.get("ImageType"))]
    if found := re.search(LOCALISER, text):
        return f"a localiser ({found[0].strip()})"
    if "LOCALIZER" in kind:
        return "a localiser"
    if slices < FEW_SLICES:
        return f"only {slices} slices"
    if part := next((part for part in kind if part in _PROJECTIONS), None):
        return f"a projection or map ({part})"
    body = str(headers.get("BodyPartExamined") or "").upper()
    if re.search("SPINE|NECK|ABDOMEN|CHEST|KNEE|PELVIS", body):
        return f"of another part of the body ({body.lower()})"
    return DERIVED if {"DERIVED", "SECONDARY"} & set(kind[:2]) else ""


def _parts(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _number(headers: Mapping[str, Any], key: str) -> float | None:
    """A time above 0; some scanners write 0 for what does not apply."""
    value = next(iter(_parts(headers.get(key))), None)
    return float(value) if isinstance(value, float | int) and value > 0 else None


WORDS: tuple[tuple[str, str], ...] = (
    ("adc", r"\be?adc\b|apparent diff"),
    ("dwi", r"\bdwi|diffusion|\bdiff\b|\bdti\b|\btracew?\b|\bb ?(500|800|1000|2000)\b"),
    ("swi", r"\bswi|\bswan\b|susceptib|venobold|t2 ?\*|t2 ?star|\bt2 (ge|gre|ffe|fl2d|hemo)|\bhemo\b"),
    (
        "other",
        r"\b(perf|dsc|dce|asl|pcasl|bold|fmri|tof|mra|mrv|angio|venogra|mrs|svs|csi|press|spectro|r?cb[fv]|mtt|ttp|tmax)"
        r"|subtra|\bsub\b|\bstir\b|field ?map|calibrat|\basset\b|phase ?map|screen|\bmip\b|\bfa\b|colou?r|\bb0 ?map"
        r"|\bciss\b|\bfiesta\b|survey|scout|locali[sz]er|\bloc\b",
    ),
    ("t1", r"\bt1 ?(w )?(flair|fl\b|tirm|ir\b)|flair t1\b"),
    ("t2f", r"flair|dark ?fluid|\bda ?fl\b|fluid att|tirm"),
    ("pd", r"\bpdw?\b|proton|\bdp\b"),
    ("t1", r"\bt1"),
    ("t2w", r"\bt2"),
    ("t1", r"mp ?rage|\bmpr\b|\bbravo\b|f?spgr|\btfl|\btfe\b|\bvibe|flash|thrive"),
)
"""(sequence, words of a series' name), asked in this order: FLAIR is also called T2, and T1-FLAIR is T1."""

_SIGNS = (
    (r"[\u2010-\u2015\u2212]", "-"),
    (r"\+ ?/ ?-|±", " ± "),
    (r"(?<![a-z0-9+])(t1 ?)?(c|ce|gd|km|k)-(?=[\s_.,;/()\[\]:|]|$)", r"\1\2− "),
    (r"(?<![a-z0-9+-])-(?=(c|ce|gd|km|k)(?![a-z0-9+-]))", " −"),
)
"""(pattern, what stands for it): the minus of "C-" and "-C", which no separator of words may swallow."""

_AGENT = r"(gado?\w*|gd|km|kl|k m|k l|kontrast\w*|contrast\w*|injection|inj|civ|mdc|pdc)"
_WITHOUT = r"(w ?o|without|ohne|sans|sin|senza|sem|bez|zonder|utan)"
_WITH = r"(w|with|mit|avec|con|com|met|med|z|s)"
_AND = r" ?(&|\+|and|und|et|y|e|en|och|i|or|oder|ou)? ?"
BOTH = rf"±|\b{_WITH}{_AND}{_WITHOUT}\b|\b{_WITHOUT}{_AND}{_WITH}\b(?! ?o\b)"
"""Of a whole examination: before and after contrast agent."""
OTHER_EVENTS = (
    r"\b(pre|post|pra|prae) ?(((op|rtx?|rx|tx|bx|gk|srs)\b)"
    r"|(operat|rad|surg|chir|crani|biops|chemo|proc|treat|ther|resec|embol|trauma)\w*)"
)
"""Before and after something that is no contrast agent."""
WITHOUT_AGENT = (
    rf"\b(w ?o|without|non?|pre|ohne|vor|sans|avant|sin|senza|sem|bez|zonder|voor|utan|prima) ?(d[ie] )?({_AGENT}|iv)\b"
    r"|\bpre\b|\bnativ\w*|unenhanced|\bplain\b|\bw ?o\b|без контр\w*|平扫|単純"
    r"|−(c|ce|gd|km|k)\b|\b(t1 ?)?(c|ce|gd|km|k)−"
)
"""Before contrast agent, in the abbreviations of several languages."""
WITH_AGENT = (
    r"\bpost(?!er)|\bpos\b|\+ ?(c|ce|gd|km|k|civ)\b|\b(t1)?(c|ce|gd|km|k) ?\+|\bce\b|t1 ?(ce|c|gd|km)\b|enhanced"
    rf"|\b((nach|mit|with|w|apres|avec|con|dopo|com|na|met|po|efter|med|after) ?)?{_AGENT}\b"
    r"|с контр\w*|после к\w*|造影|增强|増強|조영"
)
"""After contrast agent."""
SPELLED = rf"\+|{_AGENT}|\bce\b|\bt1 ?c\b"
"""The agent itself, and not only "post"."""
LOCALISER = r"locali[sz]er|\bloc\b|scout|survey|3 ?plane|\btriplane|smartbrain|aahead|reperage|lokali"
_PROJECTIONS = (
    *("PROJECTION IMAGE", "MIP", "MNIP", "MIN IP", "MAX IP", "MINIP", "SUBTRACTION", "SUB", "FA", "PHASE MAP", "P"),
    *("ADC", "PERFUSION", "RCBV", "RCBF", "MTT", "TTP"),
)
_REASONS = (
    "it is no derived image",
    "its guess is surer",
    "its header speaks of the contrast agent as its name does",
    "its voxels are smaller",
    "its guess is surer",
    "it comes first",
)
_NO_FAT = "fat is suppressed"
_NEAR = {"dwi": "other", "adc": "other", "swi": "other"}
"""What echo-planar images may be called as well."""

"""Which sequence a DICOM series is, from its image, where the headers leave that open.

The image is asked as `medmap.data.sequences` asks one: of skull-stripped brains alone, and what it knows are t1n, t1c,
t2w and t2f. So headers that tell are believed, and an image speaks only where they tell nothing or quarrel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medmap.core.modality import GLIOMA_MRI
from medmap.data.dicom import Series
from medmap.data.dicom_guess import DERIVED, Guess
from medmap.data.nifti import read_volume
from medmap.data.sequences import guess
from medmap.data.views import View
from medmap.errors import InputError

SURE = 0.5
"""An answer less probable than this is none; one that is more probable is so than all others together."""
_T1 = {"t1n", "t1c"}


def by_image(series: Sequence[Series], guesses: Sequence[Guess], file: Callable[[Series], Path]) -> list[Guess]:
    """The guesses from headers, mended by images where they are open: one a series, each with its reason.

    file: converts a series to NIfTI

    A series is open where its guess is unsure, and of `GLIOMA_MRI` or of nothing at all. An image that agrees with the
    words makes a guess likely; one that overrules them, or is all there is, leaves it unsure, and people are told to
    look at it.
    """
    found = list(guesses)
    views: dict[int, View] = {}
    for place in _open(series, guesses):
        view = _view(series[place], file)
        if isinstance(view, View):
            views[place] = view
        else:
            found[place] = _because(found[place], view)
    for place, answer in _answers(views).items():
        found[place] = _mended(found[place], *answer)
    return found


def _open(series: Sequence[Series], guesses: Sequence[Guess]) -> list[int]:
    """Where the series stand whose image is to be asked."""
    return [
        i
        for i, (each, told) in enumerate(zip(series, guesses, strict=True))
        if told.sure == "unsure"
        and told.name in (*GLIOMA_MRI, "other")
        and told.aside in ("", DERIVED)
        and not each.fault
    ]


def _view(series: Series, file: Callable[[Series], Path]) -> View | str:
    """The image as the eye takes it in, or why it cannot be asked."""
    try:
        view = View.of(*read_volume(file(series)))
    except InputError:
        return "its image cannot be read"  # who uses the series is told why
    return view or "its image is not asked: no skull-stripped brain"


def _answers(views: Mapping[int, View]) -> dict[int, tuple[str, float, bool]]:
    """What each image is, how probable that is, and whether two T1 images were compared to say so.

    Images of one study are taken for different sequences; what one alone looks like must be of the same kind, as
    there may be two of a kind, and the second would be given the name that is left.
    """
    if not views:
        return {}
    together, alone = guess(views), guess(views, distinct=False)
    shapes = [views[i].values.shape for i, (name, _) in together.items() if name in _T1]
    compared = len(views) <= len(GLIOMA_MRI) and len(shapes) == 2 and shapes[0] == shapes[1]  # more stand alone
    return {
        i: (name, chance if _kind(name) == _kind(alone[i][0]) else 0.0, compared)
        for i, (name, chance) in together.items()
    }


def _mended(told: Guess, name: str, chance: float, compared: bool) -> Guess:
    if chance < SURE or name not in GLIOMA_MRI:
        return _because(told, "its image does not tell")
    if {name, told.name} == _T1 and not compared:  # the agent is hard to see in one image alone
        name = told.name
    looks = _because(told, f"from the image: {100 * chance:.0f} % {name}")
    return replace(looks, name=name, sure="likely" if name == told.name else "unsure")


def _because(told: Guess, reason: str) -> Guess:
    return replace(told, why=(*told.why, reason))


def _kind(name: str) -> str:
    return "t1" if name in _T1 else name

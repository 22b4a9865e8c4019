"""The questions, a file each; `medmap study --list` shows them."""

from __future__ import annotations

import pkgutil
from difflib import get_close_matches
from importlib import import_module

from medmap.errors import InputError
from medmap.evidence.plan import Study


def study_names() -> list[str]:
    """Names of all studies."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def study_named(name: str) -> Study:
    """A study by its name. Raises InputError for an unknown one, with the nearest."""
    names = study_names()
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"study {name!r} is not known; {hint}expected one of {', '.join(names)}")
    study: Study = import_module(f"{__name__}.{name}").STUDY
    return study

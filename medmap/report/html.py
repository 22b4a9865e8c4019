"""What every page shares: templates filled in, one file written, no folder of this machine named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from medmap import __version__
from medmap.card import fraction
from medmap.data.whole import whole
from medmap.errors import InputError
from medmap.figures.style import label, number


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled in; ``version`` and the filters ``label``, ``number`` and ``dice`` are always
    there."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medmap.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"label": label, "number": number, "dice": fraction}
    return environment.get_template(template).render(version=__version__, **values)


def part(name: str) -> Markup:
    """A style sheet or a script of this folder, to stand in a page as it is."""
    return Markup(resources.files("medmap.report").joinpath(name).read_text(encoding="utf-8"))


def page_name(out: Path) -> None:
    """Raises InputError unless ``out`` can be the name of a page: it must take the place of no mask or image."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: pages are written as .html (or .htm); give it such a name, -o {out}.html")


def write_page(page: str, out: Path) -> Path:
    """Write a page, whole or not at all; returns ``out``. Raises InputError where it cannot be written, or is no name
    of a page."""
    page_name(out)
    try:
        with whole(out) as (fresh,):
            fresh.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{out}: the report cannot be written ({error.strerror}); name a file in a folder you may write to: -o FILE"
        ) from error
    return out


_PLACE = re.compile(r"""(?<![^\s='"(\[,;])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s'",;)\]]+""")


def unplaced(value: Any) -> Any:
    """The value with every path cut down to its last name: a report is passed on, a user's folders are not.

    >>> unplaced({"store": "/home/ann/stores/glioma", "run": "medmap train -o ../x/y", "ratio": "n/a"})
    {'store': 'glioma', 'run': 'medmap train -o y', 'ratio': 'n/a'}
    """
    if isinstance(value, Mapping):
        return {key: unplaced(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [unplaced(item) for item in value]
    if isinstance(value, str):
        return _PLACE.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], value)
    return value

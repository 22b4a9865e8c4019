"""Docstrings of medmap as Markdown, for the Python reference; mkdocstrings loads this, see mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is shown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Examples → blocks of code, lines ``name: meaning`` → a list, a closing ``::`` → a colon.

    >>> print(as_markdown("Add.\\n\\na: first\\nb: other,\\n   as a\\n\\n>>> 1 + 1\\n2"))
    Add.
    <BLANKLINE>
    - `a`: first
    - `b`: other, as a
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text))


def _paragraph(part: str) -> str:
    words, sign, example = part.partition(">>>") if re.search(r"^>>>", part, re.MULTILINE) else (part, "", "")
    if sign:
        return (f"{_paragraph(words.rstrip())}\n\n" if words else "") + f"```pycon\n{sign}{example}\n```"
    lines = part.split("\n")
    if all(NAMED.match(line) or line.startswith("  ") for line in lines) and NAMED.match(lines[0]):
        whole = re.sub(r"\n {2,}", " ", part)
        return "\n".join(f"- `{line.split(':')[0]}`: {line.split(':', 1)[1].strip()}" for line in whole.split("\n"))
    return f"{part[:-1]}" if part.endswith("::") else part


NAMED = re.compile(r"[a-z_]\w*(, [a-z_]\w*)*: +\S")
"""A line that explains an argument or a member, or several."""

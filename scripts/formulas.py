"""Formulas for `mkdocs build`: blocks ```math → MathML, which browsers draw by themselves, without a script.

In the repository the same blocks are drawn by what shows Markdown there. mkdocs.yml names this file beside pages.py.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called for every page.

    >>> on_page_markdown("```math\\nx^2\\n```")[:46]
    '<div class="formula" style="overflow-x: auto">'
    """
    return re.sub(r"^```math\n(.*?)^```$", _drawn, markdown, flags=re.DOTALL | re.MULTILINE)


def _drawn(match: re.Match[str]) -> str:
    formula = convert(" ".join(match[1].split()), display="block")
    return f'<div class="formula" style="overflow-x: auto">{formula}</div>'

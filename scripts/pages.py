"""What `mkdocs build` is told beyond mkdocs.yml: pages that lie outside docs/, and the page of the commands.

The pages are written to be read in the repository, so their links lead from file to file there. In the site README.md
is the first page, and a file that is no page is copied as text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "medmap/weights/phantom/card.md": "card.md",
}
"""{page of the repository outside docs/: its name in the site}"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the pages from elsewhere, the page of the commands, and what all of them link to."""
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    for name, source in sorted(_attached(files)):
        files.append(File.generated(config, name, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from file to file → links from page to page."""
    return relinked(markdown, page.file.src_uri)


# ---- links ------------------------------------------------------------------------------------------------------


def relinked(markdown: str, name: str) -> str:
    """A page of the site whose links lead to pages of the site; a link to a folder becomes plain words.

    >>> relinked("See [the first page](../README.md#install).", "data.md")
    'See [the first page](index.md#install).'
    """
    here = posixpath.dirname(name)

    def changed(words: str, link: str) -> str:
        file, sign, anchor = link.partition("#")
        target = _target(file, name)
        if target is None:
            return words
        return f"[{words}]({posixpath.relpath(target, here or '.')}{sign}{anchor})"

    return _each_link(markdown, changed)


def _target(file: str, name: str) -> str | None:
    """What a link of a page leads to, as a name of the site; None for a folder."""
    source = _source(file, name)
    if source in ELSEWHERE:
        return ELSEWHERE[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if not (ROOT / source).is_file():
        return None
    return f"files/{source}" if source.endswith(".png") else f"files/{source}.txt"  # shown everywhere, never executed


def _source(file: str, name: str) -> str:
    """The same, as a path in the repository."""
    origin = next((path for path, own in ELSEWHERE.items() if own == name), f"docs/{name}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), file))


def _attached(files: Files) -> set[tuple[str, str]]:
    """(name in the site, path in the repository) of every file that is linked and is no page."""
    found = set()

    def noted(name: str) -> Callable[[str, str], str]:
        def note(words: str, link: str) -> str:
            file = link.partition("#")[0]
            target = _target(file, name)
            if target is not None and target.startswith("files/"):
                found.add((target, _source(file, name)))
            return words

        return note

    for page in files.documentation_pages():
        _each_link(page.content_string, noted(page.src_uri))
    return found


def _each_link(markdown: str, changed: Callable[[str, str], str]) -> str:
    """Put changed(words, link) in the place of every link to another file; code stays as it is."""

    def one(match: re.Match[str]) -> str:
        words, link = match[1], match[2]
        return match[0] if "://" in link or link.startswith("#") else changed(words, link)

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    pieces[::2] = [re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", one, piece) for piece in pieces[::2]]
    return "".join(pieces)


# ---- commands ---------------------------------------------------------------------------------------------------


def commands() -> str:
    """The page of the commands: what each verb's --help says, with one table of options a verb."""
    import typer

    from medmap.cli import app

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="medmap")
    head = ["# Commands", "Made from `--help` of every verb.", _paragraphs(group.help), _paragraphs(group.epilog)]
    parts = [part for name in group.commands for part in _verb(group.commands[name], name, context)]
    return "\n\n".join([*head, _options(group, context), *parts]) + "\n"


def _verb(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = type(parent)(command, info_name=name, parent=parent)
    usage = " ".join([f"medmap {name}", *command.collect_usage_pieces(context)])
    yield f"## medmap {name}"
    yield f"```text\n{usage}\n```"
    yield _paragraphs(command.help)
    yield _options(command, context)


def _options(command: Any, context: Any) -> str:
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    lines = [f"| `{name}` | {_cell(text)} |" for name, text in filter(None, records)]
    return "\n".join(["| option | meaning |", "|---|---|", *lines])


def _cell(text: str) -> str:
    """Text that breaks no table and starts no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _paragraphs(text: str) -> str:
    """Paragraphs of a help; an example of a call stands in a block.

    >>> print(_paragraphs("Do it.\\n\\nmedmap do it"))
    Do it.
    <BLANKLINE>
    ```text
    medmap do it
    ```
    """
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(f"```text\n{part}\n```" if part.startswith("medmap ") else part for part in parts)

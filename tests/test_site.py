"""The site of the documentation: complete, current, and without a word loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import typer

import medmap
from medmap.cli import app

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def script(name: str, needs: str) -> ModuleType:
    """A file of scripts/, which is no package."""
    pytest.importorskip(needs, reason="the site is made with the extra docs")
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    return script("pages", "mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: a warning ends the build."""
    pytest.importorskip("mkdocs", reason="the site is made with the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Loads(HTMLParser):
    """Notes what a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert len(loads.found) > 3, page
        assert [url for url in loads.found if re.match(r"\w+:(?!image)|//", url)] == [], page


@pytest.mark.parametrize("name", ["method", "theory"])
def test_formulas_are_drawn_without_a_script(site: Path, name: str) -> None:
    written = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").count("```math")
    shown = (site / f"{name}.html").read_text(encoding="utf-8")
    assert shown.count("<math") == written > 4
    assert not re.search(r"\\[a-zA-Z]{2,}", re.sub(r"<(script|code).*?</\1>", "", shown, flags=re.DOTALL))


def test_the_reference_has_every_public_name(site: Path) -> None:
    shown = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in set(medmap.__all__) - {"__version__"}:
        assert re.search(rf'id="medmap\.[\w.]*\b{name}"', shown), name
    assert "&gt;&gt;&gt;" in shown
    assert "<blockquote>" not in shown  # what Markdown would make of an example


def test_the_reference_has_every_command_and_option(pages: ModuleType) -> None:
    text = pages.commands()
    for verb, command in COMMANDS.items():
        part = text.partition(f"## medmap {verb}\n")[2].partition("\n## ")[0]
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        assert shown, verb
        for option in (option for parameter in shown for option in parameter.opts if option.startswith("-")):
            assert re.search(rf"^\| `.*{option}\b", part, re.MULTILINE), f"{verb} {option}"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("index.md", "[a](docs/data.md#layouts)", "[a](data.md#layouts)"),
        ("index.md", "![a](docs/demo.png)", "![a](demo.png)"),
        ("index.md", "[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("index.md", "[a](configs/paper)", "a"),
        ("index.md", "[a](LICENSE)", "[a](files/LICENSE.txt)"),
        ("tutorials/patient.md", "[a](../../README.md#numbers)", "[a](../index.md#numbers)"),
        ("data.md", "[a](#b) [c](https://arxiv.org/d)", "[a](#b) [c](https://arxiv.org/d)"),
        ("data.md", "```python\nf[x](../README.md)\n```", "```python\nf[x](../README.md)\n```"),
    ],
)
def test_links_between_files_become_links_between_pages(pages: ModuleType, name: str, before: str, after: str) -> None:
    assert pages.relinked(before, name) == after


def test_docstrings_become_markdown() -> None:
    text = script("docstrings", "griffe").as_markdown(
        "Add. So::\n\n    a + b\n\na:  first\nb, c: others,\n   as a\n\nRaises X: never.\n>>> 1 + 1\n2"
    )
    assert text.split("\n\n") == [
        "Add. So:",
        "    a + b",
        "- `a`: first\n- `b, c`: others, as a",
        "Raises X: never.",
        "```pycon\n>>> 1 + 1\n2\n```",
    ]

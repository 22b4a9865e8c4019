"""The tutorials, done as they are written: every shell line and every block of Python, in order, in an empty folder.

Only training is cut short, to a few steps.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from medmap import models
from medmap.cli import app

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))


def steps(text: str) -> list[tuple[str, str, str]]:
    """(file, language, code) of the fenced blocks, in order; the file is the one that the sentence before names."""
    return re.findall(r"(?:file `(\w+\.py)`:\n\n)?^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_line(line: str) -> None:
    """A line of a shell block, in this process: torch is imported once for all of them."""
    name, *words = shlex.split(re.sub(r"(?<=\btrain\.steps=)\d+", "4", line))
    assert name == "medmap", f"a tutorial has medmap's commands only, for this test runs no others: {line}"
    with pytest.raises(SystemExit) as ended:
        app(words, prog_name="medmap")
    assert not ended.value.code, f"{line} ended with {ended.value.code}"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_step_of_a_tutorial_works(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra, package in (("train", "lightning_fabric"), ("report", "matplotlib")):
        pytest.importorskip(package, reason=f"the tutorials need the extra {extra}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "BACKBONES", dict(models.BACKBONES))  # a tutorial may add one
    names: dict[str, Any] = {}
    for file, language, code in steps(path.read_text(encoding="utf-8")):
        if file:
            (tmp_path / file).write_text(code, encoding="utf-8")
        if language == "python":
            exec(compile(code, path.name, "exec"), names)
        else:
            assert language == "sh", f"a block of {language} is not run"
            for line in code.replace("\\\n", " ").splitlines():
                run_line(line)


def test_a_step_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="ended with 1"):
        run_line("medmap check NOWHERE")


def test_a_block_is_written_to_the_file_that_is_named() -> None:
    assert steps("In a file `a.py`:\n\n```python\nx = 1\n```\n\n```sh\nls\n```\n") == [
        ("a.py", "python", "x = 1\n"),
        ("", "sh", "ls\n"),
    ]

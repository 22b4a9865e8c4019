"""Calls of the command line inside a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import TINY_RECIPE
from typer.testing import CliRunner, Result

from medmap.cli import app


def call(*words: object) -> Result:
    """One call of the command in this process; a traceback fails the test at once."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="medmap")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def works(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*words: object, code: int = 1) -> str:
    """What a call that must fail says on stderr."""
    result = call(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    return " ".join(result.stderr.split())


def answer(*words: object) -> Any:
    return json.loads(works(*words, "--json"))


def train(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    """The words that train the smallest run there is."""
    return ("train", "-d", data, "-o", out, "--device", "cpu", "--set", *TINY_RECIPE, *more)

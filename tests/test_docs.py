"""Documentation that is held to the code: links, names, commands, settings, examples, and what it may not say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import typer
import yaml

import medmap
from medmap.cli import app
from medmap.config import AlignConfig, Config, ModelConfig, SamplingConfig, load_config
from medmap.core.labels import SCHEMES
from medmap.core.metrics import CONVENTIONS, METRICS
from medmap.core.modality import GLIOMA_MRI
from medmap.data.faults import SEVERITY
from medmap.data.layouts import FAMILIES
from medmap.data.splits import published, published_names
from medmap.models.check import LAWS
from medmap.models.unet import SIZES, UNet
from medmap.scores import Score

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
HOSTS = {"arxiv.org", "github.com"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language, each command on one line."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r" \\\n *", " ", block) for block in found] if language == "sh" else found


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the tables, without the code signs."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|---"):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text: str) -> list[list[str]]:
    """Words of every medmap command in a page: in shell blocks, and inline where more than the name is given."""
    lines = [line.strip() for block in blocks(text, "sh") for line in block.splitlines()]
    found = [line for line in [*lines, *spans(text)] if line.startswith("medmap ")]
    return [shlex.split(line) for line in found]


# ---- links ------------------------------------------------------------------------------------------------------


@page
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8")))
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT), f"{path.name}: {link} leaves the repository"
        assert target.exists(), f"{path.name}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: no heading for {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    """But for what studies found: the page about studies lists those."""
    readme, studies = text_of("README.md"), text_of("docs/studies.md")
    for path in PAGES[1:]:
        name = path.relative_to(ROOT).as_posix()
        listed = f"]({path.relative_to(ROOT / 'docs').as_posix()})" in studies if "/studies/" in name else False
        assert listed or f"]({name})" in readme, path


def test_the_picture_is_a_small_png() -> None:
    picture = ROOT / "docs" / "demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 300_000


# ---- commands ---------------------------------------------------------------------------------------------------


@page
def test_every_command_and_option_exists(path: Path) -> None:
    for _, verb, *words in command_lines(path.read_text(encoding="utf-8")):
        if verb.startswith("-"):
            continue
        assert verb in COMMANDS, f"{path.name}: medmap {verb}"
        known = {option for parameter in COMMANDS[verb].params for option in parameter.opts}
        for word in (word for word in words if word.startswith("-")):
            assert word in known | {"--help", "--debug"}, f"{path.name}: medmap {verb} {word}"


def test_the_readme_names_every_command() -> None:
    listed = {cells[0] for cells in rows(text_of("README.md"))}
    assert {f"`medmap {verb}`" for verb in COMMANDS} <= listed


@page
def test_every_required_option_is_given(path: Path) -> None:
    shell = [line for block in blocks(path.read_text(encoding="utf-8"), "sh") for line in block.splitlines()]
    for _, verb, *words in (shlex.split(line) for line in shell if line.strip().startswith("medmap ")):
        for parameter in COMMANDS[verb].params:
            if parameter.required and parameter.param_type_name == "option":
                assert set(parameter.opts) & set(words), f"{path.name}: medmap {verb} lacks {parameter.opts}"


@page
def test_every_setting_in_a_command_is_one(path: Path) -> None:
    for words in command_lines(path.read_text(encoding="utf-8")):
        settings = [word for word in after_set(words) if "$" not in word and not word.isupper()]
        load_config(None, settings)


def after_set(words: list[str]) -> list[str]:
    """The settings of a command line: the words with a = that follow --set."""
    found: list[str] = []
    inside = False
    for word in words:
        inside = word == "--set" or (inside and "=" in word and not word.startswith("-"))
        found += [word] if inside and word != "--set" else []
    return found


def test_settings_are_found_in_a_command() -> None:
    words = shlex.split("medmap train --set a=1 b.c=2 -o RUN --fold all --set d=[x]")
    assert after_set(words) == ["a=1", "b.c=2", "d=[x]"]


def test_the_chinese_page_has_commands_of_the_readme() -> None:
    known = {line.strip() for block in blocks(text_of("README.md"), "sh") for line in block.splitlines()}
    lines = [line.strip() for block in blocks(text_of("docs/zh.md"), "sh") for line in block.splitlines()]
    assert len(lines) > 10
    assert [line for line in lines if line not in known] == []


# ---- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_the_published_configuration_says_what_each_line_is() -> None:
    for line in text_of("configs/published.yaml").splitlines():
        assert line.startswith("#") or line.endswith(":") or "  # " in line, line


def test_the_published_configuration_switches_on_every_published_option() -> None:
    config = load_config(ROOT / "configs" / "published.yaml")
    assert (config.align.fill, config.align.scale_at_test, config.sampling.per) == ("seen", True, "batch")
    first = load_config(ROOT / "configs" / "published.yaml", header_settings("configs/published.yaml"))
    assert (first.model.stem, first.model.stem_published, first.align.levels) == ("joint", True, ("stem",))
    assert (first.align.weights, first.align.fill, first.align.scale_at_test) == ("ratio", "none", False)
    # what either form has, no default has
    default = Config()
    assert default.align.fill == AlignConfig().fill == "none"
    assert (default.align.weights, default.align.scale_at_test) == ("softmax", False)
    assert (SamplingConfig().per, ModelConfig().stem_published) == ("sample", False)


def header_settings(name: str) -> list[str]:
    """The settings that the comment at the head of a configuration names."""
    head = " ".join(line[1:] for line in text_of(name).splitlines() if line.startswith("#"))
    return re.findall(r"--set (\S+=[^\s.]+)", head)


def every_key() -> Iterator[tuple[str, Any]]:
    for section, value in Config().model_dump(mode="json").items():
        for key, default in value.items() if isinstance(value, dict) else [(None, value)]:
            yield section if key is None else f"{section}.{key}", default


def test_training_explains_every_key_with_its_default() -> None:
    table = {cells[0]: cells for cells in rows(text_of("docs/training.md"))}
    for key, default in every_key():
        shown = default if isinstance(default, str) and default else json.dumps(default)
        assert f"`{key}`" in table, key
        assert table[f"`{key}`"][1] == f"`{shown}`", key
        assert table[f"`{key}`"][2].strip(), key


@page
def test_every_key_that_is_named_exists(path: Path) -> None:
    known = {key for key, _ in every_key()}
    sections = {key.partition(".")[0] for key in known if "." in key}
    for span in spans(path.read_text(encoding="utf-8")):
        name = re.fullmatch(r"([a-z]+\.[a-z_0-9]+)(?:[:=].*)?", span)
        if name and name[1].partition(".")[0] in sections and not name[1].endswith((".py", ".yaml")):
            assert name[1] in known, f"{path.name}: {span}"


# ---- architecture -----------------------------------------------------------------------------------------------


def modules() -> set[str]:
    """Every Python file of the package, as seen from it."""
    here = ROOT / "medmap"
    return {path.relative_to(here).as_posix() for path in here.rglob("*.py") if "__pycache__" not in path.parts}


def test_architecture_names_every_room() -> None:
    named = {span for cells in rows(text_of("docs/architecture.md")) for span in spans(cells[0])}
    tops = {path.split("/")[0] for path in modules()} - {"__init__.py", "__main__.py"}
    rooms = {name.split("/")[0] for name in named}
    assert sorted(tops - rooms) == []


@page
def test_no_module_is_named_that_does_not_exist(path: Path) -> None:
    for span in spans(path.read_text(encoding="utf-8")):
        name = span.removeprefix("medmap/")
        if re.fullmatch(r"[a-z_/0-9]+\.py", name) and not name.startswith("tests/"):
            assert name in modules() or name in FILES_OF_USERS, f"{path.name}: {span}"
        elif re.fullmatch(r"(medmap/)?[a-z_]+/", span) and not (ROOT / span).is_dir():
            assert (ROOT / "medmap" / name).is_dir() or name in FOLDERS_OF_USERS, f"{path.name}: {span}"


FOLDERS_OF_USERS = ("ssa-2mm/", "HGG/", "LGG/", "labelsTr/")
FILES_OF_USERS = ("mynet.py",)


def test_the_stairs_are_those_that_the_linter_holds() -> None:
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    (drawn,) = blocks(text_of("docs/architecture.md"), "stairs")
    assert drawn.split("\n")[:-1] == layers


def test_architecture_names_tables_that_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "medmap").rglob("*.py")]
    tables = {
        name for cells in rows(text_of("docs/architecture.md")) for name in re.findall(r"`([A-Z]{4,})`", cells[1])
    }
    assert tables
    for table in tables:
        assert any(re.search(rf"^{table}\b.* = ", source, re.MULTILINE) for source in sources), table


# ---- tables of other pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("docs/data.md", FAMILIES),
        ("docs/data.md", SCHEMES),
        ("docs/data.md", SEVERITY),
        ("docs/evaluation.md", METRICS),
        ("docs/evaluation.md", CONVENTIONS),
        ("docs/evaluation.md", Score._fields),
    ],
)
def test_tables_are_complete(name: str, words: Iterable[str]) -> None:
    named = {span for cells in rows(text_of(name)) for span in spans(cells[0])}
    assert set(words) <= {re.split(r"[: ]", span)[0] for span in named}


def test_faults_have_the_severity_that_is_said() -> None:
    table = {spans(cells[0])[0]: cells[1] for cells in rows(text_of("docs/data.md")) if spans(cells[0])}
    assert {kind: table[kind] for kind in SEVERITY} == SEVERITY


def test_published_lists_are_as_said() -> None:
    table = {spans(cells[0])[0]: cells for cells in rows(text_of("docs/data.md")) if spans(cells[0])}
    for name in published_names():
        facts = json.loads(text_of(f"medmap/data/published/{name}.json"))
        sizes = " / ".join(str(len(facts[part])) for part in ("train", "val", "test"))
        split = published(name, [case for part in ("train", "val", "test") for case in facts[part]])
        assert table[name][1:] == [sizes, f"`{split.sha256[:12]}…`"]


def test_the_overlap_of_the_brats2018_lists_is_as_said() -> None:
    tests = [set(json.loads(text_of(f"medmap/data/published/brats2018-list{n}.json"))["test"]) for n in (1, 2, 3)]
    overlaps = [len(tests[a] & tests[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    a, b, c = overlaps
    said = re.sub(r"\s+", " ", text_of("docs/data.md"))
    assert f"overlap (by {a}, {b} and {c} cases; together they hold {len(set.union(*tests))} of 285)" in said


def test_the_number_of_laws_is_as_said() -> None:
    assert f"to {NUMBERS[len(LAWS)]} laws" in text_of("CHANGELOG.md")


NUMBERS = {9: "nine", 10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen"}


def test_the_sizes_of_the_network_are_as_said() -> None:
    said = dict(re.findall(r"`(\w+)` ([\d.]+) M\b", text_of("docs/training.md")))
    assert set(said) == set(SIZES)
    for size, millions in said.items():
        found = sum(p.numel() for p in UNet(GLIOMA_MRI, classes=4, size=size).parameters()) / 1e6
        assert f"{found:.1f}".removesuffix(".0") == millions or f"{found:.0f}" == millions, size


# ---- examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name != "tutorials"], ids=lambda path: path.name)
def test_python_examples_run(path: Path) -> None:  # those of tutorials stand between commands: test_tutorials.py
    names: dict[str, Any] = {}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        exec(compile(block, path.name, "exec"), names)


def test_the_readme_has_an_example_that_fits_on_a_screen() -> None:
    (example,) = blocks(text_of("README.md"), "python")
    assert "check_backbone(" in example
    assert len(example.splitlines()) < 40


# ---- the rest ---------------------------------------------------------------------------------------------------


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The medmap developers"}]
    assert str(citation["version"]) == medmap.__version__
    assert citation["license"] == tomllib.loads(text_of("pyproject.toml"))["project"]["license"]


def test_the_changelog_knows_the_version() -> None:
    assert re.search(rf"^## .*\b{re.escape(medmap.__version__)}\b", text_of("CHANGELOG.md"), re.MULTILINE)


WRITTEN = [*PAGES, *CONFIGS, ROOT / "CITATION.cff"]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_nothing_points_to_a_machine_or_an_unknown_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    hosts = {urlparse(url).hostname for url in re.findall(r"https?://[^\s)\]>\"]+", text)}
    assert hosts <= HOSTS
    assert not re.findall(r"(?<![\w.\])}*])/[a-z]\w+/\w+", text.replace("#!/bin/bash", "")), "an absolute path"
    unlinked = re.sub(r"\]\([^)]*\)", "]", text)  # where links lead is tested above
    assert not re.findall(r"\.\./\.\./|\.\./shared", unlinked), "a path out of the repository"
    assert not re.findall(r"\b(TODO|TBD|FIXME|lorem|placeholder)\b", text, re.IGNORECASE)


def test_the_picture_can_be_drawn_again(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "picture.py"
    found = subprocess.run(
        [sys.executable, str(script), "nowhere", "x.png"], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "ImportError" not in found.stderr

from __future__ import annotations

import base64
import doctest
import html
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from made_up_run import GLIOMA, build_folds, build_run, environment, write_evaluation, write_json, write_log

from medmap import report
from medmap.errors import CheckpointError, InputError
from medmap.report import html as report_html
from medmap.report import pictures, write_report

BASE64 = re.compile(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("made") / "run", patients=5)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return write_report(made).read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered: for tests of what stands round them."""
    monkeypatch.setattr(pictures, "_inlined", lambda *_, **__: "data:image/png;base64,AAAA")


def text_of(run: Path) -> str:
    """The report without its pictures."""
    return BASE64.sub("", write_report(run).read_text(encoding="utf-8"))


def keep_only(run: Path, *names: str) -> None:
    for path in run.iterdir():
        if path.name not in names:
            path.unlink()


# ---------------------------------------------------------------------------------------------- one file


def test_page_loads_nothing(page: str) -> None:
    bare = BASE64.sub("INLINED", page)
    assert "http:" not in bare
    assert "https:" not in bare
    assert "url(" not in bare
    assert "@import" not in bare
    assert "<link" not in bare
    assert set(re.findall(r'\ssrc="([^"]*)"', bare)) == {"INLINED"}
    assert all(target.startswith("#") for target in re.findall(r'\shref="([^"]*)"', bare))


def test_pictures_load_nothing_either(page: str) -> None:
    drawn = [base64.b64decode(code).decode() for code in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]
    assert len(drawn) == 7
    assert "http:" not in drawn[0].replace('"http://www.w3.org/', "")  # names of namespaces only
    for svg in drawn:
        targets = re.findall(r'href="([^"]*)"', svg)
        assert targets
        assert all(target.startswith(("#", "data:")) for target in targets)
        assert svg.startswith("<svg")
        assert "<text" not in svg  # outlines: no font is asked for
        assert "font-face" not in svg


def test_links_within_the_page_arrive(page: str) -> None:
    anchors = set(re.findall(r'\sid="([^"]*)"', page))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= anchors


def test_equal_runs_give_equal_files(run: Path, tmp_path: Path, page: str) -> None:
    assert write_report(run, tmp_path / "again.html").read_text(encoding="utf-8") == page


@pytest.mark.usefixtures("undrawn")
def test_no_folder_of_this_machine_is_told(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["store"] = "/home/ann/stores/glioma"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(
        run / "env.json", environment() | {"command": f"/opt/ann/bin/medmap train -o {run} --set data.store=~/x/y"}
    )
    shown = text_of(run)
    assert "store: glioma" in shown
    assert "medmap train -o run --set data.store=y" in shown
    assert "ann" not in re.findall(r"[\w.]+", shown)
    assert str(run.parent) not in shown


@pytest.mark.usefixtures("undrawn")
def test_user_words_are_escaped(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"name": "<script>alert(1)</script> & Söhne"}))
    shown = text_of(run)
    assert "<script>alert" not in shown
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt; &amp; Söhne</h1>" in shown


# ------------------------------------------------------------------------------------------------ what it says


def test_headline_and_table_hold_the_numbers(made: Path, page: str) -> None:
    summary = json.loads((made / "summary.json").read_text())
    for group in summary["groups"]:
        assert f"<b>{group['mean']:.2f}</b><small>{group['low']:.2f}–{group['high']:.2f}</small>" in page
    assert page.count('<tr class="first">') == 15
    for row in summary["rows"]:
        digits = 1 if row["metric"].endswith(("_mm", "_ml")) else 3
        assert f'<td data-value="{row["mean"]}">{row["mean"]:.{digits}f}' in page


def test_page_is_honest(page: str) -> None:
    for said in (
        "One run: not evidence",
        "not a medical device",
        "fold 0 of 3, 5 patients",
        "“brats”",
        "at least three",
    ):
        assert said in page


def test_origin_names_hashes_versions_and_every_key(made: Path, page: str) -> None:
    assert json.loads((made / "splits.json").read_text())["sha256"] in page
    for name in ("config.yaml", "subsets.csv", "summary.json"):
        assert f"<tr><th>{name}</th>" in page
    for said in ("2.13.0", "3.11.9", "val_fraction: 0.2", "16 train, 2 val, 5 test"):
        assert said in page


def test_captions_say_what_is_seen(page: str) -> None:
    assert "WT depends most on FLAIR" in page
    assert "ET depends most on T1c" in page
    assert "no weight is further than" in page
    assert "is what missing sequences cost (at the end 10.0 points)" in page
    assert "Nothing was aligned" not in page


@pytest.mark.usefixtures("undrawn")
def test_what_alignment_did_is_told_of_runs_without_it_too(run: Path) -> None:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("cost", None)
        record.get("terms", {}).pop("align/x5", None)
    write_log(run / "log.jsonl", records)
    assert "Nothing was aligned in this run: its deepest latents" in html.unescape(text_of(run))
    assert "is what missing sequences cost;" in text_of(run)
    write_log(run / "log.jsonl", [{k: v for k, v in record.items() if k != "latents"} for record in records])
    assert "No validation of this run measured latents." in text_of(run)


@pytest.mark.usefixtures("undrawn")
def test_warnings_of_training_stand_at_the_top_with_their_fold(run: Path, tmp_path: Path) -> None:
    assert "Warned while training" not in text_of(run)
    warning = json.dumps({"kind": "warning", "step": 500, "sign": "fall", "level": "x5", "text": "try α < 1"}) + "\n"
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(warning)
    assert "<strong>Warned while training.</strong><br>step 500: try α &lt; 1.</p>" in text_of(run)
    folds = build_folds(tmp_path / "folds", folds=2)
    with (folds / "fold1" / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(warning)
    shown = text_of(folds)
    assert shown.count("Warned while training") == 1
    assert "</strong><br>fold1, step 500: try" in shown


def test_worst_scan_stands_first(made: Path) -> None:
    totals = [sum(line["mean"]) for line in report.read_run(made).patients]
    assert len(totals) == 5
    assert totals == sorted(totals)


@pytest.mark.usefixtures("undrawn")
def test_other_data_get_a_heat_map_each(run: Path) -> None:
    (run / "on-elsewhere").mkdir()
    write_evaluation(run / "on-elsewhere", GLIOMA, ["x", "y", "z"])
    shown = text_of(run)
    assert "On other data: elsewhere" in shown
    assert "fold 0 of 3, 3 patients" in shown


@pytest.mark.usefixtures("undrawn")
def test_folds_are_told_as_one_run(tmp_path: Path) -> None:
    shown = text_of(build_folds(tmp_path / "run", folds=2))
    assert "One run (2 folds, one seed): not evidence" in shown
    assert "Split of fold0" in shown
    assert "<th>fold1/config.yaml</th>" in shown


@pytest.mark.parametrize("modalities", [("t1c",), ("adc", "pet", "t1c")])
def test_any_sequences_work(tmp_path: Path, modalities: tuple[str, ...]) -> None:
    shown = text_of(build_run(tmp_path / "run", modalities, patients=3))
    assert shown.count('<tr class="first">') == 2 ** len(modalities) - 1
    assert ("What is lost with each sequence" in shown) == (len(modalities) > 1)


@pytest.mark.parametrize("module", [report_html, pictures])
def test_examples_in_docstrings_run(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


# ------------------------------------------------------------------------------------------------ what is not there


@pytest.mark.usefixtures("undrawn")
def test_bare_run_says_what_is_missing_and_how_to_make_it(run: Path) -> None:
    keep_only(run, "config.yaml")
    shown = text_of(run)
    assert "<img" not in shown
    assert shown.count('class="missing"') == 8
    for cure in ("medmap evaluate RUN", "medmap train -c CONFIG -o RUN", "align.anchor=pstar"):
        assert cure in shown


@pytest.mark.parametrize("name", ["env.json", "splits.json", "log.jsonl", "subsets.csv", "latents.npz", "examples.npz"])
@pytest.mark.usefixtures("undrawn")
def test_any_one_piece_may_be_absent(run: Path, name: str) -> None:
    (run / name).unlink()
    assert "mean over all 15 subsets" in text_of(run)


@pytest.mark.usefixtures("undrawn")
def test_summary_needs_neither_groups_nor_present_nor_intervals(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    rows = [{key: row[key] for key in ("subset", "region", "metric", "mean")} for row in summary["rows"]]
    kept = {key: summary[key] for key in ("cases", "patients", "modalities", "regions")}
    write_json(run / "summary.json", {**kept, "rows": rows})
    assert "all sequences given" in text_of(run)


@pytest.mark.usefixtures("undrawn")
def test_interrupted_log_is_no_fault(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert "Left: training loss" in html.unescape(text_of(run))


# ------------------------------------------------------------------------------------------------ errors


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected the run folder that `medmap train"):
        write_report(tmp_path / "nowhere")


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run: there is no config\.yaml"):
        write_report(tmp_path)


def test_runs_of_different_recipes_are_not_folds(tmp_path: Path) -> None:
    folds = build_folds(tmp_path / "runs", folds=2)
    config = yaml.safe_load((folds / "fold1" / "config.yaml").read_text())
    (folds / "fold1" / "config.yaml").write_text(yaml.safe_dump(config | {"align": {"anchor": "none"}}))
    with pytest.raises(CheckpointError, match="fold0 and fold1 differ in align, so they are not folds of one run"):
        write_report(folds)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("config.yaml", "- a list", "found a list"),
        ("config.yaml", "a: [", "cannot be read"),
        ("summary.json", "{", "cannot be read"),
        ("summary.json", "{}", "without cases, patients"),
        ("log.jsonl", 'nonsense\n{"kind": "val"}\n', "line 1"),
        ("latents.npz", "nonsense", "arrays that `medmap evaluate` wrote"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, content: str, found: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{found}"):
        write_report(run)


@pytest.mark.usefixtures("undrawn")
def test_report_that_cannot_be_written_leaves_nothing_behind(made: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    for out in (tmp_path / "absent" / "r.html", tmp_path / "folder.html"):
        with pytest.raises(
            InputError, match=r"the report cannot be written .* name a file in a folder you may write to"
        ):
            write_report(made, out)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


# ---------------------------------------------------------------------------------------------- probabilities


@pytest.mark.usefixtures("undrawn")
def test_how_right_probabilities_are_is_shown_where_it_was_measured(run: Path) -> None:
    assert "how right the network's probabilities are" in html.unescape(text_of(run))
    row = {"error_where_doubtful": [0.1, 0.02], "bins": [[[100.0] * 10, [50.0] * 10, [40.0] * 10]] * 2}
    of = {"t1c": 1.25, "t2f": 1.75}
    told = {"patients": 11, "common": 1.5, "of": of, "left_out": {"regions": {"WT": row}}}
    write_json(run / "confidence.json", {"temperature": told})
    page = text_of(run)
    assert "What the probabilities mean" in page
    assert "11 patients, each with the temperatures of the others" in page
    assert "(1.25 to 1.75)" in page

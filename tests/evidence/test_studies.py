"""Every study really runs, in small; what was run is not run again; what cannot be run says why."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medmap.cli import app
from medmap.config import load_config
from medmap.data.store import Store
from medmap.errors import DivergenceError, InputError
from medmap.evidence import runner
from medmap.evidence import trial as trials
from medmap.evidence.plan import Patients, Phantoms, Trial
from medmap.evidence.results import RUNS, Result, Scored, write_result
from medmap.evidence.runner import refuse_other_data
from medmap.evidence.trial import patients_store, prepare
from medmap.studies import study_names


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms that several studies share."""
    return tmp_path_factory.mktemp("work")


def medmap(*words: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.mark.parametrize("name", study_names())
def test_every_study_runs_in_small(name: str, work: Path, tmp_path: Path) -> None:
    done = medmap("study", name, "--quick", "-o", tmp_path, "--work", work, "--jobs", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "quick" / f"{name}.md").read_text()
    assert "Unfinished" not in page
    assert "without an interval: not evidence." in page
    assert list((tmp_path / "quick").glob(f"{name}*.png"))
    found = json.loads((tmp_path / "quick" / f"{name}.json").read_text())
    assert found["runs"]["finished"] == found["runs"]["needed"] >= 2
    assert found["verdicts"]
    assert not list((work / "quick" / "runs").iterdir())  # networks are not kept


def test_patients_who_validate_lack_nothing(tmp_path: Path) -> None:
    data = Phantoms("incomplete", train=6, val=3, test=1, missing=0.6)
    stores = prepare(data, tmp_path, {})
    store, division = Store(stores.learn), json.loads(Path(stores.split).read_text())
    counts = {group: [len(store.sequences(case)) for case in division[group]] for group in ("train", "val")}
    assert counts["val"] == [4] * 3
    assert min(counts["train"]) < 4


def test_latents_are_looked_at_where_there_are_patients_enough(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "LEAST_CASES", 2)
    done = medmap("study", "latents", "--quick", "-o", tmp_path, "--work", work, "--jobs", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "quick" / "latents.md").read_text()
    table = page[page.index("| | gap |") :].splitlines()
    assert table[2].startswith("| α = 0 | 0.")
    assert (tmp_path / "quick" / "latents-map-none.png").stat().st_size > 20_000
    facts = [json.loads(file.read_text())["latents"] for file in (tmp_path / "quick" / "runs").glob("*.json")]
    for fact in facts:
        assert list(fact["levels"]) == ["x4", "x3", "x2", "x1"]
        assert [name for name, level in fact["levels"].items() if "map" in level["after"]] == ["x4"]
        assert len(fact["rows"]["case"]) == 8
        assert fact["conditional"]["private"]
        assert fact["conditional"]["nats"] < 1e-9


def test_a_finished_run_is_never_run_again_and_an_interrupted_one_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("study", "organ", "--quick", "-o", tmp_path, "--work", work, "--jobs", 1, "--device", "cpu")
    real, calls = trials.fit, []

    def once(config: Any, source: Any, run: Path, *, resume: bool = False, **more: Any) -> None:
        calls.append((run.name, resume))
        if len(calls) == 2:  # power is lost in the second run, after its first step
            real(config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})}), source, run, **more)
            (run / "config.yaml").write_text(config.to_yaml())
            raise KeyboardInterrupt
        real(config, source, run, resume=resume, **more)

    monkeypatch.setattr(trials, "fit", once)
    assert medmap(*words).exit_code != 0
    assert len(list((tmp_path / "quick" / "runs").glob("*.csv"))) == 1
    done = medmap(*words)
    assert done.exit_code == 0, done.output
    assert [resume for _, resume in calls] == [False, False, True]
    assert calls[1][0] == calls[2][0]
    again = medmap(*words)
    assert again.exit_code == 0
    assert len(calls) == 3


def test_processes_do_not_outlive_a_killed_parent(work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medmap", "study", "organ", "--quick", "--jobs", "2", "--device", "cpu"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    more = ["--set", "train.steps=100000", "-o", str(tmp_path), "--work", str(work)]
    parent = subprocess.Popen([*command, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.parent.exists():
        parent.kill()
        pytest.skip("this system does not list a process's children")
    begun: set[str] = set()
    deadline = time.monotonic() + 90
    while len(begun) < 3 and time.monotonic() < deadline:  # two that work, and the one that counts resources
        time.sleep(0.2)
        begun |= set(children.read_text().split())
    parent.kill()
    parent.wait()
    assert len(begun) == 3
    while (left := [pid for pid in begun if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trials.fit

    def fails(config: Any, *rest: Any, **more: Any) -> None:
        if config.align.anchor == "pstar":
            raise DivergenceError("step 2: loss is not finite")
        real(config, *rest, **more)

    monkeypatch.setattr(trials, "fit", fails)
    words = ("study", "organ", "--quick", "-o", tmp_path, "--work", work, "--jobs", 1, "--device", "cpu")
    done = medmap(*words)
    assert done.exit_code == 0, done.output
    facts = [json.loads(file.read_text()) for file in (tmp_path / "quick" / "runs").glob("*.json")]
    assert sorted(fact["status"] for fact in facts) == ["diverged", "finished"]
    assert next(f for f in facts if f["status"] == "diverged")["why"] == "step 2: loss is not finite"
    assert "1 runs diverged" in (tmp_path / "quick" / "organ.md").read_text()


def test_methods_side_by_side_on_ones_own_patients(made_up_brats: dict[str, Path], work: Path, tmp_path: Path) -> None:
    """The paper's protocol, end to end, on a made-up BraTS 2018."""
    words = (
        "--data",
        made_up_brats["2018"],
        "--split",
        "brats2018-list1",
        "--methods",
        "unet/tiny,uhved/tiny:1",
        "--seeds",
        2,
    )
    small = ("--set", "train.steps=2", "--set", "train.patch=[16,16,16]", "--set", "train.warmup_steps=0")
    rest = ("-o", tmp_path, "--work", work, "--jobs", 1, "--device", "cpu", "--name", "2018")
    done = medmap("bench", *words, *small, *rest)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "2018.json").read_text())
    assert found["runs"] == {"needed": 6, "finished": 6, "diverged": 0}
    page = (tmp_path / "2018.md").read_text()
    assert "1 and 1 runs, 1 cases" in page  # of uhved
    assert "uhved tiny, pstar − uhved tiny, none" in page
    assert "| ● | ○ | ○ | ○ |" in page
    assert (tmp_path / "2018.tex").read_text().startswith(r"\begin{tabular}")
    begun = medmap("bench", *words, *small, *rest)
    assert begun.exit_code == 1
    assert "holds 6 of 6 runs" in begun.output
    assert "--resume" in begun.output


def test_other_data_of_the_same_name_are_not_taken_for_those_that_were_run(
    made_up_brats: dict[str, Path], work: Path, tmp_path: Path
) -> None:
    one, two = (tmp_path / name / "cases" for name in "ab")
    for folder in (one, two):
        shutil.copytree(made_up_brats["2018"], folder)
    shutil.rmtree(next(file.parent for file in sorted(two.rglob("*.nii.gz"))))
    small = [word for key in ("steps=2", "patch=[16,16,16]", "warmup_steps=0") for word in ("--set", f"train.{key}")]
    words = ("--split", "brats2018-list1", "--methods", "unet/tiny", "--align", "none", "--seeds", 1)
    rest = (*small, "-o", tmp_path / "out", "--work", tmp_path / "w", "--jobs", 1, "--device", "cpu")
    assert medmap("bench", "--data", one, *words, *rest).exit_code == 0
    shutil.rmtree(tmp_path / "w")
    other = medmap("bench", "--data", two, *words, *rest, "--resume")
    assert other.exit_code == 1
    assert f"{two}: holds other data (hash " in " ".join(other.output.split())
    assert "than cases.unet-tiny.none.s0." in " ".join(other.output.split())


def test_an_edited_list_of_cases_is_another_trial(tmp_path: Path) -> None:
    """Its name stays, what it says does not; where it lies is no part of it."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"

    def hashed(file: Path) -> str:
        return Trial(load_config(None, [f"data.split={file}"]), Patients("cases", 1)).hash

    one.write_text(json.dumps({"train": ["a"], "val": ["b"], "test": ["c"]}))
    shutil.copy(one, two)
    before = hashed(one)
    assert hashed(two) == before
    one.write_text(json.dumps({"train": ["c"], "val": ["b"], "test": ["a"]}))
    assert hashed(one) != before


def test_other_test_patients_of_the_same_name_are_refused(
    made_up_brats: dict[str, Path], work: Path, tmp_path: Path
) -> None:
    """Those that a trial was only tested on count as well."""
    learn, test = (Patients(name, 1) for name in ("learn", "test"))
    trial = Trial(load_config(None, []), replace(learn, others=(test,)))
    places = {"learn": made_up_brats["2018"], "test": made_up_brats["2018"]}
    digest = Store(patients_store(test, work, places)).sha256
    row = Scored("test", "c", "p", (), {("t1c", "WT"): 1.0})
    facts = {"store_sha256": Store(patients_store(trial.data, work, places)).sha256}
    for tests, refused in (({"test": digest}, False), ({}, False), ({"test": "0" * 64}, True)):
        write_result(tmp_path / RUNS, Result(trial, "finished", (row,), {**facts, "tests_sha256": tests}))
        with pytest.raises(InputError, match="holds other data") if refused else nullcontext():
            refuse_other_data([trial], tmp_path, work, places)


def test_a_store_is_run_on_at_the_spacing_that_is_asked_for(tiny_store: Path, tmp_path: Path) -> None:
    words = ("bench", "--data", tiny_store, "--spacing", 1, "--methods", "unet/tiny", "--align", "none", "--seeds", 1)
    done = medmap(*words, "-o", tmp_path, "--work", tmp_path / "work", "--jobs", 1, "--device", "cpu")
    assert done.exit_code == 1
    assert "mm, 1 mm is needed" in " ".join(done.output.split())


class Sometimes:
    """A worker that stumbles over one task, in a way that nobody foresaw."""

    def __call__(self, task: str) -> str:
        if task == "bad":
            raise ValueError("no such size")
        return task


def test_what_breaks_one_run_leaves_those_beside_it_alone() -> None:
    found = dict(runner._local(Sometimes, ["good", "bad", "fine"], 2))  # type: ignore[arg-type,list-item]
    assert (found[0], str(found[1]), found[2]) == ("good", "ValueError: no such size", "fine")


def test_a_page_ends_with_the_command_that_makes_it_again(
    made_up_brats: dict[str, Path], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--methods", "unet/tiny", "--align", "none,pk:t1c", "--seeds", "1", "--set", "train.lr=1e-2"]
    given += ["--data", str(made_up_brats["2018"]), "--folds", "2", "--spacing", "4.0", "--name", "own data"]
    monkeypatch.chdir(tmp_path)
    done = medmap("bench", *given, "--quick", "--work", work, "--jobs", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "docs" / "studies" / "quick" / "own data.md").read_text()
    command = shlex.split(page.rpartition("```sh\n")[2].partition("\n```")[0])
    assert command[:2] == ["medmap", "bench"]
    assert command[-1] == "--resume"
    assert sorted(command[2:-1]) == sorted(given)


def test_the_papers_protocol_runs_with_the_papers_settings(
    made_up_brats: dict[str, Path], work: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    data = ("--data", made_up_brats["2018"], "--split", "brats2018-list1")
    small = {"model.size": "tiny", "train.steps": 2, "train.patch": "[32,32,32]", "train.batch_size": 1}
    words = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    place = ("-o", tmp_path, "--work", work, "--jobs", 1, "--device", "cpu", "--seeds", 1)
    recipe = root / "configs" / "paper" / "{method}-brats2018.yaml"
    done = medmap("bench", "--methods", "pmkl", "-c", recipe, *data, *words, *place, "--name", "paper")
    assert done.exit_code == 0, done.output
    facts = [json.loads(file.read_text())["trial"]["config"] for file in (tmp_path / "runs").glob("*.json")]
    assert {fact["train"]["optimizer"] for fact in facts} == {"sgd"}  # its file's
    assert {fact["train"]["steps"] for fact in facts} == {2}  # the command's
    assert {fact["align"]["anchor"] for fact in facts} == {"none", "pstar"}
    assert {fact["data"]["split"] for fact in facts} == {"brats2018-list1"}
    done = medmap("study", "weights", *data, *words, *place)
    assert done.exit_code == 0, done.output
    assert "Weights at the end of training" in (tmp_path / "weights.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("study", "ancors"), "did you mean anchors?"),
        (("study",), "name a study"),
        (("bench", "--methods", "unett"), "method 'unett': expected a backbone"),
        (("bench", "--align", "none,psta"), "anchor 'psta': expected an anchor"),
        (("bench", "--methods", ","), "needs a method"),
        (("bench", "--phantoms", "--data", "."), "two kinds of patients; name one"),
        (("bench", "--phantoms", "--methods", "unet/small", "--budget", "0.01"), "main: would take about"),
        (("study", "anchors", "--budget", "0.01"), "the budget is 0.01 h"),
        (("study", "dependence", "--data", "."), "compares data of its own making"),
    ],
)
def test_what_cannot_be_done_says_why(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = medmap(*words, "-o", tmp_path, "--work", tmp_path / "work")
    assert done.exit_code in (1, 2)
    assert told in " ".join(done.output.split())
    assert not list(tmp_path.glob("runs/*"))


def test_patients_that_are_nowhere_and_a_full_disk_are_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDMAP_DATA", raising=False)
    done = medmap("bench", "-o", tmp_path, "--work", tmp_path / "work", "--jobs", 1)
    assert done.exit_code == 1
    assert "the scans of brats2021-2mm are in no place that is known; set MEDMAP_DATA" in " ".join(done.output.split())
    monkeypatch.setattr("medmap.evidence.runner.ROOM_GB", 1e9)
    done = medmap("study", "organ", "-o", tmp_path, "--work", tmp_path / "work", "--jobs", 1)
    assert "GB are free; make room" in " ".join(done.output.split())


def test_the_list_shows_what_is_left() -> None:
    done = medmap("study", "--list", "--json")
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == study_names()
    assert all(row["left"] <= row["runs"] for row in rows)

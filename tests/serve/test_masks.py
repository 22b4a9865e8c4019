"""The local page's answers: masks byte for byte, what is taken away, who waits, and what is left behind: nothing."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from made_up_page import Page, predicted, served, zipped
from made_up_scores import GLIOMA, scored
from typer.testing import CliRunner

from medmap.card import percent, read_model
from medmap.cli import app as cli
from medmap.cli import console
from medmap.confidence import write_confidence
from medmap.core.case import Case
from medmap.core.modality import GLIOMA_MRI
from medmap.data.nifti import read_labels
from medmap.errors import InputError
from medmap.predict import Predictor
from medmap.report.case import read_record
from medmap.scores import write_scores
from medmap.serve.app import MOST_PATIENTS
from medmap.serve.desk import MOST_WAITING, Desk, Tell
from medmap.serve.server import listening

PATIENT = "PHANTOM-00000-000"
SEQUENCES = ("t1n", "t1c", "t2w", "t2f")


# ---- the mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", [SEQUENCES, ("t1c",), ("t1n", "t2f"), ("t1c", "t2w", "t2f")])
def test_a_mask_is_that_of_predict_byte_by_byte(
    ready: tuple[Page, str], files: dict[str, Path], tiny_run: Path, tmp_path: Path, subset: tuple[str, ...]
) -> None:
    page, patient = ready
    told = page.job(patient, "segment", subset=list(subset))["result"]
    assert told["subset"] == list(subset)
    answer = page.client.get(f"/patients/{patient}/made/{'+'.join(subset)}/mask")
    assert told["mask_file"] in answer.headers["content-disposition"]
    assert answer.content == predicted(tiny_run, {name: files[name] for name in subset}, tmp_path / "seg.nii.gz")


def test_the_record_names_files_and_no_folder_and_goes_with_the_mask(
    ready: tuple[Page, str], files: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    page, patient = ready
    for what, name in (("mask", "seg.nii.gz"), ("json", "seg.medmap.json")):
        (tmp_path / name).write_bytes(page.client.get(f"/patients/{patient}/made/t1c+t2f/{what}").content)
    record = read_record(tmp_path / "seg.nii.gz")
    assert str(page.folder) not in json.dumps(record)
    assert [entry["file"] for entry in record["inputs"].values()] == [files[name].name for name in ("t1c", "t2f")]
    predicted(tiny_run, {name: files[name] for name in ("t1c", "t2f")}, tmp_path / "cli.nii.gz")
    other = read_record(tmp_path / "cli.nii.gz")
    for key in ("volumes_ml", "labels", "expected", "confidence", "warnings", "sequences", "left_out"):
        assert record[key] == other[key], key


def test_a_switch_encodes_nothing_anew(ready: tuple[Page, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from medmap.align import AlignedSegmenter

    page, patient = ready
    page.job(patient, "segment", subset=list(SEQUENCES))
    calls: list[int] = []
    encode = AlignedSegmenter.encode

    def counted(*args: object, **named: object) -> object:
        calls.append(1)
        return encode(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(AlignedSegmenter, "encode", counted)
    assert page.job(patient, "segment", subset=["t1n", "t1c", "t2f"])["state"] == "done"
    assert calls == []


def test_lights_change_with_a_switch_and_are_those_of_predict(
    files: dict[str, Path], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = measured(tiny_run, tmp_path / "run")
    page = Page(run, tmp_path / "page")
    patient = page.begin(*files.values())
    page.job(patient, "check")
    told = [page.job(patient, "segment", subset=list(SEQUENCES))["result"]]
    answers: list[str] = []
    answer = Predictor.answers

    def counted(self: Predictor, prepared: object, subsets: object) -> object:
        answers.extend(map(str, subsets))  # type: ignore[call-overload]
        return answer(self, prepared, subsets)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "answers", counted)
    told.append(page.job(patient, "segment", subset=["t1n", "t2w", "t2f"])["result"])
    assert answers == []  # the masks from fewer sequences are there already
    monkeypatch.undo()
    page.close()
    for result in told:
        names = result["subset"]
        predicted(run, {name: files[name] for name in names}, tmp_path / "seg.nii.gz")
        other = read_record(tmp_path / "seg.nii.gz")["confidence"]
        assert {row["name"]: row["trust"] for row in result["regions"]} == other["regions"]
        for row in result["regions"]:
            assert row["predicted"] == [percent(row["trust"][key]) for key in ("dice", "low", "high")]
        assert result["trust"] == {"patients": 14, "of_ten": 8, "broken": []}
    first, second = ({row["name"]: row["trust"] for row in result["regions"]} for result in told)
    assert first != second


def measured(run: Path, copy: Path) -> Path:
    """A run that says something of single masks."""
    shutil.copytree(run, copy)
    generator, rows = np.random.default_rng(0), []
    for number, subset in product(range(14), GLIOMA_MRI.subsets()):
        for region in ("WT", "TC", "ET", "ET-pp"):
            soft, agreement = generator.uniform(0.4, 1, 2)
            numbers = {"dice": (soft + agreement) / 2, "truth_ml": 5.0, "soft_dice": soft, "agreement": agreement}
            rows += scored(f"c{number}", str(subset), region, f"p{number}", **numbers)
    write_scores(copy, rows, GLIOMA_MRI, GLIOMA, "brats", [], {"evaluated": "made-up cases"})
    assert write_confidence(read_model(copy), copy) is not None
    return copy


def test_images_are_sent_once(ready: tuple[Page, str]) -> None:
    page, patient = ready
    first = page.job(patient, "segment", subset=list(SEQUENCES))["result"]
    assert 'class="viewer"' in first["viewer"]
    second = page.job(patient, "segment", subset=["t2f"], frame=first["frame"])["result"]
    assert "viewer" not in second
    assert second["mask"]


def test_a_report_holds_the_mask(ready: tuple[Page, str]) -> None:
    page, patient = ready
    answer = page.client.get(f"/patients/{patient}/made/t1c+t2f/report")
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
    assert PATIENT in answer.text
    assert str(page.folder) not in answer.text
    assert not [file for file in page.on_disk() if "/report/" in file]


@pytest.mark.parametrize(("subset", "words"), [(["adc"], "not there"), ([], "no sequence is switched on")])
def test_a_subset_that_is_not_there_is_refused(ready: tuple[Page, str], subset: list[str], words: str) -> None:
    page, patient = ready
    assert words in page.job(patient, "segment", subset=subset)["text"]


@pytest.mark.parametrize("path", ["t2f/nothing", "adc/mask", "t2f/seg", "..%2f../mask"])
def test_what_cannot_be_made_is_refused(ready: tuple[Page, str], path: str) -> None:
    page, patient = ready
    assert page.client.get(f"/patients/{patient}/made/{path}").status_code in (400, 404)


def test_a_failing_job_leaves_the_server_serving_and_nothing_of_the_mask(
    page: Page, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = page.begin(files["t2f"])
    page.job(patient, "check")
    before = page.on_disk()
    with monkeypatch.context() as broken:
        broken.setattr("medmap.segment.write_mask", lambda *args: 1 / 0)
        told = page.job(patient, "segment", subset=["t2f"])
    assert told["state"] == "failed"
    assert "unexpected ZeroDivisionError" in told["text"]
    assert page.on_disk() == before
    assert page.job(patient, "segment", subset=["t2f"])["state"] == "done"


def test_a_patient_is_forgotten_wholly(page: Page, files: dict[str, Path]) -> None:
    patient = page.begin(files["t2f"])
    page.job(patient, "check")
    page.job(patient, "segment", subset=["t2f"])
    assert page.client.post(f"/patients/{patient}/forget", json={}).status_code == 200
    assert page.on_disk() == []
    assert "no longer here" in page.client.post(f"/patients/{patient}/check", json={}).json()["error"]


def test_the_first_patient_makes_room(page: Page, files: dict[str, Path]) -> None:
    patients = [page.begin(files["t2f"]) for _ in range(MOST_PATIENTS + 1)]
    assert list(page.office.patients) == patients[1:]
    assert len(page.on_disk()) == MOST_PATIENTS


def test_from_a_study_comes_a_seg(page: Page, tiny_phantoms: Path, tmp_path: Path, tiny_run: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    pytest.importorskip("dcm2niix", reason="the extra dicom is not installed")
    pytest.importorskip("highdicom", reason="the extra dicom is not installed")
    from made_up_dicom import write_study

    write_study(tmp_path / "study", tiny_phantoms / PATIENT)
    slices = {str(file.relative_to(tmp_path)): file.read_bytes() for file in (tmp_path / "study").rglob("*.dcm")}
    patient = page.begin()
    assert page.upload(patient, "ann.zip", zipped(slices)).status_code == 200
    told = page.job(patient, "check")["result"]
    assert (told["refused"], told["sequences"], told["dicom"]) == ("", list(SEQUENCES), True)
    assert page.job(patient, "segment", subset=["t1c", "t2f"])["state"] == "done"
    seg = pydicom.dcmread(io.BytesIO(page.client.get(f"/patients/{patient}/made/t1c+t2f/seg").content))
    assert [str(each.SegmentLabel) for each in seg.SegmentSequence]
    report = page.client.get(f"/patients/{patient}/made/t1c+t2f/report")
    assert report.status_code == 200, report.text
    argv = ["predict", "--model", str(tiny_run), "-i", str(tmp_path / "study"), "-o", str(tmp_path / "seg.nii.gz")]
    argv += ["--device", "cpu", "--precision", "fp32", "--t1n", "none", "--t2w", "none"]
    answer = CliRunner().invoke(cli, argv)
    console.begin()
    assert answer.exit_code == 0, answer.output
    mask = page.client.get(f"/patients/{patient}/made/t1c+t2f/mask").content
    assert mask == (tmp_path / "seg.nii.gz").read_bytes()


def test_many_at_once_are_all_served(page: Page, files: dict[str, Path]) -> None:
    places: list[int] = []

    def one(name: str) -> bytes:
        patient = page.begin(files[name])
        for errand, asked in (("check", {}), ("segment", {"subset": [name]})):
            told = page.job(patient, errand, places=places, **asked)
            assert told["state"] == "done", told
        return page.client.get(f"/patients/{patient}/made/{name}/mask").content

    with ThreadPoolExecutor(6) as pool:
        masks = list(pool.map(one, ["t1n", "t1c", "t2w", "t2f", "t1n", "t1c"]))
    assert masks[:2] == masks[4:]
    assert len(set(masks)) == 4
    assert max(places) > 1  # others were before, and it was told how many


def test_files_that_come_together_are_all_taken(page: Page, files: dict[str, Path]) -> None:
    patient, content = page.begin(), files["t2f"].read_bytes()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: page.upload(patient, "one.nii.gz", content), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len(page.on_disk()) == 6
    assert len(page.job(patient, "check")["result"]["volumes"]) == 6


def test_what_is_remembered_changes_no_answer(tiny_run: Path, tiny_phantoms: Path) -> None:
    from medmap.data.cases import read_case
    from medmap.data.layouts import recognise
    from medmap.predict import Predictor

    plain = Predictor.load(tiny_run, device="cpu", precision="fp32")
    kept = plain.remembering()
    cases = [read_case(found) for found in recognise(tiny_phantoms).cases[:2]]
    for case in (cases[0], cases[1], cases[0]):
        for names in (SEQUENCES, ("t1c",), ("t1n", "t2f")):
            some = Case(case.id, {name: case.images[name] for name in names}, case.affine)
            one, other = (p.answer(p.begin(some)) for p in (plain, kept))
            assert np.array_equal(one.probabilities, other.probabilities)
            assert one.box == other.box


# ---- the desk ----------------------------------------------------------------------------------------------------


def test_one_works_and_the_others_know_their_place() -> None:
    desk, go, order = Desk(), threading.Event(), []

    def work(name: str, tell: Tell) -> dict[str, object]:
        assert go.wait(10)
        order.append(name)
        return {}

    jobs = [desk.submit(name, lambda tell, name=name: work(name, tell)) for name in "abc"]
    while desk.told(jobs[0])["state"] == "waiting":
        time.sleep(0.01)
    assert [desk.told(job).get("before") for job in jobs] == [None, 1, 2]
    late = desk.submit("b", lambda tell: work("b again", tell))
    assert desk.told(jobs[1])["state"] == "gone"
    assert desk.told(late)["before"] == 2
    go.set()
    desk.close()
    assert order == ["a", "c", "b again"]


def test_a_full_desk_says_so_and_a_forgotten_job_ends_at_its_next_step() -> None:
    desk, go, begun, steps = Desk(), threading.Event(), threading.Event(), []

    def work(tell: Tell) -> dict[str, object]:
        begun.set()
        assert go.wait(10)
        tell("further")
        steps.append("written")
        return {}

    job = desk.submit("a", work)
    assert begun.wait(10)
    for number in range(MOST_WAITING):
        desk.submit(str(number), lambda tell: {})
    with pytest.raises(InputError, match="try again in a minute"):
        desk.submit("one more", lambda tell: {})
    desk.forget("a")
    go.set()
    desk.close()
    assert (desk.told(job)["state"], steps) == ("gone", [])


# ---- the process -------------------------------------------------------------------------------------------------


def test_only_this_machine_is_listened_to() -> None:
    with listening(0) as sock:
        host, port = sock.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(InputError, match=f"port {port} cannot be had"), listening(port):
            pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_nothing_is_left_when_it_ends(
    tiny_run: Path, files: dict[str, Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with served(tmp_path, "--model", str(tiny_run)) as (process, address):
        here, key = address.split("/?key=")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(address) as answer:
            assert answer.status == 200

        def post(path: str, body: bytes) -> dict[str, str]:
            headers = {"Origin": here, "Content-Type": "application/json"}
            with opener.open(urllib.request.Request(here + path, body, headers)) as answer:
                return dict(json.load(answer))

        patient = post("/patients", b"{}")["patient"]
        post(f"/patients/{patient}/files?name=x_t2f.nii.gz", files["t2f"].read_bytes())
        post(f"/patients/{patient}/check", b"{}")
        (folder,) = tmp_path.glob("medmap-serve-*")
        assert list(folder.rglob("x_t2f.nii.gz"))
        assert folder.stat().st_mode & 0o077 == 0  # nobody else on the machine reads it
        host, port = here.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))):  # one that never says anything holds nothing up
            process.send_signal(number)
            assert process.wait(60) == code
    assert list(tmp_path.iterdir()) == []
    assert key


def test_the_labels_are_those_of_the_mask(ready: tuple[Page, str], tmp_path: Path) -> None:
    page, patient = ready
    told = page.job(patient, "segment", subset=["t2f"])["result"]
    (tmp_path / "seg.nii.gz").write_bytes(page.client.get(f"/patients/{patient}/made/t2f/mask").content)
    codes, affine = read_labels(tmp_path / "seg.nii.gz")
    whole = np.count_nonzero(codes) * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert {row["name"]: row["ml"] for row in told["regions"]}["WT"] == pytest.approx(whole, abs=1e-3)
